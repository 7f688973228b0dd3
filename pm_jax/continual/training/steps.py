"""The steps of a run: how many each task has, and the pieces in which they are made."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from pm_jax.continual.settings.config import Config


class TaskSteps(NamedTuple):
    """Steps per epoch and epochs of each task; steps of a run are counted from its first task."""

    per_epoch: tuple[int, ...]
    epochs: tuple[int, ...]

    @classmethod
    def of(cls, config: Config, sizes: np.ndarray) -> "TaskSteps":
        """Return the steps of tasks with these numbers of examples."""
        steps = (-(-sizes // config.batch_size)).tolist()
        # A task that trains nothing counts as one step, at which its end is saved.
        trains = [config.trains(task) for task in range(len(steps))]
        per_epoch = [count if some else 1 for count, some in zip(steps, trains, strict=True)]
        epochs = [config.epochs_of(task) if some else 1 for task, some in enumerate(trains)]
        return cls(tuple(per_epoch), tuple(epochs))

    @property
    def bounds(self) -> tuple[int, ...]:
        """The first step of each task, and the number of all steps."""
        return (0, *np.cumsum(np.multiply(self.per_epoch, self.epochs)).tolist())

    @property
    def total(self) -> int:
        """The number of steps of all tasks."""
        return self.bounds[-1]

    def task_at(self, step: int) -> int:
        """Return the task that goes on at a step of the run."""
        return int(np.searchsorted(self.bounds, step, side="right")) - 1

    def of_task(self, task: int) -> int:
        """Return the number of steps of a task."""
        return self.per_epoch[task] * self.epochs[task]


def segments(
    first: int, total: int, per_epoch: int, every: int, further: Collection[int] = ()
) -> list[tuple[int, int, int]]:
    """Cut a task from a step on into pieces (epoch, first, stop), at epochs, checkpoints and more.

    `further` are steps of the task to cut at as well; `every` is 0 without checkpoints in the task.
    """
    cuts = {*range(0, total + 1, per_epoch), *further}
    if every:
        cuts |= set(range(0, total + 1, every))
    bounds = [first, *sorted(cut for cut in cuts if cut > first)]
    return [
        (low // per_epoch, low % per_epoch, low % per_epoch + high - low)
        for low, high in zip(bounds[:-1], bounds[1:], strict=True)
    ]
