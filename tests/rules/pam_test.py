"""PAM by hand, and its hook in the training loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import lora, rules, trees
from pm_jax.continual import Learner
from pm_jax.lora import Adapter
from pm_jax.rules import Evidence
from pm_jax.rules.pam import PamState, opposed_entries
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


def test_opposed_entries_of_a_two_by_two_matrix():
    shared = jnp.asarray([[4.0, -3.0], [2.0, -1.0]])
    own = jnp.asarray([[-1.0, -1.0], [-1.0, 1.0]])
    assert opposed_entries(shared, own, 0.5).tolist() == [[True, False], [False, False]]
    assert opposed_entries(shared, own, 1.0).tolist() == [[True, False], [True, True]]
    # Ties are large together; what is 0 in G has no sign to oppose.
    tied = jnp.asarray([[2.0, 2.0], [2.0, 0.0]])
    assert opposed_entries(tied, -jnp.ones((2, 2)), 0.5).tolist() == [[True, True], [True, False]]
    assert not opposed_entries(jnp.zeros((2, 2)), own, 0.5).any()


def test_refreshing_renews_what_is_opposed_and_nothing_else():
    rule = rules.pam()
    shared = {
        "fc/kernel": Adapter(jnp.asarray([[4.0], [-3.0], [1.0]]), jnp.asarray([[1.0, -5.0]])),
        "fc/bias": jnp.asarray([3.0, 1.0]),
    }
    origin = {"fc/kernel": jnp.zeros((3, 2)), "fc/bias": jnp.asarray([10.0, 20.0])}
    state = PamState(jnp.asarray(1), origin, shared)
    moving = {
        "fc/kernel": Adapter(jnp.asarray([[-0.1], [-0.2], [-0.3]]), jnp.asarray([[-7.0, 8.0]])),
        "fc/bias": jnp.asarray([9.0, 19.0]),
    }
    key = jax.random.key(0)
    moved, renewed = rule.needs.hook.refresh(state, key, moving)
    # Two of three entries of A are large, one of them opposed; of B and the bias, one each.
    assert renewed["fc/kernel"].a.ravel().tolist() == [True, False, False]
    assert renewed["fc/kernel"].b.tolist() == [[False, True]]
    assert renewed["fc/bias"].tolist() == [True, False]
    a = moved["fc/kernel"].a.ravel()
    drawn = lora.init(key, {"fc/kernel": origin["fc/kernel"]}, ".*", 1)["fc/kernel"].a
    assert a[0] == drawn[0, 0] and jnp.array_equal(a[1:], jnp.asarray([-0.2, -0.3]))
    assert moved["fc/kernel"].b.tolist() == [[-7.0, 0.0]]
    assert moved["fc/bias"].tolist() == [10.0, 19.0]


def test_factors_are_averaged_and_not_products():
    rule = rules.pam()
    origin = {"k": jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), "b": jnp.asarray([1.0])}

    def adapter(a, b):
        return {"k": Adapter(jnp.asarray(a).reshape(2, 1), jnp.asarray(b).reshape(1, 2))}

    state = rule.init(origin, adapter([0.5, 0.5], [0.0, 0.0]))
    tasks = [adapter([0.5, 0.5], [0.0, 0.0]), adapter([2.0, 0.0], [1.0, 0.0]),
             adapter([0.0, 2.0], [0.0, 1.0])]  # fmt: skip
    biases = [1.0, 3.0, 9.0]
    for adapters, bias in zip(tasks, biases, strict=True):
        trained = {**lora.fold(origin, adapters), "b": jnp.asarray([bias])}
        merged, state, info = rule.update(
            state, previous=origin, trained=trained, evidence=Evidence(adapters=adapters)
        )
        if bias < 9:  # the first task did not move, so the second is the first that counts
            assert leaves_equal(merged, trained) and float(info.alpha) == 1.0
    # G: A = (1, 1), B = (1/2, 1/2), bias (2 + 8) / 2.
    assert merged["k"].tolist() == [[1.5, 0.5], [0.5, 1.5]] and merged["b"].tolist() == [6.0]
    assert float(info.alpha) == 0.5


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.5}, {"every": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        rules.pam(**settings)


FULL = dataclasses.replace(SMALL, rule="pam", perturbation="none", epochs=2)
LORA = dataclasses.replace(VIT, rule="pam", perturbation="none", epochs=2, num_tasks=3)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FULL, slow(LORA)], ids=["full", "lora"])
def test_every_task_starts_from_the_origin_and_is_kept_in_line(config):
    learner = Learner(config, 0, options=QUIET)
    run, given, refreshed = learner.programs, [], []

    def merge(state, previous, trained, evidence):
        given.append(trees.select(jax.tree.map(np.asarray, previous), run.merging))
        return run.merge(state, previous, trained, evidence)

    def refresh(key, trainable, optimizer_state, task, step, state):
        before = jax.tree.map(np.asarray, (trainable.moving, state.shared, optimizer_state))
        found = run.training.later.refresh(key, trainable, optimizer_state, task, step, state)
        after = jax.tree.map(np.asarray, (found[0].moving, found[1]))
        refreshed.append((int(task), before, after))
        return found

    learner = with_functions(learner, merge=merge, refresh=refresh)
    learner.run()
    assert run.training.later.train._cache_size() == run.merge._cache_size() == 1
    assert leaves_equal(given[1], given[0]) and leaves_equal(given[2], given[0])
    assert run.training.later.refresh._cache_size() == 1
    task, (old, shared, moments), (new, cleared) = refreshed[-1]
    assert task == 2
    opposed = 0
    origin = learner.state.rule.origin
    for path in run.merging:
        if path in run.adapted:
            triples = zip(shared[path], old[path], new[path], strict=True)
        else:
            triples = [(shared[path], old[path] - origin[path], new[path] - origin[path])]
        for g, before, after in triples:
            renewed = np.asarray(opposed_entries(g, before))
            assert np.array_equal(before[~renewed], after[~renewed])
            assert not (before[renewed] == after[renewed]).any()
            opposed += int(renewed.sum())
    assert opposed > 0
    count = [sum(int((x == 0).sum()) for x in jax.tree.leaves(tree)) for tree in (moments, cleared)]
    assert count[1] >= count[0] + opposed  # of both moments


@pytest.mark.slow
def test_a_run_killed_after_a_refresh_ends_with_the_same_numbers(tmp_path, monkeypatch):
    def dies(learner, step, tree):
        return step - learner.steps.bounds[2] > learner.steps.per_epoch[2]

    straight, wanted, again, found = straight_and_killed(LORA, tmp_path, monkeypatch, 5, dies)
    assert comparable(found) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
