"""The division of a kernel's axes into inputs and outputs, which a low-rank adapter needs.

It follows from the shapes of kernel and bias, is given, or is read off a module.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from pm_jax import trees
from pm_jax.curvature import dense_layers
from pm_jax.curvature.kernels import Axes, Convolution, Shape, axes_of
from pm_jax.types import Array, InvalidInput, Params

AxesCount = int | Mapping[str, int] | None
"""A number of axes for all kernels, or by regular expressions over their paths."""


def adapted_axes(
    params: Params,
    pattern: str | tuple[str, ...],
    rank: int,
    *,
    input_axes: AxesCount = None,
    stacked_axes: AxesCount = None,
    module: Any = None,
    inputs: tuple = (),
) -> dict[str, Axes]:
    """How the axes of the kernels divide that a pattern selects for adapters, `{path: Axes}`.

    The arguments are those of `pm_jax.lora.init`.

    Raises:
        InvalidInput: no match, a leaf that is no dense kernel or may be several ones, or a rank
            below 1 or above the smaller side of a kernel.
    """
    paths = trees.match_paths(params, pattern) if isinstance(pattern, str) else pattern
    leaves = trees.leaves_by_path(params)
    trees.select(leaves, paths)
    seen = {} if module is None else _axes_by_module(module, leaves, inputs)
    found = {}
    for path in paths:
        given = _axes_given(input_axes, path), _axes_given(stacked_axes, path)
        try:
            if path in seen and given == (None, None):
                found[path] = seen[path]
            else:
                found[path] = axes_of(leaves, path, *given)
        except InvalidInput as error:
            matching = f"pattern={pattern!r}: matches " if isinstance(pattern, str) else ""
            raise InvalidInput(f"{matching}{error}") from None
        smaller = min(found[path].sides(leaves[path].shape))
        if not 1 <= rank <= smaller:
            raise InvalidInput(f"rank={rank}: must lie in 1..{smaller}, the smaller side of {path}")
    return found


def _axes_given(count: AxesCount, path: str) -> int | None:
    if not isinstance(count, Mapping):
        return count
    return next((n for pattern, n in count.items() if re.fullmatch(pattern, path)), None)


def _axes_by_module(module: Any, leaves: Mapping[str, Array], inputs: tuple) -> dict[str, Axes]:
    """How a model uses its kernels: from a trace of a linen module, or the layers of an nnx one."""
    if not isinstance(module, nn.Module):
        from pm_jax.integrations import nnx_adapters

        return nnx_adapters.kernel_axes(module)
    if not inputs:
        raise InvalidInput("inputs=(): a linen module needs the arguments of a call; give inputs=")
    calls = dense_layers.traced_calls(
        # No arguments of the trace, because flags among the inputs must stay Python's.
        lambda: module.init(jax.random.key(0), *inputs),
        kinds=dense_layers.WITH_KERNEL,
    )
    found = {}
    for name, (call, *_) in calls.items():
        path, axes = f"{name}/kernel".lstrip("/"), None
        if isinstance(call.linear_map, Convolution):
            axes = Axes(0, len(call.kernel_shape) - 1)
        elif call.linear_map is not None:
            axes = call.linear_map.matrices
        if axes is not None and path in leaves:
            # `nn.scan` has taken its axes off the kernel that the layer sees.
            above = len(leaves[path].shape) - len(call.kernel_shape)
            found[path] = Axes(axes.stacked + above, axes.inputs)
    return found


def axes_of_adapter(path: str, adapter: tuple[Array, Array], kernel: Shape | None = None) -> Axes:
    """How the axes of an adapter divide: `[*stacked, *inputs, rank]`, `[*stacked, rank, *outputs]`.

    Args:
        path: of the kernel, for messages.
        adapter: the factors A and B.
        kernel: shape of the kernel, or `None`.

    Raises:
        InvalidInput: the factors do not fit each other or the kernel; without the kernel, more than
            one division is possible.
    """
    a, b = (factor.shape for factor in adapter)
    possible = [
        Axes(stacked, len(a) - 1 - stacked)
        for stacked in range(min(len(a), len(b)) - 1)
        if a[:stacked] == b[:stacked] and a[-1] == b[stacked]
    ]
    if kernel is not None:
        possible = [axes for axes in possible if (*a[:-1], *b[axes.stacked + 1 :]) == tuple(kernel)]
    if len(possible) == 1:
        return possible[0]
    if possible:
        raise InvalidInput(
            f"adapters={path}: factors of shapes {a} and {b} may be one adapter or a stack of "
            "them; give params=, whose kernel tells"
        )
    of = "each other" if kernel is None else f"the kernel of shape {tuple(kernel)}"
    raise InvalidInput(
        f"adapters={path}: factors of shapes {a} and {b} do not fit {of}; a has the axes (stacked, "
        "inputs, rank) and b (stacked, rank, outputs) of a kernel (stacked, inputs, outputs)"
    )
