"""Large symmetric matrices as the blocks on and below their diagonal: half the memory and work.

A matrix of B block rows has P = B (B + 1) / 2 blocks [m, m], row by row: block (i, j), i >= j, is
number i (i + 1) / 2 + j. The loops update one block at a time, so that XLA keeps one copy of the
matrix and small temporary values.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.classifiers.base import product
from pm_jax.types import Array

SIZE = 512
"""The largest block; a product of such blocks keeps all cores busy and fits their caches."""

PANEL = 64
"""Rows of a block that are factored one by one."""


def layout(width: int) -> tuple[int, int]:
    """Number B of block rows of a matrix [width, width], and the size m of a block.

    Example:
        >>> layout(10_000)
        (20, 500)
    """
    rows = -(-width // SIZE)
    return rows, -(-width // rows)


def zeros(width: int) -> Array:
    """The matrix 0, [P, m, m]; it is padded with zeros to whole blocks."""
    rows, size = layout(width)
    return jnp.zeros((rows * (rows + 1) // 2, size, size))


def rows_of(blocks: Array) -> int:
    """B of a matrix."""
    return int(np.sqrt(2 * blocks.shape[0]))


def padded(columns: Array, blocks: Array) -> Array:
    """Columns [N, width] in whole blocks, [B, N, m]."""
    rows, size = rows_of(blocks), blocks.shape[1]
    columns = jnp.pad(columns, ((0, 0), (0, rows * size - columns.shape[1])))
    return columns.reshape(-1, rows, size).swapaxes(0, 1)


def add_gram(blocks: Array, features: Array, weights: Array) -> Array:
    """Add `features^T diag(weights) features`, of features [N, width].

    Example:
        >>> add_gram(zeros(2), jnp.asarray([[1.0, 2.0]]), jnp.ones(1)).tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """
    columns = padded(features, blocks)
    weighted = columns * weights[None, :, None]
    rows = rows_of(blocks)

    def add(number: Array, blocks: Array) -> Array:
        row, column = (jnp.asarray(index)[number] for index in np.tril_indices(rows))
        return blocks.at[number].add(product(columns[row].T, weighted[column]))

    return jax.lax.fori_loop(0, blocks.shape[0], add, blocks)


def add_diagonal(blocks: Array, value: Array) -> Array:
    """Add a multiple of the identity."""
    diagonal = [row * (row + 3) // 2 for row in range(rows_of(blocks))]
    size = blocks.shape[1]

    def add(number: Array, blocks: Array) -> Array:
        return blocks.at[jnp.asarray(diagonal)[number]].add(value * jnp.eye(size))

    return jax.lax.fori_loop(0, len(diagonal), add, blocks)


def cholesky(blocks: Array) -> Array:
    """Blocks of the lower triangular L with `L L^T` the matrix; NaN where it is not positive.

    The blocks on the diagonal are the inverses of those of L, which is what `solve` needs.

    Example:
        >>> cholesky(jnp.asarray([[[4.0, 2.0], [2.0, 2.0]]])).tolist()
        [[[0.5, 0.0], [-0.5, 1.0]]]
    """
    rows = rows_of(blocks)

    def at(row: Array, column: Array) -> Array:
        return row * (row + 1) // 2 + column

    def eliminate(pivot: Array, blocks: Array) -> Array:
        inverse = _inverse_factor(blocks[at(pivot, pivot)])
        blocks = blocks.at[at(pivot, pivot)].set(inverse)

        def divide(row: Array, blocks: Array) -> Array:
            return blocks.at[at(row, pivot)].set(product(blocks[at(row, pivot)], inverse.T))

        def subtract_row(row: Array, blocks: Array) -> Array:
            def subtract(column: Array, blocks: Array) -> Array:
                left, right = blocks[at(row, pivot)], blocks[at(column, pivot)]
                return blocks.at[at(row, column)].add(-product(left, right.T))

            return jax.lax.fori_loop(pivot + 1, row + 1, subtract, blocks)

        blocks = jax.lax.fori_loop(pivot + 1, rows, divide, blocks)
        return jax.lax.fori_loop(pivot + 1, rows, subtract_row, blocks)

    return jax.lax.fori_loop(0, rows, eliminate, blocks)


def _inverse_factor(matrix: Array) -> Array:
    """The inverse of the lower triangular factor of one block [m, m], panel by panel.

    LAPACK is not asked: its threads wait for each other by spinning, which takes up to a hundred
    times as long on a machine with other work.
    """
    width = matrix.shape[0]
    panels = -(-width // PANEL)
    size = panels * PANEL
    identity = jnp.eye(size)
    # The identity pads it to whole panels.
    matrix = identity.at[:width, :width].set(matrix)

    def add_panel(panel: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rest, factor, inverse = carry
        first = panel * PANEL
        corner = jax.lax.dynamic_slice(rest, (first, first), (PANEL, PANEL))
        corner = _inverse_factor_by_rows(corner)
        column = jax.lax.dynamic_slice(rest, (0, first), (size, PANEL))
        column = jnp.where(jnp.arange(size)[:, None] < first, 0.0, product(column, corner.T))
        # Rows that are not known yet are 0, so that the product leaves them out.
        left = jax.lax.dynamic_slice(factor, (first, 0), (PANEL, size))
        rows = jax.lax.dynamic_slice(identity, (first, 0), (PANEL, size))
        rows = product(corner, rows - product(left, inverse))
        return (
            rest - product(column, column.T),
            jax.lax.dynamic_update_slice(factor, column, (0, first)),
            jax.lax.dynamic_update_slice(inverse, rows, (first, 0)),
        )

    nothing = jnp.zeros_like(matrix)
    carry = matrix, nothing, nothing
    return jax.lax.fori_loop(0, panels, add_panel, carry)[2][:width, :width]


def _inverse_factor_by_rows(matrix: Array) -> Array:
    """The inverse of the lower triangular factor of a small matrix, row by row."""
    identity = jnp.eye(matrix.shape[0])

    def add_row(row: Array, inverse: Array) -> Array:
        left = product(inverse, matrix[row])
        pivot = jnp.sqrt(matrix[row, row] - jnp.sum(left**2))
        return inverse.at[row].set((identity[row] - product(left, inverse)) / pivot)

    return jax.lax.fori_loop(0, matrix.shape[0], add_row, jnp.zeros_like(matrix))


def solve(factor: Array, right: Array) -> Array:
    """Solve `L L^T x = right` for right [width, C], with L as `cholesky` returns it.

    Example:
        >>> factor = cholesky(jnp.asarray([[[4.0, 2.0], [2.0, 2.0]]]))
        >>> solve(factor, jnp.asarray([[8.0], [6.0]])).tolist()
        [[1.0], [2.0]]
    """
    rows, size = rows_of(factor), factor.shape[1]
    width, classes = right.shape
    right = jnp.pad(right, ((0, rows * size - width), (0, 0))).reshape(rows, size, classes)

    def at(row: Array, column: Array) -> Array:
        return factor[row * (row + 1) // 2 + column]

    def forward(row: Array, x: Array) -> Array:
        def subtract(column: Array, value: Array) -> Array:
            return value - product(at(row, column), x[column])

        value = jax.lax.fori_loop(0, row, subtract, x[row])
        return x.at[row].set(product(at(row, row), value))

    def backward(number: Array, x: Array) -> Array:
        row = rows - 1 - number

        def subtract(below: Array, value: Array) -> Array:
            return value - product(at(below, row).T, x[below])

        value = jax.lax.fori_loop(row + 1, rows, subtract, x[row])
        return x.at[row].set(product(at(row, row).T, value))

    x = jax.lax.fori_loop(0, rows, forward, right)
    return jax.lax.fori_loop(0, rows, backward, x).reshape(rows * size, classes)[:width]
