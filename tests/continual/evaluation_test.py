import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import curvature, losses, trees
from pm_jax.continual import Learner
from pm_jax.continual.merging.evaluation import MeanLossPass, ScoresPass
from pm_jax.continual.training.logits import logits_of
from pm_jax.continual.training.purpose_keys import CURVATURE, purpose_key
from pm_jax.curvature import input_moments, kronecker, low_rank, measures
from pm_jax.curvature.dense_layers import kernel_paths
from pm_jax.types import Batch
from tests.small_runs import BY_CLASS, QUIET, SMALL, VIT, slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        slow(BY_CLASS),
        slow(VIT),
        slow(dataclasses.replace(SMALL, temperature=3.0)),
        dataclasses.replace(BY_CLASS, curvature="exact_current", temperature=3.0),
    ],
    ids=["domain", "class", "lora", "temperature", "exact"],
)
def test_evidence_is_the_curvature_of_the_tasks_own_loss_over_dense_weights(config):
    if config.curvature != "exact_current":
        config = dataclasses.replace(config, curvature="fisher_empirical")
    config = dataclasses.replace(config, curvature_memory_mb=0.05, curvature_samples=0)
    learner = Learner(config, seed=0, options=QUIET)
    run, stream = learner.programs, learner.stream
    previous = learner.params
    trained = jax.tree.map(lambda x: x + 0.01 * jnp.ones_like(x), previous)
    task = 1
    got = run.evidence(
        learner.training_data, learner.key, trained, previous, np.asarray(task, np.int32)
    )
    rows = stream.train.rows()[task]
    leaves = trees.select(trained, run.merging)
    model, mask = config.network(10), jnp.asarray(stream.class_masks[task])

    def logits_fn(leaves, inputs):
        logits = logits_of(model, trees.replace(trained, leaves), inputs, mask)
        return jnp.where(mask[None, :], logits / config.temperature, -1e30)

    measure = functools.partial(
        measures.measure_all,
        params=leaves,
        examples=Batch(jnp.asarray(stream.inputs[rows]), jnp.asarray(stream.labels[rows])),
        batch_size=50,
        direction=jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), leaves),
    )
    exact = config.curvature == "exact_current"
    empirical = curvature.fisher_empirical(losses.cross_entropy(logits_fn))
    direct = measure(curvature.fisher_exact(logits_fn) if exact else empirical)
    for a, b in zip(jax.tree.leaves(got.quadratic.diagonal),
                    jax.tree.leaves(direct.quadratic.diagonal), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    along = measure(curvature.gauss_newton(logits_fn)) if exact else direct
    np.testing.assert_allclose(got.curvature_error, along.standard_error, rtol=1e-4)
    assert exact or got.curvature_along is None
    if exact:
        np.testing.assert_allclose(got.curvature_along, along.along, rtol=1e-4)
        assert abs(float(direct.along / along.along) - 1) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kronecker", "low_rank", "input_moment"])
@pytest.mark.parametrize("config", [SMALL, slow(VIT)], ids=["mlp", "lora"])
def test_evidence_of_correlated_curvature_is_that_of_the_tasks_own_loss(config, kind):
    config = dataclasses.replace(
        config,
        curvature=kind,
        curvature_memory_mb=0.5,
        temperature=2.0,
        curvature_rank=3,
        curvature_samples=0,
    )
    learner = Learner(config, seed=0, options=QUIET)
    run, stream, task = learner.programs, learner.stream, 1
    trained = jax.tree.map(lambda x: x + 0.01, learner.params)
    number = np.asarray(task, np.int32)
    got = run.evidence(learner.training_data, learner.key, trained, learner.params, number)
    rows = stream.train.rows()[task]
    leaves = trees.select(trained, run.merging)
    model, mask = config.network(10), jnp.asarray(stream.class_masks[task])

    def logits_fn(leaves, inputs):
        params = trees.replace(trained, leaves)
        return logits_of(model, params, inputs, mask, config.temperature)

    if kind == "kronecker":
        measure = kronecker.fisher_kronecker(logits_fn, kernel_paths(leaves))
    elif kind == "input_moment":
        measure = input_moments.input_moment(logits_fn)
    else:
        measure = low_rank.gauss_newton_low_rank(logits_fn, rank=3)
    direction = jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), leaves)
    direct = measures.measure_all(
        measure, leaves, Batch(jnp.asarray(stream.inputs[rows]), jnp.asarray(stream.labels[rows])),
        50, direction, purpose_key(learner.key, CURVATURE, task),
    )  # fmt: skip
    other = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), leaves)
    directions = [direction, other]
    wanted = direct.quadratic.gram(directions)
    # 300 examples summed in other groups; the first direction is nearly flat.
    np.testing.assert_allclose(
        got.quadratic.gram(directions), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max())
    )
    # Rows behind a layer norm sum to 0: the first direction moves nothing, but for rounding.
    rounding = 1e-9 * float(wanted.max()) if kind == "input_moment" else 0.0
    np.testing.assert_allclose(got.curvature_error, direct.standard_error, rtol=1e-4, atol=rounding)
    assert float(got.curvature_error) > 0


@pytest.mark.slow
def test_curvature_is_measured_on_as_many_examples_as_an_error_asks_for():
    base = dataclasses.replace(SMALL, curvature="fisher_empirical", curvature_memory_mb=0.05)

    def measured(error, still=False):
        learner = Learner(dataclasses.replace(base, curvature_error=error), seed=0, options=QUIET)
        step = 0.0 if still else 0.01
        trained = jax.tree.map(lambda x: x + step, learner.params)
        task = np.asarray(1, np.int32)
        found = learner.programs.evidence(
            learner.training_data, learner.key, trained, learner.params, task
        )
        return found

    exact = measured(0.0)
    for error in (0.2, 0.05):
        found = measured(error)
        size = float(found.quadratic.curvature_along(
            jax.tree.map(lambda x: jnp.full_like(x, 0.01), found.quadratic.center)))  # fmt: skip
        assert 0.3 * error < float(found.curvature_error) / size <= error
        assert float(found.curvature_error) > float(exact.curvature_error)
    reached = measured(1e-6)  # with all examples, in another order
    np.testing.assert_allclose(reached.curvature_error, exact.curvature_error, rtol=1e-4)
    still = measured(0.2, still=True)
    whole = measured(0.0, still=True)
    for a, b in zip(*(jax.tree.leaves(x.quadratic.diagonal) for x in (still, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.max()))


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_size_and_count_every_example():
    learner = Learner(BY_CLASS, seed=0, options=QUIET)
    model, stream = BY_CLASS.network(10), learner.stream
    seen = stream.class_masks[:2].any(axis=0)

    def scores(size):
        found = ScoresPass(model, size, temperature=2.0)(
            learner.splits["test"], learner.params, seen, 2
        )
        both = np.stack([found.accuracy, found.task_aware])
        return both, np.asarray(found.loss), np.asarray(found.class_hits)

    accuracies, losses_found, hits = zip(*map(scores, (1, 7, 256)), strict=True)
    right = np.zeros(10, int)
    assert np.array_equal(accuracies[0], accuracies[1])
    assert np.array_equal(accuracies[1], accuracies[2])
    assert (accuracies[0][:, 2:] == 0).all() and (losses_found[0][2:] == 0).all()
    for task, rows in enumerate(stream.test.rows()[:2]):
        logits = np.array(logits_of(
            model, learner.params, jnp.asarray(stream.inputs[rows]), jnp.ones(10)))  # fmt: skip
        for row, mask in enumerate((seen, stream.class_masks[task])):
            guess = np.where(mask, logits, -np.inf).argmax(axis=1)
            wanted = np.mean(guess == stream.labels[rows])
            np.testing.assert_allclose(accuracies[0][row, task], wanted, rtol=1e-6)
            if row == 0:
                labels = stream.labels[rows]
                right += np.bincount(labels[guess == labels], minlength=10)
        own = np.where(stream.class_masks[task], logits.astype(np.float64) / 2, -np.inf)
        chosen = own[np.arange(len(rows)), stream.labels[rows]]
        wanted = np.mean(np.log(np.exp(own).sum(axis=1)) - chosen)
        for found in losses_found:
            np.testing.assert_allclose(found[task], wanted, rtol=1e-5)
    assert all(found.tolist() == right.tolist() for found in hits) and right.any()


@pytest.mark.slow
def test_the_accuracy_of_each_class_is_among_the_results():
    learner = Learner(BY_CLASS, seed=0, options=QUIET)
    results, stream = learner.run(), learner.stream
    for split in ("test", "validation"):
        found = results["scores"]["trained"][split]
        labels = stream.labels[np.concatenate(getattr(stream, split).rows())]
        right = np.bincount(labels) @ np.asarray(found["class_accuracy"])
        sizes = getattr(stream, split).sizes
        np.testing.assert_allclose(right, sizes @ np.asarray(found["accuracy_matrix"][-1]))
    assert results["class_accuracy"] == results["scores"]["trained"]["test"]["class_accuracy"]


def test_mean_loss_does_not_depend_on_the_batch_size():
    learner = Learner(BY_CLASS, seed=0, options=QUIET)
    model = BY_CLASS.network(10)
    found = [
        float(
            MeanLossPass(model, size)(
                learner.training_data, learner.params, np.asarray(1, np.int32)
            )
        )
        for size in (1, 50, 1000)
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-5)
