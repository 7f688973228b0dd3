"""Configurations small enough for tests, and how runs are compared."""

import copy
import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest

from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual import learner as learner_module
from pm_jax.continual.merging.programs import evaluation_passes, programs_of, training_programs
from pm_jax.continual.training.task_program import Segment

SMALL = Config(
    num_tasks=3, epochs=1, first_task_epochs=2, hidden_sizes=(16,), batch_size=64,
    learning_rate=3e-3,
)  # fmt: skip
BY_CLASS = dataclasses.replace(SMALL, scenario="class_incremental", classifiers=("trained",))
VIT = dataclasses.replace(
    BY_CLASS, model="vit", patch_size=4, width=16, depth=1, num_heads=2, adapter="lora",
    lora_rank=2, weight_decay=0.1, num_tasks=2,
)  # fmt: skip


QUIET = RunOptions(quiet=True)

ALL_FUSIONS = "fusion_emitters" not in os.environ.get("XLA_FLAGS", "")


def different_programs(test):
    """Marks a test that compares programs to the last bit, which conftest's way rounds apart."""
    elsewhere = pytest.mark.skipif(
        not ALL_FUSIONS, reason="compiled as a user's run is, by all_fusions_test.py"
    )
    return pytest.mark.different_programs(elsewhere(test))


def slow(*values):
    """The parameters of a test, left to the slow lane."""
    return pytest.param(*values, marks=pytest.mark.slow)


def forget_programs():
    """Have everything compiled anew."""
    programs_of.cache_clear()
    training_programs.cache_clear()
    evaluation_passes.cache_clear()


def copied(owner):
    """A copy that shares its compiled functions, which are made when they are first asked for."""
    for name, attribute in vars(type(owner)).items():
        if isinstance(attribute, functools.cached_property):
            getattr(owner, name)
    return copy.copy(owner)


def with_functions(learner, *, train=None, refresh=None, **functions):
    """The same learner with other compiled functions: of all tasks' training, or of `Programs`."""
    programs = copied(learner.programs)
    for name, function in functions.items():
        assert hasattr(programs, name)
        setattr(programs, name, function)
    replaced = {name: x for name, x in (("train", train), ("refresh", refresh)) if x}
    if replaced:
        programs.training = training = copied(programs.training)
        one_program = training.first is training.later
        training.later = copied(training.later)
        for name, function in replaced.items():
            setattr(training.later, name, function)
        if one_program:
            training.first = training.later
    return Learner(
        learner.config, learner.seed, learner.directory, learner.options, programs=programs
    )


def comparable(results):
    return json.dumps({k: v for k, v in results.items() if k != "seconds"}, sort_keys=True)


class Killed(BaseException):
    """Ends a run as a signal would, between two statements."""


def straight_and_killed(config, directory, monkeypatch, every, dies):
    """A learner that ran through, one that was killed once and went on, and both results.

    `dies(learner, step, tree)` says at which checkpoint, which is written before.
    """
    options = RunOptions(checkpoint_every=every, quiet=True)
    straight = Learner(config, 0, directory / "straight", options)
    wanted = straight.run()
    return straight, wanted, *killed_and_gone_on(config, directory, monkeypatch, every, dies)


def killed_and_gone_on(config, directory, monkeypatch, every, dies):
    """The learner that went on where another was killed as `straight_and_killed` says."""
    options = RunOptions(checkpoint_every=every, quiet=True)
    first = Learner(config, 0, directory / "killed", options)
    saves, killed = learner_module.Checkpoints.save, []

    def dying_save(self, step, tree):
        saves(self, step, tree)
        if dies(first, step, tree) and not killed:
            killed.append(step)
            raise Killed

    monkeypatch.setattr(learner_module.Checkpoints, "save", dying_save)
    with pytest.raises(Killed):
        first.run()
    again = Learner(config, 0, directory / "killed", options)
    return again, again.run()


def leaves_equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def segment(*values):
    return Segment.of(*values)
