"""Subspaces spanned by K stacked displacements, pytrees of L arrays [K, ...]."""

import jax
import jax.numpy as jnp

from pm_jax.types import Array, PyTree


def gram(directions: PyTree) -> Array:
    """Inner products leaf by leaf, float32 [L, K, K]; their sum is that of whole displacements."""

    def products(leaf: Array) -> Array:
        axes = tuple(range(1, leaf.ndim))
        return jnp.tensordot(leaf, leaf, (axes, axes), precision="highest")

    return jnp.stack([products(leaf) for leaf in jax.tree.leaves(directions)])


def orthonormal_coordinates(products: Array, cutoff: float) -> Array:
    """M [K, K] such that the displacements `sum_k M_kj d_k` are orthonormal, or 0.

    `products` is their Gram matrix [K, K]. Directions whose eigenvalue is at most `cutoff` times
    the largest are left out: their columns are 0, so that shapes do not depend on the data.
    """
    squares = jnp.diagonal(products)
    # To unit length first, so that the cutoff does not drop a short displacement.
    inverse = jnp.where(squares > 0, 1 / jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    values, vectors = jnp.linalg.eigh(products * inverse[:, None] * inverse[None, :])
    # Eigenvalues ascend; the second condition is for displacements that are all 0.
    kept = (values > cutoff * values[-1]) & (values > 0)
    scale = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
    return inverse[:, None] * vectors * scale[None, :]


def combination(directions: PyTree, weights: Array) -> PyTree:
    """`sum_k weights_k d_k` as arrays [...]; weights are [L, K], or [1, K] for all leaves alike."""
    leaves, structure = jax.tree.flatten(directions)
    weights = jnp.broadcast_to(weights, (len(leaves), weights.shape[1]))
    rows = jax.tree.unflatten(structure, list(weights))
    return jax.tree.map(
        lambda row, leaf: jnp.tensordot(row, leaf, 1, precision="highest"), rows, directions
    )
