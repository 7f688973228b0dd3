"""Task vectors: displacements from one model to another, and their arithmetic.

A task vector has `None` in place of the leaves that are not floating point.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.types import Array, InvalidInput, Params, PyTree


def difference(trained: Params, previous: Params) -> PyTree:
    """Task vector `trained - previous`.

    Args:
        trained: pytree of arrays, `theta_t*`.
        previous: the model it started from, of the same structure and shapes.

    Returns:
        The displacement, float32 (float64 for float64 leaves) whatever the models' type.

    Raises:
        InvalidInput: structures or shapes differ.

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

    trees.check_alike(trained, previous, ("trained", "previous"))
    return jax.tree.map(leaf_difference, trees.floating(trained), trees.floating(previous))


def apply(params: Params, task_vector: PyTree, coefficient: Array | float = 1.0) -> Params:
    """The model moved along a task vector, `params + coefficient * task_vector`.

    For a convex combination of two models `trees.lerp` is the exact form.

    Args:
        params: pytree of arrays.
        task_vector: displacement of the same structure and shapes.
        coefficient: scalar.

    Returns:
        The moved model, computed in float32 and cast once to the leaf's own type; leaves that are
        not floating point stay as they are.

    Raises:
        InvalidInput: structures or shapes differ.

    Example:
        >>> apply(jnp.asarray([1.0]), jnp.asarray([2.0]), 0.5).tolist()
        [2.0]
    """

    def leaf_apply(leaf, step):
        dtype = trees.compute_dtype(leaf, step)
        moved = jnp.asarray(leaf, dtype) + jnp.asarray(coefficient, dtype) * step
        return moved.astype(jnp.asarray(leaf).dtype)

    trees.check_alike(task_vector, params, ("task_vector", "params"))
    moved = jax.tree.map(leaf_apply, trees.floating(params), trees.floating(task_vector))
    return trees.with_floating(params, moved)


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
        InvalidInput: no task vector, another number of coefficients, or structures or shapes
            that differ.

    Example:
        >>> combine([jnp.asarray([1.0]), jnp.asarray([10.0])], [2.0, 0.5]).tolist()
        [7.0]
    """
    if not task_vectors or len(task_vectors) != len(coefficients):
        raise InvalidInput(
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

    for number, task_vector in enumerate(task_vectors):
        trees.check_alike(
            task_vector, task_vectors[0], (f"task_vectors[{number}]", "task_vectors[0]")
        )
    return jax.tree.map(leaf_combine, *map(trees.floating, task_vectors))
