import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pm_jax import trees
from pm_jax.curvature import DiagonalQuadratic, ExactQuadratic, Quadratic, SumQuadratic
from pm_jax.curvature.exact import AlongDirection
from pm_jax.types import Batch
from tests import oracles


def random_tree(rng, dtype=np.float32, positive=False):
    def leaf(*shape):
        values = rng.normal(size=shape)
        return jnp.asarray(abs(values) if positive else values, dtype)

    return {"a": leaf(4, 3), "b": leaf(5)}


def task_list(rng, tasks, dtype=np.float32):
    """(theta_i*, F_i) of some tasks."""
    return [(random_tree(rng, dtype), random_tree(rng, dtype, positive=True)) for _ in range(tasks)]


def listed_value(tasks, theta):
    """Q by the paper's formula, one model and one Fisher per task, float64."""
    theta = oracles.flat(theta)
    return sum(
        0.5 * np.sum(oracles.flat(f) * (theta - oracles.flat(star)) ** 2) for star, f in tasks
    )


def running_sum(tasks, center):
    quadratics = [DiagonalQuadratic.at(star, diagonal=fisher) for star, fisher in tasks]
    return functools.reduce(lambda total, q: total + q, quadratics, DiagonalQuadratic.zero(center))


@pytest.mark.parametrize("dtype,tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_running_sums_equal_the_list_of_tasks(dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(0)
        tasks, theta, direction = task_list(rng, 6, dtype), *(random_tree(rng, dtype),) * 2
        direction = random_tree(rng, dtype)
        total = running_sum(tasks, random_tree(rng, dtype))
        np.testing.assert_allclose(total.value(theta), listed_value(tasks, theta), rtol=tolerance)
        d, at = oracles.flat(direction), oracles.flat(theta)
        slope = sum(d @ (oracles.flat(f) * (at - oracles.flat(star))) for star, f in tasks)
        np.testing.assert_allclose(total.gradient_along(theta, direction), slope, rtol=tolerance)
        curvature = sum(d @ (oracles.flat(f) * d) for _, f in tasks)
        np.testing.assert_allclose(total.curvature_along(direction), curvature, rtol=tolerance)


def test_memory_does_not_grow_with_the_tasks():
    rng = np.random.default_rng(0)
    center = random_tree(rng)
    few, many = running_sum(task_list(rng, 2), center), running_sum(task_list(rng, 40), center)
    assert jax.tree.structure(few) == jax.tree.structure(many)
    assert [x.shape for x in jax.tree.leaves(few)] == [x.shape for x in jax.tree.leaves(many)]


def test_recentring_changes_nothing_but_the_center():
    rng = np.random.default_rng(1)
    quadratic = running_sum(task_list(rng, 3), random_tree(rng))
    moved = quadratic.recentered(random_tree(rng))
    for _ in range(3):
        theta, direction = random_tree(rng), random_tree(rng)
        np.testing.assert_allclose(moved.value(theta), quadratic.value(theta), rtol=1e-5)
        np.testing.assert_allclose(
            moved.gradient_along(theta, direction),
            quadratic.gradient_along(theta, direction),
            rtol=1e-4,  # the slope is a sum with cancellation
        )


def dense_matrix(matrix, params, batch):
    dense = oracles.dense_gauss_newton if matrix == "gauss_newton" else oracles.dense_hessian
    return dense(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_exact_quadratic_answers_as_the_dense_matrix(matrix, batch_size):
    center, direction, batch = oracles.problem()
    other = oracles.problem(seed=5)[1]
    model = oracles.network if matrix == "gauss_newton" else oracles.losses
    quadratic = ExactQuadratic.at(center, batch, model, matrix=matrix, batch_size=batch_size)
    dense = dense_matrix(matrix, center, batch)
    directions = [direction, other]
    flats = np.stack([oracles.flat(d) for d in directions])
    gram = flats @ dense @ flats.T
    scale = np.sqrt(np.outer(np.diag(abs(gram)), np.diag(abs(gram))))
    np.testing.assert_allclose(np.asarray(quadratic.gram(directions)) / scale, gram / scale,
                               rtol=0, atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(quadratic.curvature_along(direction), gram[0, 0], rtol=1e-5)
    theta = jax.tree.map(jnp.add, center, other)
    np.testing.assert_allclose(quadratic.value(theta), 0.5 * gram[1, 1], rtol=1e-5)
    np.testing.assert_allclose(
        float(quadratic.gradient_along(theta, direction)) / scale[0, 1],
        gram[1, 0] / scale[0, 1],
        rtol=0,
        atol=1e-5,
    )


def test_weights_of_zero_leave_examples_out():
    center, direction, batch = oracles.problem()
    weights = jnp.asarray([1.0] * 9 + [0.0] * 4)
    part = Batch(batch.inputs[:9], batch.labels[:9])
    for model, matrix in ((oracles.network, "gauss_newton"), (oracles.losses, "hessian")):
        weighted = ExactQuadratic.at(center, batch._replace(weights=weights), model, matrix, 4)
        np.testing.assert_allclose(
            weighted.curvature_along(direction),
            ExactQuadratic.at(center, part, model, matrix, 4).curvature_along(direction),
            rtol=1e-5,
        )


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
def test_exact_curvatures_of_one_model_add_up_to_one_that_keeps_both_tasks(matrix):
    model = oracles.network if matrix == "gauss_newton" else oracles.losses
    problems = [oracles.problem(seed=seed) for seed in (0, 1)]
    first, second = (
        ExactQuadratic.at(center, batch, model, matrix=matrix, batch_size=5)
        for center, _, batch in problems
    )
    both, direction = first + second.scaled(3.0), problems[0][1]
    assert isinstance(both, ExactQuadratic)
    dense = [dense_matrix(matrix, center, batch) for center, _, batch in problems]
    total, d = dense[0] + 3 * dense[1], oracles.flat(direction)
    found = oracles.flat(both.curvature.times(direction))
    np.testing.assert_allclose(found, total @ d, rtol=1e-4, atol=1e-5 * abs(total @ d).max())
    np.testing.assert_allclose(both.curvature_along(direction), d @ total @ d, rtol=1e-5)
    step = oracles.flat(problems[0][0]) - oracles.flat(problems[1][0])
    at_first = 1.5 * step @ dense[1] @ step
    np.testing.assert_allclose(both.value(problems[0][0]), at_first, rtol=1e-4)
    if matrix == "gauss_newton":
        np.testing.assert_allclose(both.trace(), np.trace(total), rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="matrix='hessian': its trace takes a product"):
            both.trace()


def test_exact_curvatures_of_different_models_stay_apart():
    center, _, batch = oracles.problem()
    one, other = (ExactQuadratic.at(center, batch, oracles.network, batch_size=n) for n in (5, 6))
    assert isinstance(one + other, SumQuadratic)
    with pytest.raises(ValueError, match="must have the same model, matrix and batch size"):
        one.plus(other)


@pytest.mark.parametrize("size", [1.0, 1e-15, 0.0])
def test_a_curvature_along_one_direction_has_its_value_there_and_nothing_across(size):
    """Also where the square of the direction's square underflows, and 0 for no direction."""
    rng = np.random.default_rng(4)
    d, other = jax.tree.map(lambda x: size * x, random_tree(rng)), random_tree(rng)
    quadratic = Quadratic.at(d, AlongDirection(d, jnp.asarray(2.0))).scaled(3.0)
    value = 6.0 if size else 0.0
    np.testing.assert_allclose(quadratic.curvature_along(d), value, rtol=1e-5)
    # The center is one whole direction away from the origin.
    origin = jax.tree.map(jnp.zeros_like, d)
    np.testing.assert_allclose(quadratic.gradient_along(origin, d), -value, rtol=1e-5)
    np.testing.assert_allclose(quadratic.value(origin), value / 2, rtol=1e-5)
    share = float(trees.inner(d, other) / trees.inner(d, d)) if size else 0.0
    square = value * share**2
    np.testing.assert_allclose(quadratic.curvature_along(other), square, rtol=1e-4)
    across = jax.tree.map(lambda x, y: x - share * y, other, d)
    np.testing.assert_allclose(quadratic.curvature_along(across), 0, atol=1e-9 * max(1.0, square))
    assert not (quadratic + DiagonalQuadratic.zero(d)).leafwise


@pytest.mark.slow
def test_sum_of_different_kinds_adds_their_answers():
    center, direction, batch = oracles.problem()
    exact = ExactQuadratic.at(center, batch, oracles.network)
    diagonal = DiagonalQuadratic.at(
        jax.tree.map(jnp.zeros_like, center), jax.tree.map(jnp.ones_like, center)
    )
    both = diagonal + exact
    assert isinstance(both, SumQuadratic)
    theta = jax.tree.map(jnp.add, center, direction)
    for ask in (
        lambda q: q.value(theta),
        lambda q: q.gradient_along(theta, direction),
        lambda q: q.curvature_along(direction),
        lambda q: q.gram([direction, theta])[0, 1],
        lambda q: q.trace(),
    ):
        np.testing.assert_allclose(ask(both), ask(diagonal) + ask(exact), rtol=1e-6)
    np.testing.assert_allclose((exact + diagonal).value(theta), both.value(theta), rtol=1e-6)


def test_a_quadratic_passes_through_jit_and_counts_its_leaves():
    rng = np.random.default_rng(2)
    quadratic = running_sum(task_list(rng, 2), random_tree(rng))
    theta = random_tree(rng)
    np.testing.assert_allclose(
        jax.jit(lambda q, t: q.value(t))(quadratic, theta), quadratic.value(theta), rtol=1e-6
    )


def test_memory_is_not_changed_by_training_an_nnx_model_further():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    memory = DiagonalQuadratic.zero(nnx.state(model, nnx.Param))
    before = jax.tree.map(jnp.copy, memory.center)
    nnx.update(model, jax.tree.map(lambda x: x + 1.0, nnx.state(model, nnx.Param)))
    for now, then in zip(jax.tree.leaves(memory.center), jax.tree.leaves(before), strict=True):
        assert jnp.array_equal(now, then)


def test_an_unknown_matrix_is_refused():
    with pytest.raises(ValueError, match="matrix='fisher'"):
        ExactQuadratic.at(jnp.zeros(1), oracles.problem()[2], oracles.network, matrix="fisher")


def test_leaves_of_a_diagonal_quadratic_keep_full_precision_for_bfloat16_models():
    center = {"a": jnp.ones(3, jnp.bfloat16)}
    quadratic = DiagonalQuadratic.zero(center)
    assert quadratic.diagonal["a"].dtype == jnp.float32
    assert trees.inner(quadratic.gradient, quadratic.gradient).dtype == jnp.float32
