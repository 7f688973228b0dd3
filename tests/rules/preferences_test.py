import numpy as np
import pytest
from scipy import special, stats
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


def test_mmd_grows_with_the_shift_and_ends_where_no_pair_is_alike():
    rng = np.random.default_rng(2)
    source, target = rng.normal(size=(2, 50, 4))
    found = [preferences.mmd_distance(source, target + shift) for shift in (0, 1, 3, 10, 100)]
    # Measured elsewhere, on another draw of as many points.
    np.testing.assert_allclose(found[1:], [0.51, 1.02, 1.09, 1.09], atol=0.015)
    assert found[0] < 0.2 < found[1] < found[2] < found[3]
    # In expectation, by the law of |x - y|^2 of 4-d Gaussians, with their median in place of m.
    median = 2 * stats.chi2(4).median()
    within, between = (1 + 2 / median) ** -2, lambda d: np.exp(-(d**2) / (2 * (median + 2)))
    wanted = [np.sqrt(2 * within * (1 - between(2 * shift))) for shift in (1, 3, 10)]
    np.testing.assert_allclose(found[1:4], wanted, atol=0.05)


def test_mmd_by_hand_of_three_points_and_four():
    # Distances 1, 2, 3 of the source: m = 2. Distances 1, 2, 3, 4, 5, 6 of the target: the lower
    # median of an even number, m = 3.
    source, target = np.asarray([[0.0], [1.0], [3.0]]), np.asarray([[4.0], [5.0], [8.0], [10.0]])
    within = np.exp([-1 / 8, -4 / 8, -9 / 8]).mean()
    own = np.exp([-1 / 18, -4 / 18, -9 / 18, -16 / 18, -25 / 18, -36 / 18]).mean()
    squares = [16, 25, 64, 100, 9, 16, 49, 81, 1, 4, 25, 49]
    across = np.exp(-np.asarray(squares) / 8).mean()
    found = preferences.mmd_distance(source, target)
    assert found == pytest.approx(np.sqrt(within + own - 2 * across), rel=1e-12)
    # .60456 + .52484 - 2 * .18142, with a table of powers of e.
    assert found == pytest.approx(0.87554, abs=1e-5)


def test_mmd_of_examples_that_are_all_the_same():
    same = np.ones((3, 2))
    assert preferences.mmd_distance(same, same) == 0.0
    assert preferences.mmd_distance(same, same + 1) == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize("distance_name", preferences.DISTANCES)
def test_the_cluster_that_the_target_is_of_is_preferred(distance_name):
    rng = np.random.default_rng(3)
    means = 4 * np.eye(4)
    for right in range(4):
        sources = [rng.normal(size=(30, 4)) + mean for mean in means]
        weights = preferences.from_features(
            distance_name, sources, rng.normal(size=(20, 4)) + means[right]
        )
        assert np.argmax(weights) == right and weights[right] > 0.9


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
