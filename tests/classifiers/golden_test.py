"""Classifiers against other implementations, and against what can be computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from pm_jax import classifiers
from pm_jax.classifiers.random_features import RECENT, Recent, _keep
from pm_jax.classifiers.ridge import STRENGTHS, chosen_strength

WIDTH, CLASSES = 4, 3
KEY = jax.random.key(1)


def examples(count=90, seed=0, spread=1.0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=count)
    centers = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    features = centers[labels] + spread * generator.normal(size=(count, WIDTH))
    return features.astype(np.float32), labels.astype(np.int32)


def observed(classifier, features, labels):
    statistics = classifier.statistics
    state = statistics.init(CLASSES, WIDTH, KEY)
    return statistics.observe(state, features, labels, np.ones(len(labels), np.float32))


def test_nearest_mean_is_that_of_another_implementation():
    classifier = classifiers.nearest_mean()
    features, labels = examples()
    logits = classifier.fit(observed(classifier, features, labels), None, None)(features)
    other = NearestCentroid().fit(features.astype(np.float64), labels)
    np.testing.assert_array_equal(np.argmax(logits, axis=1), other.predict(features))
    centers = other.centroids_
    distances = ((features[:, None].astype(np.float64) - centers[None]) ** 2).sum(axis=-1)
    wanted = -0.5 * distances + 0.5 * (features.astype(np.float64) ** 2).sum(axis=1)[:, None]
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [10.0, 1000.0])
def test_ridge_is_that_of_another_implementation(strength):
    classifier = classifiers.ridge(features=50, strength=strength)
    features, labels = examples()
    state = observed(classifier, features, labels)
    predictor = jax.jit(classifier.fit)(state, None, None)
    expanded = np.maximum(features.astype(np.float64) @ np.asarray(state.projection), 0)
    other = Ridge(alpha=strength, fit_intercept=False).fit(expanded, np.eye(CLASSES)[labels])
    np.testing.assert_allclose(predictor(features), other.predict(expanded), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        predictor.kernel, other.coef_.T, atol=1e-4 * np.abs(other.coef_).max()
    )
    assert predictor.strength == strength


def test_strength_of_ridge_has_the_least_error_on_every_fifth_recent_example():
    classifier = classifiers.ridge(features=40)
    features, labels = examples(100, spread=3.0)
    state = observed(classifier, features, labels)
    kept = np.asarray(state.recent.priorities) >= 0
    assert kept.sum() == 100 and kept[:100].all()
    order = np.asarray(state.recent.features)[:100]
    targets = np.eye(CLASSES)[np.asarray(state.recent.labels)[:100]]
    expanded = np.maximum(order.astype(np.float64) @ np.asarray(state.projection), 0)
    last = np.arange(100) % 5 == 4
    scale = np.mean(np.sum(expanded**2, axis=1))

    def error(strength):
        other = Ridge(alpha=strength, fit_intercept=False).fit(expanded[~last], targets[~last])
        return np.sum((other.predict(expanded[last]) - targets[last]) ** 2)

    wanted = min((scale * strength for strength in STRENGTHS), key=error)
    assert scale * STRENGTHS[0] < wanted < scale * STRENGTHS[-1]  # inside the grid
    np.testing.assert_allclose(jax.jit(chosen_strength)(state), wanted, rtol=1e-5)


def test_recent_examples_are_thinned_evenly():
    recent = Recent(
        jnp.zeros((100, 1)), jnp.zeros(100, jnp.int32), jnp.full(100, -1.0), jnp.zeros(())
    )
    numbers = np.arange(1000)
    for first in range(0, 1000, 250):
        batch = numbers[first : first + 250]
        recent = _keep(recent, jnp.asarray(batch[:, None], jnp.float32), batch, batch >= 0)
    kept = np.sort(np.asarray(recent.labels))
    np.testing.assert_array_equal(kept, np.sort(np.asarray(recent.features)[:, 0]))
    assert recent.observed == 1000 and len(set(kept)) == 100
    # One in ten of any stretch, such as a class of examples that come class by class.
    for first in range(0, 1000, 200):
        assert 17 <= np.sum((kept >= first) & (kept < first + 200)) <= 23
    assert np.diff(kept).max() <= 30


def test_recent_examples_are_those_of_the_newer_statistics():
    statistics = classifiers.ridge(features=10).statistics
    one, two = (observed(classifiers.ridge(features=10), *examples(20, seed)) for seed in (0, 1))
    both = statistics.plus(one, two)
    np.testing.assert_array_equal(both.recent.features, two.recent.features)
    assert both.recent.features.shape == (RECENT, WIDTH) and both.counts.sum() == 40


def test_ridge_grows_stronger_where_float32_cannot_factor():
    classifier = classifiers.ridge(features=60, strength=1e-7)
    features, labels = examples(20)
    predictor = jax.jit(classifier.fit)(observed(classifier, features, labels), None, None)
    assert np.isfinite(predictor.kernel).all() and predictor.strength > 1e-7
    strength = classifier.figures(None, predictor)["strength"]
    assert strength == predictor.strength
    assert "grew" in classifier.remarks(classifier.figures(None, predictor))[0]


def test_aligned_columns_become_those_of_the_discriminant():
    """The best columns for Gaussians with one covariance are linear discriminant analysis."""
    aligned = classifiers.aligned(steps=500, rate=0.05, batch_size=512)
    features, labels = examples(600, spread=0.7)
    state = observed(aligned, features, labels)
    # Trained on one class at a time, columns say nothing of others.
    columns = jnp.zeros((WIDTH, CLASSES)), jnp.asarray([0.0, 0.0, 5.0])
    found = jax.jit(aligned.fit)(state, columns, KEY)
    # Features are drawn from all classes alike, whatever their shares.
    state = state._replace(counts=jnp.full(CLASSES, 200.0))
    wanted = classifiers.discriminant().fit(state, None, None)

    def probabilities(predictor):
        return np.asarray(jax.nn.softmax(predictor(features), axis=1))

    # Drawn features, a few hundred steps: as good as the discriminant to some hundredths.
    np.testing.assert_allclose(probabilities(found), probabilities(wanted), atol=0.1)
    assert np.mean(np.abs(probabilities(found) - probabilities(wanted))) < 0.02
    before = np.asarray(classifiers.trained().fit(None, columns, None)(features)).argmax(axis=1)
    assert (
        np.mean(before == labels)
        < 0.5
        < 0.8
        < np.mean(probabilities(found).argmax(axis=1) == labels)
    )


def test_aligned_columns_begin_at_the_trained_ones():
    aligned = classifiers.aligned(steps=1, rate=1e-8)
    features, labels = examples()
    generator = np.random.default_rng(2)
    columns = tuple(
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in ((WIDTH, CLASSES), (CLASSES,))
    )
    found = jax.jit(aligned.fit)(observed(aligned, features, labels), columns, KEY)
    for one, two in zip(found, columns, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_covariance_without_examples_to_measure_it_is_said():
    classifier = classifiers.discriminant()
    features, labels = examples(CLASSES)
    state = observed(classifier, features, np.arange(CLASSES))  # one of each class
    predictor = classifier.fit(state, None, None)
    figures = classifier.figures(state, predictor)
    assert figures["shrinkage"] == 1 and "shrinkage 1" in classifier.remarks(figures)[0]
    # The distance to the means, but for the shares, which are equal.
    nearest = classifiers.nearest_mean().fit(state, None, None)
    np.testing.assert_allclose(predictor.kernel, nearest.kernel, rtol=1e-5)
    features, labels = examples(400)
    many = observed(classifier, features * np.asarray([1, 2, 4, 8], np.float32), labels)
    assert 0 < classifier.figures(many, None)["shrinkage"] < 0.1
