"""Adapters on the layers of nnx modules: the branch against the fold, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pm_jax
from pm_jax import lora, perturbation
from pm_jax.integrations import nnx as pm_nnx
from pm_jax.integrations import nnx_adapters
from pm_jax.types import InvalidInput
from tests.small_runs import slow

TOKENS, IMAGES = (3, 4, 6), (3, 5, 6, 4)


class Stack(nnx.Module):
    """Layers made by `nnx.vmap` and run by `nnx.scan`, kernels [4, 6, 6]."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.layers, self.head = make(rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + nnx.tanh(layer(x))

        return self.head(run(x, self.layers))


class Moving(nnx.Module):
    """Dropout keys and batch statistics that move, and a layer that is used twice."""

    def __init__(self, rngs):
        self.shared = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.shared(nnx.tanh(self.shared(x)))))


def rngs():
    return nnx.Rngs(0, dropout=1)


MODELS = {
    "linear": (lambda: nnx.Linear(6, 5, rngs=rngs()), TOKENS),
    "general, one axis to two": (lambda: nnx.LinearGeneral(6, (2, 3), rngs=rngs()), TOKENS),
    "general, two axes to one": (
        lambda: nnx.LinearGeneral((4, 6), 5, axis=(-2, -1), rngs=rngs()), TOKENS),
    "general, an axis in the middle": (
        lambda: nnx.LinearGeneral(4, 5, axis=1, rngs=rngs()), TOKENS),
    "einsum": (
        lambda: nnx.Einsum("btd,dnh->btnh", (6, 2, 3), (2, 3), rngs=rngs()), TOKENS),
    "einsum, a kernel for each head": (
        lambda: nnx.Einsum("...td,ndh->...tnh", (2, 6, 3), rngs=rngs()), TOKENS),
    "convolution": (lambda: nnx.Conv(4, 5, (3, 2), strides=2, rngs=rngs()), IMAGES),
    "convolution in groups": (
        lambda: nnx.Conv(4, 6, (3, 3), padding="CIRCULAR", feature_group_count=2, rngs=rngs()),
        IMAGES),
    "attention": (lambda: nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs()), TOKENS),
    "sequential": (
        lambda: nnx.Sequential(
            nnx.Linear(6, 5, rngs=rngs()), nnx.relu, nnx.Linear(5, 3, rngs=rngs())), TOKENS),
    "stack": (lambda: Stack(rngs()), TOKENS),
    "moving": (lambda: Moving(rngs()), TOKENS),
}  # fmt: skip
COMMON = {"linear", "general, two axes to one", "convolution in groups", "sequential", "moving"}
ALL = [name if name in COMMON else slow(name) for name in MODELS]


def example(name):
    make, shape = MODELS[name]
    model = make()
    params = nnx.state(model, nnx.Param)
    fresh = lora.init(jax.random.key(2), params, r"(.*/)?kernel", 2, module=model)
    adapters = jax.tree.map(
        lambda x: 0.4 * jnp.cos(jnp.arange(x.size) + x.ndim).reshape(x.shape), fresh
    )
    return model, params, adapters, jax.random.normal(jax.random.key(1), shape)


def close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ALL)
def test_branch_and_fold_agree_in_outputs_gradients_and_what_else_moves(name):
    model, _, adapters, x = example(name)

    @nnx.jit
    def by_branch(model, adapters):
        def loss(adapters, model):
            y = nnx_adapters.with_adapters(model, adapters, 1.5)(x)
            return jnp.sum(y**2), y

        return nnx.grad(loss, has_aux=True)(adapters, model)

    @nnx.jit
    def by_fold(model, adapters):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(adapters):
            folded = nnx.merge(graph, lora.fold(params, adapters, 1.5), rest, copy=True)
            y = folded(x)
            return jnp.sum(y**2), (y, nnx.state(folded, nnx.Not(nnx.Param)))

        gradient, (y, moved) = jax.grad(loss, has_aux=True)(adapters)
        nnx.update(model, moved)
        return gradient, y

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    other = nnx.clone(model)
    branched, folded = by_branch(model, adapters), by_fold(other, adapters)
    close(branched, folded)
    # Keys and statistics have moved in the module itself, and its parameters have not.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.BatchStat, nnx.RngCount))),
        nnx.to_pure_dict(nnx.state(other, nnx.Any(nnx.BatchStat, nnx.RngCount))),
    )
    jax.tree.map(
        np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )


@pytest.mark.parametrize("name", ["linear", slow("stack"), slow("convolution")])
def test_one_scale_per_example_is_that_examples_fold(name):
    model, params, adapters, x = example(name)
    scales = jnp.asarray([0.5, -1.0, 1.5])
    found = nnx_adapters.with_adapters(model, adapters, scales)(x)
    graph, _ = nnx.split(model)
    for n, scale in enumerate(scales):
        close(found[n], nnx.merge(graph, lora.fold(params, adapters, scale))(x)[n])


@pytest.mark.parametrize("law", [perturbation.symmetric(), slow(perturbation.gaussian(0.3))])
def test_perturbed_adapters_are_the_perturbed_kernels(law):
    model, params, adapters, x = example("sequential")
    graph, _ = nnx.split(model)
    base = {path: leaf for path, leaf in pm_jax.trees.leaves_by_path(params).items()
            if path in adapters}  # fmt: skip
    folded = lora.fold(base, adapters)

    def loss(point):
        return jnp.sum(nnx_adapters.with_adapters(model, point)(x) ** 2)

    def loss_of_kernels(point):
        return jnp.sum(nnx.merge(graph, pm_jax.trees.replace(params, point))(x) ** 2)

    for key in jax.random.split(jax.random.key(3), 3):
        np.testing.assert_allclose(
            pm_jax.perturbed(loss, law)(key, adapters, base),
            pm_jax.perturbed(loss_of_kernels, law)(key, folded, base),
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    "path,message",
    [
        ("layers/7/kernel", "nearest are layers/2/kernel, layers/0/kernel"),
        ("layers/0/bias", "is no kernel"),
        ("layers/0/kernel", "do not fit the kernel of shape"),
    ],
)
def test_adapters_that_would_have_no_effect_are_refused_by_path(path, message):
    model, _, adapters, _ = example("sequential")
    wrong = {path: lora.Adapter(jnp.ones((6, 2)), jnp.ones((2, 4)))}
    with pytest.raises(InvalidInput, match=f"adapters={path}: .*{message}"):
        nnx_adapters.with_adapters(model, {**adapters, **wrong})


def test_layers_that_pm_jax_does_not_know_are_named():
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    adapters = {"kernel": lora.Adapter(jnp.ones((6, 2)), jnp.ones((2, 5)))}
    with pytest.raises(InvalidInput, match="belongs to a Doubled"):
        nnx_adapters.with_adapters(Doubled(6, 5, rngs=rngs()), adapters)


def test_adapters_of_an_adapted_module_train_in_the_idiom_of_nnx():
    model, _, adapters, x = example("sequential")
    adapted = nnx_adapters.with_adapters(model, adapters)
    factors = nnx.state(adapted, nnx.LoRAParam)
    assert lora.count(factors) == lora.count(adapters)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 2), argnums=wrt)(adapted)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_the_perturbation_of_a_module_scales_the_branches_of_an_adapted_one():
    model, params, adapters, x = example("sequential")
    adapted = nnx_adapters.with_adapters(model, adapters)
    law = perturbation.symmetric()
    loss = pm_nnx.perturbed(lambda model: jnp.sum(model(x) ** 2), law, wrt=nnx.LoRAParam)
    # A task starts with B = 0 and any A.
    base = jax.tree.map(lambda leaf: 0.0 * leaf, pm_nnx.snapshot(adapted, nnx.LoRAParam))
    graph, _ = nnx.split(model)
    wanted = pm_jax.perturbed(lambda p: jnp.sum(nnx.merge(graph, p)(x) ** 2), law)
    for key in jax.random.split(jax.random.key(3), 3):
        np.testing.assert_allclose(
            loss(key, adapted, base), wanted(key, lora.fold(params, adapters), params), rtol=1e-4
        )
