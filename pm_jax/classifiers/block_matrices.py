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

SIZE = 1024
"""The largest block; a product of such blocks keeps all cores busy and fits their caches."""


def layout(width: int) -> tuple[int, int]:
    """Number B of block rows of a matrix [width, width], and the size m of a block.

    Example:
        >>> layout(10_000)
        (10, 1000)
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

    Example:
        >>> cholesky(jnp.asarray([[[4.0, 2.0], [2.0, 5.0]]])).tolist()
        [[[2.0, 0.0], [1.0, 2.0]]]
    """
    rows = rows_of(blocks)

    def at(row: Array, column: Array) -> Array:
        return row * (row + 1) // 2 + column

    def eliminate(pivot: Array, blocks: Array) -> Array:
        triangle = jax.lax.linalg.cholesky(blocks[at(pivot, pivot)], symmetrize_input=False)
        blocks = blocks.at[at(pivot, pivot)].set(triangle)

        def divide(row: Array, blocks: Array) -> Array:
            below = jax.lax.linalg.triangular_solve(
                triangle, blocks[at(row, pivot)], lower=True, transpose_a=True
            )
            return blocks.at[at(row, pivot)].set(below)

        def subtract_row(row: Array, blocks: Array) -> Array:
            def subtract(column: Array, blocks: Array) -> Array:
                left, right = blocks[at(row, pivot)], blocks[at(column, pivot)]
                return blocks.at[at(row, column)].add(-product(left, right.T))

            return jax.lax.fori_loop(pivot + 1, row + 1, subtract, blocks)

        blocks = jax.lax.fori_loop(pivot + 1, rows, divide, blocks)
        return jax.lax.fori_loop(pivot + 1, rows, subtract_row, blocks)

    return jax.lax.fori_loop(0, rows, eliminate, blocks)


def solve(factor: Array, right: Array) -> Array:
    """Solve `L L^T x = right`, of blocks L as `cholesky` makes them and right [width, C].

    Example:
        >>> solve(jnp.asarray([[[2.0, 0.0], [1.0, 2.0]]]), jnp.asarray([[8.0], [8.0]])).tolist()
        [[1.5], [1.0]]
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
        value = jax.lax.linalg.triangular_solve(at(row, row), value, left_side=True, lower=True)
        return x.at[row].set(value)

    def backward(number: Array, x: Array) -> Array:
        row = rows - 1 - number

        def subtract(below: Array, value: Array) -> Array:
            return value - product(at(below, row).T, x[below])

        value = jax.lax.fori_loop(row + 1, rows, subtract, x[row])
        value = jax.lax.linalg.triangular_solve(
            at(row, row), value, left_side=True, lower=True, transpose_a=True
        )
        return x.at[row].set(value)

    x = jax.lax.fori_loop(0, rows, forward, right)
    return jax.lax.fori_loop(0, rows, backward, x).reshape(rows * size, classes)[:width]
