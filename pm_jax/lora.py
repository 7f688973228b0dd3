"""Low-rank adapters as pytrees, for the dense kernels of any parameter tree.

Adapters are a flat dict `{path of a kernel: Adapter(a, b)}`. The adapted kernel is `W + scale A B`;
it is formed by `fold`, or left implicit by `branch`, which adds `scale (x A) B` to the output of a
linen layer and so needs no gradient of the size of W.

Kernels are those of ordinary dense layers [in, out]; of attention, [in, heads, size] and [heads,
size, out]; of convolutions, [height, width, in, out], as matrices (height width in) x out; and
stacks of kernels as `nn.scan` makes them, [layers, in, out], with one adapter for each layer.

References:
    Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, 2022
"""

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import branches, trees
from pm_jax.adapter_axes import AxesCount, adapted_axes, axes_of_adapter
from pm_jax.curvature import dense_layers
from pm_jax.curvature.dense_layers import LayerCall
from pm_jax.curvature.kernels import Axes, Shape
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree


class Adapter(NamedTuple):
    """Factors of a low-rank displacement `a @ b` of a kernel `[*stacked, *inputs, *outputs]`.

    Attributes:
        a: float32 [*stacked, *inputs, rank]; [in, rank] for an ordinary kernel.
        b: float32 [*stacked, rank, *outputs]; [rank, out] for an ordinary kernel.
    """

    a: Array
    b: Array


Adapters = dict[str, Adapter]
"""The adapter of each adapted kernel, by its path."""


class AdaptedKernel(NamedTuple):
    """A dense kernel and the branch of its adapter: `kernel + scale a @ b` before the sum.

    `pm_jax.perturbed` turns adapters into it: a perturbation along the task vector scales the
    branch.

    Attributes:
        kernel: [*stacked, *inputs, *outputs].
        adapter: the factors of the product that is added.
        scale: scalar, or [N] for one scale per example.
    """

    kernel: Array
    adapter: Adapter
    scale: Array | float


def init(
    key: Key,
    params: Params,
    pattern: str | tuple[str, ...],
    rank: int,
    *,
    input_axes: AxesCount = None,
    stacked_axes: AxesCount = None,
    module: Any = None,
    inputs: tuple = (),
) -> Adapters:
    """Fresh adapters `{path: Adapter}`, whose product is zero: A is random and B is 0.

    There is no factor alpha/rank. Which axes of a kernel are inputs follows from its shape if it
    has two axes, and otherwise from the bias beside it, from the module, or from `input_axes`.

    Args:
        key: PRNG key, folded with every kernel's path.
        params: any parameter tree.
        pattern: regular expression over "a/b/c", or paths.
        rank: of every adapter.
        input_axes: number of axes of a kernel that are inputs, as 2 for [heads, size, out]; for all
            kernels, or `{regular expression over paths: number}`.
        stacked_axes: number of leading axes that count kernels, as 1 for [layers, in, out] of
            `nn.scan`; likewise.
        module: linen or nnx module whose parameters these are, which tells both numbers.
        inputs: arguments for a call of a linen module; nothing is computed.

    Raises:
        InvalidInput: no match, a leaf that is no dense kernel or may be several ones, or a rank
            below 1 or above the smaller side of a kernel.

    Example:
        >>> adapters = init(jax.random.key(0), {"key": {"kernel": jnp.ones((4, 6))}}, ".*", 2)
        >>> adapters["key/kernel"].a.shape, adapters["key/kernel"].b.shape
        ((4, 2), (2, 6))
        >>> attention = {"out": {"kernel": jnp.ones((2, 3, 6)), "bias": jnp.ones(6)}}
        >>> adapters = init(jax.random.key(0), attention, ".*/kernel", 2)
        >>> adapters["out/kernel"].a.shape, adapters["out/kernel"].b.shape
        ((2, 3, 2), (2, 6))
    """
    axes = adapted_axes(
        params, pattern, rank,
        input_axes=input_axes, stacked_axes=stacked_axes, module=module, inputs=inputs,
    )  # fmt: skip
    kernels = trees.select(params, tuple(axes))
    keys = trees.leaf_keys(key, kernels)

    def fresh(path: str, kernel: Array) -> Adapter:
        stacked, inputs, outputs = axes[path].split(kernel.shape)
        b = jnp.zeros((*stacked, rank, *outputs), jnp.float32)
        a = input_factor(keys[path], (*stacked, *inputs, rank), math.prod(inputs))
        return Adapter(a, b)

    return {path: fresh(path, kernel) for path, kernel in kernels.items()}


def input_factor(key: Key, shape: Shape, rows: int) -> Array:
    """A fresh A of a shape [*stacked, *inputs, rank], float32, for matrices of some rows."""
    # Kaiming's law with a = sqrt(5): uniform in +-1/sqrt(rows), as in Hu et al.'s code.
    bound = rows**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _divided(adapters: Adapters, params: Params | None) -> Iterator[tuple[str, Adapter, Axes]]:
    kernels = None if params is None else trees.select(params, tuple(adapters))
    for path, adapter in adapters.items():
        kernel = None if kernels is None else tuple(kernels[path].shape)
        yield path, adapter, axes_of_adapter(path, adapter, kernel)


def _as_matrices(adapter: Adapter, axes: Axes) -> Adapter:
    """The factors with their input and output axes joined, [*stacked, in, rank] and so on."""
    a, b = adapter
    stacked, inputs, (rank,) = axes.split(a.shape)
    return Adapter(a.reshape(*stacked, math.prod(inputs), rank), b.reshape(*stacked, rank, -1))


def displacement(adapters: Adapters, params: Params | None = None) -> dict[str, Array]:
    """The dense task vector `A B` of adapters, `{path: float32 of the kernel's shape}`.

    Args:
        adapters: `{path: Adapter}`.
        params: parameters with these kernels, needed only where the shapes of the factors alone do
            not tell whether they are stacked.

    Raises:
        InvalidInput: factors that do not fit, or stacks that need `params`.
    """
    steps = {}
    for path, adapter, axes in _divided(adapters, params):
        a, b = _as_matrices(adapter, axes)
        # Without the highest precision TPUs multiply in bfloat16.
        step = jnp.matmul(a, b, precision="highest")
        steps[path] = step.reshape(*adapter.a.shape[:-1], *adapter.b.shape[axes.stacked + 1 :])
    return steps


def fold(params: Params, adapters: Adapters, coefficient: Array | float = 1.0) -> Params:
    """The effective weights, `W + coefficient A B`, of the adapted kernels.

    Args:
        params: any parameter tree.
        adapters: `{path: Adapter}`.
        coefficient: scalar; 1 for the trained model, alpha for a merged one.

    Returns:
        The parameters with the adapted kernels replaced, in the kernels' types.

    Raises:
        ValueError: an adapter whose path the parameters do not have, or that does not fit.

    Example:
        >>> adapters = {"k": Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)))}
        >>> fold({"k": jnp.ones((1, 1))}, adapters, 0.5)["k"].tolist()
        [[2.0]]
    """
    kernels = trees.select(params, tuple(adapters))
    steps = displacement(adapters, kernels)
    # Added in float32 and cast once: a small step would be lost in a bfloat16 kernel.
    folded = {
        path: (kernel.astype(jnp.float32) + coefficient * steps[path]).astype(kernel.dtype)
        for path, kernel in kernels.items()
    }
    return trees.replace(params, folded)


def count(adapters: PyTree) -> int:
    """Number of trainable numbers in adapters (or in any other tree of arrays)."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def squared_norm(adapters: Adapters, params: Params | None = None) -> Array:
    """`sum ||A B||^2` over all adapters from rank-sized Gram matrices, without forming A B.

    Args:
        adapters: `{path: Adapter}`.
        params: as for `displacement`.

    Example:
        >>> float(squared_norm({"k": Adapter(jnp.ones((1, 2)), jnp.ones((2, 3)))}))
        12.0
    """
    total = jnp.zeros((), jnp.float32)
    for _, adapter, axes in _divided(adapters, params):
        a, b = _as_matrices(adapter, axes)
        # tr(A^T A B B^T) of each matrix of a stack; the greedy order of products forms both Gram
        # matrices first.
        n = "abcdefgh"[: axes.stacked]
        total += jnp.einsum(
            f"{n}ir,{n}is,{n}ro,{n}so->", a, a, b, b, precision="highest", optimize="greedy"
        )
    return total


def dense_leaves(leaves: Mapping[str, Array | Adapter | AdaptedKernel]) -> dict[str, Array]:
    """The leaves that go into the parameters: arrays, and the kernel of an `AdaptedKernel`.

    An `Adapter` has no kernel and is left out.

    Example:
        >>> adapter = Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)))
        >>> list(dense_leaves({"k": AdaptedKernel(jnp.ones((1, 1)), adapter, 1.5), "l": adapter}))
        ['k']
    """
    return {
        path: leaf.kernel if isinstance(leaf, AdaptedKernel) else leaf
        for path, leaf in leaves.items()
        if not isinstance(leaf, Adapter)
    }


@contextlib.contextmanager
def branch(adapters: Mapping[str, Any], scale: Array | float = 1.0) -> Iterator[None]:
    """Context in which adapted linen layers add `scale (x A) B` to their output.

    Equal to applying the model with `fold(params, adapters, scale)`, and cheaper to train: the
    backward pass forms gradients of A and B only. Layers are `Dense`, `DenseGeneral`, `Einsum` and
    `Conv`, also under `nn.remat`, and under `nn.scan` and `nn.vmap` that stack their kernels.

    Args:
        adapters: `{path of a kernel within the module: Adapter or AdaptedKernel}`; other leaves
            have no branch.
        scale: scalar, or [N] for one scale per example; an `AdaptedKernel` has its own.

    Returns:
        A context manager around `module.apply`. For nnx modules, which know no such contexts, there
        is `pm_jax.integrations.nnx_adapters`.

    Raises:
        InvalidInput: an adapter that does not fit its layer; at the end of the context, an adapter
            that no layer used.

    Example:
        >>> import flax.linen as nn
        >>> layer, x = nn.Dense(3, name="head"), jnp.ones((1, 2))
        >>> params = layer.init(jax.random.key(0), x)
        >>> adapters = {"kernel": Adapter(jnp.ones((2, 1)), jnp.ones((1, 3)))}
        >>> with branch(adapters):
        ...     adapted = layer.apply(params, x)
        >>> (adapted - layer.apply(params, x)).round(4).tolist()
        [[2.0, 2.0, 2.0]]
    """
    branched = branches_of(adapters, scale)
    # Layers under `nn.scan` need their slice of a stack, which flax makes of what lies beside the
    # kernel. Other factors are closed over, so that ordinary programs stay as they are.
    stacks = {
        f"{path}{_LENT}": tuple(adapter)
        for path, (adapter, _, _) in branched.items()
        if _may_be_stacked(adapter)
    }
    used: set[str] = set()
    called: dict[str, str] = {}

    def add_branch(call: LayerCall) -> Array | None:
        called.setdefault(call.kernel, type(call.layer).__name__)
        path, kind = call.kernel, dense_layers.kind_of(call.layer)
        if path not in branched or kind is None:
            return None
        adapter, _, factor = branched[path]
        lent: Any = call.layer.get_variable("params", f"kernel{_LENT}")
        adapter = Adapter(*lent) if lent is not None else adapter
        axes = axes_of_adapter(path, adapter, call.kernel_shape)
        try:
            if call.linear_map is None:
                raise branches.Unfit("its kernel is masked, or an ellipsis stands for its axes")
            output = branches.branch_output(
                call.linear_map, call.inputs, call.output, adapter, axes, factor
            )
        except branches.Unfit as reason:
            raise InvalidInput(
                f"adapters={path}: has no branch in a {kind.__name__} layer ({reason}); use fold"
            ) from None
        used.add(path)
        return output

    # All modules, so that an adapter of another layer is an error that names the layer. Lending
    # goes around the visits, because the outermost module is called again within it.
    with dense_layers.lending(stacks), dense_layers.visiting(add_branch, kinds=None):
        yield
    # An exception within the context does not come here.
    for path in branched:
        if path not in used:
            raise InvalidInput(unused_adapter(path, called))


def branches_of(
    adapters: Mapping[str, Any], scale: Array | float
) -> dict[str, tuple[Adapter, Array | None, Array | float]]:
    """The adapters among the leaves of a tree, each with its kernel (or `None`) and its scale."""
    found: dict[str, tuple[Adapter, Array | None, Array | float]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        dict(adapters), is_leaf=lambda leaf: isinstance(leaf, Adapter | AdaptedKernel)
    ):
        if isinstance(leaf, AdaptedKernel):
            found[trees.path_name(path)] = leaf.adapter, leaf.kernel, leaf.scale
        elif isinstance(leaf, Adapter):
            found[trees.path_name(path)] = leaf, None, scale
    return found


_LENT = "_and_adapter"
"""Ending of the name under which the factors of a stack lie beside their kernel."""


def _may_be_stacked(adapter: Adapter) -> bool:
    a, b = adapter.a.shape, adapter.b.shape
    return min(len(a), len(b)) > 2 and a[0] == b[0]


def unused_adapter(path: str, called: Mapping[str, str]) -> str:
    """Why an adapter has had no effect, for layers called `{path of a kernel: type of layer}`."""
    if path in called:
        return (
            f"adapters={path}: belongs to a {called[path]}; a branch is for linen Dense, "
            "DenseGeneral, Einsum and Conv layers themselves, use fold for others"
        )
    near = difflib.get_close_matches(path, called, 3, 0.3)
    reached = f"the nearest are {', '.join(near)}" if near else "no linen layer was called"
    return (
        f"adapters={path}: no layer of a linen model used it ({reached}); name the path within the "
        "module that is applied. A function that was jitted before does not see this context, "
        "enter it inside; nor does an nnx model, use integrations.nnx_adapters or fold"
    )
