"""What a Fisher by layers computes: one forward and one backward pass, and a product a kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import trees
from pm_jax.curvature.squared_gradients import Passes, by_layers, label_passes
from pm_jax.types import Batch


class Block(nn.Module):
    """A residual block of a transformer: six layers and the two products of attention."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        def dense(width, name):
            return nn.Dense(width, dtype=self.dtype, name=name)

        query, key, value = (dense(6, name)(x) for name in ("query", "key", "value"))
        weights = nn.softmax(jnp.einsum("nti,nsi->nts", query, key))
        x = x + dense(6, "out")(jnp.einsum("nts,nsi->nti", weights, value))
        return x + dense(6, "down")(nn.tanh(dense(12, "up")(x)))


class Network(nn.Module):
    """Two blocks and a classifier."""

    block: type = Block

    @nn.compact
    def __call__(self, x):
        for number in range(2):
            x = self.block(name=f"block_{number}")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


def products(program):
    """Count the matrix products of a traced program."""
    count = 0
    for equation in program.eqns:
        count += equation.primitive.name == "dot_general"
        for part in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(part, "jaxpr", part)
            count += products(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize(
    ("block", "most"), [(Block, 17 + 17 + 12), (nn.remat(Block), 17 + 14 + 17 + 12)]
)
def test_matrix_products_of_one_drawn_label(block, most):
    """17 forward, 17 backward (no gradient goes below the first keys) and 3 for each kernel.

    Blocks that are rematerialised run forward once more, but for their last layers.
    """
    network, x = Network(block), jnp.ones((4, 5, 6))
    params = jax.jit(network.init)(jax.random.key(0), x)["params"]
    kernels = trees.select(params, ".*(key|value)/kernel")
    batch, keys = Batch(x, jnp.zeros(4, int)), jax.random.split(jax.random.key(1), 4)

    def squares(kernels, batch, keys, direction):
        def logits(some, batch):
            return network.apply({"params": trees.replace(params, some)}, batch.inputs)

        return by_layers(logits, label_passes(1), kernels, batch, keys, direction)

    assert len(kernels) == 4
    program = jax.make_jaxpr(squares)(kernels, batch, keys, kernels)
    assert products(program.jaxpr) <= most


def test_bfloat16_inputs_and_gradients_are_multiplied_without_rounding():
    layer = nn.Dense(7, use_bias=False, dtype=jnp.bfloat16)
    random = np.random.default_rng(0)
    x, g = (random.normal(size=(5, 300, width)).astype(jnp.bfloat16) for width in (4, 7))
    weights = np.asarray([1.0, 0.5, 2.0, 0.0, 1.0], np.float32)
    params = {"kernel": jnp.ones((4, 7))}
    found = by_layers(
        lambda params, batch: layer.apply({"params": params}, batch.inputs),
        lambda outputs, keys: Passes(jnp.asarray(g)[None], jnp.ones((1, 5))),
        params, Batch(jnp.asarray(x), jnp.zeros(5, int), jnp.asarray(weights)), None, params,
    )  # fmt: skip
    squares = np.einsum("nti,nto->nio", *(v.astype(np.float64) for v in (x, g))) ** 2
    wanted = np.tensordot(weights.astype(np.float64), squares, 1)
    np.testing.assert_allclose(found.total["kernel"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found.along, squares.sum(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize(("tokens", "classes", "number"), [((), 10, 1), ((3,), 7, 2)])
def test_labels_are_those_of_jax_whatever_length_is_drawn(tokens, classes, number):
    keys = jax.random.split(jax.random.key(2), 5)
    logits = 3 * jax.random.normal(jax.random.key(1), (5, *tokens, classes))
    scores = label_passes(number)(logits, keys).cotangents
    labels = jnp.argmax(scores, axis=-1)
    for example, (key, own) in enumerate(zip(keys, logits, strict=True)):
        wanted = jax.random.categorical(key, own, shape=(number, *tokens))
        np.testing.assert_array_equal(labels[:, example], wanted)
