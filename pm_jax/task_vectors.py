"""Task vectors: displacements from one model to another, and their arithmetic."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.types import Array, Params, PyTree


def difference(trained: Params, previous: Params) -> PyTree:
    """Task vector `trained - previous`.

    Args:
        trained: pytree of floating-point arrays, `theta_t*`.
        previous: the model it started from, of the same structure and shapes.

    Returns:
        The displacement, float32 (float64 for float64 leaves) whatever the models' type.

    Raises:
        AssertionError: structures or shapes differ.

    References:
        Ilharco et al., `Editing Models with Task Arithmetic
        <https://arxiv.org/abs/2212.04089>`_, 2023

    Example:
        >>> difference({"w": jnp.asarray([3.0])}, {"w": jnp.asarray([1.0])})["w"].tolist()
        [2.0]
    """

    def leaf_difference(new, old):
        # Cast first: a difference of bfloat16 weights may need more digits than bfloat16 has.
        dtype = trees.compute_dtype(new, old)
        return jnp.asarray(new, dtype) - jnp.asarray(old, dtype)

    chex.assert_trees_all_equal_shapes(trained, previous)
    return jax.tree.map(leaf_difference, trained, previous)


def apply(params: Params, task_vector: PyTree, coefficient: Array | float = 1.0) -> Params:
    """The model moved along a task vector, `params + coefficient * task_vector`.

    For a convex combination of two models `trees.lerp` is the exact form.

    Args:
        params: pytree of floating-point arrays.
        task_vector: displacement of the same structure and shapes.
        coefficient: scalar.

    Returns:
        The moved model, computed in float32 and cast once to the leaf's own type.

    Example:
        >>> apply(jnp.asarray([1.0]), jnp.asarray([2.0]), 0.5).tolist()
        [2.0]
    """

    def leaf_apply(leaf, step):
        dtype = trees.compute_dtype(leaf, step)
        moved = jnp.asarray(leaf, dtype) + jnp.asarray(coefficient, dtype) * step
        return moved.astype(jnp.asarray(leaf).dtype)

    return jax.tree.map(leaf_apply, params, task_vector)


def scale(task_vector: PyTree, coefficient: Array | float) -> PyTree:
    """A task vector times a scalar, float32 (float64 for float64 leaves)."""
    return combine([task_vector], [coefficient])


def combine(task_vectors: Sequence[PyTree], coefficients: Sequence[Array | float]) -> PyTree:
    """Linear combination `sum_i coefficients[i] task_vectors[i]`.

    Args:
        task_vectors: one or more displacements of the same structure and shapes.
        coefficients: as many scalars.

    Returns:
        The combined displacement, float32 (float64 for float64 leaves).

    Raises:
        ValueError: no task vector, or another number of coefficients.

    Example:
        >>> combine([jnp.asarray([1.0]), jnp.asarray([10.0])], [2.0, 0.5]).tolist()
        [7.0]
    """
    if not task_vectors or len(task_vectors) != len(coefficients):
        raise ValueError(
            f"coefficients={list(coefficients)}: one per task vector is needed, and at least one; "
            f"there are {len(task_vectors)} task vectors"
        )

    def leaf_combine(*leaves):
        dtype = trees.compute_dtype(*leaves)
        terms = [
            jnp.asarray(c, dtype) * jnp.asarray(leaf, dtype)
            for c, leaf in zip(coefficients, leaves, strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    return jax.tree.map(leaf_combine, *task_vectors)
