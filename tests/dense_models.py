"""Linen models with one kind of dense layer each, for tests of adapters and of curvature."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

TOKENS, VECTORS, IMAGES, SERIES = (3, 4, 6), (3, 6), (3, 5, 6, 4), (3, 7, 4)


class Step(nn.Module):
    """A residual step, as `nn.scan` wants it."""

    layer: str = "dense"

    @nn.compact
    def __call__(self, x, _):
        match self.layer:
            case "dense":
                y = nn.Dense(x.shape[-1], name="key")(x)
            case "attention":
                y = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            case "conv":
                y = nn.Conv(x.shape[-1], (3,), name="conv")(x)
            case "dropout":
                y = nn.Dense(x.shape[-1], name="key")(nn.Dropout(0.5, deterministic=False)(x))
        return x + nn.tanh(y), None


class Scanned(nn.Module):
    """Steps stacked by `nn.scan`, with kernels [4, ...], also with rematerialisation."""

    layer: str = "dense"
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        step = nn.remat(Step, prevent_cse=False) if self.remat else Step
        stack = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=4,
        )
        return nn.Dense(2, name="head")(stack(self.layer, name="blocks")(x, None)[0])


class Twofold(nn.Module):
    """A stack of stacks, with kernels [2, 4, in, out]."""

    @nn.compact
    def __call__(self, x):
        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                inner = nn.scan(Step, {"params": 0}, split_rngs={"params": True}, length=4)
                return inner(name="inner")(x, None)

        outer = nn.scan(Outer, {"params": 0}, split_rngs={"params": True}, length=2)
        return outer(name="outer")(x, None)[0]


class Ensemble(nn.Module):
    """Three members by `nn.vmap`, with a kernel each."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Dense, in_axes=None, out_axes=1, axis_size=3,
            variable_axes={"params": 0}, split_rngs={"params": True},
        )  # fmt: skip
        return members(2, name="members")(x)


class Remat(nn.Module):
    """Layers whose class is transformed, and a block that is."""

    @nn.compact
    def __call__(self, x):
        x, _ = nn.remat(Step)(name="step")(x, None)
        return nn.remat(nn.Dense)(2, name="head")(x)


class BySetup(nn.Module):
    """Submodules from `setup`, one of them used twice, and dropout."""

    def setup(self):
        self.shared = nn.Dense(6)
        self.stack = Scanned("dropout")

    def __call__(self, x):
        return self.stack(self.shared(nn.tanh(self.shared(x))))


MODELS = {
    "dense": (nn.Dense(5), TOKENS),
    "dense without bias": (nn.Dense(5, use_bias=False), VECTORS),
    "general, one axis to two": (nn.DenseGeneral((2, 3)), TOKENS),
    "general, two axes to one": (nn.DenseGeneral(5, axis=(-2, -1)), TOKENS),
    "general, an axis in the middle": (nn.DenseGeneral(5, axis=1), TOKENS),
    "general, a kernel for each of an axis": (nn.DenseGeneral(5, batch_dims=(0,)), TOKENS),
    "einsum": (nn.Einsum((6, 2, 3), "btd,dnh->btnh"), TOKENS),
    "einsum with dots": (nn.Einsum((6, 5), "...d,dk->...k"), TOKENS),
    "einsum, a kernel for each head": (nn.Einsum((2, 6, 3), "btd,ndh->btnh"), TOKENS),
    "einsum, outputs first": (nn.Einsum((5, 6), "btd,vd->btv", use_bias=False), TOKENS),
    "einsum, heads last": (nn.Einsum((6, 4, 5), "btd,dto->bto"), TOKENS),
    "attention": (nn.MultiHeadDotProductAttention(2), TOKENS),
    "convolution": (nn.Conv(5, (3, 2), strides=2), IMAGES),
    "convolution, dilated": (nn.Conv(5, (2, 3), kernel_dilation=(2, 1), padding=1), IMAGES),
    "convolution, of dilated inputs": (nn.Conv(5, 3, padding=[(1, 2)], input_dilation=2), SERIES),
    "convolution in groups": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGES),
    "convolution by channel": (nn.Conv(8, (3, 3), feature_group_count=4), IMAGES),
    "convolution, circular": (nn.Conv(5, (3, 4), padding="CIRCULAR"), IMAGES),
    "convolution, reflecting": (nn.Conv(5, (4,), padding="REFLECT"), SERIES),
    "convolution, causal": (nn.Conv(5, (3,), padding="CAUSAL", kernel_dilation=2), SERIES),
    "convolution of more batch axes": (nn.Conv(5, (2,), padding="VALID"), IMAGES),
    "scan": (Scanned(), VECTORS),
    "scan of scans": (Twofold(), VECTORS),
    "scan of attention": (Scanned("attention"), TOKENS),
    "scan of convolutions": (Scanned("conv"), SERIES),
    "remat": (Remat(), VECTORS),
    "scan of remat": (Scanned(remat=True), VECTORS),
    "scan of remat of attention": (Scanned("attention", remat=True), TOKENS),
    "ensemble": (Ensemble(), VECTORS),
    "setup": (BySetup(), VECTORS),
}
"""Models and the shapes of their inputs."""


@functools.cache
def example(name):
    """A model, its parameters with biases that are not 0, and inputs."""
    model, shape = MODELS[name]
    inputs = jax.random.normal(jax.random.key(1), shape)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    params = model.init(rngs, inputs)["params"]
    leaves, structure = jax.tree.flatten(params)
    leaves = [leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape) for leaf in leaves]
    return model, jax.tree.unflatten(structure, leaves), inputs
