"""BECAME: gradient projection memory against NumPy, the coefficient, and both in the learner."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules, trees
from pm_jax.continual import Config, Learner
from pm_jax.continual.merging.programs import programs_of
from pm_jax.curvature import DiagonalQuadratic, dense_layers
from pm_jax.lora import Adapter
from pm_jax.rules import Evidence, gradient_projection, objectives
from pm_jax.types import Batch, InvalidInput
from tests import oracles
from tests.coefficients_test import dense_tasks
from tests.curvature.quadratics_test import random_tree
from tests.small_runs import (
    QUIET,
    SMALL,
    VIT,
    comparable,
    leaves_equal,
    slow,
    straight_and_killed,
    with_functions,
)


def inputs(seed, count, width, rank):
    """Rows whose energy falls off over `rank` directions."""
    rng = np.random.default_rng(seed)
    scales = 0.5 ** np.arange(rank)
    return rng.normal(size=(count, rank)) * scales @ rng.normal(size=(rank, width))


def moments_of(rows):
    return jnp.asarray(rows.T @ rows / len(rows), jnp.float32)


def test_memory_takes_the_fewest_directions_that_hold_the_energy():
    """The paper's loop over singular vectors of the examples' matrix, for two tasks."""
    thresholds = (0.9, 0.97)
    projector, basis = jnp.zeros((8, 8)), np.zeros((8, 0))
    for task, threshold in enumerate(thresholds):
        rows = inputs(task, 50, 8, 6)
        outside = rows - rows @ basis @ basis.T
        _, values, vectors = np.linalg.svd(outside)
        total, held = (rows**2).sum(), (rows**2).sum() - (outside**2).sum()
        count = next(k for k in range(9) if held + (values[:k] ** 2).sum() >= threshold * total)
        assert 0 < count < 6
        basis = np.concatenate([basis, vectors[:count].T], axis=1)
        projector = gradient_projection.grown(projector, moments_of(rows), threshold)
        np.testing.assert_allclose(projector, basis @ basis.T, atol=1e-5)
        kept = np.trace(np.asarray(projector) @ (rows.T @ rows)) / total
        assert kept >= threshold


def test_a_task_whose_inputs_the_memory_holds_adds_nothing():
    moments = moments_of(inputs(0, 50, 8, 6))
    projector = gradient_projection.grown(jnp.zeros((8, 8)), moments, 0.95)
    assert leaves_equal(gradient_projection.grown(projector, moments, 0.9), projector)
    assert leaves_equal(gradient_projection.grown(projector, 0 * moments, 0.9), projector)


def test_a_projected_change_does_not_alter_the_outputs_of_earlier_inputs():
    rows = inputs(0, 50, 8, 3)
    projector = gradient_projection.grown(jnp.zeros((8, 8)), moments_of(rows), 0.999)
    change = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5)), jnp.float32)
    left = gradient_projection.removed(projector, change)
    assert np.abs(rows @ np.asarray(left)).max() < 0.1 * np.abs(rows @ np.asarray(change)).max()
    # And what can be used freely is kept.
    direction = np.linalg.svd(rows)[2][-1]
    np.testing.assert_allclose(direction @ left, direction @ np.asarray(change), rtol=1e-3)


def test_input_moments_are_those_of_the_layers_inputs_with_and_without_tokens():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):  # [N, 2, 3]
            x = nn.Dense(4, name="tokens")(x)
            return nn.Dense(5, name="head")(x.mean(axis=1))

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 2, 3)), jnp.float32)
    params = jax.jit(Net().init)(jax.random.key(0), x[0])["params"]
    logits = jax.tree_util.Partial(
        lambda leaves, x: Net().apply({"params": trees.replace(params, leaves)}, x)
    )
    weights = jnp.asarray([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    batches = Batch(x, jnp.zeros((2, 4), int), weights)
    objective = objectives.Objective(logits, batches, jnp.ones(5, bool), jnp.zeros(5, bool))
    leaves = trees.leaves_by_path(params)
    found = gradient_projection.input_moments(objective, leaves, dense_layers.kernel_paths(leaves))
    rows = np.asarray(x).reshape(8, 2, 3)[:6]
    np.testing.assert_allclose(
        found["tokens/kernel"], moments_of(rows.reshape(12, 3)), rtol=1e-5, atol=1e-6
    )
    hidden = (rows @ np.asarray(leaves["tokens/kernel"])).mean(axis=1)
    np.testing.assert_allclose(found["head/kernel"], moments_of(hidden), rtol=1e-4, atol=1e-6)


# The rule.


def model(seed, positive=False):
    rng = np.random.default_rng(seed)
    leaves = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    return {k: jnp.asarray(abs(v) if positive else v, jnp.float32) for k, v in leaves.items()}


def evidence(trained, fisher, projected_model):
    quadratic = DiagonalQuadratic.at(trained, fisher)
    return Evidence(quadratic, trajectory=jax.tree.map(lambda x: x[None], projected_model))


def absorbed(rule, state, merged, fisher):
    moments = {"kernel": jnp.eye(3)}
    return rule.needs.absorb(
        state, Evidence(DiagonalQuadratic.at(merged, fisher), input_moments=moments)
    )


def test_coefficient_and_precision_on_three_tasks_by_hand():
    rule = rules.became(decay=0.5)
    state = rule.init(model(0))
    fishers = [model(10 + task, positive=True) for task in range(4)]
    precision, merged = None, model(0)
    for task in range(3):
        trained, projected_model = model(1 + task), model(20 + task)
        merged, state, info = rule.update(
            state, previous=merged, trained=trained,
            evidence=evidence(trained, fishers[task], projected_model),
        )  # fmt: skip
        if task == 0:
            assert float(info.alpha) == 1.0 and leaves_equal(merged, trained)
        else:
            step = {k: np.asarray(trained[k] - projected_model[k], np.float64) for k in trained}
            own, old = (
                sum((np.asarray(f[k]) * step[k] ** 2).sum() for k in step)
                for f in (fishers[task], precision)
            )
            np.testing.assert_allclose(info.alpha, own / (own + old), rtol=1e-5)
            for k in step:
                wanted = np.asarray(projected_model[k]) + own / (own + old) * step[k]
                np.testing.assert_allclose(merged[k], wanted, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                info.predicted_loss_change, 0.5 * (old / (own + old)) ** 2 * own, rtol=1e-5
            )
        at_merged = fishers[task + 1]
        state = absorbed(rule, state, merged, at_merged)
        decayed = {k: 0.5 * v for k, v in precision.items()} if precision else None
        precision = {
            k: np.asarray(v, np.float64) + (decayed[k] if decayed else 0)
            for k, v in at_merged.items()
        }
    for k in precision:
        np.testing.assert_allclose(state.precision.diagonal[k], precision[k], rtol=1e-6)


def test_without_the_projected_stage_the_second_coefficient_is_that_of_perturb_and_merge():
    fishers = [model(10, positive=True), model(11, positive=True)]
    ours, theirs = rules.became(projected=0.0), rules.perturb_and_merge()
    assert ours.needs.hook is None and ours.needs.snapshots == (0.0,)
    first, second = model(1), model(2)
    state, other = ours.init(model(0)), theirs.init(model(0))
    for trained, previous, fisher in ((first, model(0), fishers[0]), (second, first, fishers[1])):
        task = evidence(trained, fisher, previous)
        merged, state, info = ours.update(state, previous=previous, trained=trained, evidence=task)
        wanted, other, wanted_info = theirs.update(
            other, previous=previous, trained=trained, evidence=task
        )
        state = absorbed(ours, state, merged, fisher)
    assert 0.0 < float(info.alpha) < 1.0
    np.testing.assert_allclose(info.alpha, wanted_info.alpha, rtol=1e-5)
    for k in merged:
        np.testing.assert_allclose(merged[k], wanted[k], rtol=1e-5, atol=1e-6)


def stacked(tree):
    return jax.tree.map(lambda x: x[None], tree)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "low_rank", slow("input_moment")])
def test_every_kind_of_memory_follows_the_formula_with_dense_matrices(float64, kind, decay):
    rng = np.random.default_rng(9)
    found, memory = dense_tasks(kind, rng, 8)
    rule = rules.became(decay=decay, memory=memory)
    state, merged, precision = rule.init(random_tree(rng, np.float64)), None, 0.0
    for (own, matrix, trained), (other, at_merged, _) in zip(found[::2], found[1::2], strict=True):
        projected_model = random_tree(rng, np.float64)
        merged, state, info = rule.update(
            state, previous=merged, trained=trained,
            evidence=Evidence(own, trajectory=stacked(projected_model)),
        )  # fmt: skip
        d = oracles.flat(trained) - oracles.flat(projected_model)
        alpha = d @ matrix @ d / (d @ (matrix + precision) @ d)
        np.testing.assert_allclose(info.alpha, alpha, rtol=1e-6)
        evidence = Evidence(dataclasses.replace(other, center=merged), input_moments={})
        state = rule.needs.absorb(state, evidence)
        precision = at_merged + decay * precision
    assert alpha < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kronecker", "low_rank"])
def test_the_second_coefficient_is_that_of_perturb_and_merge_for_correlated_curvature(
    float64, kind
):
    found, memory = dense_tasks(kind, np.random.default_rng(10), 2)
    ours = rules.became(projected=0.0, memory=memory)
    theirs = rules.perturb_and_merge(memory=memory)
    previous = found[0][2]
    state, other = ours.init(previous), theirs.init(previous)
    for quadratic, _, trained in found:
        evidence = Evidence(quadratic, trajectory=stacked(previous), input_moments={})
        models = {"previous": previous, "trained": trained, "evidence": evidence}
        merged, state, info = ours.update(state, **models)
        previous, other, wanted = theirs.update(other, **models)
        state = ours.needs.absorb(state, evidence)
    assert 0 < float(info.alpha) < 1
    np.testing.assert_allclose(info.alpha, wanted.alpha, rtol=1e-6)
    np.testing.assert_allclose(oracles.flat(merged), oracles.flat(previous), rtol=1e-9)


@pytest.mark.parametrize("fill", [0.0, jnp.nan, -1.0])
def test_curvature_without_a_minimum_falls_back(fill):
    rule = rules.became()
    state = rule.init(model(0))._replace(tasks=jnp.asarray(3))
    fisher = jax.tree.map(lambda x: jnp.full_like(x, fill), model(0))
    _, _, info = rule.update(state, previous=model(0), trained=model(1),
                             evidence=evidence(model(1), fisher, model(2)))  # fmt: skip
    assert float(info.alpha) == 0.25 and float(info.degenerate) == 1.0


def test_the_hook_keeps_adapters_outside_and_rests_what_is_no_kernel():
    rule = rules.became()
    state = rule.init({"fc/kernel": jnp.zeros((3, 2)), "fc/bias": jnp.zeros(2)})
    adapter = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)))
    moving = {"fc/kernel": adapter, "fc/bias": jnp.ones(2)}
    free = rule.needs.hook.project(state, moving)
    assert leaves_equal(free, moving)  # nothing is remembered before the first merge
    state = state._replace(
        tasks=jnp.asarray(1), projectors={"fc/kernel": jnp.diag(jnp.asarray([1.0, 0, 0]))}
    )
    got = rule.needs.hook.project(state, moving)
    assert got["fc/kernel"].a.ravel().tolist() == [0.0, 1.0, 1.0]
    assert got["fc/kernel"].b.tolist() == [[1.0, 1.0]] and got["fc/bias"].tolist() == [0.0, 0.0]
    fresh = rule.needs.hook.onset(state, moving)
    assert fresh["fc/kernel"].a.ravel().tolist() == [0.0, 1.0, 1.0]
    assert fresh["fc/bias"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "settings",
    [{"projected": 1.0}, {"threshold": 1.0}, {"threshold_growth": -0.1}, {"decay": 1.5}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        rules.became(**settings)


# In the learner.

FULL = dataclasses.replace(
    SMALL, rule="became", perturbation="none", num_tasks=2, epochs=2, weight_decay=0.1,
    merge_examples=64,
)  # fmt: skip
LORA = dataclasses.replace(VIT, rule="became", perturbation="none", epochs=2, merge_examples=64)


def test_the_memory_grows_by_the_threshold_of_each_task():
    rule = rules.became(threshold=0.5, threshold_growth=0.3)
    state, merged = rule.init(model(0)), model(1)
    moments = {"kernel": jnp.diag(jnp.asarray([60.0, 25.0, 15.0]))}
    for directions in (1, 2, 3):  # 50, 80 and (at most) 99.9 % of 60 + 25 + 15
        _, state, _ = rule.update(
            state, previous=merged, trained=merged, evidence=evidence(merged, model(2), merged)
        )
        quadratic = DiagonalQuadratic.at(merged, model(3, positive=True))
        state = rule.needs.absorb(state, Evidence(quadratic, input_moments=moments))
        held = np.diag(state.projectors["kernel"])
        np.testing.assert_allclose(held, np.arange(3) < directions, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FULL, slow(LORA)], ids=["full", "lora"])
def test_the_projected_stage_leaves_the_memory_alone_and_the_free_stage_does_not(config):
    """Under AdamW with weight decay, which alone would leave the complement."""
    learner = Learner(config, 0, options=QUIET)
    run, given, states = learner.programs, [], []

    def merge(state, previous, trained, evidence):
        states.append(jax.tree.map(np.asarray, state))
        given.append((previous, trained, evidence.trajectory))
        return run.merge(state, previous, trained, evidence)

    learner = with_functions(learner, merge=merge)
    results = learner.run()
    assert run.training.later.train._cache_size() == run.merge._cache_size() == 1
    previous, trained, trajectory = given[1]
    start, end = (trees.select(tree, run.merging) for tree in (previous, trained))
    for path, stack in trajectory.items():
        first, second = np.asarray(stack[0] - start[path]), np.asarray(end[path] - stack[0])
        projector = states[1].projectors.get(path)
        assert np.abs(second).max() > 0
        if projector is None:
            assert not first.any()
            continue
        assert 0 < np.trace(projector) < len(projector)
        assert np.abs(first).max() > 1e-4
        assert np.abs(projector @ first).max() < 1e-4 * np.abs(first).max()
        assert np.abs(projector @ second).max() > 1e-2 * np.abs(second).max()
    merge = results["merges"][1]
    assert 0 < merge["alpha"] < 1 and 0 < merge["memory_share"] < 1
    assert results["merges"][0]["alpha"] == 1 and results["merges"][0]["memory_share"] == 0
    # What it absorbs of a task is the Fisher at the merged model, where it will be asked.
    last = np.asarray(config.num_tasks - 1, np.int32)
    at_merged, at_trained = (
        run.evidence(learner.training_data, learner.key, where, previous, last).quadratic.diagonal
        for where in (learner.params, given[-1][1])
    )
    after, before = (s.precision.diagonal for s in (learner.state.rule, states[-1]))
    gained = jax.tree.map(lambda new, old: new - old, after, before)
    size = max(np.abs(before[path]).max() for path in gained)
    for path, own in gained.items():
        # A difference of float32 sums.
        np.testing.assert_allclose(own, at_merged[path], rtol=1e-5, atol=1e-6 * size)
    off = max(np.abs(at_trained[path] - own).max() for path, own in gained.items())
    assert off > 1e-4 * size
    programs_of.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kronecker", "low_rank"])
def test_a_run_keeps_and_asks_the_curvature_of_its_settings(kind):
    config = dataclasses.replace(FULL, curvature=kind, curvature_rank=3)
    learner = Learner(config, 0, options=QUIET)
    run, given = learner.programs, []

    def merge(state, previous, trained, evidence):
        given.append((jax.tree.map(jnp.copy, state), previous, trained, evidence))
        return run.merge(state, previous, trained, evidence)

    learner = with_functions(learner, merge=merge)
    alpha = learner.run()["merges"][1]["alpha"]
    assert run.merge._cache_size() == run.absorb._cache_size() == 1
    state, first, trained, evidence = given[1]
    end = trees.select(trained, run.merging)
    d = jax.tree.map(lambda x, stack: x - stack[0], end, evidence.trajectory)
    # The first merge keeps the trained model, where the run measures again.
    old = run.evidence(learner.training_data, learner.key, first, first, np.asarray(0, np.int32))
    own, earlier = (q.curvature_along(d) for q in (evidence.quadratic, old.quadratic))
    np.testing.assert_allclose(state.precision.along(d), earlier, rtol=1e-5)
    np.testing.assert_allclose(alpha, own / (own + earlier), rtol=1e-5)
    assert 0 < alpha < 1
    programs_of.cache_clear()


def test_curvature_of_all_tasks_at_once_is_refused():
    with pytest.raises(InvalidInput, match="exact_all: rule=became takes curvature of one task"):
        Config(rule="became", curvature="exact_all", perturbation="none")


@pytest.mark.slow
def test_a_run_killed_in_the_projected_stage_ends_with_the_same_numbers(tmp_path, monkeypatch):
    straight, wanted, again, found = straight_and_killed(
        LORA, tmp_path, monkeypatch, 3, lambda learner, step, tree: step > learner.steps.bounds[1]
    )
    assert comparable(found) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
    assert leaves_equal(again.state.rule, straight.state.rule)
