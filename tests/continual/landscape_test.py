"""The landscape of a merge against the models that it is about."""

import dataclasses

import jax
import numpy as np
import pytest

from pm_jax import trees
from pm_jax.continual import Learner
from pm_jax.continual.merging import landscape
from pm_jax.continual.run import run_seeds
from tests.small_runs import BY_CLASS, QUIET, comparable, forget_programs, straight_and_killed

PLANE = dataclasses.replace(BY_CLASS, rule="averaging", perturbation="none", plane_points=3)
CONFIG = dataclasses.replace(BY_CLASS, rule="averaging", perturbation="none", landscape_points=5)


def test_points_are_scored_on_validation_data_and_the_regret_is_to_the_best_of_them(tmp_path):
    learner = Learner(CONFIG, seed=0, options=QUIET)
    merges, merge_task = [], learner.merge_task

    def watched(task, found):
        figures = merge_task(task, found)
        merges.append((found.start, found.trained, learner.params))
        return figures

    learner.merge_task = watched
    results = learner.run()
    learner.write_landscape(tmp_path)
    found = np.load(tmp_path / "landscape.npz")
    alphas = found["alphas"]
    np.testing.assert_allclose(alphas, np.arange(-1, 6) / 4)
    assert found["loss"].shape == (3, 7, 3) and found["merged_loss"].shape == (3, 3)
    stream, run = learner.stream, learner.programs
    for task, (start, trained, merged) in enumerate(merges):
        seen = task + 1
        classes = stream.class_masks[:seen].any(axis=0)
        if task == 0:  # from scratch, theta_0 is the first trained model
            start = trained
        # Of what does not merge, such as the classifier's columns, the trained is taken.
        ends = trees.select(start, run.merging), trees.select(trained, run.merging)
        beyond = jax.tree.map(lambda a, b: a + 1.25 * (b - a), *ends)
        points = {1: ends[0], 5: ends[1], 6: beyond}  # alphas 0, 1 and 5/4
        models = {place: trees.replace(trained, x) for place, x in points.items()}
        for place, params in {**models, None: merged}.items():
            wanted = run.training.scores(
                learner.splits["validation"], params, classes, np.asarray(seen, np.int32)
            )
            for name, values in zip(landscape.SCORES, wanted[:3], strict=True):
                at_merged = found[f"merged_{name}"][task]
                stored = at_merged if place is None else found[name][task, place]
                np.testing.assert_allclose(stored[:seen], values[:seen], atol=1e-5)
                assert np.isnan(stored[seen:]).all()
    rows = stream.validation.rows()
    assert not set(np.concatenate(rows)) & set(np.concatenate(stream.train.rows()))
    merge = results["merges"][2]
    inside = slice(1, 6)
    totals, means = found["loss"][2].sum(axis=1), found["accuracy"][2].mean(axis=1)
    assert merge["oracle_alpha"] == alphas[inside][totals[inside].argmin()]
    regret = found["merged_loss"][2].sum() - totals[inside].min()
    np.testing.assert_allclose(merge["regret_loss"], max(regret, 0), atol=1e-5)
    regret = means[inside].max() - found["merged_accuracy"][2].mean()
    np.testing.assert_allclose(merge["regret_accuracy"], max(regret, 0), atol=1e-6)
    assert np.isnan(results["merges"][0]["regret_loss"])
    mean = np.mean([each["regret_accuracy"] for each in results["merges"][1:]])
    np.testing.assert_allclose(results["mean_regret_accuracy"], mean)


@pytest.mark.slow
def test_plane_goes_through_the_models_of_the_last_two_merges(tmp_path):
    learner = Learner(PLANE, seed=0, options=QUIET)
    merges, merge_task = [], learner.merge_task

    def watched(task, found):
        merge_task(task, found)
        merges.append((found.start, found.trained, learner.params))
        return {"alpha": 0.0}

    learner.merge_task = watched
    learner.run()
    learner.write_landscape(tmp_path)
    found = np.load(tmp_path / "landscape.npz")
    assert "loss" not in found.files and np.isnan(found["plane_loss"][0]).all()
    np.testing.assert_allclose(found["plane_along"], [-0.5, 0.5, 1.5])
    np.testing.assert_allclose(found["plane_across"], [-1.0, 0.0, 1.0])
    run, stream = learner.programs, learner.stream
    merging = lambda params: trees.select(params, run.merging)  # noqa: E731
    previous, trained, _ = merges[2]
    earlier = jax.tree.map(lambda a, b: a - b, *(merging(x) for x in merges[1][1::-1]))
    classes, count = np.ones(10, bool), np.asarray(3, np.int32)
    for row, column in ((0, 0), (1, 1), (2, 0), (1, 2)):
        along, across = found["plane_along"][row], found["plane_across"][column]
        leaves = jax.tree.map(
            lambda a, b, c, along=along, across=across: a + along * (b - a) + across * c,
            merging(previous), merging(trained), earlier,
        )  # fmt: skip
        model = trees.replace(trained, leaves)
        wanted = run.training.scores(learner.splits["validation"], model, classes, count)
        for name, values in zip(landscape.SCORES, wanted[:3], strict=True):
            # Sums in another order.
            np.testing.assert_allclose(found[f"plane_{name}"][2, row, column], values, atol=1e-4)
    np.testing.assert_allclose(found["plane_merged"][1:, 0], [1 / 2, 1 / 3], rtol=1e-4)
    np.testing.assert_allclose(found["plane_merged"][1:, 1:], 0, atol=1e-2)
    assert run.in_plane._cache_size() == 1 and stream.num_tasks == 3


def test_coordinates_of_a_model_off_the_plane():
    axes = {"w": np.asarray([2.0, 0, 0])}, {"w": np.asarray([1.0, 1, 0])}
    found = landscape.coordinates(axes, {"w": np.asarray([4.0, 2, np.sqrt(5) * 2])})
    np.testing.assert_allclose(found, [1, 2, np.sqrt(0.5)], rtol=1e-5)
    same = landscape.coordinates((axes[0], axes[0]), {"w": np.asarray([4.0, 0, 0])})
    np.testing.assert_allclose(same, [1, 1, 0], atol=1e-3)


def test_looking_changes_nothing_and_compiles_once(tmp_path):
    forget_programs()
    plain = dataclasses.replace(CONFIG, landscape_points=0)
    summary = run_seeds(plain, [0], tmp_path / "plain", QUIET)
    assert np.isnan(summary["mean_regret_loss"]["mean"])
    assert not (tmp_path / "plain" / "seed_0" / "landscape.npz").exists()
    before = Learner(plain, seed=0, options=QUIET).run()
    learner = Learner(CONFIG, seed=0, options=QUIET)
    looked = learner.run()
    np.testing.assert_array_equal(looked["accuracy_matrix"], before["accuracy_matrix"])
    assert learner.programs.training.scores.resident._cache_size() == 1
    assert learner.programs.between._cache_size() == 1


@pytest.mark.slow
def test_a_killed_run_has_the_same_landscape(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, landscape_points=2, plane_points=2)
    boundary = []

    def dies(learner, step, tree):
        boundary.append(step)
        return step == learner.steps.bounds[1]

    straight, wanted, again, found = straight_and_killed(config, tmp_path, monkeypatch, 0, dies)
    assert boundary and comparable(found) == comparable(wanted)
    for learner, name in ((straight, "a"), (again, "b")):
        (tmp_path / name).mkdir()
        learner.write_landscape(tmp_path / name)
    first, second = (np.load(tmp_path / name / "landscape.npz") for name in "ab")
    assert first.files == second.files
    assert all(np.array_equal(first[key], second[key], equal_nan=True) for key in first.files)
