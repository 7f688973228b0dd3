"""Measuring models and data as people have them: every form, state, warnings and mistakes."""

import functools
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training import train_state

import pm_jax
from pm_jax import Batch, curvature, losses, trees
from pm_jax.curvature import ExactQuadratic, kronecker, low_rank, measures
from pm_jax.types import InvalidInput
from tests import oracles
from tests.compilations import compilations
from tests.small_runs import slow

EXAMPLES = 13
SAMPLED = curvature.fisher_exact(oracles.network, num_samples=2)
PARAMS, DIRECTION, BATCH = oracles.problem(EXAMPLES)
INPUTS, LABELS = (np.asarray(x) for x in BATCH[:2])


def measured(examples, **given):
    given = {"batch_size": 5, "direction": DIRECTION, "key": jax.random.key(1), **given}
    return pm_jax.measure_all(SAMPLED, PARAMS, examples, **given)


def assert_close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def identical(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def pieces(*sizes):
    """Inputs and labels cut into batches of some sizes, and the rest."""
    edges = np.cumsum(sizes)
    return list(zip(np.split(INPUTS, edges), np.split(LABELS, edges), strict=True))


class Tensor:
    """Like a tensor of another library: no array, but one that NumPy reads."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return "torch.float32"

    def __len__(self):
        return len(self.values)


class Loader:
    """Like torch's: iterable again and again, with a length, and batches that are lists."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return -(-EXAMPLES // self.size)

    def __iter__(self):
        for start in range(0, EXAMPLES, self.size):
            rows = slice(start, start + self.size)
            yield [Tensor(INPUTS[rows]), Tensor(LABELS[rows])]


FORMS = {
    "a tuple of NumPy's arrays": lambda: (INPUTS, LABELS),
    "with weights": lambda: (INPUTS, LABELS, np.ones(EXAMPLES)),
    "labels of another type": lambda: (INPUTS, LABELS.astype(np.uint8)),
    "a list of labels": lambda: (INPUTS, LABELS.tolist()),
    "tensors": lambda: (Tensor(INPUTS), Tensor(LABELS)),
    "a list of one batch": lambda: [BATCH],
    "a tuple of batches": lambda: tuple(Batch(*piece) for piece in pieces(6)),
    "a generator": lambda: (Batch(*piece) for piece in pieces(4, 4, 4)),
    "small batches in the middle": lambda: iter(pieces(5, 1, 3)),
    "an empty batch": lambda: pieces(2, 0, 7),
    "batches larger than batch_size": lambda: pieces(12),
    "single examples": lambda: pieces(*[1] * (EXAMPLES - 1)),
    "a loader": lambda: Loader(4),
    "JAX's arrays in a generator": lambda: (jax.tree.map(jnp.asarray, p) for p in pieces(3, 9)),
}


@pytest.mark.parametrize("form", FORMS)
def test_examples_in_every_form_give_the_same_bits(form):
    assert identical(measured(FORMS[form]()), measured(BATCH))


@pytest.mark.parametrize("batch_size", [slow(1), 3, slow(8), slow(256)])
def test_sampled_labels_and_sums_do_not_depend_on_the_batch_size(batch_size):
    wanted = measured(BATCH)
    for examples in (BATCH, pieces(4, 4, 4)):
        assert_close(measured(examples, batch_size=batch_size), wanted)
    groups = measures.in_groups(SAMPLED, 3)
    key = jax.random.key(1)
    found = pm_jax.measure_all(groups, PARAMS, Loader(5), batch_size, DIRECTION, key)
    assert_close(found, pm_jax.measure_all(groups, PARAMS, BATCH, 13, DIRECTION, key))


def test_inputs_are_any_tree_and_examples_with_weight_0_do_not_count():
    def logits_fn(params, inputs):
        return oracles.network(params, inputs["x"] - inputs["more"][0])

    measure = pm_jax.fisher_exact(logits_fn)
    inputs = {"x": INPUTS + 1.0, "more": [np.ones((EXAMPLES, 1), np.float32)]}
    wanted = pm_jax.measure_all(pm_jax.fisher_exact(oracles.network), PARAMS, BATCH, 5)
    assert_close(pm_jax.measure_all(measure, PARAMS, (inputs, LABELS), 5), wanted)
    twice = jax.tree.map(lambda x: np.concatenate([x, 7 + x]), inputs)
    weights = np.arange(2 * EXAMPLES) < EXAMPLES
    # Padding may have any label.
    labels = np.concatenate([LABELS, np.full(EXAMPLES, -1)])
    for examples in ((twice, labels, weights), [(twice, labels, weights)]):
        assert_close(pm_jax.measure_all(measure, PARAMS, examples, 5), wanted)


@pytest.mark.parametrize("dtype", [np.float16, *map(slow, (ml_dtypes.bfloat16, float, np.uint8))])
def test_inputs_of_any_type_reach_the_model(dtype):
    inputs = (4 * INPUTS).clip(0).astype(dtype)

    def logits_fn(params, inputs):
        assert inputs.dtype == (np.float32 if dtype is float else dtype)
        return oracles.network(params, inputs.astype(jnp.float32))

    measure = pm_jax.fisher_exact(logits_fn)
    found = pm_jax.measure_all(measure, PARAMS, [(inputs, LABELS)], 5)
    wanted = pm_jax.measure_all(
        pm_jax.fisher_exact(oracles.network), PARAMS, (inputs.astype(np.float32), LABELS), 5
    )
    assert_close(found, wanted)


def test_a_progress_bar_counts_examples(capsys):
    assert identical(measured(BATCH, progress=True), measured(BATCH))
    assert f"{EXAMPLES}/{EXAMPLES}" in capsys.readouterr().err
    measured(iter(pieces(6)), progress=True)
    assert f"{EXAMPLES}example" in capsys.readouterr().err
    measured(BATCH)
    assert not capsys.readouterr().err


def test_measuring_again_compiles_nothing():
    """Other values, other sizes of the task, another state, measures made anew."""

    def logits_fn(params, inputs, mask):
        return losses.mask_logits(oracles.network(params, inputs), mask)

    def run(number, examples):
        with compilations() as compiled:
            pm_jax.measure_all(
                pm_jax.fisher_empirical(losses.cross_entropy(logits_fn), chunk_size=3),
                jax.tree.map(lambda x: x + number, PARAMS),
                examples, 4, DIRECTION, model_state=jnp.arange(4) < 4 - number,
            )  # fmt: skip
        return len(compiled)

    labels = LABELS % 2
    assert run(0, (INPUTS, labels)) > 0
    # Four batches of four each: their last one is padded.
    assert run(1, (INPUTS[:13], labels[:13])) == 0
    assert run(2, (np.concatenate([INPUTS, INPUTS[:3]]), np.append(labels, labels[:3]))) == 0
    assert run(0, [(INPUTS, labels)]) > 0
    assert run(1, ((INPUTS[n : n + 2], labels[n : n + 2]) for n in range(0, 12, 2))) == 0


def test_a_model_that_reads_changed_variables_is_measured_as_it_is_now():
    table = {"mask": jnp.ones(4), "scale": 1.0}

    def logits_fn(params, inputs):
        return table["scale"] * oracles.network(params, inputs) * table["mask"][None]

    measure, found = pm_jax.fisher_exact(logits_fn), []
    for change in ({}, {"mask": jnp.arange(4.0)}, {"scale": 2.0}):
        table.update(change)
        frozen = dict(table)
        anew = pm_jax.fisher_exact(
            lambda p, x, frozen=frozen: (
                frozen["scale"] * oracles.network(p, x) * frozen["mask"][None]
            )
        )
        for examples in (BATCH, [BATCH]):
            result = pm_jax.measure_all(measure, PARAMS, examples, 5)
            assert_close(result, pm_jax.measure_all(anew, PARAMS, examples, 5))
        found.append(float(result.quadratic.trace()))
    assert len(set(found)) == 3
    # Equal values in new arrays are no change.
    table["mask"] = jnp.arange(4.0) + 0
    with compilations() as compiled:
        pm_jax.measure_all(measure, PARAMS, BATCH, 5)
    assert not [seconds for seconds in compiled if seconds > 0.5]


# The state of a model.


def some_of(names, *fast):
    """All names, most of them left to the slow lane."""
    return [name if name in fast else slow(name) for name in names]


MASK = jnp.asarray([True, True, False, True])


def masked(params, inputs, mask):
    return losses.mask_logits(oracles.network(params, inputs), mask["classes"])


def masked_by_closure(params, inputs):
    return losses.mask_logits(oracles.network(params, inputs), MASK)


STATEFUL = {
    "fisher_empirical": lambda fn: curvature.fisher_empirical(losses.cross_entropy(fn)),
    "fisher_exact": curvature.fisher_exact,
    "in_groups": lambda fn: measures.in_groups(curvature.fisher_exact(fn, num_samples=1), 2),
    "gauss_newton": curvature.gauss_newton,
    "hessian": lambda fn: curvature.hessian(losses.cross_entropy(fn)),
    "low_rank": functools.partial(low_rank.gauss_newton_low_rank, rank=2),
    "identity": lambda fn: curvature.identity(),
    "with_along": lambda fn: measures.with_along(
        curvature.fisher_exact(fn), curvature.gauss_newton(fn)
    ),
}


@pytest.mark.parametrize("name", some_of(STATEFUL, "fisher_empirical", "low_rank", "with_along"))
def test_the_state_of_a_model_is_an_argument_of_every_measure(name):
    labels = np.where(LABELS == 2, 0, LABELS)
    given = (5, DIRECTION, jax.random.key(0))
    found = pm_jax.measure_all(
        STATEFUL[name](masked), PARAMS, (INPUTS, labels), *given, model_state={"classes": MASK}
    )
    wanted = pm_jax.measure_all(STATEFUL[name](masked_by_closure), PARAMS, (INPUTS, labels), *given)
    assert_close(found, wanted)


def test_exact_quadratics_have_the_state_of_each_task():
    state = {"classes": MASK}
    quadratic = ExactQuadratic.at(PARAMS, BATCH, masked, batch_size=4, model_state=state)
    wanted = ExactQuadratic.at(PARAMS, BATCH, masked_by_closure, batch_size=4)
    assert_close(quadratic.curvature_along(DIRECTION), wanted.curvature_along(DIRECTION))
    assert_close(quadratic.trace(), wanted.trace())
    all_classes = ExactQuadratic.at(
        PARAMS, BATCH, masked, batch_size=4, model_state={"classes": MASK | True}
    )
    both = quadratic + all_classes
    terms = [q.curvature_along(DIRECTION) for q in (quadratic, all_classes)]
    assert_close(both.curvature_along(DIRECTION), sum(terms))
    assert abs(terms[0] / terms[1] - 1) > 0.01


# Trees.


class Linen(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        x = nn.relu(dense(6, name="hidden")(x))
        return dense(3, name="head")(x)


KERNELS = ("hidden/kernel", "head/kernel")


def linen(kind):
    model = Linen(remat=kind == "remat")
    nested = Linen().init(jax.random.key(0), INPUTS)["params"]
    if kind == "flat":
        return trees.leaves_by_path(nested), lambda p, x: model.apply(
            {"params": {name: {k: p[f"{name}/{k}"] for k in ("kernel", "bias")}
                        for name in ("hidden", "head")}}, x
        )  # fmt: skip
    if kind == "with others":
        return {**nested, "step": 3}, lambda p, x: model.apply(
            {"params": {name: p[name] for name in ("hidden", "head")}}, x
        )
    params = FrozenDict(nested) if kind == "frozen" else nested
    return params, lambda p, x: model.apply({"params": p}, x)


@pytest.mark.parametrize("kind", ["nested", *map(slow, ("flat", "frozen", "remat", "with others"))])
def test_kronecker_and_dense_layers_take_any_tree_by_path(kind):
    params, logits_fn = linen(kind)
    flat, of_flat = linen("flat")
    examples = (INPUTS, LABELS % 3)
    directions = [jax.tree.map(lambda x: jnp.cos(1.0 + x), trees.floating(x))
                  for x in (params, flat)]  # fmt: skip

    def both(make):
        found = pm_jax.measure_all(make(logits_fn), params, examples, 5, directions[0])
        wanted = pm_jax.measure_all(make(of_flat), flat, examples, 5, directions[1])
        assert_close((found.along, found.standard_error), (wanted.along, wanted.standard_error))
        center = found.quadratic.center
        assert jax.tree.structure(center) == jax.tree.structure(trees.floating(params))
        for theta in (0.1, 0.2):
            moved = [jax.tree.map(lambda x, by=theta: x + by, trees.floating(x))
                     for x in (params, flat)]  # fmt: skip
            assert_close(found.quadratic.value(moved[0]), wanted.quadratic.value(moved[1]))
        return found.quadratic

    quadratic = both(lambda fn: kronecker.fisher_kronecker(fn, KERNELS, dense_layers=("head",)))
    both(lambda fn: kronecker.fisher_kronecker(fn, ".*/kernel"))
    fast = both(lambda fn: curvature.fisher_exact(fn, dense_layers=("hidden", "head")))
    plain = pm_jax.measure_all(pm_jax.fisher_exact(logits_fn), params, examples, 5).quadratic
    assert_close(fast.diagonal, plain.diagonal)
    zero = kronecker.KroneckerQuadratic.zero(params, KERNELS, slots=2)
    assert_close((zero + quadratic).value(params), quadratic.value(params))


OTHERS = {
    "step": 7, "rng": jax.random.key(0), "ids": np.arange(3), "name": "net", "flag": True,
    "none": None,
}  # fmt: skip


def with_others(params, inputs):
    assert params.get("name", "net") == "net"
    return oracles.network(params, inputs)


@pytest.mark.parametrize("name", some_of(STATEFUL, "fisher_exact", "hessian", "identity"))
def test_leaves_that_are_not_floating_point_are_passed_over(name):
    params = {**PARAMS, **OTHERS}
    direction = pm_jax.task_vectors.difference(
        {**params, **jax.tree.map(jnp.add, PARAMS, DIRECTION)}, params
    )
    key, measure = jax.random.key(0), STATEFUL[name](with_others)
    wanted = pm_jax.measure_all(measure, PARAMS, BATCH, 5, DIRECTION, key)
    for examples in (BATCH, [BATCH]):
        found = pm_jax.measure_all(measure, params, examples, 5, direction, key)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if found.quadratic is not None:
        assert found.quadratic.center["step"] is None and found.quadratic.gradient["name"] is None
    exact = ExactQuadratic.at(params, BATCH, with_others)
    plain = ExactQuadratic.at(PARAMS, BATCH, with_others)
    assert_close(exact.curvature_along(direction), plain.curvature_along(DIRECTION))


# A first look.


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
    params = model.init(jax.random.key(0), DATA[0])["params"]
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


# Mistakes.


def linear(params, inputs):
    return inputs @ params


W, X, Y = np.ones((4, 3), np.float32), np.ones((6, 4), np.float32), np.arange(6) % 3
FISHER = pm_jax.fisher_empirical(losses.cross_entropy(linear))
EXACT = pm_jax.fisher_exact(linear)


def wrong(examples=(X, Y), measure=FISHER, params=W, **given):
    return lambda: pm_jax.measure_all(measure, params, examples, **given)


def late(*batches):
    """A generator whose last batch is the wrong one."""
    return wrong((batch for batch in ((X, Y), (X, Y), *batches)))


def used_up():
    batches = iter([(X, Y)])
    pm_jax.measure_all(FISHER, W, batches)
    pm_jax.measure_all(FISHER, W, batches)


NAN = np.where(np.eye(6, 4, dtype=bool), np.nan, X)
MISTAKES = {
    "examples: the iterable has no batches; a generator is used up after one pass": used_up,
    "examples: the iterable has no batches": wrong([]),
    "examples: all batches are empty": wrong([(X[:0], Y[:0])]),
    "examples: has no examples": wrong((X[:0], Y[:0])),
    r"examples: batch 2: has inputs of shape \[N, 5\] float32, and batch 0 has \[N, 4\] float32": (
        late((np.ones((6, 5), np.float32), Y))
    ),
    r"examples: batch 2: has inputs of shape \[N, 4\] int64, and batch 0 has \[N, 4\] float32": (
        late((X.astype(int), Y))
    ),
    "examples: batch 2: has the leaves inputs/x, labels, weights, and batch 0 has inputs, labels": (
        late(({"x": X}, Y))
    ),
    r"examples: batch 0: is a dict with 'image', 'label'; .*\(batch\['image'\], batch\['label'\]\)":
        wrong([{"image": X, "label": Y}]),
    "examples: is a dict with 'x', 'y'": wrong({"x": X, "y": Y}),
    "examples: batch 0: is a ndarray; it must be a Batch or a tuple": wrong([X, Y]),
    r"examples: is one array of shape \(6, 4\); give a tuple": wrong(X),
    "examples: is a int; it must be": wrong(3),
    "examples: is a NoneType; it must be": wrong(None),
    "examples: batch 0: is a tuple of 1: ndarray": wrong([(X,)]),
    "examples: batch 0: is a tuple of 4": wrong([(X, Y, Y, Y)]),
    r"examples: has inputs of shape \(6, 4\) and labels of shape \(5,\)": wrong((X, Y[:5])),
    r"examples: batch 0: has inputs/a of shape \(5, 4\) and labels": wrong([({"a": X[:5]}, Y)]),
    r"examples: has weights of shape \(2,\) and labels of shape \(6,\)": wrong((X, Y, np.ones(2))),
    "examples: has a weight that is negative or NaN": wrong((X, Y, np.arange(6) - 1.0)),
    "examples: has labels of type float32 and shape .6, 3.;.*give np.argmax": wrong(
        (X, np.eye(3, dtype=np.float32)[Y])
    ),
    "examples: has labels of type float64 and shape .6,.;.*labels.astype": wrong((X, Y * 1.0)),
    "examples: has labels of type bool.*labels.astype": wrong((X, Y > 1)),
    r"examples: has labels of shape \[N, 3\] where the logits are \[N, 3\]; give np.argmax": wrong(
        (X, np.eye(3, dtype=int)[Y])
    ),
    r"examples: has labels of shape \[N, 7\] where the logits are \[N, 3\]; give labels \[N\]":
        wrong((X, np.ones((6, 7), int))),
    "examples: has a label 3; labels must be from 0 to 2": wrong((X, Y + 1)),
    "examples: has a label 1099511627776; labels must be": wrong((X, Y + 2**40)),
    "examples: has a label -1; labels must be from 0 to 2": wrong((X, Y - 1), measure=EXACT),
    "examples: batch 2: has a label 3; labels must be": late((X, Y + 3)),
    "examples: batch 0: has a label without an axis": wrong([(X[0], Y[0]), (X[1], Y[1])]),
    "examples: batch 0: has inputs of ndarray and type <U1, which are no numbers": wrong(
        [(np.asarray(["a"] * 6), Y)]
    ),
    "examples: batch 0: has inputs of type Strange, which NumPy cannot read": wrong(
        [(type("Strange", (), {"__array__": lambda self: 1 / 0})(), Y)]
    ),
    "examples: all weights are 0": wrong((X, Y, np.zeros(6))),
    "examples: has NaN among its inputs": wrong((NAN, Y)),
    "examples: batch 2: has NaN among its inputs": wrong(
        ((x, Y) for x in (X, X, NAN)), batch_size=6
    ),
    "batch_size=0: must be a whole number, at least 1": wrong(batch_size=0),
    "batch_size=2.5: must be a whole number": wrong(batch_size=2.5),
    "params: has numbers that are not finite": wrong(params=W * np.nan),
    "params/b: has numbers that are not finite": wrong(
        params={"a": W, "b": W * np.nan}, measure=pm_jax.fisher_exact(lambda p, x: x @ p["a"])
    ),
    "model_state/mean: has numbers that are not finite": wrong(
        measure=pm_jax.fisher_exact(lambda p, x, s: x @ p + s["mean"][None]),
        model_state={"mean": np.full(3, np.nan)},
    ),
    "params: has no floating-point leaf": wrong(params={}),
    "params=Linear: is a module.*snapshot": wrong(params=nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
    "params=TrainState: has the optimiser's moments.*state.params": wrong(
        params=train_state.TrainState.create(apply_fn=linear, params=W, tx=optax.adam(0.1))
    ),
    r"direction=float32\[3\]: params is float32\[4, 3\]": wrong(direction=np.ones(3, np.float32)),
    "direction=dict: params is": wrong(direction={"w": W}),
    "direction: has numbers that are not finite": wrong(direction=W * np.nan),
    "measure=fisher_exact: must be a Measure; call its factory": wrong(measure=pm_jax.fisher_exact),
    "measure=str: must be a Measure": wrong(measure="fisher_exact"),
    r"logits_fn=<lambda>: is called with \(params, inputs\) and does not": wrong(
        measure=pm_jax.fisher_exact(lambda w: w)
    ),
    r"logits_fn=<lambda>: is called with \(params, inputs\).*give measure_all a model_state": wrong(
        measure=pm_jax.fisher_exact(lambda w, x, state: x @ w)
    ),
    r"logits_fn=linear: is called with \(params, inputs, model_state\).*lambda params, inputs, st":
        wrong(model_state={"mean": W}),
    "losses_fn=<lambda>: is called with .params, batch, model_state.": wrong(
        measure=pm_jax.fisher_empirical(lambda w, batch: batch.inputs @ w), model_state=W
    ),
    r"logits_fn: returns shape \(6,\) for 6 examples; it must return logits \[N, C\]": wrong(
        measure=pm_jax.fisher_exact(lambda w, x: (x @ w)[:, 0])
    ),
    r"logits_fn: returns shape \(3,\) for 6 examples": wrong(
        measure=pm_jax.gauss_newton(lambda w, x: (x @ w).mean(axis=0)), direction=W
    ),
    r"logits_fn: returns a tuple; it must return one array, the logits \[N, C\] .without": wrong(
        measure=pm_jax.fisher_exact(lambda w, x: (x @ w, {}))
    ),
    "logits_fn: returns int32; it must return floating point": wrong(
        measure=pm_jax.fisher_exact(lambda w, x: jnp.argmax(x @ w, -1, keepdims=True))
    ),
    r"losses_fn: returns shape \(\) for 6 examples; it must return losses \[N\]": wrong(
        measure=pm_jax.fisher_empirical(lambda w, batch: (batch.inputs @ w).mean())
    ),
    "key=None: sampled labels need a PRNG key": wrong(
        measure=pm_jax.fisher_exact(linear, num_samples=1)
    ),
    "direction=None: this measure needs": wrong(measure=pm_jax.gauss_newton(linear)),
    "kernels=.*hiden.*": wrong(
        params=linen("nested")[0], measure=kronecker.fisher_kronecker(
            linen("nested")[1], ("hiden/kernel",)),
        examples=(INPUTS, LABELS % 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    with pytest.raises(ValueError, match=f"^({message})") as error:
        MISTAKES[message]()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert isinstance(error.value, InvalidInput) or "=" in message


def test_checks_are_no_part_of_a_program_that_a_caller_compiles():
    """Inside jit there are no values to look at, and nothing is added to the computation."""

    def measure(params, examples):
        return pm_jax.measure_all(EXACT, params, examples, 6).quadratic.diagonal

    found = jax.jit(measure)(jnp.asarray(W), Batch(jnp.asarray(X), jnp.asarray(Y)))
    assert_close(found, measure(W, (X, Y)))
    text = jax.jit(measure).lower(W, Batch(X, Y)).as_text()
    assert "is_finite" not in text and "callback" not in text
