import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import coefficients, curvature, task_vectors
from pm_jax.quadratics import DiagonalQuadratic
from tests import oracles
from tests.quadratics_test import listed_value, random_tree, running_sum, task_list


def test_closed_form_by_hand():
    old = DiagonalQuadratic.at(jnp.asarray([0.0, 1.0]), jnp.asarray([2.0, 1.0]))
    new = DiagonalQuadratic.at(jnp.asarray([3.0, 2.0]), jnp.asarray([1.0, 4.0]))
    previous, delta = jnp.asarray([1.0, 1.0]), jnp.asarray([2.0, 1.0])
    # gradient at previous: old (2, 0), new (-2, -4); along delta 4 - 8 = -4;
    # curvature along delta: old 9, new 8.
    found = coefficients.merge_coefficient(old + new, previous, delta, task=2, curvature_error=0.5)
    assert float(found.numerator) == 4.0 and float(found.denominator) == 17.0
    np.testing.assert_allclose(found.alpha_raw, 4 / 17, rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, (1 - 4 / 17) / 17 * 0.5, rtol=1e-6)
    assert not bool(found.degenerate)


@pytest.mark.parametrize("clip", [True, False])
def test_closed_form_is_the_minimum_along_the_segment(float64, clip):
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 201) if clip else np.linspace(-3, 3, 601)
    for _ in range(20):
        tasks = task_list(rng, 3, np.float64)
        previous, new = random_tree(rng, np.float64), tasks[-1][0]
        delta = task_vectors.difference(new, previous)
        memory = running_sum(tasks, random_tree(rng, np.float64))
        alpha = coefficients.merge_coefficient(memory, previous, delta, task=3, clip=clip).alpha
        best = listed_value(tasks, task_vectors.apply(previous, delta, alpha))
        for a in grid:
            assert best <= listed_value(tasks, task_vectors.apply(previous, delta, a)) * (1 + 1e-12)


def test_a_common_factor_cancels():
    rng = np.random.default_rng(1)
    tasks, previous = task_list(rng, 4), random_tree(rng)
    delta = task_vectors.difference(tasks[-1][0], previous)
    center = random_tree(rng)
    scaled = [(star, jax.tree.map(lambda f: 1e-4 * f, fisher)) for star, fisher in tasks]
    plain, other = (
        coefficients.merge_coefficient(running_sum(t, center), previous, delta, task=4).alpha_raw
        for t in (tasks, scaled)
    )
    np.testing.assert_allclose(other, plain, rtol=1e-5)


def test_standard_error_is_the_spread_over_resampled_data():
    """The Fisher of the new task measured on many fresh samples of its data."""
    params, direction, _ = oracles.problem()
    previous = jax.tree.map(jnp.subtract, params, direction)
    old = DiagonalQuadratic.at(
        jax.tree.map(lambda p: p + 0.05, previous),
        jax.tree.map(lambda p: 0.05 * jnp.ones_like(p), params),
    )
    measure = curvature.fisher_empirical(oracles.losses)

    @jax.jit
    def one(inputs, labels):
        batch = oracles.Batch(inputs, labels)
        found = curvature.measure_all(measure, params, batch, 200, direction)
        return coefficients.merge_coefficient(
            old + found.quadratic, previous, direction, task=2,
            curvature_error=found.standard_error,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    found = [
        one(
            jnp.asarray(rng.normal(size=(200, oracles.FEATURES)), jnp.float32),
            jnp.asarray(rng.integers(oracles.CLASSES, size=200)),
        )
        for _ in range(400)
    ]
    spread = np.std([float(f.alpha_raw) for f in found], ddof=1)
    predicted = np.mean([float(f.standard_error) for f in found])
    # 400 repeats know a standard deviation to 3.5 %; three times that.
    np.testing.assert_allclose(predicted, spread, rtol=0.11)
    assert spread > 1e-3


DEGENERATE = {
    "no displacement": (jnp.zeros(2), jnp.ones(2)),
    "no curvature": (jnp.ones(2), jnp.zeros(2)),
    "underflow": (jnp.full(2, 1e-23), jnp.ones(2)),
    "negative curvature": (jnp.ones(2), -jnp.ones(2)),
    "infinite curvature": (jnp.ones(2), jnp.asarray([jnp.inf, 1.0])),
    "undefined curvature": (jnp.ones(2), jnp.asarray([jnp.nan, 1.0])),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("name", DEGENERATE)
def test_no_minimum_falls_back_to_averaging_and_says_so(name, wrap):
    delta, diagonal = DEGENERATE[name]
    quadratic = DiagonalQuadratic.at(jnp.zeros(2), diagonal)
    solve = wrap(functools.partial(coefficients.merge_coefficient, task=4))
    found = solve(quadratic, jnp.ones(2), delta)
    assert float(found.alpha) == 0.25 and float(found.alpha_raw) == 0.25
    assert bool(found.degenerate)


def test_alpha_is_clipped_and_the_raw_value_kept():
    quadratic = DiagonalQuadratic.at(jnp.asarray([5.0]), jnp.ones(1))
    previous, delta = jnp.zeros(1), jnp.ones(1)
    found = coefficients.merge_coefficient(quadratic, previous, delta, task=2)
    assert float(found.alpha) == 1.0 and float(found.alpha_raw) == 5.0
    found = coefficients.merge_coefficient(quadratic, previous, delta, task=2, clip=False)
    assert float(found.alpha) == 5.0
    found = coefficients.merge_coefficient(quadratic, previous, -delta, task=2)
    assert float(found.alpha) == 0.0 and float(found.alpha_raw) == -5.0


def test_the_first_task_is_kept_whole_whatever_its_curvature():
    for diagonal in (jnp.ones(1), jnp.zeros(1), jnp.full(1, jnp.nan)):
        quadratic = DiagonalQuadratic.at(jnp.asarray([5.0]), diagonal)
        found = coefficients.merge_coefficient(quadratic, jnp.zeros(1), jnp.ones(1), task=1)
        assert float(found.alpha) == 1.0 and float(found.standard_error) == 0.0
        assert not bool(found.degenerate)
