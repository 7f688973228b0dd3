"""The matrices among the leaves of a model, for rules that look at their singular vectors.

A matrix is a leaf of two axes, [in, out], or a kernel of more axes, as those of attention and of
convolutions, whose axes divide into inputs and outputs. Biases and scales of stacked layers, tables
of embeddings and positions are none.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pm_jax import trees
from pm_jax.curvature.kernels import Axes, axes_of, shape_of
from pm_jax.types import Array, InvalidInput, Params, PyTree

NO_MATRICES = ("bias", "scale")
"""Names of leaves that are no matrices, however many axes they have."""


def matrices(params: Params, pattern: str = "", input_axes: int = 0) -> dict[str, Axes]:
    """How the axes of the matrices of a model divide, `{path: Axes}`.

    Args:
        params: pytree of arrays or shapes.
        pattern: regular expression that the whole path of a matrix matches; empty for all of them.
        input_axes: number of input axes of kernels with more than two axes, where neither their
            shape nor that of the bias beside them tells; 0 if there are none such.

    Raises:
        InvalidInput: the pattern matches nothing, or a leaf that is no matrix; or the axes of a
            kernel may divide in several ways.

    Example:
        >>> model = {"norm": {"scale": jnp.ones(4)}, "mlp": {"kernel": jnp.ones((4, 8))}}
        >>> matrices(model)
        {'mlp/kernel': Axes(stacked=0, inputs=1)}
    """
    leaves = trees.leaves_by_path(params)
    paths = [path for path, leaf in leaves.items() if is_matrix(path, leaf)]
    if pattern:
        try:
            matched = trees.match_paths(params, pattern)
        except ValueError as error:
            raise InvalidInput(str(error)) from None
        if strange := [path for path in matched if path not in paths]:
            raise InvalidInput(
                f"pattern={pattern!r}: matches {strange[0]} of shape {shape_of(leaves[strange[0]])}"
                f", which is no matrix; match {_listed(paths)} only"
            )
        paths = list(matched)
    return {path: _axes(leaves, path, input_axes) for path in paths}


def as_matrices(leaf: Array, axes: Axes) -> Array:
    """A leaf as a stack of matrices [S, in, out]; `reshape(leaf.shape)` is the way back.

    Example:
        >>> as_matrices(jnp.ones((768, 12, 64)), Axes(stacked=0, inputs=1)).shape
        (1, 768, 768)
    """
    return leaf.reshape(-1, *axes.sides(leaf.shape))


def singular(matrix: Array) -> tuple[Array, Array, Array]:
    """U [in, K], S [K] and V [out, K] of a matrix, with 0 in place of vectors that are not its own.

    Singular vectors whose value is 0 up to rounding are any orthonormal ones, which would differ
    from one library to the next.

    Example:
        >>> u, s, v = singular(jnp.asarray([[3.0, 0.0], [0.0, 0.0]]))
        >>> s.tolist(), jnp.abs(u).tolist()
        ([3.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """
    rows, columns = matrix.shape
    if columns > rows:
        v, s, u = singular(matrix.T)
        return u, s, v
    base = None
    if rows >= 2 * columns:
        # LAPACK's divide and conquer takes three times as long without this.
        base, matrix = jnp.linalg.qr(matrix)
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    own = s > rows * jnp.finfo(s.dtype).eps * s[0]
    u, v = (jnp.where(own[None], vectors, 0) for vectors in (u, vh.T))
    return u if base is None else product(base, u), jnp.where(own, s, 0), v


def product(*factors: Array) -> Array:
    """The matrix product of the factors, from the left, at highest precision."""
    result = factors[0]
    for factor in factors[1:]:
        result = jnp.matmul(result, factor, precision="highest")
    return result


def kept_share(added: PyTree, task_vector: PyTree) -> dict[str, Array]:
    """The share of a task vector's squared norm that is added, as a figure of a merge."""
    whole = trees.inner(task_vector, task_vector)
    share = trees.inner(added, added) / jnp.where(whole > 0, whole, 1.0)
    return {"kept_share": jnp.where(whole > 0, share, 1.0).astype(jnp.float32)}


def is_matrix(path: str, leaf: Any) -> bool:
    """True for a leaf that counts as a matrix, or as several, by its name and its axes.

    Example:
        >>> is_matrix("fc1/kernel", jnp.ones((4, 8))), is_matrix("in/embedding", jnp.ones((9, 4)))
        (True, False)
    """
    name, shape = path.rpartition("/")[2], shape_of(leaf)
    axes = 0 if 0 in shape else len(shape)
    if axes == 2:
        return name not in NO_MATRICES and "embed" not in name
    return axes > 2 and name == "kernel"


def _axes(leaves: dict[str, Array], path: str, input_axes: int) -> Axes:
    shape = shape_of(leaves[path])
    if len(shape) == 2:
        return Axes(stacked=0, inputs=1)
    try:
        return axes_of(leaves, path)
    except InvalidInput:
        if 1 <= input_axes < len(shape):
            return Axes(stacked=0, inputs=input_axes)
    raise InvalidInput(
        f"input_axes={input_axes}: {path} of shape {shape} may be several matrices; give the "
        f"number of its axes that are inputs, from 1 to {len(shape) - 1}"
    )


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more}" if paths else "matrices, of which the model has none,"
