"""Low-rank adapters on the layers of nnx modules.

    def loss_fn(adapters, model, batch):
        adapted = nnx_adapters.with_adapters(model, adapters)
        return cross_entropy(adapted(batch.images), batch.labels)

    adapters = pm_jax.lora.init(key, nnx.state(model, nnx.Param), ".*kernel", 4, module=model)
    gradients = nnx.grad(loss_fn)(adapters, model, batch)

nnx knows no interceptors, which `pm_jax.lora.branch` uses in linen. A copy of the module takes
their place, whose layers add the branch.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pm_jax import branches, lora
from pm_jax.curvature.kernels import Axes, Contraction, Convolution
from pm_jax.types import Array, InvalidInput

WITH_KERNEL = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)
"""All layers of nnx that pm_jax knows to be linear in their kernel."""


class AdapterScale(nnx.Variable):
    """Scale of an adapter's branch; it does not train."""


def _adapted_call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Array:
    """The output of the layer that an adapted one is a subclass of, plus that of the branch."""
    output = super(type(self), self).__call__(inputs, *args, **kwargs)
    equation = args[0] if args else kwargs.get("einsum_str")
    adapter = lora.Adapter(self.lora_a[...], self.lora_b[...])
    axes = lora.axes_of_adapter("kernel", adapter, self.kernel[...].shape)
    layer, scale = _linear_map(self, jnp.ndim(inputs), equation), self.lora_scale[...]
    try:
        if layer is None:
            raise branches.Unfit("its kernel is masked, or an ellipsis stands for its axes")
        return branches.branch_output(layer, inputs, output, adapter, axes, scale)
    except branches.Unfit as reason:
        raise InvalidInput(
            f"adapters: have no branch in {type(self).__name__} ({reason}); use lora.fold"
        ) from None


# Each has one base, because a layer that becomes adapted can change to a class of its layout only.
class AdaptedLinear(nnx.Linear):
    """`nnx.Linear` with the branch of an adapter."""

    __call__ = _adapted_call


class AdaptedLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with the branch of an adapter."""

    __call__ = _adapted_call


class AdaptedEinsum(nnx.Einsum):
    """`nnx.Einsum` with the branch of an adapter."""

    __call__ = _adapted_call


class AdaptedConv(nnx.Conv):
    """`nnx.Conv` with the branch of an adapter."""

    __call__ = _adapted_call


_ADAPTED: dict[type, type] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Conv: AdaptedConv,
}


def with_adapters(
    module: nnx.Module, adapters: Mapping[str, Any], scale: Array | float = 1.0
) -> nnx.Module:
    """The module with layers that add `scale (x A) B` to their output.

    Equal to the module with the kernels of `lora.fold(params, adapters, scale)`, and cheaper to
    train: the backward pass forms gradients of A and B only. Layers are `nnx.Linear`,
    `nnx.LinearGeneral`, `nnx.Einsum` and `nnx.Conv`, also stacked by `nnx.vmap` for `nnx.scan`.

    Args:
        module: the nnx module, which stays as it is.
        adapters: `{path of a kernel: Adapter or AdaptedKernel}`; other leaves have no branch. The
            kernel of an `AdaptedKernel` takes the place of the layer's own.
        scale: scalar, or [N] for one scale per example; an `AdaptedKernel` has its own.

    Returns:
        A copy that shares all variables with the module, so that dropout keys and statistics move
        in both. Its factors are of the type `nnx.LoRAParam`.

    Raises:
        InvalidInput: an adapter on no such layer, or that does not fit its kernel.

    Example:
        >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> adapters = {"kernel": lora.Adapter(jnp.ones((2, 1)), jnp.ones((1, 3)))}
        >>> (with_adapters(layer, adapters)(jnp.ones((1, 2))) - layer(jnp.ones((1, 2)))).tolist()
        [[2.0, 2.0, 2.0]]
    """
    copy = nnx.clone(module, variables=False)
    layers = _layers(copy)
    for path, (adapter, kernel, factor) in lora.branches_of(adapters, scale).items():
        layer = layers.get(path)
        if layer is None:
            raise InvalidInput(_no_layer(path, module))
        own = layer.kernel[...]
        # Raises where the factors do not fit.
        lora.axes_of_adapter(path, adapter, own.shape)
        if kernel is not None:
            layer.kernel = nnx.Param(kernel)
        # Where layers are stacked, `nnx.scan` takes a slice of all that they have.
        factor = jnp.asarray(factor, jnp.float32)
        stack = own.shape[: own.ndim - _own_axes(layer)]
        layer.lora_scale = AdapterScale(jnp.broadcast_to(factor, (*stack, *factor.shape)))
        layer.lora_a, layer.lora_b = map(nnx.LoRAParam, adapter)
        layer.__class__ = _ADAPTED[type(layer)]
    return copy


def kernel_axes(module: nnx.Module) -> dict[str, Axes]:
    """How the axes of the kernels of a module's layers divide, `{path: Axes}`.

    Example:
        >>> kernel_axes(nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0)))
        {'kernel': Axes(stacked=0, inputs=2)}
    """
    found = {}
    for path, layer in _layers(module).items():
        match layer:
            case nnx.Linear():
                axes: Axes | None = Axes(0, 1)
            case nnx.LinearGeneral():
                axes = Axes(len(layer.batch_axis), len(layer.in_features))
            case nnx.Conv():
                axes = Axes(0, len(layer.kernel_size) + 1)
            case _:
                equation = Contraction.einsum(layer.einsum_str, len(layer.einsum_str))
                axes = equation and equation.matrices
        if axes is not None:
            # Layers that `nnx.vmap` has made are stacked.
            above = layer.kernel[...].ndim - _own_axes(layer)
            found[path] = Axes(axes.stacked + above, axes.inputs)
    return found


def _layers(module: nnx.Module) -> dict[str, Any]:
    """Layers that can have adapters, by the paths of their kernels."""
    return {
        path: layer
        for path, layer in _modules(module).items()
        # Subclasses may compute in another way.
        if type(layer) in WITH_KERNEL
    }


def _modules(module: nnx.Module) -> dict[str, nnx.Module]:
    return {"/".join([*map(str, path), "kernel"]): part for path, part in nnx.iter_modules(module)}


def _no_layer(path: str, module: nnx.Module) -> str:
    """Why an adapter would have no effect on a module."""
    if path in (modules := _modules(module)):
        return (
            f"adapters={path}: belongs to a {type(modules[path]).__name__}; a branch is for nnx "
            "Linear, LinearGeneral, Einsum and Conv layers themselves, use lora.fold for others"
        )
    near = difflib.get_close_matches(path, _layers(module), 3, 0.0)
    return (
        f"adapters={path}: is no kernel of a layer of the {type(module).__name__}; the nearest are "
        f"{', '.join(near) or 'none'}; name the path within the module"
    )


def _own_axes(layer: Any) -> int:
    """Number of axes of the kernel that a layer sees when it is called."""
    match layer:
        case nnx.Linear():
            return 2
        case nnx.LinearGeneral():
            return len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
        case nnx.Conv():
            return len(layer.kernel_size) + 2
    return len(layer.kernel_shape)


def _linear_map(layer: Any, ndim: int, equation: str | None) -> Contraction | Convolution | None:
    """Describe how a layer multiplies its inputs, of `ndim` axes, by its kernel."""
    match layer:
        case nnx.Linear():
            return Contraction.general(ndim, (-1,), (), 1)
        case nnx.LinearGeneral():
            features = len(layer.out_features)
            return Contraction.general(ndim, layer.axis, tuple(layer.batch_axis), features)
        case nnx.Conv():
            return Convolution.of(layer)
    return Contraction.einsum(equation or layer.einsum_str, ndim)
