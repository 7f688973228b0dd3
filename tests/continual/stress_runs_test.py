"""Whole runs on data and numbers at the edge: they end with finite results, or with one line."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax.continual import Config, Learner, RunOptions, TrainingDiverged
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.data import sources
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput
from tests.binaries import refused
from tests.small_runs import QUIET, with_functions

pytestmark = pytest.mark.slow

# Twice as much of the first task, so that a second one of any classes has no other shapes.
LABELS = np.asarray([0, 1] * 14 + [2, 3] * 6)
NOISE = np.random.default_rng(0).integers(256, size=(40, 4, 4)).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One path for all data, so that equal settings share their compiled functions."""
    return tmp_path_factory.mktemp("data") / "mine.npz"


@pytest.fixture
def config(place):
    """Settings of a run on arrays; tasks of the classes 0, 1 and 2, 3."""

    def settings(images=NOISE, labels=LABELS, test_images=None, test_labels=None, **changes):
        test = (images, labels) if test_images is None else (test_images, test_labels)
        np.savez(place, x_train=images, y_train=labels, x_test=test[0], y_test=test[1])
        sources.load.cache_clear()
        plain = Config(
            dataset=str(place), scenario="class_incremental", class_order="given", num_tasks=2,
            epochs=2, first_task_epochs=2, hidden_sizes=(8,), batch_size=8,
            classifiers=("trained",),
        )  # fmt: skip
        return dataclasses.replace(plain, **changes)

    return settings


def all_finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


def finished(config, directory=None):
    """A learner at the end of its run, whose parameters and rule state are finite, and results."""
    learner = Learner(config, 0, directory, QUIET)
    results = learner.run()
    assert all_finite(learner.state.rule) and all_finite(learner.params)
    for merge in results["merges"]:
        assert 0 <= merge["alpha"] <= 1 and np.isfinite(merge["actual_loss_change"])
    return learner, results


def test_the_only_example_of_a_class_is_trained_on(config):
    labels = np.where(LABELS == 3, 2, LABELS)
    labels[-1] = 3
    learner, results = finished(config(NOISE, labels))
    stream = learner.stream
    of_class = [
        stream.labels[split.rows()[1]].tolist()
        for split in (stream.train, stream.validation, stream.test)
    ]
    assert [found.count(3) for found in of_class] == [1, 0, 1]
    assert np.isfinite(results["final_average_accuracy"])


@pytest.mark.parametrize(
    "kept, tested, pattern",
    [
        ([*np.flatnonzero(LABELS < 2), 38, 39], LABELS >= 0, "no class of two training examples"),
        (LABELS >= 0, LABELS < 2, "no test example"),
    ],
)
def test_a_task_without_examples_is_named_by_its_classes(config, kept, tested, pattern):
    settings = config(NOISE[kept], LABELS[kept], NOISE[tested], LABELS[tested])
    with pytest.raises(InvalidInput, match=f"dataset=mine: the task of classes 2, 3 has {pattern}"):
        settings.task_stream(0)


def test_images_of_one_colour_whatever_the_class(config):
    _, results = finished(config(0 * NOISE))
    matrix = np.asarray(results["accuracy_matrix"])
    # One image has one prediction, which is right for half of a task or for none of it.
    assert set(matrix[np.tril_indices(2)]) <= {0.0, 0.5} and matrix[0, 0] == 0.5


def test_the_same_images_under_other_labels_in_a_later_task(config):
    images = np.concatenate([NOISE[:12], NOISE[12:28], NOISE[:12]])
    _, results = finished(config(images))
    assert 0 < results["merges"][1]["alpha"] < 1
    assert np.isfinite(results["forgetting"])


def test_tasks_of_loss_0_that_are_equal_or_contradict_each_other_are_averaged(
    monkeypatch, tmp_path
):
    """The second task is the first one, learned to the end; the third has its labels exchanged."""
    labels = np.arange(40) % 2
    images = np.broadcast_to((255 * labels).astype(np.uint8)[:, None, None, None], (40, 4, 4, 1))
    domains = [LabelledArrays(images, own, images, own) for own in (labels, labels, 1 - labels)]
    monkeypatch.setattr(Config, "_images", lambda self: domains)
    learner, results = finished(
        Config(
            num_tasks=3, epochs=10, first_task_epochs=10, hidden_sizes=(8,), batch_size=8,
            learning_rate=0.3,
        ),
        tmp_path,
    )  # fmt: skip
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = {task: [] for task in (1, 2, 3)}
    for line in lines:
        if line["event"] == "epoch":
            losses[line["task"]].append(line["loss"])
    assert losses[1][-1] == 0 and not any(losses[2])
    first, second, third = results["merges"]
    # No gradient, no displacement, no curvature: the model stays, bit for bit.
    assert second["alpha"] == 0.5 and second["degenerate"] == 1 and second["denominator"] == 0
    assert second["actual_loss_change"] == 0
    matrix = np.asarray(results["accuracy_matrix"])
    assert (matrix[0] == matrix[1]).all() and matrix[0].tolist() == [1, 1, 0]
    # What is right for one is wrong for the other.
    assert (matrix[:, 0] == matrix[:, 1]).all() and (matrix[:, 0] + matrix[:, 2] == 1).all()
    # Earlier tasks have no curvature: the average if the last one has none, else all of it.
    wanted = 1 / 3 if third["denominator"] == 0 else 1
    np.testing.assert_allclose(third["alpha"], wanted, rtol=1e-6)
    assert third["degenerate"] == (third["denominator"] == 0)


# NaN and infinity.


def poisoned(tree):
    """With one number of its first leaf infinite."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [leaves[0].at[(0,) * leaves[0].ndim].set(jnp.inf), *leaves[1:]]
    )


def poison(stage):
    """A learner that goes wrong at a stage of the second task, with a finite loss."""

    def change(learner):
        run = learner.programs

        def train(key, trainable, optimizer, model_state, start, data, segment):
            trainable, optimizer, model_state, values = run.training.later.train(
                key, trainable, optimizer, model_state, start, data, segment
            )
            if segment.task == 1 and stage == "parameters":
                trainable = poisoned(trainable)
            if segment.task == 1 and stage == "moments":
                optimizer = jax.tree.map(lambda x: x + jnp.inf if x.ndim else x, optimizer)
            return trainable, optimizer, model_state, values

        def evidence(data, key, trained, start, task, model_state):
            found = run.evidence(data, key, trained, start, task, model_state)
            if task == 1 and stage == "curvature":
                curvature = poisoned(found.quadratic.curvature)
                found = found._replace(quadratic=found.quadratic.replace(curvature=curvature))
            return found

        def merge(state, *arguments):
            state, leaves, info = run.merge(state, *arguments)
            merges_second = stage == "merge" and state.tasks == 2
            return state, poisoned(leaves) if merges_second else leaves, info

        return with_functions(learner, train=train, evidence=evidence, merge=merge)

    return change


@pytest.mark.parametrize(
    "stage, pattern",
    {
        "parameters": r"task 2, step 1: trained/direct/hidden_0/bias is not finite",
        "moments": r"task 2, step 1: optimizer/.* is not finite",
        "curvature": r"task 2, merge: rule/memory/gradient/hidden_0/bias is not finite",
        "merge": r"task 2, merge: params/hidden_0/bias is not finite",
    }.items(),
)
def test_what_is_not_finite_is_named_and_never_saved(config, tmp_path, stage, pattern):
    settings = config()
    learner = Learner(settings, 0, tmp_path, RunOptions(checkpoint_every=1, quiet=True))
    learner = poison(stage)(learner)
    with pytest.raises(TrainingDiverged, match=pattern + "; lower learning_rate=0.003 .* is kept"):
        learner.run()
    assert not (tmp_path / "results.json").exists()
    again = Learner(settings, 0, tmp_path, RunOptions(checkpoint_every=1, quiet=True))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step = checkpoints.latest()
        training_state = again.restore(checkpoints, step)
    assert step >= again.steps.bounds[1] and all_finite((again.state, training_state))
    results = again.run()  # goes on from it, without the fault
    assert all_finite(again.params) and 0 <= results["merges"][1]["alpha"] <= 1


def test_a_rate_that_overflows_in_bfloat16_ends_with_code_1_and_what_was_saved_loads(
    config, tmp_path, capsys
):
    settings = config(compute_dtype="bfloat16", optimizer="sgd", learning_rate=1e10)
    own = [f"--{name}={getattr(settings, name)}" for name in
           ("dataset", "scenario", "class_order", "num_tasks", "epochs", "first_task_epochs",
            "batch_size", "compute_dtype", "optimizer", "learning_rate")]  # fmt: skip
    own += ["--hidden_sizes=8", "--classifiers=trained"]
    arguments = [*own, f"--workdir={tmp_path}", "--baseline="]
    lines = [
        refused(capsys, "train", *arguments, "--checkpoint_every=1", code=1)
        for _ in range(2)  # the rerun goes on, and fails at the same step
    ]
    assert re.match(r"error: task 1, step \d: .* lower learning_rate=10000000000.0", lines[0])
    assert lines[0] == lines[1] and str(tmp_path / "seed_0") in lines[0]
    learner = Learner(settings, 0, tmp_path / "seed_0", QUIET)
    with Checkpoints(tmp_path / "seed_0" / "checkpoints") as checkpoints:
        assert all_finite(learner.restore(checkpoints, checkpoints.latest()))
    assert not (tmp_path / "seed_0" / "results.json").exists()
