"""Curvature of low rank against the dense Gauss-Newton matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pm_jax import curvature
from pm_jax.curvature import low_rank, measures
from pm_jax.curvature.low_rank import LowRankQuadratic
from pm_jax.types import Batch
from tests import oracles

EXAMPLES = 13  # of 4 classes: the dense matrix has rank 39 of 80


def measured(rank, batch_size=5, seed=0, dtype=np.float64, examples=EXAMPLES):
    params, direction, batch = oracles.problem(examples, seed, dtype)
    found = measures.measure_all(
        low_rank.gauss_newton_low_rank(oracles.network, rank=rank),
        params, batch, batch_size, direction, jax.random.key(seed),
    )  # fmt: skip
    return found, params, direction, batch


def dense(quadratic):
    columns = jax.vmap(lambda column: ravel_pytree(column)[0])(quadratic.curvature.columns)
    return np.asarray(columns).T @ np.asarray(columns)


@pytest.mark.slow
def test_enough_directions_give_the_whole_matrix(float64):
    found, params, _, batch = measured(60)
    wanted = oracles.dense_gauss_newton(params, batch)
    # Eigenvalues below 1e-5 of the largest are left out.
    np.testing.assert_allclose(dense(found.quadratic), wanted, atol=1e-4 * abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 4])
def test_it_is_exact_along_the_task_vector_whatever_the_rank(float64, rank):
    found, params, direction, batch = measured(rank)
    matrix = oracles.dense_gauss_newton(params, batch)
    d, other = oracles.flat(direction), oracles.flat(params)
    gram = found.quadratic.gram([direction, params])
    np.testing.assert_allclose(gram[0], [d @ matrix @ d, d @ matrix @ other], rtol=1e-9)
    np.testing.assert_allclose(gram[0, 0], found.along, rtol=1e-9)
    assert float(gram[1, 1]) < other @ matrix @ other


@pytest.mark.slow
def test_the_measure_is_a_mean_whatever_the_batches_and_weights():
    whole, params, direction, batch = measured(4, EXAMPLES, dtype=np.float32)
    pieces = measured(4, 5, dtype=np.float32)[0]
    twice = Batch(*(jnp.concatenate([x, x]) for x in batch[:2]))
    padding = jnp.arange(2 * EXAMPLES) < EXAMPLES
    padded = twice._replace(weights=padding.astype(jnp.float32))
    measure = low_rank.gauss_newton_low_rank(oracles.network, rank=4)
    for examples in (twice, padded):
        found = measures.measure_all(measure, params, examples, 6, direction, jax.random.key(0))
        np.testing.assert_allclose(dense(found.quadratic), dense(whole.quadratic), atol=2e-6)
    np.testing.assert_allclose(dense(pieces.quadratic), dense(whole.quadratic), atol=2e-6)
    exact = measures.measure_all(
        curvature.gauss_newton(oracles.network), params, batch, 5, direction
    )
    np.testing.assert_allclose(pieces.along, exact.along, rtol=1e-5)
    np.testing.assert_allclose(pieces.standard_error, exact.standard_error, rtol=1e-5)


def task(seed):
    found, params, _, _ = measured(4, seed=seed)
    return found.quadratic, dense(found.quadratic), oracles.flat(params)


@pytest.mark.slow
def test_a_sum_that_has_room_is_that_of_the_tasks(float64):
    tasks = [task(seed) for seed in range(3)]
    origin, direction, _ = oracles.problem(1, 9, np.float64)
    memory = LowRankQuadratic.zero(origin, 12)
    add = jax.jit(LowRankQuadratic.plus)
    for quadratic, _, _ in tasks:
        memory = add(memory, quadratic)
    theta, d = oracles.flat(origin), oracles.flat(direction)
    value = sum((theta - star) @ m @ (theta - star) / 2 for _, m, star in tasks)
    slope = sum((theta - star) @ m @ d for _, m, star in tasks)
    np.testing.assert_allclose(memory.value(origin), value, rtol=1e-9)
    np.testing.assert_allclose(memory.gradient_along(origin, direction), slope, rtol=1e-9)
    both = sum(m for _, m, _ in tasks)
    np.testing.assert_allclose(memory.curvature_along(direction), d @ both @ d, rtol=1e-9)
    np.testing.assert_allclose(memory.trace(), np.trace(both), rtol=1e-9)
    half = memory.scaled(0.5)
    np.testing.assert_allclose(half.value(origin), value / 2, rtol=1e-9)
    np.testing.assert_allclose(half.curvature_along(direction), d @ both @ d / 2, rtol=1e-9)


@pytest.mark.slow
def test_a_sum_without_room_keeps_the_leading_part_and_the_slope_at_its_center(float64):
    tasks = [task(seed) for seed in range(2)]
    origin, direction, _ = oracles.problem(1, 9, np.float64)
    memory = LowRankQuadratic.zero(origin, 5)
    for quadratic, _, _ in tasks:
        memory = memory.plus(quadratic)
    values, vectors = np.linalg.eigh(tasks[0][1] + tasks[1][1])
    leading = vectors[:, -5:] * values[-5:] @ vectors[:, -5:].T
    np.testing.assert_allclose(dense(memory), leading, atol=1e-9 * values[-1])
    newest = tasks[1][0].center
    slope = (oracles.flat(newest) - tasks[0][2]) @ tasks[0][1] @ oracles.flat(direction)
    np.testing.assert_allclose(memory.gradient_along(newest, direction), slope, rtol=1e-9)


def test_without_a_key_there_is_the_given_direction_only():
    params, direction, batch = oracles.problem(EXAMPLES)
    measure = low_rank.gauss_newton_low_rank(oracles.network, rank=2)
    with pytest.raises(ValueError, match="key=None: random directions need"):
        measures.measure_all(measure, params, batch, 5, direction)
    with pytest.raises(ValueError, match="rank=0: must be at least 1"):
        low_rank.gauss_newton_low_rank(oracles.network, rank=0)


def test_no_displacement_leaves_a_matrix_of_the_random_directions():
    params, direction, batch = oracles.problem(EXAMPLES)
    measure = low_rank.gauss_newton_low_rank(oracles.network, rank=3)
    still = jax.tree.map(jnp.zeros_like, direction)
    found = measures.measure_all(measure, params, batch, 5, still, jax.random.key(0)).quadratic
    assert np.isfinite(dense(found)).all() and np.linalg.matrix_rank(dense(found), tol=1e-6) == 2
