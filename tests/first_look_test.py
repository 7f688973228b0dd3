"""A first look at a model: warnings of what curvature cannot be measured with."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pm_jax
from pm_jax import curvature, losses
from pm_jax.types import InvalidInput
from tests.small_runs import slow


def linear(params, inputs):
    return inputs @ params


W, X, Y = np.ones((4, 3), np.float32), np.ones((6, 4), np.float32), np.arange(6) % 3
EXACT = pm_jax.fisher_exact(linear)


class Net(nn.Module):
    """A model with one layer between two others."""

    kind: str

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        if self.kind == "batch":
            x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(x)
        elif self.kind == "layer":
            x = nn.LayerNorm()(x)
        elif self.kind == "group":
            x = nn.GroupNorm(4)(x)
        elif self.kind == "dropout":
            x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(3)(nn.relu(x))


RNG = np.random.default_rng(1)
DATA = RNG.normal(size=(40, 8)).astype(np.float32), np.arange(40) % 3


def net(kind, train):
    """A `LogitsFn` with state, parameters and state."""
    model = Net(kind)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, DATA[0], 1)
    _, state = model.apply(
        variables, DATA[0], True, mutable="batch_stats", rngs={"dropout": jax.random.key(2)}
    )

    def logits_fn(params, inputs, state):
        variables = {"params": params, **state}
        options = {"mutable": "batch_stats", "rngs": {"dropout": jax.random.key(3)}}
        return model.apply(variables, inputs, train, **options)[0]

    return logits_fn, variables["params"], state


def nnx_dropout(train):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.first(x))))

    model = Model(nnx.Rngs(0))
    model.train() if train else model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return (lambda p, x, state: nnx.merge(graph, p, state)(x)), params, rest


def others_of_the_batch(params, inputs):
    logits = inputs @ params
    return logits - logits.mean(axis=0, keepdims=True)


def warned(measure, params, examples=DATA, **given):
    """Messages of the warnings of a measurement."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pm_jax.measure_all(measure, params, examples, **given)
    assert all(str(w.filename) == __file__ and "\n" not in str(w.message) for w in found)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("form", ["arrays", slow("batches")])
@pytest.mark.parametrize(
    "kind", ["batch", "dropout", *map(slow, ("nnx dropout", "layer", "group", "none"))]
)
def test_a_model_in_training_mode_is_warned_of_once(kind, form):
    examples = DATA if form == "arrays" else [DATA, DATA]
    patterns = {
        "batch": "^logits_fn: the logits of an example change by .*BatchNorm.*model_state",
        "dropout": "^logits_fn: the logits of one example, given twice.*dropout.*deterministic",
    }
    for train in (True, False):
        logits_fn, params, state = nnx_dropout(train) if "nnx" in kind else net(kind, train)
        for measure in (
            curvature.fisher_exact(logits_fn),
            curvature.fisher_empirical(losses.cross_entropy(logits_fn)),
        ):
            found = warned(measure, params, examples, model_state=state, batch_size=16)
            pattern = patterns.get(kind.split()[-1]) if train else None
            assert len(found) == (pattern is not None)
            assert pattern is None or re.search(pattern, found[0])


def test_a_loss_that_mixes_examples_is_warned_of_by_its_own_name():
    def losses_fn(params, batch):
        logits = others_of_the_batch(params, batch.inputs)
        return jnp.sum(logits**2, axis=-1)

    params = jnp.ones((8, 3)) * jnp.arange(3.0)[None]
    (found,) = warned(curvature.fisher_empirical(losses_fn), params)
    assert found.startswith("losses_fn: the losses of an example change by")
    assert warned(curvature.identity(), params) == []
    assert len(warned(curvature.gauss_newton(others_of_the_batch), params, direction=params)) == 1


def test_dropout_that_all_examples_share_is_warned_of():
    def shared(params, inputs):
        kept = jax.random.bernoulli(jax.random.key(0), 0.9, (1, 4))
        return jnp.where(kept, inputs, 0) @ params

    class Callable:
        """A function that cannot be hashed."""

        __hash__ = None

        def __call__(self, params, inputs):
            return shared(params, inputs)

    for logits_fn in (shared, Callable()):
        (found,) = warned(curvature.fisher_exact(logits_fn), jnp.ones((4, 3)), (X, Y))
        assert found.startswith("logits_fn: draws random numbers, as dropout does")


def test_infinite_masks_are_no_dependence_and_an_undefined_curvature_is_said():
    def masked(params, inputs):
        return jnp.where(jnp.arange(3)[None] < 2, inputs @ params, -jnp.inf)

    params = jnp.arange(12.0).reshape(4, 3)
    assert warned(curvature.fisher_exact(masked), params, (X, Y % 2)) == []

    def undefined(params, inputs):
        return jnp.sqrt(inputs @ params * 0)

    for examples in ((X, Y), [(X, Y)]):
        (found,) = warned(curvature.fisher_exact(undefined), params, examples)
        assert found.startswith("measure_all: the curvature has NaN, although")


def test_an_iterable_inside_jit_is_refused():
    with pytest.raises(InvalidInput, match="examples=list: inside a compiled function"):
        jax.jit(lambda w: pm_jax.measure_all(EXACT, w, [(X, Y)]).along)(W)


def test_an_nnx_module_that_a_function_closes_over_is_named():
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def logits_fn(params, inputs):
        return model(inputs @ params)

    with pytest.raises(InvalidInput, match="^logits_fn: changes variables of an nnx module"):
        pm_jax.measure_all(pm_jax.fisher_exact(logits_fn), jnp.ones((4, 4)), (X, Y))


@pytest.mark.parametrize("depth", [slow(2), slow(12)])
def test_rounding_in_bfloat16_is_no_dependence(depth):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(depth):
                y = nn.LayerNorm(dtype=jnp.bfloat16)(x)
                y = nn.gelu(nn.Dense(64, dtype=jnp.bfloat16)(y))
                x = x + nn.Dense(8, dtype=jnp.bfloat16)(y)
            return nn.Dense(3, dtype=jnp.bfloat16)(x)

    model = Deep()
    params = jax.jit(model.init)(jax.random.key(0), DATA[0])["params"]
    measure = curvature.gauss_newton(lambda p, x: model.apply({"params": p}, x))
    assert warned(measure, params, direction=params) == []
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert warned(measure, half, direction=half) == []


@pytest.mark.parametrize("kind", ["batch", slow("layer")])
def test_a_single_example_and_logits_of_0_are_no_trouble(kind):
    logits_fn, params, state = net(kind, True)
    one = jax.tree.map(lambda x: x[:1], DATA)
    warned(curvature.fisher_exact(logits_fn), params, one, model_state=state)
    zero = jax.tree.map(jnp.zeros_like, params)
    assert warned(curvature.fisher_exact(logits_fn), zero, model_state=state) == []


@pytest.mark.slow
def test_measuring_batch_statistics_takes_the_state():
    """Example by example in training mode, most of the Fisher vanishes."""
    logits_fn, params, state = net("batch", False)
    found = pm_jax.measure_all(pm_jax.fisher_exact(logits_fn), params, DATA, model_state=state)
    whole = pm_jax.measure_all(
        pm_jax.gauss_newton(logits_fn), params, DATA, direction=params, model_state=state
    )
    jacobian = jax.jacobian(lambda p: logits_fn(p, DATA[0], state))(params)
    p = np.asarray(jax.nn.softmax(logits_fn(params, DATA[0], state)))
    inner = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
    trace = sum(
        np.einsum("ncp,ncd,ndp->", j, inner, j)
        for j in (np.asarray(x).reshape(40, 3, -1) for x in jax.tree.leaves(jacobian))
    )
    np.testing.assert_allclose(found.quadratic.trace(), trace / 40, rtol=1e-5)
    tangent = sum(
        np.einsum("ncp,p->nc", np.asarray(j).reshape(40, 3, -1), np.asarray(d).ravel())
        for j, d in zip(jax.tree.leaves(jacobian), jax.tree.leaves(params), strict=True)
    )
    values = np.einsum("nc,ncd,nd->n", tangent, inner, tangent)
    np.testing.assert_allclose(whole.along, values.mean(), rtol=1e-5)
