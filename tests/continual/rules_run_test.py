"""Every registered rule through the binary, on a tiny run of three tasks."""

import dataclasses
import functools
import inspect
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules
from tests.binaries import call
from tests.small_runs import SMALL, comparable, leaves_equal, slow, straight_and_killed

TINY = ["--num_tasks=3", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8",
        "--batch_size=128", "--perturbation=none"]  # fmt: skip


@functools.cache
def results(rule):
    """Results and training losses by task."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [f"--rule={rule}", f"--workdir={directory}/run", *TINY]
        call("train", *arguments)
        seed = f"{directory}/run/seed_0"
        with open(f"{seed}/metrics.jsonl") as log, open(f"{seed}/results.json") as found:
            lines = [line for line in map(json.loads, log) if line["event"] == "epoch"]
            return json.load(found), [line["loss"] for line in lines]


# A task that cannot move trains nothing here, where all tasks share a classifier.
ONE_BY_ONE = [
    name
    for name in rules.REGISTRY
    if not rules.make(name).needs.tasks_at_once and rules.make(name).needs.moving_tasks is None
]
FAST = ("perturb_and_merge", "sequential", "averaging")


@pytest.mark.slow
@pytest.mark.parametrize("name", [x if x in FAST else slow(x) for x in ONE_BY_ONE])
def test_a_run_trains_as_the_rule_says_and_is_measured_on_the_merged_model(name):
    found, losses = results(name)
    sequential, its_losses = results("sequential")
    rule = rules.make(name)
    # Rules that take part in training, or cut it at snapshots, have losses of their own.
    if not (rule.needs.hook or rule.needs.snapshots):
        # From scratch the first task is the pre-training, so the second starts alike in all.
        assert losses[:2] == its_losses[:2]
        stays = found["merges"][1]["alpha"] == 1.0  # where the merge is the trained model
        goes_on = rule.needs.next_task_from == "trained" or (
            stays and rule.needs.next_task_from == "merged"
        )
        assert (losses[2] == its_losses[2]) == goes_on
    accuracies, its_accuracies = found["accuracy_matrix"], sequential["accuracy_matrix"]
    assert accuracies[0] == its_accuracies[0]
    assert (accuracies[-1] == its_accuracies[-1]) == (name == "sequential")
    assert all(merge["alpha"] is not None for merge in found["merges"])


def state_bytes(name, max_tasks):
    state = rules.make(name, f"max_tasks={max_tasks}").init({"w": jnp.zeros(50)})
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_a_rule_whose_state_grows_with_the_tasks_says_so():
    takes = [name for name, make in rules.REGISTRY.items()
             if "max_tasks" in inspect.signature(make).parameters]  # fmt: skip
    growing = {name for name in takes if state_bytes(name, 6) >= state_bytes(name, 3) + 3 * 200}
    assert growing == {name for name in rules.REGISTRY if rules.make(name).needs.keeps_tasks}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tunable_magmax", "exact_curvature"])
def test_vectors_of_all_tasks_are_in_the_hosts_memory_and_outlive_a_kill(
    name, tmp_path, monkeypatch
):
    config = dataclasses.replace(SMALL, rule=name, num_tasks=2, first_task_epochs=1)
    straight, wanted, again, found = straight_and_killed(
        config,
        tmp_path,
        monkeypatch,
        0,
        lambda learner, step, tree: step == learner.steps.bounds[1],
    )
    assert comparable(found) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
    for learner in (straight, again):
        assert all(type(x) is np.ndarray for x in jax.tree.leaves(learner.state.rule))
