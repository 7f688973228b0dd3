"""The dense layers of a linen model: their inputs, their outputs' gradients and their kernels.

Everything that looks inside a linen model goes through `visiting`, which calls back whenever the
model applies a layer. Layers are named by the path of their module, "a/b" for "a/b/kernel".
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.types import Array, Batch, Params, PyTree


class LayerCall(NamedTuple):
    """One application of a layer while a model runs.

    Attributes:
        name: path of the layer, "a/b"; "" for a model that is one layer.
        layer: the linen module.
        inputs: its first argument.
        output: the result.
    """

    name: str
    layer: nn.Module
    inputs: Any
    output: Any

    @property
    def kernel(self) -> str:
        """Path of the layer's kernel, if it has one."""
        return f"{self.name}/kernel".lstrip("/")


def visiting(
    visit: Callable[[LayerCall], Array | None], kind: type[nn.Module] = nn.Dense
) -> AbstractContextManager:
    """Context in which a linen model calls `visit` at every layer of a kind that it applies.

    An array that `visit` returns replaces the layer's output.

    Example:
        >>> layer, params = nn.Dense(1, use_bias=False), {"params": {"kernel": jnp.ones((2, 1))}}
        >>> with visiting(lambda call: 2 * call.output):
        ...     layer.apply(params, jnp.ones((1, 2))).tolist()
        [[4.0]]
    """

    def interceptor(next_fn, args, kwargs, context):
        output = next_fn(*args, **kwargs)
        # Modules have other methods, such as `setup`, which compute no outputs.
        if context.method_name != "__call__" or not isinstance(context.module, kind):
            return output
        inputs = args[0] if args else None
        call = LayerCall("/".join(context.module.path), context.module, inputs, output)
        replacement = visit(call)
        return output if replacement is None else replacement

    return nn.intercept_methods(interceptor)


def layers_called_once(module: nn.Module, inputs: PyTree) -> tuple[str, ...]:
    """Names of the dense layers that a module calls exactly once, in the order of the calls."""
    calls: list[str] = []
    with visiting(lambda call: calls.append(call.name)):
        # Only shapes are needed, so nothing is computed.
        jax.eval_shape(module.init, jax.random.key(0), inputs)
    # A dict instead of a set: it keeps the order of the calls.
    return tuple(name for name in dict.fromkeys(calls) if calls.count(name) == 1)


def kernel_paths(params: Params) -> tuple[str, ...]:
    """Paths of the dense kernels [in, out] of a parameter tree, by linen's names."""
    leaves = trees.leaves_by_path(params)
    # Kernels of convolutions have the same name and more axes.
    return tuple(p for p, x in leaves.items() if p.split("/")[-1] == "kernel" and x.ndim == 2)


def layer_of(path: str) -> str:
    """Name of the layer that a leaf belongs to: "a/b" for "a/b/kernel", "" for "kernel"."""
    return path.rpartition("/")[0]


def inputs_of(apply: Callable[[], Any], layer: str) -> Array:
    """Inputs of one dense layer while `apply()` runs the model, float32; those of its first call.

    Raises:
        ValueError: the model calls no dense layer of that name.
    """
    inputs: dict[str, Array] = {}

    # No lambda: an array that it returned would replace the layer's output.
    def remember(call: LayerCall) -> None:
        inputs.setdefault(call.name, call.inputs)

    with visiting(remember):
        apply()
    if layer not in inputs:
        raise ValueError(f"layer={layer!r}: no Dense layer of the model that is called")
    return inputs[layer].astype(jnp.float32)


def input_moments(
    apply: Callable[[], Any], paths: Collection[str], weights: Array
) -> dict[str, tuple[Array, Array]]:
    """Sum the outer products of dense layers' inputs over the N examples that `apply` runs on.

    By path of a kernel these are `sum_n weight_n x_n x_n^T` [in, in], over token axes and all calls
    of a layer, and the sum of the weights.

    Raises:
        ValueError: a kernel of no dense layer that the model calls.
    """
    moments: dict[str, tuple[Array, Array]] = {}

    def add(call: LayerCall) -> None:
        path = call.kernel
        if path not in paths:
            return
        # Layers may compute in bfloat16, in which sums over a batch lose their small terms.
        x = jnp.asarray(call.inputs, jnp.float32)
        by_example = weights.reshape(-1, *[1] * (x.ndim - 1))
        rows = (x * by_example).reshape(-1, x.shape[-1])
        products = jnp.matmul(rows.T, x.reshape(rows.shape), precision="highest")
        # A token counts as an example of its own.
        count = jnp.sum(jnp.broadcast_to(by_example, (*x.shape[:-1], 1)))
        total, examples = moments.get(path, (0.0, 0.0))
        moments[path] = total + products, examples + count

    with visiting(add):
        apply()
    if missing := [path for path in paths if path not in moments]:
        raise ValueError(f"paths={missing}: no Dense layer of the model that is called")
    # In the order of `paths`, which does not depend on the order of the calls.
    return {path: moments[path] for path in paths}


class Tapped(NamedTuple):
    """The pass of a batch through dense layers, and the gradients' way back to them.

    Attributes:
        outputs: of the model, [N, ...].
        inputs: `{layer: its inputs [N, ..., in]}`.
        pull_back: from cotangents of the model's outputs to `{layer: gradients of the layer's
            outputs [N, ..., out]}`.
    """

    outputs: Array
    inputs: dict[str, Array]
    pull_back: Callable[[Array], dict[str, Array]]


def tapped(
    outputs_fn: Callable[[Params, Batch], Array],
    params: Params,
    batch: Batch,
    layers: Collection[str],
) -> Tapped:
    """Run a linen model such that gradients of the outputs of `layers` can be computed.

    A tap is a zero that is added to a layer's output: the gradient with respect to the tap is the
    gradient with respect to that output, for every example by itself.

    Raises:
        ValueError: the model does not call a layer exactly once.
    """

    def run(taps: dict[str, Array] | None) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        calls: dict[str, tuple[Array, Array]] = {}

        def add_tap(call: LayerCall) -> Array | None:
            if (name := call.name) not in layers:
                return None
            # One tap for two calls would sum their gradients before they are squared.
            if name in calls:
                raise ValueError(f"dense_layers={name}: is called more than once; leave it out")
            calls[name] = call.inputs, call.output
            return None if taps is None else call.output + taps[name]

        with visiting(add_tap):
            outputs = outputs_fn(params, batch)
        return outputs, calls

    # The taps have the shapes of the layers' outputs, which only a first run tells.
    shapes = jax.eval_shape(lambda: run(None)[1])
    if missing := sorted(set(layers) - set(shapes)):
        raise ValueError(
            f"dense_layers={missing}: are no linen Dense layers of the model that is applied"
        )
    taps = {name: jnp.zeros(output.shape, output.dtype) for name, (_, output) in shapes.items()}
    outputs, pull_back, calls = jax.vjp(run, taps, has_aux=True)
    inputs = {name: x for name, (x, _) in calls.items()}
    return Tapped(outputs, inputs, lambda cotangents: pull_back(cotangents)[0])
