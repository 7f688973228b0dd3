import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from pm_jax import classifiers
from pm_jax.continual import Config, Learner
from pm_jax.continual.merging.statistics import features_of
from pm_jax.continual.training.logits import logits_of
from pm_jax.types import InvalidInput
from tests.small_runs import BY_CLASS, QUIET

DISCRIMINANT = classifiers.discriminant()
STATISTICS = DISCRIMINANT.statistics
observe = jax.jit(STATISTICS.observe)
fit = jax.jit(lambda state: DISCRIMINANT.fit(state, None, None))


def examples(count=90, width=5, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=count)
    mixing = generator.normal(size=(width, width))
    features = (
        generator.normal(size=(count, width)) @ mixing
        + 2 * generator.normal(size=(classes, width))[labels]
    )
    return features.astype(np.float32), labels.astype(np.int32)


def statistics_of(features, labels, classes, batches=((0, None),)):
    found = STATISTICS.init(classes, features.shape[1], None)
    for first, stop in batches:
        rows = slice(first, stop)
        found = observe(found, features[rows], labels[rows], np.ones(len(labels[rows])))
    return found


def test_logits_are_those_of_another_implementation():
    features, labels = examples()
    found = statistics_of(features, labels, 3)
    kernel, bias = fit(found)
    centred = features - np.stack([features[labels == c].mean(axis=0) for c in range(3)])[labels]
    _, share = oas(centred.astype(np.float64), assume_centered=True)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share)
    other.fit(features.astype(np.float64), labels)
    # A solve of a covariance with a condition number of some hundreds, in float32.
    np.testing.assert_allclose(kernel, other.coef_.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(bias, other.intercept_, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batches", [((0, 1), (1, None)), ((0, 30), (30, 31), (31, None))])
def test_batches_add_up(batches):
    features, labels = examples()
    whole, parts = (statistics_of(features, labels, 3, b) for b in (((0, None),), batches))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_padding_does_not_count():
    features, labels = examples(20)
    padded = observe(
        STATISTICS.init(3, 5, None),
        np.concatenate([features, 100 + features]),
        np.tile(labels, 2),
        np.arange(40) < 20,
    )
    for a, b in zip(statistics_of(features, labels, 3), padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_classes_without_examples_are_never_chosen():
    features, labels = examples()
    kernel, bias = fit(statistics_of(features, 2 * labels, 6))
    logits = features @ np.asarray(kernel) + np.asarray(bias)
    assert np.isfinite(logits).all() and set(np.argmax(logits, axis=1)) == {0, 2, 4}


def test_equal_features_leave_only_the_shares():
    features, labels = np.ones((4, 2), np.float32), np.asarray([0, 0, 0, 1])
    kernel, bias = fit(statistics_of(features, labels, 2))
    found = np.ones(2) @ np.asarray(kernel) + np.asarray(bias)
    np.testing.assert_allclose(found, np.log([0.75, 0.25]) + 1.0, rtol=1e-5)


@pytest.mark.slow
def test_run_predicts_with_the_classes_of_all_tasks_and_trains_as_before():
    plain = Learner(BY_CLASS, seed=0, options=QUIET)
    learner = Learner(
        dataclasses.replace(BY_CLASS, classifiers=("discriminant",)), seed=0, options=QUIET
    )
    wanted, found = plain.run(), learner.run()
    np.testing.assert_equal(found["merges"], wanted["merges"])
    assert found["final_average_accuracy"] != wanted["final_average_accuracy"]
    stream, model = learner.stream, BY_CLASS.network(10)
    statistics, merged = learner.state.statistics["class_statistics"], learner.state.params
    rows = np.concatenate(stream.train.rows())
    assert statistics.counts.tolist() == np.bincount(stream.labels[rows], minlength=10).tolist()
    rows = stream.train.rows()[-1]
    features = features_of(model, merged, jnp.asarray(stream.inputs[rows]))
    for label in np.flatnonzero(stream.class_masks[-1]):
        own = features[stream.labels[rows] == label]
        np.testing.assert_allclose(statistics.means[label], own.mean(axis=0), rtol=1e-4, atol=1e-5)
    kernel, bias = fit(statistics)
    for task, rows in enumerate(stream.test.rows()):
        inputs, seen = jnp.asarray(stream.inputs[rows]), jnp.ones(10)
        logits = features_of(model, merged, inputs) @ kernel + np.asarray(bias)[None]
        accuracy = np.mean(np.argmax(logits, axis=1) == stream.labels[rows])
        np.testing.assert_allclose(found["accuracy_matrix"][-1][task], accuracy, atol=1e-6)
        predicted = logits_of(model, learner.params, inputs, seen)
        np.testing.assert_array_equal(np.argmax(predicted, axis=1), np.argmax(logits, axis=1))


def test_one_classifier_for_all_tasks_is_refused():
    with pytest.raises(InvalidInput, match="^classifiers=discriminant: .* use trained$"):
        Config(classifiers=("discriminant",))
