"""Subspaces spanned by a few displacements, in coordinates that are orthonormal."""

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.types import Array, PyTree


def gram(directions: PyTree) -> Array:
    """Inner products of K stacked displacements, leaf by leaf.

    Args:
        directions: pytree of L arrays [K, ...].

    Returns:
        float32 [L, K, K]; the sum over the leaves is that of whole displacements.

    Example:
        >>> gram({"a": jnp.asarray([[1.0, 2.0], [0.0, 1.0]])}).tolist()
        [[[5.0, 2.0], [2.0, 1.0]]]
    """

    def products(leaf: Array) -> Array:
        axes = tuple(range(1, leaf.ndim))
        return jnp.tensordot(leaf, leaf, (axes, axes), precision="highest")

    return jnp.stack([products(leaf) for leaf in jax.tree.leaves(directions)])


def orthonormal_coordinates(products: Array, cutoff: float) -> Array:
    """How to combine K displacements to orthonormal ones, from their inner products alone.

    The displacements are brought to unit length first, so that a short one counts as much as a long
    one. Directions whose eigenvalue is at most `cutoff` times the largest are left out: their
    columns are 0, and shapes do not depend on the data.

    Args:
        products: Gram matrix [K, K].
        cutoff: relative, in (0, 1).

    Returns:
        float32 M [K, K]: the displacements `sum_k M_kj d_k` are orthonormal, or 0.

    Example:
        >>> coordinates = orthonormal_coordinates(jnp.diag(jnp.asarray([0.0, 4.0])), 1e-4)
        >>> abs(coordinates).tolist()
        [[0.0, 0.0], [0.0, 0.5]]
    """
    squares = jnp.diagonal(products)
    inverse = jnp.where(squares > 0, 1 / jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    values, vectors = jnp.linalg.eigh(products * inverse[:, None] * inverse[None, :])
    kept = (values > cutoff * values[-1]) & (values > 0)
    scale = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
    return inverse[:, None] * vectors * scale[None, :]


def combination(directions: PyTree, weights: Array) -> PyTree:
    """`sum_k weights_k d_k` of stacked displacements, leaf by leaf.

    Args:
        directions: pytree of L arrays [K, ...].
        weights: [L, K], or [1, K] for all leaves alike.

    Returns:
        Pytree of arrays [...].

    Example:
        >>> combination(jnp.asarray([[1.0], [2.0]]), jnp.asarray([[3.0, 5.0]])).tolist()
        [13.0]
    """
    leaves, structure = jax.tree.flatten(directions)
    weights = jnp.broadcast_to(weights, (len(leaves), weights.shape[1]))
    sums = [
        jnp.tensordot(row, leaf, 1, precision="highest")
        for row, leaf in zip(weights, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, sums)


def stacked_from(base: PyTree, points: PyTree) -> PyTree:
    """Displacements of K stacked points from one.

    Args:
        base: pytree of arrays [...].
        points: of the same structure, [K, ...].

    Returns:
        float32 pytree of arrays [K, ...].

    Example:
        >>> stacked_from(jnp.ones(1), jnp.asarray([[2.0], [4.0]])).tolist()
        [[1.0], [3.0]]
    """

    def leaf(low, high):
        dtype = trees.compute_dtype(low, high)
        return jnp.asarray(high, dtype) - jnp.asarray(low, dtype)[None]

    return jax.tree.map(leaf, base, points)
