import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax.classifiers import CLASS_STATISTICS, FeatureMap, drift

WIDTH = 5
observe, fit = jax.jit(drift.observe), jax.jit(drift.fit)


def features(count=400, width=WIDTH, seed=0):
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, width)) @ generator.normal(size=(width, width))
    return (mixed + 3 * generator.normal(size=width)).astype(np.float32)


def planted(before, noise=0.0, seed=1):
    """Features after an affine drift, with its matrix and shift."""
    generator = np.random.default_rng(seed)
    matrix = np.eye(WIDTH) + 0.2 * generator.normal(size=(WIDTH, WIDTH))
    shift = generator.normal(size=WIDTH)
    after = before @ matrix + shift + noise * generator.normal(size=before.shape)
    return after.astype(np.float32), matrix, shift


def fitted(before, after, weights=None):
    weights = np.ones(len(before), np.float32) if weights is None else weights
    return fit(observe(drift.init(before.shape[1]), before, after, weights))


def by_hand(before, after, strength):
    """The map in float64 from the examples themselves: x -> (x - mean f) M + mean g."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    f = before - before.mean(axis=0)
    d = (after - before) - (after - before).mean(axis=0)
    width = f.shape[1]
    ridge = strength * np.trace(f.T @ f) / width
    slope = np.linalg.solve(f.T @ f + ridge * np.eye(width), f.T @ d)
    return lambda x: (x - before.mean(axis=0)) @ (np.eye(width) + slope) + after.mean(axis=0)


def explained_by_hand(before, after):
    """The best share on held-out examples, in float64, and the strength that gives it."""
    held_out = np.arange(len(before)) % 5 == 4
    total = np.sum((after[held_out] - before[held_out]).astype(np.float64) ** 2)

    def explained(strength):
        moved = by_hand(before[~held_out], after[~held_out], strength)(before[held_out])
        return 1 - np.sum((after[held_out] - moved) ** 2) / total

    return max((explained(strength), strength) for strength in (*drift.STRENGTHS, 1e30))


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_the_map_and_its_share_are_those_of_the_examples_themselves(noise):
    before = features(120)
    after, _, _ = planted(before, noise)
    share, strength = explained_by_hand(before, after)
    found, figures = fitted(before, after)
    np.testing.assert_allclose(figures.strength, strength, rtol=1e-6)
    # The share is a difference of sums of squares of the moments.
    np.testing.assert_allclose(figures.explained, share, rtol=1e-4, atol=1e-5)
    wanted = by_hand(before, after, strength)(before)
    np.testing.assert_allclose(found(before), wanted, rtol=1e-4, atol=1e-4)


def test_a_planted_drift_is_found_and_moves_statistics_to_where_they_would_be():
    generator = np.random.default_rng(0)
    # The same spread in all directions, since a direction without examples cannot be found.
    before, earlier = (
        generator.normal(2, 1, (count, WIDTH)).astype(np.float32) for count in (400, 90)
    )
    after, matrix, shift = planted(before)
    found, figures = fitted(before, after)
    assert figures.explained > 0.999 and figures.explained_by_shift < 0.95
    assert figures.strength == np.float32(drift.STRENGTHS[0])
    # The drift is shrunk by a thousandth of itself.
    np.testing.assert_allclose(found.matrix, matrix, atol=2e-3)
    np.testing.assert_allclose(
        found(before.mean(axis=0)[None])[0], before.mean(axis=0) @ matrix + shift, rtol=1e-4
    )
    labels, ones = np.arange(90) % 3, np.ones(90, np.float32)
    empty = CLASS_STATISTICS.init(3, WIDTH, None)
    old = CLASS_STATISTICS.observe(empty, earlier, labels, ones)
    now = (earlier @ matrix + shift).astype(np.float32)
    new = CLASS_STATISTICS.observe(empty, now, labels, ones)
    moved = CLASS_STATISTICS.moved(old, found)

    def error(state):
        return [float(jnp.linalg.norm(getattr(state, x) - getattr(new, x))) for x in new._fields]

    counts, means, scatter = np.divide(error(moved), np.maximum(error(old), 1e-9))
    assert counts == 0 and means < 0.005 and scatter < 0.005


def test_no_drift_changes_nothing_to_the_bit():
    before = features()
    found, figures = fitted(before, before)
    for one, two in zip(found, FeatureMap.identity(WIDTH), strict=True):
        np.testing.assert_array_equal(one, two)
    assert figures.explained == 0 and figures.explained_by_shift == 0
    labels = np.arange(len(before)) % 3
    state = CLASS_STATISTICS.init(3, WIDTH, None)
    state = CLASS_STATISTICS.observe(state, before, labels, np.ones(len(before), np.float32))
    for one, two in zip(CLASS_STATISTICS.moved(state, found), state, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_shift_is_a_shift():
    before, shift = features(), np.asarray([1.0, -2.0, 0.0, 0.5, 4.0], np.float32)
    found, figures = fitted(before, before + shift)
    np.testing.assert_allclose(figures.explained, 1, atol=1e-5)
    np.testing.assert_allclose(figures.explained_by_shift, 1, atol=1e-5)
    np.testing.assert_allclose(found(before), before + shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.matrix, np.eye(WIDTH), atol=1e-4)


def test_drift_that_no_map_explains_is_left_alone():
    """Held-out drift opposite to the one of the fit: every map would make it worse."""
    before = features(100)
    sign = np.where(np.arange(100) % 5 == 4, -1.0, 1.0)[:, None]
    found, figures = fitted(before, (before + 3 * sign).astype(np.float32))
    for one, two in zip(found, FeatureMap.identity(WIDTH), strict=True):
        np.testing.assert_array_equal(one, two)
    assert figures.explained == 0 and figures.explained_by_shift < -1
    assert np.isinf(figures.strength)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 99), (33, 34, 33), (7, 3, 90)])
def test_batches_and_padding_change_nothing(sizes):
    before = features(100)
    after, _, _ = planted(before, 0.3)
    whole, figures = fitted(before, after)
    state, first = drift.init(WIDTH), 0
    for size in sizes:
        batch = [x[first : first + size] for x in (before, after)]
        padded = [np.concatenate([x, np.full((4, WIDTH), np.nan, np.float32)]) for x in batch]
        state = drift.observe(state, *padded, np.arange(size + 4) < size)
        first += size
    found, others = fit(state)
    np.testing.assert_allclose(others, figures, rtol=1e-4)
    for one, two in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_statistics_of_two_parts_add_up():
    before = features(100)
    after, _, _ = planted(before, 0.3)
    # The second part begins with a held-out number of its own, so both are multiples of five.
    ones = np.ones(50, np.float32)
    parts = [
        observe(drift.init(WIDTH), before[rows], after[rows], ones)
        for rows in (slice(0, 50), slice(50, 100))
    ]
    whole = observe(drift.init(WIDTH), before, after, np.ones(100, np.float32))
    for one, two in zip(jax.tree.leaves(drift.plus(*parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4 * float(jnp.abs(two).max()))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_few_examples_give_a_finite_map(count):
    before = features(5)[:count]
    after = before + 1 if count else before
    weights = np.ones(count, np.float32)
    found, figures = drift.fit(drift.observe(drift.init(WIDTH), before, after, weights))
    assert all(np.isfinite(leaf).all() for leaf in found)
    # The fifth is the first that is held out; before it nothing says that a map would help.
    assert (figures.explained > 0.99) == (count == 5)
    if count < 5:
        np.testing.assert_array_equal(found.matrix, np.eye(WIDTH))


def test_fewer_examples_than_features_and_features_that_are_constant():
    before = np.concatenate([features(30, 40), np.full((30, 10), 2.0, np.float32)], axis=1)
    after = before + 0.5 * np.roll(before, 1, axis=1)
    found, figures = fitted(before, after)
    assert all(np.isfinite(leaf).all() for leaf in found)
    assert 0 < figures.explained < 1
    constant, figures = fitted(np.ones((20, 3), np.float32), np.full((20, 3), 3.0, np.float32))
    np.testing.assert_allclose(constant(np.ones((1, 3))), np.full((1, 3), 3.0), rtol=1e-5)
    np.testing.assert_allclose(figures.explained, 1, rtol=1e-5)
