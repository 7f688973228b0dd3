"""Several classifiers after one training: their numbers, their state and their programs."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import classifiers
from pm_jax.classifiers import drift
from pm_jax.continual import Config, Learner, RunOptions, TrainingDiverged
from pm_jax.continual.merging.classifying import with_head
from pm_jax.continual.merging.evaluation import ScoresPass
from pm_jax.continual.merging.statistics import features_of
from pm_jax.continual.placement.data import place_stream
from pm_jax.continual.report.results import table
from pm_jax.continual.run import run_seeds
from pm_jax.continual.settings.chosen_classifiers import chosen
from pm_jax.continual.settings.settings import as_now
from pm_jax.continual.storage.provenance import configuration_hash
from pm_jax.continual.training.logits import logits_of
from pm_jax.continual.training.purpose_keys import CLASSIFIERS, purpose_key
from pm_jax.integrations.wrap import as_model
from pm_jax.types import InvalidInput
from tests import own_models
from tests.small_runs import (
    BY_CLASS,
    QUIET,
    VIT,
    comparable,
    forget_programs,
    killed_and_gone_on,
    leaves_equal,
    slow,
)

MOVED = "discriminant:drift_correction=affine"
LABELS = (
    "trained",
    "discriminant",
    "nearest_mean",
    "aligned:steps=20",
    "ridge:features=40:strength=2",
    MOVED,
)
ALL = dataclasses.replace(BY_CLASS, classifiers=LABELS)
ALL_MOVED = dataclasses.replace(
    ALL, classifiers=(*LABELS[:-1], "discriminant:drift_correction=none"),
    drift_correction="affine",
)  # fmt: skip


class Watched(NamedTuple):
    """A finished run, the merged model after each task, and how often functions were compiled."""

    learner: Learner
    results: dict
    merged: list
    compiled: list


def watch(config):
    """A learner, and the list that gets its merged models."""
    learner = Learner(config, 0, options=QUIET)
    merged, merge_task = [], learner.merge_task

    def spy(task, finished):
        figures = merge_task(task, finished)
        merged.append(learner.state.params)
        return figures

    learner.merge_task = spy
    return learner, merged


@pytest.fixture(scope="module")
def watched():
    forget_programs()
    learner, merged = watch(ALL)
    results, run = learner.run(), learner.programs
    functions = (
        run.classifying.init,
        run.classifying.observe.resident,
        run.classifying.joined,
        run.classifying.fit,
        run.training.scores.resident,
    )
    return Watched(learner, results, merged, [function._cache_size() for function in functions])


def features_at(learner, params, rows):
    return features_of(ALL.network(10), params, jnp.asarray(learner.stream.inputs[rows]), None)


def predictor_by_hand(watched, place, last):
    """A classifier after a task, from whole tasks' features, without the run's passes."""
    learner, merged = watched.learner, watched.merged
    label = LABELS[place]
    name, *settings = label.split(":")
    made = classifiers.make(name, ",".join(s for s in settings if "drift" not in s))
    key = purpose_key(learner.key, CLASSIFIERS)
    state = made.statistics.init(10, 16, key)
    for task, rows in enumerate(learner.stream.train.rows()[: last + 1]):
        features = features_at(learner, merged[task], rows)
        labels, weights = jnp.asarray(learner.stream.labels[rows]), jnp.ones(len(rows))
        if task and label == MOVED:
            before = features_at(learner, merged[task - 1], rows)
            found = drift.observe(drift.init(16), before, features, weights)
            state = made.statistics.moved(state, drift.fit(found)[0])
        own = made.statistics.observe(made.statistics.init(10, 16, key), features, labels, weights)
        state = made.statistics.plus(state, own)
    head = merged[last]["head"]
    columns = head["kernel"], head["bias"]
    return made.fit(state, columns, purpose_key(learner.key, CLASSIFIERS, place))


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS[1:])
def test_accuracies_are_those_of_the_library_on_whole_tasks_features(watched, label):
    learner, results, merged, _ = watched
    predictor = predictor_by_hand(watched, LABELS.index(label), 2)
    for split in ("test", "validation"):
        row = results["scores"][label][split]["accuracy_matrix"][-1]
        aware = results["scores"][label][split]["task_aware"]["accuracy_matrix"][-1]
        for task, rows in enumerate(getattr(learner.stream, split).rows()):
            logits = np.asarray(predictor(features_at(learner, merged[-1], rows)))
            labels = learner.stream.labels[rows]
            # One example may lie on the edge: statistics are summed in another order.
            slack = 1.01 / len(rows)
            assert abs(row[task] - np.mean(logits.argmax(axis=1) == labels)) <= slack
            own = np.where(learner.stream.class_masks[task], logits, -np.inf).argmax(axis=1)
            assert abs(aware[task] - np.mean(own == labels)) <= slack
    assert np.nanmin(np.diag(results["scores"][label]["test"]["accuracy_matrix"])) > 0.4


@pytest.mark.slow
def test_one_training_has_the_trained_columns_that_a_run_without_others_has(watched):
    plain = Learner(BY_CLASS, 0, options=QUIET)
    wanted = plain.run()
    found = watched.results["scores"]["trained"]
    assert comparable(found) == comparable(wanted["scores"]["trained"])
    merges = [{k: v for k, v in merge.items() if not k.startswith("drift")}
              for merge in watched.results["merges"]]  # fmt: skip
    np.testing.assert_equal(merges, wanted["merges"])
    assert leaves_equal(plain.state.params, watched.merged[-1])
    assert watched.results["rule_state_bytes"] == wanted["rule_state_bytes"]


def check_drift(learner, merged, results):
    """Figures of the drift are those between two merged models, on the newer task's features."""
    first, *later = results["merges"]
    assert np.isnan([first["drift_explained"], first["drift_strength"]]).all()
    for task, merge in enumerate(later, start=1):
        rows = learner.stream.train.rows()[task]
        pair = (features_at(learner, merged[n], rows) for n in (task - 1, task))
        _, wanted = drift.fit(drift.observe(drift.init(16), *pair, jnp.ones(len(rows))))
        np.testing.assert_allclose(merge["drift_explained"], wanted.explained, rtol=1e-3)
        np.testing.assert_allclose(merge["drift_strength"], wanted.strength, rtol=1e-5)
        assert 0.1 < merge["drift_explained"] < 1


@pytest.mark.slow
def test_drift_is_a_figure_of_every_merge_but_the_first(watched):
    check_drift(watched.learner, watched.merged, watched.results)


@pytest.mark.slow
def test_statistics_are_of_all_tasks_and_the_examples_kept_of_the_last_one(watched):
    stream, state = watched.learner.stream, watched.learner.state.statistics
    rows = np.concatenate(stream.train.rows())
    counts = np.bincount(stream.labels[rows], minlength=10)
    for statistics in state.values():
        np.testing.assert_array_equal(statistics.counts, counts)
    recent = state["random_features_40"].recent
    assert recent.observed == stream.train.sizes[-1]
    kept = np.asarray(recent.labels)[np.asarray(recent.priorities) >= 0]
    assert set(kept.tolist()) == set(np.flatnonzero(stream.class_masks[-1]))


@pytest.mark.slow
def test_every_function_of_the_classifiers_compiles_once(watched):
    assert watched.compiled == [1] * 5


@pytest.mark.slow
def test_the_setting_corrects_all_but_those_that_say_otherwise(watched):
    found = Learner(ALL_MOVED, 0, options=QUIET).run()["scores"]
    wanted = watched.results["scores"]
    assert comparable(found["discriminant"]) == comparable(wanted[MOVED])
    plain = found["discriminant:drift_correction=none"]
    assert comparable(plain) == comparable(wanted["discriminant"])
    for label in ("trained", "ridge:features=40:strength=2"):
        assert comparable(found[label]) == comparable(wanted[label])
    assert comparable(found["nearest_mean"]) != comparable(wanted["nearest_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_a_killed_run_ends_with_the_bits_of_one_that_ran_through(
    watched, tmp_path, monkeypatch, inside
):
    def dies(learner, step, tree):
        return ("trainable" in tree) == inside and step >= learner.steps.bounds[1]

    straight = watched.learner
    again, found = killed_and_gone_on(ALL, tmp_path, monkeypatch, 3, dies)
    assert comparable(found) == comparable(watched.results)
    assert leaves_equal(again.state.statistics, straight.state.statistics)
    names = {"class_statistics", "class_statistics_moved", "random_features_40"}
    assert set(again.state.statistics) == names
    fits = (each.merging.fitted(each.state).predictors for each in (again, straight))
    assert leaves_equal(*fits)


@pytest.mark.slow
@pytest.mark.parametrize("resized", [{}, {"image_size": 16}])
def test_five_classifiers_cost_about_one_pass_of_the_model(resized):
    """The floating-point operations of the compiled scores: features are not computed again."""
    config = dataclasses.replace(VIT, width=64, **resized)
    model, stream = as_model(config.network(10)), config.task_stream(0)
    params, state = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    examples = place_stream(config, stream, stream.test)
    linear = classifiers.Linear(jnp.zeros((64, 10)), jnp.zeros(10))
    scores = ScoresPass(model)

    def operations(*predictors):
        given = (params, np.ones(10, bool), np.asarray(2, np.int32), state, predictors)
        compiled = scores.resident.lower(examples, given).compile()
        return compiled.cost_analysis()["flops"]

    one = operations(None)
    assert operations(None, linear, linear, linear, linear) < 1.05 * one
    assert operations(linear) < 1.05 * one


FROZEN = {"rule": "frozen", "perturbation": "none", "classifiers": ("discriminant", "nearest_mean")}


@pytest.mark.parametrize("rule", ["frozen", slow("first_session")])
def test_one_class_a_task_is_learned_where_no_columns_train(rule):
    base = {"base_classes": 2, "num_tasks": 9}
    config = dataclasses.replace(BY_CLASS, **FROZEN | {"rule": rule} | base)
    learner = Learner(config, 0, options=QUIET)
    results = learner.run()
    assert learner.stream.class_masks.sum(axis=1).tolist() == [2] + [1] * 8
    # Chance is a tenth.
    assert results["final_average_accuracy"] > 0.4
    assert results["scores"]["nearest_mean"]["test"]["final_average_accuracy"] > 0.4
    for wrong in ({"base_classes": 1, "num_tasks": 10}, {"classifiers": ("aligned",)}):
        with pytest.raises(InvalidInput, match="leaves a task with one class.* rule=frozen"):
            dataclasses.replace(config, **wrong).task_stream(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"rule": "joint", "perturbation": "none"},
        {"rule": "trm", "perturbation": "none"},
        {"rule": "magmax", "perturbation": "none"},
        {"rule": "became", "perturbation": "none"},
        {"trust": "shrink"},
        {"adapter": "lora", "lora_rank": 2, "landscape_points": 2, "plane_points": 2},
        {"devices": 8, "fsdp": 2},
        {"compute_dtype": "bfloat16"},
        {"resident_mb": 0.025},
    ],
)
def test_classifiers_go_with_other_settings(watched, change):
    config = dataclasses.replace(ALL, **change)
    learner, merged = watch(config)
    results = learner.run()
    assert list(results["scores"]) == list(LABELS)
    for label in LABELS[1:]:
        # Chance is a tenth.
        assert results["scores"][label]["test"]["final_average_accuracy"] > 0.25, label
    if "devices" in change:
        devices = learner._devices
        for leaf in jax.tree.leaves(learner.state.statistics):
            assert leaf.sharding.is_equivalent_to(devices.sharding(leaf.shape), leaf.ndim)
        run = learner.programs.classifying
        assert run.joined._cache_size() == run.fit._cache_size() == 1
        for label in LABELS:
            one, other = (
                run["scores"][label]["test"]["accuracy_matrix"][-1]
                for run in (watched.results, results)
            )
            np.testing.assert_allclose(one, other, atol=0.03)
    if change.get("rule") == "magmax":
        # Tasks start from theta_0, while the statistics are of the merged model before.
        check_drift(learner, merged, results)


@pytest.mark.slow
def test_a_linear_classifier_can_be_the_head_and_ridge_cannot(watched):
    learner, results, merged, _ = watched
    rows = learner.stream.test.rows()[0]
    inputs = jnp.asarray(learner.stream.inputs[rows])
    for label in LABELS:
        if label.startswith("ridge"):
            with pytest.raises(InvalidInput, match="^classifiers=ridge.*: is not linear"):
                learner.merging.params_for_prediction(learner.state, label)
            continue
        params = learner.merging.params_for_prediction(learner.state, label)
        right = logits_of(ALL.network(10), params, inputs, jnp.ones(10)).argmax(axis=1)
        right = np.mean(np.asarray(right) == learner.stream.labels[rows])
        wanted = results["scores"][label]["test"]["accuracy_matrix"][-1][0]
        np.testing.assert_allclose(right, wanted, atol=1.01 / len(rows))
    assert leaves_equal(learner.params, merged[-1])  # the first one is the trained columns
    kernel = {"kernel": jnp.zeros((16, 10))}
    with pytest.raises(InvalidInput, match="has no head/bias of shape"):
        with_head(as_model(ALL.network(10)), {"head": kernel},
                  classifiers.Linear(jnp.zeros((16, 10)), jnp.zeros(10)))  # fmt: skip


@pytest.mark.slow
def test_a_singular_scatter_is_said_in_a_line(tmp_path, capsys):
    few = dataclasses.replace(
        BY_CLASS, classifiers=("trained", "discriminant"), train_per_class=2,
        validation_fraction=0.5,
    )  # fmt: skip
    summary = run_seeds(few, [0], tmp_path, RunOptions())
    lines = [line for line in capsys.readouterr().err.splitlines() if "discriminant:" in line]
    assert len(lines) == 3 and all("task " in line for line in lines)
    heading = table({"a": summary}).splitlines()[0]
    assert heading.startswith("rule (test split, trained)") and "final, discriminant" in heading
    log = (tmp_path / "seed_0/metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, log) if line["event"] == "evaluate"][-1]
    assert last["discriminant_shrinkage"] == 1.0 and "test_accuracy_discriminant" in last


class Overflowing(own_models.Functions):
    """Its logits are finite and its features are not."""

    def features(self, params, state, inputs):
        return jnp.full((inputs.shape[0], 4), jnp.inf) * params["top"]["kernel"][0, 0]


class OfTokens(own_models.Functions):
    """Its features have an axis too many."""

    def features(self, params, state, inputs):
        return jnp.ones((inputs.shape[0], 3, 4))


@pytest.mark.slow
def test_features_that_are_not_finite_or_not_of_examples_end_in_a_line():
    config = dataclasses.replace(BY_CLASS, classifiers=("discriminant",), hidden_sizes=(256, 256))
    learner = Learner(config, 0, options=QUIET, model=Overflowing(10))
    with pytest.raises(TrainingDiverged, match="^task 1, features of the merged model: .* is not"):
        learner.run()
    with pytest.raises(InvalidInput, match=r"^classifiers=discriminant: .* float32 \[\d, 3, 4\]"):
        Learner(config, 0, options=QUIET, model=OfTokens(10))
    with pytest.raises(InvalidInput, match="^classifiers=aligned: starts from the kernel"):
        aligned = dataclasses.replace(config, classifiers=("aligned",))
        Learner(aligned, 0, options=QUIET, model=Overflowing(10))


def test_labels_have_settings_of_their_own():
    first, second = chosen(("ridge:features=7", "nearest_mean"), "affine")
    assert first.classifier.statistics.name == "random_features_7" and not first.moves
    assert second.moves and second.state_name == "class_statistics_moved"
    assert not chosen(("nearest_mean:drift_correction=none",), "affine")[0].moves


def test_settings_of_an_earlier_version_have_one_classifier():
    earlier = {"rule": "averaging", "classifier": "discriminant"}
    now = as_now(earlier)
    assert now["classifiers"] == ["discriminant"] and "classifier" not in now
    assert now["drift_correction"] == "none" and as_now({})["classifiers"] == ["trained"]
    base = Config(scenario="class_incremental")
    one = dataclasses.replace(base, classifiers=("discriminant",))
    # As `configuration_hash` of the version before had it.
    assert configuration_hash(one).startswith("a585815d831b")
    both = dataclasses.replace(base, classifiers=("trained", "discriminant"))
    assert len({configuration_hash(each) for each in (base, one, both)}) == 3


def test_new_classes_are_predicted_with_the_recommended_classifier_unless_one_is_named():
    recommended = ("discriminant:drift_correction=affine",)
    assert Config(scenario="class_incremental").classifiers == recommended
    named = Config(scenario="class_incremental", classifiers=("trained",))
    assert named.classifiers == Config().classifiers == ("trained",)
