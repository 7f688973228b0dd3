"""TRM on a linear softmax model against NumPy, and its evidence as the learner collects it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules, trees
from pm_jax.continual import Learner
from pm_jax.rules import Evidence, objectives
from pm_jax.types import Batch
from tests.small_runs import (
    QUIET,
    SMALL,
    VIT,
    comparable,
    killed_and_gone_on,
    leaves_equal,
    straight_and_killed,
    with_functions,
)

CLASSES, OLD = np.asarray([0, 0, 1, 1, 1]), np.asarray([1, 1, 1, 0, 0])
ONSET = 3.0


def linear_logits(leaves, inputs):
    return inputs @ leaves["kernel"] + leaves["bias"][None]


def leaves(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(scale * rng.normal(size=(4, 5)), jnp.float32),
            "bias": jnp.asarray(scale * rng.normal(size=5), jnp.float32)}  # fmt: skip


def objective(old=OLD):
    rng = np.random.default_rng(9)
    weights = np.ones((3, 6), np.float32)
    weights[2, 4:] = 0
    batches = Batch(
        jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32),
        jnp.asarray(rng.integers(2, 5, size=(3, 6))),
        jnp.asarray(weights),
    )
    return objectives.Objective(
        jax.tree_util.Partial(linear_logits), batches, jnp.asarray(CLASSES > 0),
        jnp.asarray(old > 0),
    )  # fmt: skip


def evidence(previous, trained, count=3):
    bend = leaves(77, 0.3)
    points = [
        jax.tree.map(lambda p, t, b, f=f: p + f * (t - p) + f * (1 - f) * b,
                     previous, trained, bend)
        for f in [(k + 1) / count for k in range(count)]
    ]  # fmt: skip
    trajectory = jax.tree.map(lambda *x: jnp.stack(x), *points)
    return Evidence(trajectory=trajectory, objective=objective(), onset_gradient_norm=ONSET)


def second_merge(**settings):
    """A merge at t = 2, away from theta_0."""
    rule = rules.trm(**{"snapshots": 3, **settings})
    state = rule.init(leaves(0))
    previous, trained = leaves(1), leaves(2)
    _, state, _ = rule.update(
        state, previous=leaves(0), trained=previous,
        evidence=evidence(leaves(0), previous, len(rule.needs.snapshots)),
    )  # fmt: skip
    merged, _, info = rule.update(
        state, previous=previous, trained=trained,
        evidence=evidence(previous, trained, len(rule.needs.snapshots)),
    )  # fmt: skip
    return previous, trained, merged, info


def softmax(logits, classes):
    logits = np.where(classes, logits, -np.inf)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def by_numpy(params, old_params, temperature=2.0):
    """The three losses and the gradient norm, each a mean over batches weighed by examples."""
    task, found, sizes = objective(), [], []
    for x, y, w in zip(*map(np.asarray, task.batches), strict=True):
        x, w = x.astype(np.float64), w.astype(np.float64)
        logits, old = (
            x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"])
            for p in (params, old_params)
        )
        p = softmax(logits, CLASSES > 0)
        alignment = -(w * np.log(p[np.arange(6), y])).sum() / w.sum()
        residual = w[:, None] * (p - np.eye(5)[y]) / w.sum()
        norm = np.sqrt(((x.T @ residual) ** 2).sum() + (residual.sum(axis=0) ** 2).sum())
        a, b = (softmax(z / temperature, OLD > 0)[:, OLD > 0] for z in (old, logits))
        divergence = (a * np.log(a / b)).sum(axis=1)
        consistency = temperature**2 * (w * divergence).sum() / w.sum()
        found.append([alignment, consistency, max(0, 1 - norm / ONSET) ** 2, norm])
        sizes.append(w.sum())
    return np.average(found, axis=0, weights=sizes)


@pytest.mark.slow
def test_the_losses_before_and_after_are_those_of_numpy_and_the_objective_falls():
    previous, trained, merged, info = second_merge()
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, previous, trained)
    names = ("alignment", "consistency", "responsiveness", "gradient_norm")
    for when, model in (("before", halfway), ("after", merged)):
        got = [info.figures[f"{name}_{when}"] for name in names]
        np.testing.assert_allclose(got, by_numpy(model, previous), rtol=1e-4)
    weights = np.asarray([1.0, 1.0, 0.1])
    before, after = (by_numpy(model, previous)[:3] @ weights for model in (halfway, merged))
    assert after < 0.8 * before
    assert info.figures["subspace_rank"] == 3.0  # a parabola's two directions and the history


@pytest.mark.slow
@pytest.mark.parametrize("per", ["model", "tensor"])
def test_the_end_is_a_minimum_in_the_subspace(per):
    """Long searches end where no direction of the subspace leads further down.

    Up to small steps: the search takes all batches alike, the value weighs them by examples.
    """
    previous, trained, merged, info = second_merge(steps=3000, learning_rate=1e-3, per=per)
    weights = np.asarray([1.0, 1.0, 0.1])

    def value(model):
        return by_numpy(model, previous)[:3] @ weights

    lowest = value(merged)
    directions = [
        jax.tree.map(lambda a, b: a - b, trained, previous),
        jax.tree.map(lambda a, b: a - b, previous, leaves(0)),
        leaves(77),
    ]
    if per == "tensor":
        assert info.figures["subspace_rank"] == 3.0
        directions = [
            {name: x if name == moved else jnp.zeros_like(x) for name, x in direction.items()}
            for direction in directions
            for moved in direction
        ]
    for direction in directions:
        for step in (0.1, -0.1):
            assert value(jax.tree.map(lambda m, d, s=step: m + s * d, merged, direction)) > lowest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alignment", "consistency", "responsiveness"])
def test_a_loss_without_weight_is_not_minimised(name):
    weights = {"alignment": 1.0, "consistency": 1.0, "responsiveness": 5.0}
    _, _, merged, with_it = second_merge(**weights)
    _, _, other, without = second_merge(**{**weights, name: 0.0})
    figure = f"{name}_after"
    assert float(with_it.figures[figure]) < float(without.figures[figure])
    assert not leaves_equal(merged, other)


@pytest.mark.slow
def test_a_search_by_tensor_begins_alike_and_leads_further_down():
    figures = [second_merge(per=per, steps=300)[3].figures for per in ("model", "tensor")]
    names = ("alignment", "consistency", "responsiveness")
    whole, by_tensor = (
        [sum(w * found[f"{n}_{when}"] for w, n in zip((1, 1, 0.1), names, strict=True))
         for when in ("before", "after")] for found in figures
    )  # fmt: skip
    np.testing.assert_allclose(whole[0], by_tensor[0], rtol=1e-4)
    assert by_tensor[1] < whole[1] < whole[0]


def test_one_snapshot_without_history_merges_on_the_segment():
    previous, trained, merged, info = second_merge(snapshots=1, history=False)
    wanted = trees.lerp(previous, trained, info.alpha)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert info.figures["subspace_rank"] == 1.0


def test_a_search_that_is_not_finite_ends_where_it_began():
    previous, trained, merged, info = second_merge(learning_rate=1e38)
    assert info.degenerate == 1.0
    for a, p, t in zip(*map(jax.tree.leaves, (merged, previous, trained)), strict=True):
        np.testing.assert_allclose(a, (p + t) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"snapshots": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"temperature": 0.0}, {"cutoff": 1.0},
     {"consistency": -1.0}, {"per": "layer"}, {"next_task_from": "both"},
     {"alignment": 0.0, "consistency": 0.0, "responsiveness": 0.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        rules.trm(**settings)


def test_the_training_temperature_is_the_losss_and_not_the_consistencys():
    params, inputs = leaves(1), objective().batch(0)
    plain, hot = objective(), objective()._replace(temperature=28.0)
    logits = np.asarray(linear_logits(params, inputs.inputs), np.float64)
    for task, temperature in ((plain, 1.0), (hot, 28.0)):
        p = softmax(logits / temperature, CLASSES > 0)
        wanted = -np.log(p[np.arange(6), inputs.labels]).mean()
        loss, found = task.loss(params, inputs)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        np.testing.assert_allclose(found, logits, rtol=1e-5)
    stacked = objectives.stack([hot, hot], jnp.asarray([True, True]))
    np.testing.assert_allclose(
        stacked.task(1).loss(params, inputs)[0], hot.loss(params, inputs)[0], rtol=1e-6
    )


def test_without_old_classes_there_is_nothing_to_be_consistent_with():
    task = objective(old=np.zeros(5))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)
    values = [task.old_log_probabilities(z, 2.0) for z in (logits, -logits)]
    assert leaves_equal(*values)


# In the learner.

CONFIG = dataclasses.replace(
    SMALL, rule="trm", perturbation="none", merge_examples=100, epochs=2, temperature=2.0
)


def collected(config, monkeypatch, directory=None, options=QUIET):
    """The learner after its run, with what `merge` was given each time."""
    learner = Learner(config, 0, directory, options)
    merge, given = learner.programs.merge, []

    def spy(state, previous, trained, evidence):
        given.append((previous, trained, evidence))
        return merge(state, previous, trained, evidence)

    learner = with_functions(learner, merge=spy)
    results = learner.run()
    assert learner.programs.training.later.train._cache_size() == merge._cache_size() == 1
    return learner, results, given


@pytest.mark.slow
def test_trajectory_and_onset_are_those_of_the_training(monkeypatch):
    config = dataclasses.replace(VIT, rule="trm")
    learner, results, given = collected(config, monkeypatch)
    merging = learner.programs.merging
    previous, trained, evidence = given[1]
    for path, stack in evidence.trajectory.items():
        assert stack.shape[0] == 5
        last = trees.select(trained, merging)[path]
        assert np.array_equal(stack[-1], last)
        steps = [np.linalg.norm(point - last) for point in stack]
        assert steps[0] > steps[3] > 0
    assert evidence.objective.temperature == config.temperature
    # The examples are the current task's, and their gradient at the onset is what is compared to.
    task = learner.programs.objective(learner.training_data, learner.key, previous, np.int32(1))
    assert int(task.batches.weights.sum()) == min(
        config.merge_examples, learner.stream.train.sizes[1]
    )
    assert leaves_equal(task.batches, evidence.objective.batches)

    @jax.jit
    def slope_and_gap(selected, batch):
        def loss(selected):
            params = trees.replace(previous, selected)
            x = batch.inputs.astype(jnp.float32) / 127.5 - 1
            logits = learner.config.network(10).apply({"params": params}, x)
            found = task.logits(selected, batch.inputs)
            gap = jnp.abs(found - logits).max()
            logits = logits / config.temperature
            logits = jnp.where(jnp.asarray(learner.stream.class_masks[1])[None], logits, -1e30)
            values = -jax.nn.log_softmax(logits)[jnp.arange(len(x)), batch.labels]
            return jnp.sum(values * batch.weights) / batch.weights.sum(), gap

        return jax.grad(loss, has_aux=True)(selected)

    norms = []
    for number in range(len(task.batches.labels)):
        slope, gap = slope_and_gap(trees.select(previous, merging), task.batch(number))
        assert gap < 1e-5
        norms.append(np.sqrt(sum(float((g**2).sum()) for g in slope.values())))
    wanted = np.average(norms, weights=task.batches.weights.sum(axis=1))
    np.testing.assert_allclose(evidence.onset_gradient_norm, wanted, rtol=1e-5)
    merge = results["merges"][1]
    np.testing.assert_allclose(merge["onset_gradient_norm"], wanted, rtol=1e-5)
    assert merge["alignment_before"] > 0 and results["merges"][0]["consistency_after"] == 0


@pytest.mark.slow
def test_a_run_killed_between_two_snapshots_ends_with_the_same_numbers(tmp_path, monkeypatch):
    def dies(learner, step, tree):
        return "trajectory" in tree and step > learner.steps.bounds[1]

    straight, wanted, again, found = straight_and_killed(CONFIG, tmp_path, monkeypatch, 11, dies)
    assert comparable(found) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)


@pytest.mark.slow
def test_data_and_snapshots_that_do_not_fit_give_the_same_numbers(tmp_path, monkeypatch):
    """Streamed inputs, snapshots that the host keeps, and a run that is killed between two."""
    pytest.importorskip("grain")
    config = dataclasses.replace(CONFIG, num_tasks=2, rule_settings="snapshots=3,steps=5")
    learner, wanted, given = collected(config, monkeypatch)
    small = dataclasses.replace(config, resident_mb=0.01)
    other, found, spilled = collected(small, monkeypatch)
    assert all(isinstance(x, np.ndarray) for x in spilled[1][2].trajectory.values())
    assert leaves_equal(spilled[1][2].trajectory, given[1][2].trajectory)
    assert comparable(found) == comparable(wanted) and leaves_equal(other.params, learner.params)

    def dies(learner, step, tree):
        return "trajectory" in tree and step > learner.steps.bounds[1]

    again, after = killed_and_gone_on(small, tmp_path, monkeypatch, 11, dies)
    assert comparable(after) == comparable(wanted) and leaves_equal(again.params, learner.params)
