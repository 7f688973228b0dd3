import numpy as np
import pytest
from scipy import special
from scipy.spatial import distance

from pm_jax import rules
from pm_jax.rules import preferences

RNG = np.random.default_rng(0)
NEAR, FAR, TARGET = (RNG.normal(size=(n, 3)) + shift for n, shift in ((7, 1), (6, 3), (5, 1)))


def test_label_counts_are_the_shares_of_the_tasks_classes():
    masks = np.asarray([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    assert preferences.label_counts([0, 1, 1, 2], masks) == (0.75, 0.25, 0.0)
    with pytest.raises(ValueError, match="none is of the classes"):
        preferences.label_counts([3], masks[:2])


def test_cosine_is_of_the_mean_features():
    left, right = NEAR.mean(axis=0), TARGET.mean(axis=0)
    wanted = (1 - left @ right / np.sqrt((left @ left) * (right @ right))) / 2
    assert preferences.cosine_distance(NEAR, TARGET) == pytest.approx(wanted, rel=1e-12)


def test_mmd_is_the_root_of_the_unbiased_estimate():
    def mean(left, right, same):
        squares = [
            ((a - b) ** 2).sum()
            for i, a in enumerate(left)
            for j, b in enumerate(right)
            if not (same and i == j)
        ]
        return np.mean(np.exp(-np.asarray(squares) / (2 * np.median(squares))))

    square = mean(FAR, FAR, True) + mean(TARGET, TARGET, True) - 2 * mean(FAR, TARGET, False)
    found = preferences.mmd_distance(FAR, TARGET)
    assert found == pytest.approx(np.sqrt(max(square, 0)), rel=1e-12)


def test_sinkhorn_is_that_of_logarithms():
    cost = distance.cdist(FAR, TARGET) ** 2
    cost /= cost.max()
    rows, columns = np.zeros(len(FAR)), np.zeros(len(TARGET))
    for _ in range(100):
        rows = -np.log(len(FAR)) - special.logsumexp(columns - cost / 0.1, axis=1)
        columns = -np.log(len(TARGET)) - special.logsumexp(rows[:, None] - cost / 0.1, axis=0)
    plan = np.exp(rows[:, None] + columns - cost / 0.1)
    found = preferences.sinkhorn_distance(FAR, TARGET)
    assert found == pytest.approx((plan * cost).sum(), rel=1e-9)
    assert preferences.sinkhorn_distance(np.ones((2, 1)), np.ones((3, 1))) == 0.0


def test_weights_fall_by_the_distance_and_do_not_underflow():
    assert preferences.weights_of_distances([0.02, 0.01]) == pytest.approx(
        [1 / (1 + np.e), np.e / (1 + np.e)], rel=1e-12
    )
    assert preferences.weights_of_distances([100.0, 200.0]) == (1.0, 0.0)


@pytest.mark.parametrize("name", preferences.DISTANCES)
def test_weights_of_features_are_a_preference(name):
    weights = preferences.from_features(name, [NEAR, FAR, NEAR], TARGET)
    assert weights[0] == weights[2] and sum(weights) == pytest.approx(1, abs=1e-12)
    rules.tunable_magmax(preference=weights, max_tasks=3)
    embedded = preferences.from_features(name, [NEAR, FAR, NEAR], np.stack([TARGET] * 3))
    assert embedded == weights


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="distance=x: must be one of cosine, mmd, sinkhorn"):
        preferences.from_features("x", [NEAR], TARGET)
    with pytest.raises(ValueError, match="by 2 models for 1 tasks"):
        preferences.from_features("mmd", [NEAR], np.stack([TARGET] * 2))
