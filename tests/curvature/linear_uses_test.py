"""Kernels that are found in a traced program, and their squared gradients, against the general way.

`by_vmap` differentiates every use of a parameter, so that a use that was overlooked would show.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pm_jax
from pm_jax import curvature, losses, trees
from pm_jax.curvature import squared_gradients
from pm_jax.curvature.linear_uses import Traced
from pm_jax.types import Batch
from tests.small_runs import slow

CLASSES, FEATURES = 3, 4
IMAGES = jax.random.normal(jax.random.key(0), (3, 6, 7, 2))
VECTORS = jax.random.normal(jax.random.key(1), (3, FEATURES))


def batch_of(inputs):
    return Batch(inputs, jnp.arange(3) % CLASSES, jnp.asarray([1.0, 0.0, 2.0]))


def assert_by_program_equals_by_vmap(outputs, params, batch, passes=None):
    passes = passes or squared_gradients.label_passes(None)
    direction = jax.tree.map(lambda v: jnp.sin(1.0 + jnp.arange(v.size)).reshape(v.shape), params)
    keys = jax.random.split(jax.random.key(2), 3)
    found, wanted = (
        jax.jit(lambda way=way: way(outputs, passes, params, batch, keys, direction))()
        for way in (squared_gradients.by_program, squared_gradients.by_vmap)
    )
    leaves, expected = (trees.leaves_by_path(x.total) for x in (found, wanted))
    for path, leaf in expected.items():
        scale = float(jnp.abs(leaf).max())
        assert leaves[path].dtype == leaf.dtype
        # Both are sums of rounded products, in another order.
        np.testing.assert_allclose(leaves[path], leaf, rtol=1e-5, atol=2e-6 * scale, err_msg=path)
    np.testing.assert_allclose(found.along, wanted.along, rtol=1e-5)


def found_in(outputs, params, batch):
    """Paths of the parameters that are taken the faster way."""
    single = jax.tree.map(lambda leaf: leaf[:1], batch)
    paths = list(trees.leaves_by_path(params))
    return {paths[number] for number, _ in Traced.of(outputs, params, single).uses.values()}


class Convolutional(nn.Module):
    """A layer between two others, and the logits."""

    middle: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(2, name="first")(x))
        x = nn.tanh(self.middle(x)).reshape(len(x), -1)
        return nn.Dense(CLASSES, name="head")(x)


CONVOLUTIONS = {
    "same": dict(kernel_size=(3, 2)),
    "valid, without bias": dict(kernel_size=(2, 3), padding="VALID", use_bias=False),
    "one by one": dict(kernel_size=(1, 1)),
    "strides": dict(kernel_size=(3, 3), strides=(2, 3)),
    "strides, even": dict(kernel_size=(2, 2), strides=2, padding="VALID"),
    "dilated": dict(kernel_size=(2, 3), kernel_dilation=(2, 1), padding=[(1, 0), (0, 2)]),
    "dilated inputs": dict(kernel_size=(2, 2), input_dilation=(2, 3), padding=[(2, 1), (0, -1)]),
    "circular": dict(kernel_size=(3, 3), padding="CIRCULAR"),
    "reflecting": dict(kernel_size=(3, 3), padding="REFLECT"),
    "one position": dict(kernel_size=(6, 7), padding="VALID"),
    "one axis": dict(kernel_size=(3,), padding="CAUSAL"),
}
GROUPS = dict(kernel_size=(3, 3), feature_group_count=2)
FAST = ("same", "strides", "dilated", "one position")


@pytest.mark.parametrize(
    "name", [name if name in FAST else slow(name) for name in (*CONVOLUTIONS, "groups")]
)
def test_convolutions(name):
    module = Convolutional(nn.Conv(4, **CONVOLUTIONS.get(name, GROUPS), name="middle"))
    params = jax.jit(module.init)(jax.random.key(3), IMAGES)["params"]

    def outputs(params, batch):
        return module.apply({"params": params}, batch.inputs)

    covered = {"head/kernel"} | ({"middle/kernel"} if name in CONVOLUTIONS else set())
    assert found_in(outputs, params, batch_of(IMAGES)) == covered
    assert_by_program_equals_by_vmap(outputs, params, batch_of(IMAGES))


def dense(params, x):
    return nn.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]


JITTED = jax.jit(lambda x, kernel: jnp.tanh(x @ kernel))


def jitted_twice(params, x):
    # One inner program serves both calls.
    return JITTED(JITTED(x, params["a"]["kernel"]), params["c"]) @ params["b"]


def transposed(params, x):
    return (params["b"].T @ jnp.tanh(params["a"]["kernel"] @ x.T)).T


def kernel_first(params, x):
    return jnp.einsum("ck,nc->nk", params["b"], jnp.einsum("io,ni->no", params["c"], x))


def windows(params, x):
    # Rows of one example are several ones, which the general way covers.
    return (x.reshape(-1, 2) @ params["a"]["kernel"][:2]).reshape(len(x), -1)[:, :CLASSES]


def twice(params, x):
    return dense(params, x @ params["a"]["kernel"])


def tied(params, x):
    return (dense(params, x) @ params["b"].T)[:, :CLASSES]


def tied_embedding(params, x):
    rows = params["c"][jnp.argmax(x, axis=1)]
    return jnp.tanh(rows @ params["a"]["kernel"]) @ params["c"].T


def normalised(params, x):
    kernel = params["a"]["kernel"]
    return (x @ (kernel / jnp.linalg.norm(kernel))) @ params["b"]


def penalised(params, x):
    return dense(params, x) + 0.1 * jnp.sum(params["b"] ** 2)


def fixed_elsewhere(params, x):
    return dense(params, x) * jax.lax.stop_gradient(params["b"]).sum()


def cast(params, x):
    half = params["a"]["kernel"].astype(jnp.bfloat16)
    return (x.astype(jnp.bfloat16) @ half).astype(jnp.float32) @ params["b"]


def remat(params, x):
    return jax.checkpoint(dense)(params, x)


def looped(params, x):
    step = lambda x, _: (jnp.tanh(x @ params["a"]["kernel"]), None)  # noqa: E731
    return jax.lax.scan(step, x, length=2)[0] @ params["b"]


def returned(params, x):
    del x
    return params["b"][:1]


A, B, C = "a/kernel", "b", "c"
FUNCTIONS = [
    (dense, {A, B}), (jitted_twice, {A, B, C}), (transposed, {A}), (kernel_first, {B, C}),
    (windows, set()), (twice, {B}), (tied, {A}), (tied_embedding, {A}), (normalised, {B}),
    (penalised, {A}), (fixed_elsewhere, {A}), (cast, {B}), (remat, set()), (looped, {B}),
    (returned, set()),
]  # fmt: skip


@pytest.mark.parametrize("function,paths", FUNCTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_only_parameters_that_are_used_once_are_found(function, paths):
    shapes = {A: (FEATURES, FEATURES), "a/bias": (FEATURES,), B: (FEATURES, CLASSES),
              C: (FEATURES, FEATURES)}  # fmt: skip
    keys = jax.random.split(jax.random.key(4), len(shapes))
    a, bias, b, c = (jax.random.normal(k, s) for k, s in zip(keys, shapes.values(), strict=True))
    params, batch = {"a": {"kernel": a, "bias": bias}, "b": b, "c": c}, batch_of(VECTORS)

    def outputs(params, batch):
        return function(params, batch.inputs)

    assert found_in(outputs, params, batch) == paths
    assert_by_program_equals_by_vmap(outputs, params, batch)


def test_a_penalty_of_a_loss_is_part_of_the_gradient():
    params = {"kernel": jax.random.normal(jax.random.key(5), (FEATURES, CLASSES))}

    def losses_fn(params, batch):
        values = losses.cross_entropy(lambda p, x: x @ p["kernel"])(params, batch)
        return values + 0.1 * jnp.sum(params["kernel"] ** 2)

    batch = batch_of(VECTORS)
    assert found_in(losses_fn, params, batch) == set()
    found = pm_jax.measure_all(curvature.fisher_empirical(losses_fn), params, batch, 2)
    gradients = jax.vmap(jax.grad(lambda p, x: losses_fn(p, jax.tree.map(lambda v: v[None], x))[0]),
                         (None, 0))(params, batch)["kernel"]  # fmt: skip
    wanted = (gradients[0] ** 2 + 2 * gradients[2] ** 2) / 3
    np.testing.assert_allclose(found.quadratic.diagonal["kernel"], wanted, rtol=1e-5)


@pytest.mark.parametrize("num_samples", [2, slow(None)])
def test_the_measures_find_kernels_by_themselves(num_samples):
    module = Convolutional(nn.Conv(4, (3, 3), name="middle"))
    params = jax.jit(module.init)(jax.random.key(3), IMAGES)["params"]
    direction = jax.tree.map(jnp.cos, params)

    def logits_fn(params, images):
        return module.apply({"params": params}, images)

    found, wanted = (
        pm_jax.measure_all(
            pm_jax.fisher_exact(
                logits_fn, num_samples=num_samples, dense_layers=layers, chunk_size=2
            ),
            params, batch_of(IMAGES), 3, direction, jax.random.key(6),
        )
        for layers in (None, ())
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


def test_every_example_is_alone_in_its_batch():
    # As with the batch statistics of training mode, where the outputs depend on other examples.
    def outputs(params, batch):
        x = batch.inputs @ params["kernel"]
        return x - 0.5 * x.mean(axis=0, keepdims=True)

    params = {"kernel": jnp.cos(jnp.arange(12.0)).reshape(FEATURES, CLASSES)}
    assert found_in(outputs, params, batch_of(VECTORS)) == {"kernel"}
    assert_by_program_equals_by_vmap(outputs, params, batch_of(VECTORS))
