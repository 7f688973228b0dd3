"""Adapters of qwix against the library itself: folds, the way back, perturbation and two tasks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pm_jax
from pm_jax import lora, perturbation, trees
from pm_jax.integrations import qwix as pm_qwix
from pm_jax.types import InvalidInput
from tests.small_runs import slow

# Not at the top of a test: a session without the library says once that it is missing.
qwix = pytest.importorskip("qwix")

pytestmark = [
    # qwix 0.1.8 uses names that flax 0.12 has deprecated.
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now:DeprecationWarning"),
]

RANK, ALPHA = 2, 6.0


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(x.shape[-1], name="key")(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Step, {"params": 0}, split_rngs={"params": True}, length=4)
        return stack(name="blocks")(x, None)[0]


class Einsums(nnx.Module):
    """Kernels with their inputs first, in the middle and last."""

    def __init__(self, rngs):
        self.first = nnx.Einsum("btd,dnh->btnh", (6, 2, 3), (2, 3), rngs=rngs)
        self.middle = nnx.Einsum("btnh,hd->btnd", (3, 6), rngs=rngs)
        self.heads = nnx.Einsum("btnd,kdh->btnkh", (5, 6, 3), rngs=rngs)
        self.last = nnx.Einsum("btnkh,vnkh->btv", (7, 2, 5, 3), rngs=rngs)

    def __call__(self, x):
        return self.last(self.heads(nnx.tanh(self.middle(self.first(x)))))


def rngs():
    return nnx.Rngs(0)


TOKENS, IMAGES = (3, 4, 6), (3, 5, 6, 4)
MODELS = {
    "Dense": (lambda: nn.Dense(5), TOKENS),
    "DenseGeneral": (lambda: nn.DenseGeneral((2, 3)), TOKENS),
    "attention": (lambda: nn.MultiHeadDotProductAttention(2), TOKENS),
    "Conv": (lambda: nn.Conv(5, (3, 2), strides=2), IMAGES),
    "scan": (Stack, TOKENS),
    "nnx Linear": (lambda: nnx.Linear(6, 5, rngs=rngs()), TOKENS),
    "nnx LinearGeneral": (
        lambda: nnx.LinearGeneral((4, 6), (2, 3), axis=(-2, -1), rngs=rngs()), TOKENS),
    "nnx attention": (lambda: nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs()), TOKENS),
    "nnx Conv": (lambda: nnx.Conv(4, 5, (3, 2), rngs=rngs()), IMAGES),
    "nnx Einsum": (lambda: Einsums(rngs()), TOKENS),
}  # fmt: skip
COMMON = {"Dense", "DenseGeneral", "nnx Einsum"}
ALL = [name if name in COMMON else slow(name) for name in MODELS]


def example(name):
    """Functions of parameters with and without qwix, parameters with factors, and inputs."""
    make, shape = MODELS[name]
    model, inputs = make(), jax.random.normal(jax.random.key(1), shape)
    rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=ALPHA)
    provider = qwix.LoraProvider([rule])
    if isinstance(model, nn.Module):
        adapted = qwix.apply_lora_to_model(model, provider)
        params = jax.jit(adapted.init)(jax.random.key(0), inputs)["params"]
        functions = [
            lambda params, x, module=module: module.apply({"params": params}, x)
            for module in (adapted, model)
        ]
    else:
        plain, _, rest = nnx.split(model, nnx.Param, ...)
        adapted = qwix.apply_lora_to_model(model, provider, inputs, rngs=nnx.Rngs(2))
        graph, params, others = nnx.split(adapted, nnx.Param, ...)
        functions = [
            lambda params, x, graph=graph, others=others: nnx.merge(graph, params, others)(x)
            for graph, others in ((graph, others), (plain, rest))
        ]
    factors = {
        path: 0.5 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
        for path, leaf in trees.leaves_by_path(params).items()
        if path.endswith("_lora_b")
    }
    return *functions, trees.replace(params, factors), inputs


def close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_folded_model_is_that_of_qwix(name):
    with_qwix, plain, params, inputs = example(name)
    wanted = with_qwix(params, inputs)
    base, adapters = pm_qwix.split(params, ALPHA)
    assert type(base) is type(params) and adapters
    close(plain(pm_qwix.fold(params, ALPHA), inputs), wanted)
    close(plain(lora.fold(base, adapters), inputs), wanted)
    # Without the factors it is another model, and a task starts from it.
    started = with_qwix(pm_qwix.restart(params, base, jax.random.key(4)), inputs)
    close(started, plain(base, inputs))
    assert float(jnp.abs(started - wanted).max()) > 1e-2 * float(jnp.abs(wanted).max())


@pytest.mark.parametrize("name", ALL)
def test_the_way_back_gives_the_factors_of_qwix(name):
    _, _, params, _ = example(name)
    _, adapters = pm_qwix.split(params, ALPHA)
    if name == "nnx Einsum":
        # Heads before the inputs share one A in qwix.
        with pytest.raises(InvalidInput, match="adapters=heads/kernel: .*use lora.fold"):
            pm_qwix.with_adapters(params, adapters, ALPHA)
        del adapters["heads/kernel"]
    doubled = {path: adapter._replace(a=2 * adapter.a) for path, adapter in adapters.items()}
    close(pm_qwix.with_adapters(params, adapters, ALPHA), params)
    changed = pm_qwix.with_adapters(params, doubled, ALPHA)
    close({p: lora.displacement({p: a}, pm_qwix.split(params, ALPHA)[0])[p]
           for p, a in pm_qwix.split(changed, ALPHA)[1].items() if p in doubled},
          {p: 2 * lora.displacement({p: a}, pm_qwix.split(params, ALPHA)[0])[p]
           for p, a in adapters.items()})  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("law", [perturbation.symmetric(), slow(perturbation.antithetic())])
def test_perturbing_qwix_is_perturbing_the_folded_kernels(name, law):
    with_qwix, plain, params, inputs = example(name)
    base, adapters = pm_qwix.split(params, ALPHA)
    loss = pm_qwix.perturbed(lambda p, x: jnp.sum(with_qwix(p, x) ** 2), law)
    wanted = pm_jax.perturbed(lambda p, x: jnp.sum(plain(p, x) ** 2), law)
    for key in jax.random.split(jax.random.key(3), 2):
        # The task vector is 0 in all leaves but the kernels with factors.
        close(loss(key, params, inputs), wanted(key, lora.fold(base, adapters), base, inputs))


def test_gradients_of_a_perturbed_loss_reach_both_factors_by_the_chain_rule():
    # By hand: loss (1 + s) A B with A = 3, B = 2, scale 1, so the gradients are (1 + s) (B, A).
    params = {"kernel": jnp.zeros((1, 1)), "kernel_lora_a": jnp.full((1, 1), 3.0),
              "kernel_lora_b": jnp.full((1, 1), 2.0)}  # fmt: skip
    one = perturbation.Perturbation(steps=(0.5,), probabilities=(1.0,))
    loss = pm_qwix.perturbed(lambda p: pm_qwix.fold(p, 1.0)["kernel"].sum(), one)
    gradient = jax.grad(loss, argnums=1)(jax.random.key(0), params)
    assert float(gradient["kernel_lora_a"][0, 0]) == 1.5 * 2
    assert float(gradient["kernel_lora_b"][0, 0]) == 1.5 * 3


def tree(**shapes):
    return {path: jnp.ones(shape) for path, shape in shapes.items()}


@pytest.mark.parametrize(
    "params,arguments,message",
    [
        (tree(kernel=(4, 5)), {}, "no leaf whose name ends in _lora_a"),
        (tree(kernel=(4, 5), kernel_lora_a=(4, 2)), {}, "only one of its two factors"),
        (tree(kernel_lora_a=(4, 2), kernel_lora_b=(2, 5)), {}, "'kernel' is missing beside"),
        (tree(kernel=(4, 5), kernel_lora_a=(3, 2), kernel_lora_b=(2, 5)), {}, "do not fit kernel"),
        (tree(kernel=(4, 4, 5), kernel_lora_a=(4, 2), kernel_lora_b=(2, 4, 5)), {},
         r"\(0,\) or \(1,\) of kernel .*contracted="),
        (tree(kernel=(4, 3, 5), kernel_lora_a=(4, 5, 2), kernel_lora_b=(2, 3)), {},
         "no neighbours"),
        (tree(kernel=(4, 5), kernel_lora_a=(4, 2), kernel_lora_b=(2, 5)),
         {"alpha": {"other": 1.0}}, "no pattern that matches kernel"),
        ({"kernel": tree(qvalue=(4, 5), scale=(1, 5)), **tree(kernel_lora_a=(4, 2),
          kernel_lora_b=(2, 5))}, {}, "is quantized"),
    ],
)  # fmt: skip
def test_trees_that_are_not_qwixs_are_refused_in_one_line(params, arguments, message):
    with pytest.raises(InvalidInput, match=message) as error:
        pm_qwix.split(params, **{"alpha": 2.0, **arguments})
    assert "\n" not in str(error.value)


def test_axes_that_shapes_leave_open_are_given():
    params = tree(kernel=(4, 4, 5), kernel_lora_a=(4, 2), kernel_lora_b=(2, 4, 5))
    params["kernel_lora_a"] *= jnp.asarray([1.0, 2.0, 3.0, 4.0])[:, None]
    first, second = (
        pm_qwix.fold(params, 1.0, contracted={"kernel": axes})["kernel"] for axes in ((0,), (1,))
    )
    close(jnp.swapaxes(first, 0, 1), second)
    assert float(first[3, 0, 0]) == 5.0 and float(second[0, 3, 0]) == 5.0


def test_a_gaussian_law_and_trees_without_factors_are_refused():
    with pytest.raises(InvalidInput, match="law: a Gaussian one moves kernels"):
        pm_qwix.perturbed(lambda p: 0.0, perturbation.gaussian(0.1))
    loss = pm_qwix.perturbed(lambda p: p["w"], perturbation.symmetric())
    with pytest.raises(InvalidInput, match="no leaf whose name ends in _lora_b"):
        loss(jax.random.key(0), {"w": jnp.ones(())})


def test_a_base_of_other_leaves_is_refused():
    params = tree(kernel=(4, 5), kernel_lora_a=(4, 2), kernel_lora_b=(2, 5))
    for base in ({"other": jnp.ones((4, 5))}, params):
        with pytest.raises(InvalidInput, match="base: .*one of the trees only"):
            pm_qwix.restart(params, base)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(16, name="hidden")(x)))


class NnxClassifier(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(8, 16, rngs=rngs())
        self.head = nnx.Linear(16, 3, rngs=rngs())

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


def two_tasks():
    """Clusters of three classes, in other features for each task."""
    rng = np.random.default_rng(0)
    for features in (slice(0, 4), slice(4, 8)):
        labels = np.arange(96) % 3
        inputs = 0.7 * rng.normal(size=(96, 8))
        inputs[:, features] += 2 * rng.normal(size=(3, 4))[labels]
        yield jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_qwix_model_trains_two_tasks_and_merges_them(kind):
    rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=ALPHA)
    provider, example_input = qwix.LoraProvider([rule]), jnp.ones((1, 8))
    if kind == "linen":
        model = Classifier()
        adapted = qwix.apply_lora_to_model(model, provider)
        params = jax.jit(adapted.init)(jax.random.key(0), example_input)["params"]

        def with_qwix(params, x):
            return adapted.apply({"params": params}, x)

        def plain(params, x):
            return model.apply({"params": params}, x)
    else:
        model = NnxClassifier()
        graph_plain, _ = nnx.split(model)
        adapted = qwix.apply_lora_to_model(model, provider, example_input, rngs=nnx.Rngs(1))
        graph, params, others = nnx.split(adapted, nnx.Param, ...)

        def with_qwix(params, x):
            return nnx.merge(graph, params, others)(x)

        def plain(params, x):
            return nnx.merge(graph_plain, params)(x)

    def loss_fn(params, x, y):
        logits = with_qwix(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss = pm_qwix.perturbed(loss_fn, perturbation.symmetric())
    factors = jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" if "_lora_" in trees.path_name(path) else "frozen", params
    )
    optimizer = optax.partition({"lora": optax.adam(3e-2), "frozen": optax.set_to_zero()}, factors)

    @jax.jit
    def step(key, params, state, x, y):
        gradient = jax.grad(loss, argnums=1)(key, params, x, y)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    def accuracy(params, task):
        x, y = task
        return float((plain(params, x).argmax(-1) == y).mean())

    tasks = list(two_tasks())
    base, _ = pm_qwix.split(params, ALPHA)
    rule, measure = pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(plain)
    state = rule.init(base)
    for number, (x, y) in enumerate(tasks):
        params = pm_qwix.restart(params, base, jax.random.key(number))
        opt_state = optimizer.init(params)
        for key in jax.random.split(jax.random.key(10 + number), 60):
            params, opt_state = step(key, params, opt_state, x, y)
        trained = pm_qwix.fold(params, ALPHA)
        close(plain(trained, x), with_qwix(params, x))
        assert accuracy(trained, tasks[number]) > 0.8
        batch = pm_jax.Batch(x, y)
        evidence = pm_jax.Evidence(
            quadratic=pm_jax.measure_all(measure, trained, batch, 32).quadratic
        )
        base, state, info = rule.update(state, previous=base, trained=trained, evidence=evidence)
    assert 0.0 < float(info.alpha) < 1.0
    # The merged model, one without qwix, has forgotten less than the last one.
    merged, last = ([accuracy(model, task) for task in tasks] for model in (base, trained))
    assert np.mean(merged) > np.mean(last) + 0.05 and merged[1] > 0.9
