"""Low-rank adapters as pytrees, for the dense kernels of any parameter tree.

Adapters are a flat dict `{path of a kernel: Adapter(a, b)}`. The adapted kernel is `W + scale A B`;
it is formed by `fold`, or left implicit by `branch`, which adds `scale (x A) B` to the output of a
linen `Dense` layer and so needs no gradient of the size of W.

References:
    Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, 2022
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.curvature.dense_layers import LayerCall, visiting
from pm_jax.types import Array, Key, Params, PyTree


class Adapter(NamedTuple):
    """Factors of a low-rank displacement `a @ b`.

    Attributes:
        a: float32 [in, rank].
        b: float32 [rank, out].
    """

    a: Array
    b: Array


Adapters = dict[str, Adapter]


class AdaptedKernel(NamedTuple):
    """A dense kernel and the branch of its adapter: `kernel + scale a @ b` before the sum.

    `pm_jax.perturbed` turns adapters into it: a perturbation along the task vector scales the
    branch.

    Attributes:
        kernel: [in, out].
        adapter: the factors of the product that is added.
        scale: scalar, or [N] for one scale per example.
    """

    kernel: Array
    adapter: Adapter
    scale: Array | float


def adapted_paths(params: Params, pattern: str, rank: int) -> tuple[str, ...]:
    """Paths of the dense kernels that a regular expression over "a/b/c" selects for adapters.

    Raises:
        ValueError: no match, a matching leaf that is not [in, out], or a rank below 1 or above
            the smaller side of a kernel.
    """
    paths = trees.match_paths(params, pattern)
    for path, kernel in trees.select(params, paths).items():
        if jnp.ndim(kernel) != 2:
            raise ValueError(
                f"pattern={pattern!r}: matches {path} of shape {jnp.shape(kernel)}; adapters are "
                "for dense kernels of shape (in, out)"
            )
        if not 1 <= rank <= min(kernel.shape):
            raise ValueError(
                f"rank={rank}: must lie in 1..{min(kernel.shape)}, the smaller side of {path}"
            )
    return paths


def init(key: Key, params: Params, pattern: str, rank: int) -> Adapters:
    """Fresh adapters `{path: Adapter}`, whose product is zero: A is random and B is 0.

    The kernels are selected as by `adapted_paths`; there is no factor alpha/rank.

    Args:
        key: PRNG key, folded with every kernel's path.
        params: any parameter tree.
        pattern: regular expression over "a/b/c".
        rank: of every adapter.

    Raises:
        ValueError: as `adapted_paths`.

    Example:
        >>> adapters = init(jax.random.key(0), {"key": {"kernel": jnp.ones((4, 6))}}, ".*", 2)
        >>> adapters["key/kernel"].a.shape, adapters["key/kernel"].b.shape
        ((4, 2), (2, 6))
    """
    kernels = trees.select(params, adapted_paths(params, pattern, rank))

    def fresh(kernel_key: Key, kernel: Array) -> Adapter:
        rows, columns = kernel.shape
        b = jnp.zeros((rank, columns), jnp.float32)
        return Adapter(input_factor(kernel_key, rows, rank), b)

    return jax.tree.map(fresh, trees.leaf_keys(key, kernels), kernels)


def input_factor(key: Key, rows: int, rank: int) -> Array:
    """A fresh A for a kernel of some rows, float32 [rows, rank]."""
    # Kaiming's law with a = sqrt(5): uniform in +-1/sqrt(rows), as in Hu et al.'s code.
    bound = rows**-0.5
    return jax.random.uniform(key, (rows, rank), jnp.float32, -bound, bound)


def displacement(adapters: Adapters) -> dict[str, Array]:
    """The dense task vector `A B` of adapters, `{path: float32 [in, out]}`."""
    # Without the highest precision TPUs multiply in bfloat16.
    return {
        path: jnp.matmul(adapter.a, adapter.b, precision="highest")
        for path, adapter in adapters.items()
    }


def fold(params: Params, adapters: Adapters, coefficient: Array | float = 1.0) -> Params:
    """The effective weights, `W + coefficient A B`, of the adapted kernels.

    Args:
        params: any parameter tree.
        adapters: `{path: Adapter}`.
        coefficient: scalar; 1 for the trained model, alpha for a merged one.

    Returns:
        The parameters with the adapted kernels replaced, in the kernels' types.

    Raises:
        ValueError: an adapter whose path the parameters do not have.

    Example:
        >>> adapters = {"k": Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)))}
        >>> fold({"k": jnp.ones((1, 1))}, adapters, 0.5)["k"].tolist()
        [[2.0]]
    """
    kernels = trees.select(params, tuple(adapters))
    steps = displacement(adapters)
    # Added in float32 and cast once: a small step would be lost in a bfloat16 kernel.
    folded = {
        path: (kernel.astype(jnp.float32) + coefficient * steps[path]).astype(kernel.dtype)
        for path, kernel in kernels.items()
    }
    return trees.replace(params, folded)


def count(adapters: PyTree) -> int:
    """Number of trainable numbers in adapters (or in any other tree of arrays)."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def squared_norm(adapters: Adapters) -> Array:
    """`sum ||A B||^2` over all adapters from rank-sized Gram matrices, without forming A B.

    Example:
        >>> float(squared_norm({"k": Adapter(jnp.ones((1, 2)), jnp.ones((2, 3)))}))
        12.0
    """
    total = jnp.zeros((), jnp.float32)
    # tr(A^T A B B^T); the greedy order of products forms both Gram matrices first.
    for a, b in adapters.values():
        total += jnp.einsum("ir,is,ro,so->", a, a, b, b, precision="highest", optimize="greedy")
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


def branch(adapters: Mapping[str, Any], scale: Array | float = 1.0):
    """Context in which adapted linen `Dense` layers add `scale (x A) B` to their output.

    Equal to applying the model with `fold(params, adapters, scale)`, and cheaper to train: the
    backward pass forms gradients of A and B only.

    Args:
        adapters: `{path of a kernel within the module: Adapter or AdaptedKernel}`; other leaves
            have no branch.
        scale: scalar, or [N] for one scale per example; an `AdaptedKernel` has its own.

    Returns:
        A context manager around `module.apply`.

    Example:
        >>> layer, x = nn.Dense(3, name="head"), jnp.ones((1, 2))
        >>> params = layer.init(jax.random.key(0), x)
        >>> adapters = {"kernel": Adapter(jnp.ones((2, 1)), jnp.ones((1, 3)))}
        >>> with branch(adapters):
        ...     adapted = layer.apply(params, x)
        >>> (adapted - layer.apply(params, x)).round(4).tolist()
        [[2.0, 2.0, 2.0]]
    """
    branches = {
        path: (leaf.adapter, leaf.scale) if isinstance(leaf, AdaptedKernel) else (leaf, scale)
        for path, leaf in adapters.items()
        if isinstance(leaf, (Adapter, AdaptedKernel))
    }

    def add_branch(call: LayerCall) -> Array | None:
        path = call.kernel
        if path not in branches:
            return None
        if not isinstance(call.layer, nn.Dense):
            raise ValueError(
                f"adapters={path}: belongs to a {type(call.layer).__name__}; a branch is for "
                "linen Dense layers, use fold for others"
            )
        (adapter, factor), output = branches[path], call.output
        a, b = (matrix.astype(output.dtype) for matrix in adapter)
        # Matrices, because a CPU differentiates products of more axes with slow copies.
        low = jnp.asarray(call.inputs, output.dtype).reshape(-1, a.shape[0]) @ a
        low = low.reshape(*output.shape[:-1], a.shape[1])
        # Scaled in the width of the rank, before the product with B. Per-example scales [N] meet
        # the first axis of [N, ..., rank].
        factor = jnp.asarray(factor, output.dtype)
        low *= factor.reshape(factor.shape + (1,) * (low.ndim - factor.ndim))
        return output + (low.reshape(-1, a.shape[1]) @ b).reshape(output.shape)

    # All modules, so that an adapter of a layer that is not `Dense` is an error, not passed over.
    return visiting(add_branch, kind=nn.Module)
