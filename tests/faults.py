"""Faults of a machine while a run goes on, each a function of a patch whose name says what happens.

`experiments/mistakes.md` has the names with spaces.
"""

import errno
import os
import pathlib

import jax
import jax.numpy as jnp
from orbax import checkpoint as orbax

from pm_jax.continual import Learner
from pm_jax.continual.merging.merging import Merging
from pm_jax.continual.storage.logs import RunLog


def failing(monkeypatch, owner, name, error, when):
    """Have a function raise at the first call for which `when(number, *arguments)` is true."""
    original, calls = getattr(owner, name), []

    def called(*arguments, **named):
        calls.append(1)
        if when(len(calls), *arguments):
            raise error
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, called)


def fault_of(number):
    return OSError(number, os.strerror(number))


def renaming_fails(monkeypatch, number, end):
    """As the last step of writing a file whose path ends so."""
    failing(monkeypatch, os, "replace", fault_of(number),
            lambda _, old, new: pathlib.Path(new).as_posix().endswith(end))  # fmt: skip


def the_disk_is_full_when_the_settings_are_written(monkeypatch):
    renaming_fails(monkeypatch, errno.ENOSPC, "/config.json")


def the_disk_is_full_when_a_line_of_the_log_is_written(monkeypatch):
    failing(monkeypatch, RunLog, "_append", fault_of(errno.ENOSPC), lambda call, *_: call == 3)


def the_disk_is_full_when_a_checkpoint_is_written(monkeypatch):
    """In the words of TensorStore."""
    error = ValueError(
        'RESOURCE_EXHAUSTED: Error writing "rule/0" in OCDBT database: Failed to write 1792 bytes '
        "to file 23: No space left on device [os_error_code='28']"
    )
    failing(monkeypatch, orbax.CheckpointManager, "save", error, lambda call, *_: call == 2)


def the_disk_is_full_when_the_checksums_of_a_checkpoint_are_written(monkeypatch):
    renaming_fails(monkeypatch, errno.ENOSPC, "/checkpoints/manifest.json")


def the_disk_is_full_when_the_results_are_written(monkeypatch):
    renaming_fails(monkeypatch, errno.ENOSPC, "/results.json")


def the_disk_is_full_when_the_summary_is_written(monkeypatch):
    renaming_fails(monkeypatch, errno.ENOSPC, "/summary.json")


def the_disk_is_full_when_the_merged_model_is_written(monkeypatch):
    renaming_fails(monkeypatch, errno.ENOSPC, ".safetensors")


def the_quota_is_used_up_when_the_results_are_written(monkeypatch):
    renaming_fails(monkeypatch, errno.EDQUOT, "/results.json")


def the_disk_fails_when_the_results_are_written(monkeypatch):
    renaming_fails(monkeypatch, errno.EIO, "/results.json")


def the_device_has_no_memory_left_in_task_2(monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4000 bytes.")
    failing(monkeypatch, Learner, "train_task", error, lambda call, *_: call == 2)


def the_host_has_no_memory_left_after_task_1(monkeypatch):
    failing(monkeypatch, Learner, "accuracy", MemoryError(), lambda call, *_: call == 2)


def the_merge_of_task_2_gives_nan(monkeypatch):
    merge = Merging.merge

    def poisoned(self, task, *arguments):
        state, info = merge(self, task, *arguments)
        if task == 1:
            state = state._replace(params=jax.tree.map(lambda leaf: leaf + jnp.nan, state.params))
        return state, info

    monkeypatch.setattr(Merging, "merge", poisoned)


def the_measured_loss_of_task_2_is_infinite(monkeypatch):
    loss = Merging.held_out_loss
    monkeypatch.setattr(
        Merging, "held_out_loss",
        lambda self, trained, task, *rest: (
            loss(self, trained, task, *rest) + (jnp.inf if task == 1 else 0.0)
        ),
    )  # fmt: skip
