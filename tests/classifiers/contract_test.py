"""Every registered classifier through one suite; a new one is tested by being registered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import classifiers
from pm_jax.classifiers import FeatureMap, Linear
from pm_jax.classifiers.registry import REGISTRY

SETTINGS = {"ridge": "features=30,strength=10", "aligned": "steps=200,batch_size=64,rate=0.05"}
"""A small size each; a strength that is chosen depends on the examples of the newest task."""

WIDTH, CLASSES = 6, 5
SEEN = (0, 1, 3, 4)
KEY = jax.random.key(3)

every_classifier = pytest.mark.parametrize("name", REGISTRY)
with_statistics = pytest.mark.parametrize(
    "name", [name for name in REGISTRY if classifiers.make(name).statistics]
)


@functools.cache
def made(name):
    """The classifier, compiled once for all tests."""
    classifier = classifiers.make(name, SETTINGS.get(name, ""))
    statistics = classifier.statistics
    if statistics:
        statistics = statistics._replace(
            observe=jax.jit(statistics.observe), plus=jax.jit(statistics.plus)
        )
    return classifier._replace(fit=jax.jit(classifier.fit), statistics=statistics)


def examples(count=60, seed=0, classes=SEEN):
    generator = np.random.default_rng(seed)
    labels = np.asarray(classes)[generator.integers(len(classes), size=count)]
    centers = 3 * np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    features = centers[labels] + generator.normal(size=(count, WIDTH))
    return features.astype(np.float32), labels.astype(np.int32)


def columns():
    generator = np.random.default_rng(4)
    kernel, bias = generator.normal(size=(WIDTH, CLASSES)), generator.normal(size=CLASSES)
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)


def start(statistics):
    return statistics.init(CLASSES, WIDTH, KEY)


def state_of(statistics, features, labels, sizes=None):
    """The statistics of examples that come in batches of some sizes."""
    state, first = start(statistics), 0
    for size in sizes or [len(labels)]:
        rows = slice(first, first + size)
        state = statistics.observe(state, features[rows], labels[rows], np.ones(size, np.float32))
        first += size
    assert first == len(labels)
    return state


def assert_close(found, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = float(jnp.abs(b.astype(jnp.float32)).max())
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


@every_classifier
def test_grammar(name):
    classifier = made(name)
    assert classifier.name == name
    state = None
    if classifier.statistics:
        state = state_of(classifier.statistics, *examples())
    predictor = classifier.fit(state, columns(), KEY)
    assert isinstance(predictor, Linear) is classifier.linear
    logits = jax.jit(lambda predictor, x: predictor(x))(predictor, examples()[0])
    assert logits.shape == (60, CLASSES) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    if classifier.linear:
        kernel, bias = predictor
        assert kernel.shape == (WIDTH, CLASSES) and bias.shape == (CLASSES,)
    figures = classifier.figures(state, predictor)
    assert all(np.isfinite(float(value)) for value in figures.values())
    assert classifier.remarks(figures) == ()


@every_classifier
def test_columns_are_read_where_the_classifier_says_so(name):
    classifier = classifiers.make(name, SETTINGS.get(name, ""))
    state = state_of(made(name).statistics, *examples()) if classifier.statistics else None
    if classifier.needs_columns:
        with pytest.raises(ValueError, match=f"^columns=None: {name} reads the trained columns"):
            classifier.fit(state, None, KEY)
    else:
        assert_close(made(name).fit(state, columns(), KEY), made(name).fit(state, None, None), 0)


@with_statistics
def test_state_is_a_pytree_of_arrays_of_fixed_shapes(name):
    statistics = made(name).statistics
    before, after = start(statistics), state_of(statistics, *examples(7))
    # Passes donate them, which the same buffer cannot be twice.
    assert len(set(map(id, jax.tree.leaves(before)))) == len(jax.tree.leaves(before))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)


@with_statistics
@pytest.mark.parametrize("sizes", [(1, 59), (20, 20, 20), (33, 2, 25)])
def test_batches_add_up(name, sizes):
    statistics = made(name).statistics
    features, labels = examples()
    whole, parts = (state_of(statistics, features, labels, s) for s in (None, sizes))
    assert_close(parts, whole)


@with_statistics
def test_tasks_add_up_in_any_grouping(name):
    classifier = made(name)
    statistics = classifier.statistics
    tasks = [examples(30, seed, classes) for seed, classes in enumerate([(0, 1), (3,), (4, 0)])]
    a, b, c = (state_of(statistics, *task) for task in tasks)
    together = state_of(statistics, *(np.concatenate(x) for x in zip(*tasks, strict=True)))
    wanted = classifier.fit(together, columns(), KEY)
    left = statistics.plus(statistics.plus(a, b), c)
    right = statistics.plus(a, statistics.plus(b, c))
    assert_close(left, right)
    # Small differences of the statistics grow in a solve, and by every step of a training.
    for state in (left, statistics.plus(start(statistics), left)):
        assert_close(classifier.fit(state, columns(), KEY), wanted, 1e-3)


@with_statistics
def test_padding_does_not_count(name):
    statistics = made(name).statistics
    features, labels = examples(20)
    padding = np.full_like(features, np.nan)
    padded = statistics.observe(
        start(statistics),
        np.concatenate([padding, features]),
        np.concatenate([np.full(20, -100, np.int32), labels]),
        np.arange(40) >= 20,
    )
    assert_close(padded, state_of(statistics, features, labels))


@with_statistics
def test_compiled_is_as_eager_and_compiled_once_over_tasks(name):
    classifier = classifiers.make(name, SETTINGS.get(name, ""))
    traced = []

    def learn(state, features, labels, weights):
        traced.append(1)
        task = classifier.statistics.observe(
            start(classifier.statistics), features, labels, weights
        )
        state = classifier.statistics.plus(state, task)
        return state, classifier.fit(state, columns(), KEY)

    compiled, state, eager = jax.jit(learn), start(classifier.statistics), None
    for seed, classes in enumerate([(0, 1), (3,), (4, 0)]):
        features, labels = examples(30, seed, classes)
        weights = np.ones(30, np.float32)
        if seed == 2:
            eager = learn(state, features, labels, weights)
        state, predictor = compiled(state, features, labels, weights)
    assert len(traced) == 2
    assert_close((state, predictor), eager, 1e-3)


@with_statistics
def test_classes_without_examples_are_never_chosen(name):
    classifier = made(name)
    features, labels = examples()
    predictor = classifier.fit(state_of(classifier.statistics, features, labels), columns(), KEY)
    far = 100 * np.random.default_rng(0).normal(size=(200, WIDTH)).astype(np.float32)
    logits = np.asarray(predictor(far))
    assert set(np.argmax(logits, axis=1)) <= set(SEEN)
    np.testing.assert_array_equal(logits[:, 2], np.float32(-1e30))
    # Features apart by three times their spread: whatever learns from them gets them right.
    assert np.mean(np.argmax(predictor(features), axis=1) == labels) > 0.95


@with_statistics
def test_no_examples_at_all_give_a_predictor_that_is_finite(name):
    classifier = made(name)
    predictor = classifier.fit(start(classifier.statistics), columns(), KEY)
    logits = np.asarray(predictor(examples()[0]))
    np.testing.assert_array_equal(logits, np.float32(-1e30))


@with_statistics
def test_classes_in_another_order_give_logits_in_that_order(name):
    classifier = made(name)
    features, labels = examples()
    order = np.asarray([3, 0, 4, 1, 2])  # class c becomes order[c]
    kernel, bias = columns()
    turned = (kernel[:, np.argsort(order)], bias[np.argsort(order)])
    plain = classifier.fit(state_of(classifier.statistics, features, labels), columns(), KEY)
    other = classifier.fit(
        state_of(classifier.statistics, features, order[labels].astype(np.int32)), turned, KEY
    )
    wanted, found = np.asarray(plain(features)), np.asarray(other(features))[:, order]
    if name == "aligned":  # draws other features of the classes
        assert np.mean(wanted.argmax(axis=1) == found.argmax(axis=1)) > 0.95
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@with_statistics
def test_features_in_bfloat16_are_taken(name):
    classifier = made(name)
    features, labels = examples()
    rounded = jnp.asarray(features, jnp.bfloat16)
    state = state_of(classifier.statistics, rounded, labels)
    wanted = state_of(classifier.statistics, rounded.astype(jnp.float32), labels)
    assert_close(state, wanted, 0)
    predictor = classifier.fit(state, columns(), KEY)
    assert predictor(rounded).dtype == jnp.float32


@with_statistics
def test_statistics_that_move_are_those_of_the_mapped_features(name):
    statistics = made(name).statistics
    if statistics.moved is None:
        assert name == "ridge"
        return
    features, labels = examples()
    generator = np.random.default_rng(1)
    feature_map = FeatureMap(
        *(
            jnp.asarray(generator.normal(size=shape), jnp.float32)
            for shape in ((WIDTH,), (WIDTH, WIDTH), (WIDTH,))
        )
    )
    state = state_of(statistics, features, labels)
    mapped = state_of(statistics, np.asarray(feature_map(features)), labels)
    assert_close(statistics.moved(state, feature_map), mapped, 1e-4)
    assert_close(statistics.moved(state, FeatureMap.identity(WIDTH)), state, 0)


def test_what_has_the_same_statistics_shares_their_name():
    names = {name: classifiers.make(name).statistics for name in REGISTRY}
    shared = {name for name, found in names.items() if found and found.name == "class_statistics"}
    assert shared == {"discriminant", "nearest_mean", "aligned"}
    assert names["trained"] is None
    sizes = {classifiers.ridge(features=size).statistics.name for size in (10, 20)}
    assert len(sizes) == 2
