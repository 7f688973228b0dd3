"""The outputs that low-rank adapters add to those of a layer, for linen and nnx.

A layer is linear in its kernel W, so with the kernel `W + s A B` it gives its own output plus
`s` times the output of a layer with the kernel A, multiplied by B. Nothing of the size of W is
formed, and nothing of that size is differentiated.
"""

import math
import string

import jax.numpy as jnp

from pm_jax.curvature.kernels import Axes, Contraction, Convolution
from pm_jax.types import Array


class Unfit(Exception):
    """The reason why a branch of an adapter cannot be computed for a layer."""


def branch_output(
    layer: Contraction | Convolution,
    inputs: Array,
    output: Array,
    factors: tuple[Array, Array],
    axes: Axes,
    scale: Array | float,
) -> Array:
    """The output of an adapted layer: its own, plus that of the branch.

    Args:
        layer: what the layer does with its kernel.
        inputs: of the layer.
        output: of the layer without its adapter, whose type the branch is computed in.
        factors: A [*stacked, *inputs, rank] and B [*stacked, rank, *outputs].
        axes: division of the kernel's axes that the factors have.
        scale: s, scalar, or [N] for one of each example, on the first axis of the inputs.

    Raises:
        Unfit: the layer has no such branch.
    """
    a, b = (factor.astype(output.dtype) for factor in factors)
    x = jnp.asarray(inputs, output.dtype)
    scale = jnp.asarray(scale, output.dtype)
    if isinstance(layer, Convolution):
        if axes.stacked or b.ndim != 2:
            raise Unfit("the kernel of a convolution is one matrix, (window, in) x out")
        return output + _convolved(layer, x, a, b, scale).reshape(output.shape)
    rest = len(layer.inputs) - axes.inputs
    # Most layers sum over the last axes of their inputs, and their outputs come last.
    if (
        axes.stacked == 0
        and layer.kernel == layer.inputs[rest:] + layer.outputs[rest:]
        and layer.inputs[:rest] == layer.outputs[:rest]
    ):
        rank = a.shape[-1]
        # Matrices, because a CPU differentiates products of more axes with slow copies.
        low = x.reshape(-1, math.prod(a.shape[:-1])) @ a.reshape(-1, rank)
        # Scaled in the width of the rank, before the product with B.
        low = _scaled(low.reshape(*output.shape[:rest], rank), scale)
        return output + (low.reshape(-1, rank) @ b.reshape(rank, -1)).reshape(output.shape)
    return output + _contracted(layer, x, a, b, axes, scale)


def _scaled(low: Array, scale: Array) -> Array:
    """Scale by s; one of each example [N] meets the first axis of [N, ..., rank]."""
    return low * scale.reshape(scale.shape + (1,) * (low.ndim - scale.ndim))


def _contracted(
    layer: Contraction, x: Array, a: Array, b: Array, axes: Axes, scale: Array
) -> Array:
    """The branch of any einsum, by two einsums."""
    stacked, inputs, outputs = axes.split(layer.kernel)
    rank = next(c for c in string.ascii_letters if c not in "".join(layer))
    # The first product keeps all axes that are in the outputs or that B has too.
    kept = [
        c
        for c in dict.fromkeys([*layer.inputs, *stacked, *inputs])
        if c in layer.outputs or c in stacked or c in outputs
    ]
    if scale.ndim and kept[0] != layer.inputs[0]:
        raise Unfit("the layer sums over the axis of the examples, which have a scale each")
    low_axes = "".join([*kept, rank])
    a_axes, b_axes = "".join([*stacked, *inputs, rank]), "".join([*stacked, rank, *outputs])
    low = jnp.einsum(f"{layer.inputs},{a_axes}->{low_axes}", x, a)
    return jnp.einsum(f"{low_axes},{b_axes}->{layer.outputs}", _scaled(low, scale), b)


def _convolved(layer: Convolution, x: Array, a: Array, b: Array, scale: Array) -> Array:
    """The branch of a convolution: one with A, and a product with B at every place."""
    groups, rank = layer.groups, a.shape[-1]
    # Every group of inputs meets the same A; the outputs of group g meet their own columns of B.
    low = layer(x, jnp.tile(a, groups))
    low = _scaled(low.reshape(*low.shape[:-1], groups, rank), scale)
    return jnp.einsum("...gr,rgo->...go", low, b.reshape(rank, groups, -1))
