"""Squared gradients and Kronecker factors of every kind of dense layer, against general ways."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pm_jax
from pm_jax import curvature, trees
from pm_jax.curvature import dense_layers, kronecker, squared_gradients
from pm_jax.types import Batch, InvalidInput
from tests.dense_models import MODELS, TOKENS, VECTORS, Remat, Scanned
from tests.small_runs import slow

CLASSES = 4


class Classifier(nn.Module):
    """A layer of some kind between two dense ones, and class logits of all that it gives."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(x.shape[-1], name="first")(x))
        y = self.middle()(x)
        return nn.Dense(CLASSES, name="head")(nn.tanh(y).reshape(len(x), -1))

    @nn.nowrap
    def middle(self):
        return {
            "dense": lambda: nn.Dense(5, name="middle"),
            "general, one axis to two": lambda: nn.DenseGeneral((2, 3), name="middle"),
            "general, two axes to one": lambda: nn.DenseGeneral(5, (-2, -1), name="middle"),
            "general, an axis in the middle": lambda: nn.DenseGeneral(5, 1, name="middle"),
            "einsum": lambda: nn.Einsum((6, 2, 3), "btd,dnh->btnh", name="middle"),
            "einsum with dots": lambda: nn.Einsum((6, 5), "...d,dk->...k", name="middle"),
            "einsum, outputs first": lambda: nn.Einsum((5, 6), "btd,vd->btv", name="middle"),
            "einsum, heads between": lambda: nn.Einsum((2, 6, 3), "btd,ndh->bhtn", name="middle"),
            "remat": lambda: nn.remat(nn.Dense)(5, name="middle"),
            "remat of general": lambda: nn.remat(nn.DenseGeneral)((2, 3), name="middle"),
            "checkpoint of a checkpoint": lambda: nn.remat(nn.remat(nn.Dense))(5, name="middle"),
            "whole numbers": lambda: _OfWholeNumbers(name="middle"),
        }[self.kind]()


class _OfWholeNumbers(nn.Module):
    """A dense layer on integers, in a module of its own."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="of")(jnp.round(3 * x).astype(jnp.int32)) + x[..., :1]


KINDS = [
    "dense", "general, one axis to two", "general, two axes to one",
    slow("general, an axis in the middle"), slow("einsum"), slow("einsum with dots"),
    "einsum, outputs first", slow("einsum, heads between"), "remat", slow("remat of general"),
    slow("checkpoint of a checkpoint"), slow("whole numbers"),
]  # fmt: skip


def problem(kind, examples=3):
    model = Classifier(kind)
    inputs = jax.random.normal(jax.random.key(1), (examples, *TOKENS[1:]))
    tree = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    params = trees.leaves_by_path(tree)
    params = {k: v + 0.1 * jnp.cos(jnp.arange(v.size)).reshape(v.shape) for k, v in params.items()}

    def outputs(some, batch):
        leaves = trees.replace(trees.replace(tree, params), some)
        return model.apply({"params": leaves}, batch.inputs)

    return outputs, params, Batch(inputs, jnp.arange(examples) % CLASSES)


def passes(logits, _):
    p = jax.nn.softmax(logits)
    return squared_gradients.Passes(
        jnp.stack([p - jax.nn.one_hot(c, CLASSES)[None] for c in range(CLASSES)]), p.T
    )


@pytest.mark.parametrize("kind", KINDS)
def test_by_layers_equals_by_vmap(kind):
    outputs, params, batch = problem(kind)
    batch = batch._replace(weights=jnp.asarray([1.0, 0.0, 2.0]))
    middle = {path: leaf for path, leaf in params.items() if path.startswith("middle")}
    direction = jax.tree.map(lambda v: jnp.sin(1.0 + jnp.arange(v.size)).reshape(v.shape), middle)
    found, wanted = (
        jax.jit(lambda way=way: way(outputs, passes, middle, batch, None, direction))()
        for way in (squared_gradients.by_layers, squared_gradients.by_vmap)
    )
    for path in middle:
        scale = float(jnp.abs(wanted.total[path]).max())
        assert scale > 0 and found.total[path].shape == middle[path].shape
        np.testing.assert_allclose(
            found.total[path], wanted.total[path], rtol=1e-5, atol=1e-6 * scale
        )
    np.testing.assert_allclose(found.along, wanted.along, rtol=1e-5)


@pytest.mark.parametrize("kind", ["general, one axis to two", "general, two axes to one"])
def test_kronecker_factors_of_a_general_layer_are_those_of_the_dense_one(kind):
    outputs, params, batch = problem(kind)
    kernel = params["middle/kernel"]
    found = kronecker.factors(outputs, passes, {"middle/kernel": kernel}, batch)

    class AsDense(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(6, name="first")(x))
            if kind.startswith("general, two"):
                x = x.reshape(len(x), -1)
            y = nn.Dense(params["middle/bias"].size, name="middle")(x)
            return nn.Dense(CLASSES, name="head")(nn.tanh(y).reshape(len(x), -1))

    width = params["middle/bias"].size
    matrix = kernel.reshape(-1, width)
    dense = {**params, "middle/kernel": matrix, "middle/bias": params["middle/bias"].reshape(-1)}
    tree = jax.jit(AsDense().init)(jax.random.key(0), batch.inputs)["params"]

    def dense_outputs(some, batch):
        leaves = trees.replace(tree, {**dense, **some})
        return AsDense().apply({"params": leaves}, batch.inputs)

    wanted = kronecker.factors(dense_outputs, passes, {"middle/kernel": matrix}, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


def test_kronecker_of_one_example_is_the_exact_curvature_of_a_general_kernel():
    # One example, one token, one label: the product of the factors is the Fisher matrix.
    model = nn.DenseGeneral((2, 2), use_bias=False)
    inputs, kernel = jnp.asarray([[1.0, -2.0, 0.5]]), jnp.cos(jnp.arange(12.0)).reshape(3, 2, 2)

    def outputs(params, batch):
        return model.apply({"params": params}, batch.inputs).reshape(1, -1)

    gradient = jnp.asarray([[[1.0, 2.0, -1.0, 0.5]]])
    one = lambda *_: squared_gradients.Passes(gradient, jnp.ones((1, 1)))  # noqa: E731
    sums = kronecker.factors(outputs, one, {"kernel": kernel}, Batch(inputs, jnp.zeros(1, int)))
    quadratic = kronecker.KroneckerQuadratic.at(
        {"kernel": kernel}, *jax.tree.map(lambda x: x[None], tuple(sums)), {}
    )
    row = np.einsum("i,o->io", inputs[0], gradient[0, 0]).ravel()
    for seed in range(3):
        step = np.random.default_rng(seed).normal(size=12)
        direction = {"kernel": jnp.asarray(step.reshape(3, 2, 2), jnp.float32)}
        product = quadratic.curvature.times(direction)["kernel"]
        assert product.shape == kernel.shape
        np.testing.assert_allclose(product.ravel(), row * (row @ step), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["general, two axes to one", "remat", "einsum"])
def test_the_measure_takes_kernels_of_more_axes(kind):
    outputs, params, batch = problem(kind)
    direction = jax.tree.map(lambda v: jnp.sin(1.0 + jnp.arange(v.size)).reshape(v.shape), params)

    def logits(leaves, inputs):
        return outputs(leaves, Batch(inputs, batch.labels))

    measure = pm_jax.kronecker.fisher_kronecker(logits, ("middle/kernel", "head/kernel"))
    found = pm_jax.measure_all(measure, params, batch, 3, direction)
    exact = pm_jax.measure_all(pm_jax.gauss_newton(logits), params, batch, 3, direction)
    np.testing.assert_allclose(found.along, exact.along, rtol=1e-5)
    sums = kronecker.factors(outputs, passes, trees.select(params, ("middle/kernel",)), batch)
    quadratic = found.quadratic.curvature
    np.testing.assert_allclose(
        3 * quadratic.inputs["middle/kernel"][0], sums.inputs["middle/kernel"], rtol=1e-5, atol=1e-6
    )
    memory = kronecker.KroneckerQuadratic.zero(params, ("middle/kernel", "head/kernel"), slots=2)
    both = memory.plus(found.quadratic)
    np.testing.assert_allclose(
        both.curvature_along(direction), found.quadratic.curvature_along(direction), rtol=1e-5
    )


COMPILED = nn.jit(nn.Dense)


class Loops(nn.Module):
    """A dense layer that runs many times in one trace."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "scan over layers":
            x = Scanned(name="looped")(x)
        elif self.how == "scan with one kernel":
            x, _ = nn.scan(
                _Carry, variable_broadcast="params", split_rngs={"params": False}, length=3
            )(name="looped")(x, None)
        elif self.how == "vmap":
            x = nn.vmap(
                nn.Dense, variable_axes={"params": None}, split_rngs={"params": False},
                in_axes=1, out_axes=1,
            )(6, name="looped")(jnp.stack([x, 2 * x], 1)).mean(1)  # fmt: skip
        elif self.how == "convolution":
            x = nn.Conv(6, (1,), name="looped")(x[:, None])[:, 0]
        elif self.how == "heads":
            x = nn.Einsum((3, 2, 2), "bnd,nde->bne", name="looped")(x.reshape(-1, 3, 2))
            x = x.reshape(len(x), 6)
        elif self.how == "twice":
            layer = nn.Dense(6, name="looped")
            x = layer(layer(x))
        elif self.how == "windows":
            x = nn.Dense(3, name="looped")(x.reshape(-1, 3)).reshape(len(x), 6)
        elif self.how == "compiled":
            x = COMPILED(6, name="looped")(x)
        return nn.Dense(CLASSES, name="head")(x)


class _Carry(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="key")(x)), None


REFUSED = {
    "scan over layers": ("looped/blocks/key", "stacked by nn.scan"),
    "scan with one kernel": ("looped/key", "more than once"),
    "vmap": ("looped", "more than once"),
    "convolution": ("looped", "no matrix product"),
    "heads": ("looped", "no matrix product"),
    "twice": ("looped", "more than once"),
    "compiled": ("looped", "nn.jit"),
    "windows": ("looped", "6 entries and not one for each of 3 examples"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", REFUSED)
def test_layers_that_are_not_covered_are_refused_by_name(how):
    layer, message = REFUSED[how]
    model, inputs = Loops(how), jnp.ones(VECTORS)
    tree = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    params = trees.leaves_by_path(tree)

    def outputs(some, batch):
        return model.apply({"params": trees.replace(tree, some)}, batch.inputs)

    batch = Batch(inputs, jnp.zeros(3, int))
    kernel = {f"{layer}/kernel": params[f"{layer}/kernel"]}
    for way in (squared_gradients.by_layers, kronecker.factors):
        with pytest.raises(InvalidInput, match=f"dense_layers=.*{layer}.*: .*{message}"):
            way(outputs, passes, kernel, batch)
    # They are not among the layers that a caller can choose from, and the general way covers them.
    names = dense_layers.layers_called_once(model, inputs, dense_layers.DENSE)
    assert layer not in names or how in ("heads", "windows")
    assert "head" in names
    measure = curvature.fisher_exact(
        lambda p, x: outputs(p, Batch(x, batch.labels)), dense_layers=("head",)
    )
    plain = curvature.fisher_exact(lambda p, x: outputs(p, Batch(x, batch.labels)))
    found, wanted = (
        pm_jax.measure_all(m, params, batch, 3).quadratic.diagonal for m in (measure, plain)
    )
    for path in params:
        np.testing.assert_allclose(found[path], wanted[path], rtol=1e-4, atol=1e-6)


def test_a_kernel_that_is_no_known_matrix_is_refused_before_anything_is_measured():
    params = {"w": {"kernel": jnp.ones((4, 2, 3))}, "v": {"kernel": jnp.ones((7, 2, 3)),
              "bias": jnp.ones((7, 3))}}  # fmt: skip
    for path, message in (("w/kernel", "may be"), ("v/kernel", "stacks several matrices")):
        with pytest.raises(InvalidInput, match=f"kernels={path}: .*{message}"):
            kronecker.KroneckerQuadratic.zero(params, (path,), 2)


def test_a_kernel_with_its_outputs_first_has_no_factors():
    outputs, params, batch = problem("einsum, outputs first")
    with pytest.raises(InvalidInput, match="kernels=middle/kernel: .*outputs before"):
        kronecker.factors(outputs, passes, trees.select(params, ("middle/kernel",)), batch)


def test_inputs_are_those_of_the_layer_and_not_of_its_transformed_class():
    model, inputs = Remat(), jnp.ones(VECTORS)
    params = jax.jit(model.init)(jax.random.key(0), inputs)
    calls = []
    with dense_layers.visiting(lambda call: calls.append(call.name)):
        model.apply(params, inputs)
    assert calls == ["step/key", "head"]
    assert dense_layers.layers_called_once(model, inputs) == ("step/key", "head")


@pytest.mark.parametrize("name", ["attention", "einsum", "scan of attention"])
def test_one_list_of_known_layers(name):
    model, shape = MODELS[name]
    names = dense_layers.layers_called_once(model, jnp.ones(shape), dense_layers.DENSE)
    wanted = {
        "attention": {"query", "key", "value", "out"}, "einsum": {""},
        # What `nn.scan` stacks runs more than once.
        "scan of attention": {"head"},
    }  # fmt: skip
    assert set(names) == wanted[name]
