"""Gradients of the outputs of a linen model's dense layers, for all examples of a batch at once."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax.curvature.dense_layers import (
    DENSE,
    WITH_KERNEL,
    LayerCall,
    TracedCall,
    traced_calls,
    visiting,
)
from pm_jax.curvature.kernels import Contraction
from pm_jax.types import Array, Batch, InvalidInput, Params


class Tapped(NamedTuple):
    """The pass of a batch through dense layers, and the gradients' way back to them.

    Inputs and gradients of a layer are rows of the matrix that its kernel is: the axes over which
    the kernel does not run, tokens as a rule, are one.

    Attributes:
        outputs: of the model, [N, ...].
        pull_back: from cotangents of the model's outputs to `{layer: (its inputs [N, tokens, in],
            which are the same for all cotangents, and gradients of its outputs [N, tokens, out])}`.
        contractions: `{layer: what it does with its kernel}`.
        padded: whether the model pads its tokens, whose gradients are 0.
    """

    outputs: Array
    pull_back: Callable[[Array], dict[str, tuple[Array, Array]]]
    contractions: dict[str, Contraction]
    padded: bool = False


def tapped(
    outputs_fn: Callable[[Params, Batch], Array],
    params: Params,
    batch: Batch,
    layers: Collection[str],
) -> Tapped:
    """Run a linen model such that gradients of the outputs of `layers` can be computed.

    A tap passes a layer's output on, and hands its gradient and the layer's inputs to two zeros
    whose "gradients" they become: values can leave the body of `nn.remat` on no other way.

    Raises:
        InvalidInput: the model does not call a layer exactly once, or it is none of `DENSE`.
    """
    calls = traced_calls(outputs_fn, params, batch, kinds=WITH_KERNEL)
    if missing := sorted(set(layers) - set(calls)):
        raise InvalidInput(
            f"dense_layers={missing}: are no linen Dense layers of the model that is applied, or "
            "nn.jit has compiled them"
        )
    contractions = {name: _contraction(name, calls[name]) for name in layers}
    for name in layers:
        # Rows that mix examples, as windows of images do, have no gradient of one example.
        if (first := calls[name][0].inputs.shape[0]) != batch.labels.shape[0]:
            raise InvalidInput(
                f"dense_layers={name}: the first axis of its inputs has {first} entries and not "
                f"one for each of {batch.labels.shape[0]} examples; leave it out"
            )

    def run(slots: dict[str, tuple[Array, Array]]) -> Array:
        def add_tap(call: LayerCall) -> Array | None:
            if call.name not in layers:
                return None
            return _tap(call.output, _floating(call.inputs), *slots[call.name])

        with visiting(add_tap, DENSE):
            return outputs_fn(params, batch)

    slots = {
        name: tuple(
            jnp.zeros(x.shape, x.dtype)
            for x in (calls[name][0].output, jax.eval_shape(_floating, calls[name][0].inputs))
        )
        for name in layers
    }
    outputs, pull_back = jax.vjp(run, slots)

    def rows(name: str, values: Array, letters: str, last: list[str]) -> Array:
        """[N, tokens, width] from the values of a layer, with the axes `last` joined."""
        rest = [letter for letter in letters if letter not in last]
        moved = jnp.transpose(values, [letters.index(letter) for letter in [*rest, *last]])
        width = [moved.shape[len(rest) + number] for number in range(len(last))]
        examples = moved.shape[0]
        return moved.reshape(examples, -1, math.prod(width))

    def of_layers(cotangents: Array) -> dict[str, tuple[Array, Array]]:
        (slots,) = pull_back(cotangents)
        return {
            name: (
                rows(name, x, contractions[name].inputs, contractions[name].summed),
                rows(name, gradient, contractions[name].outputs, contractions[name].produced),
            )
            for name, (gradient, x) in slots.items()
        }

    padded = any(call.padded for of_layer in calls.values() for call in of_layer)
    return Tapped(outputs, of_layers, contractions, padded)


def _contraction(name: str, calls: list[TracedCall]) -> Contraction:
    """The contraction of a layer that is called once; raises `InvalidInput` for other layers."""
    call = calls[0]
    contraction = call.linear_map
    if not isinstance(contraction, Contraction) or not contraction.is_matrix_product:
        raise InvalidInput(
            f"dense_layers={name}: is no matrix product over all its axes, as a convolution or a "
            "product for each head; leave it out"
        )
    # One tap for two calls would sum their gradients before they are squared.
    if len(calls) > 1 or not call.once:
        raise InvalidInput(
            f"dense_layers={name}: is called more than once, stacked by nn.scan or nn.vmap, or "
            "within nn.jit; leave it out"
        )
    return contraction


def _floating(x: Any) -> Array:
    """An array that can be a cotangent: whole numbers become float32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


@jax.custom_vjp
def _tap(output: Array, inputs: Array, output_slot: Array, input_slot: Array) -> Array:
    """The output; the gradients of the slots are its own gradient and the inputs."""
    del inputs, output_slot, input_slot
    return output


def _tap_forward(output, inputs, output_slot, input_slot):
    return _tap(output, inputs, output_slot, input_slot), inputs


def _tap_backward(inputs, gradient):
    # The inputs themselves get no gradient from here: `None` stands for zero.
    return gradient, None, gradient, inputs


_tap.defvjp(_tap_forward, _tap_backward)
