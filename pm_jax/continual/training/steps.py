"""The steps of a run: how many each task has, and the pieces in which they are made."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from pm_jax.continual.settings.config import Config


class TaskSteps(NamedTuple):
    """The steps of each task of a run, which are counted through from the first task to the last.

    Attributes:
        per_epoch: steps of an epoch, by task.
        epochs: epochs, by task.

    Example:
        >>> steps = TaskSteps((3, 2), (2, 1))
        >>> steps.bounds, steps.total, [steps.task_at(step) for step in (0, 5, 6)]
        ((0, 6, 8), 8, [0, 0, 1])
    """

    per_epoch: tuple[int, ...]
    epochs: tuple[int, ...]

    @classmethod
    def of(cls, config: Config, sizes: np.ndarray) -> "TaskSteps":
        """The steps for tasks of some numbers of examples."""
        per_epoch = (-(-sizes // config.batch_size)).tolist()
        return cls(tuple(per_epoch), tuple(map(config.epochs_of, range(len(per_epoch)))))

    @property
    def bounds(self) -> tuple[int, ...]:
        """First step of each task, and the number of all steps."""
        return (0, *np.cumsum(np.multiply(self.per_epoch, self.epochs)).tolist())

    @property
    def total(self) -> int:
        """Steps of all tasks."""
        return self.bounds[-1]

    def task_at(self, step: int) -> int:
        """The task that goes on at a step."""
        return int(np.searchsorted(self.bounds, step, side="right")) - 1

    def of_task(self, task: int) -> int:
        """Steps of a task in all."""
        return self.per_epoch[task] * self.epochs[task]


def segments(
    first_step: int,
    total_steps: int,
    steps_per_epoch: int,
    every: int,
    further: Collection[int] = (),
) -> list[tuple[int, int, int]]:
    """Pieces (epoch, first, stop) that lead through a task, cut at epochs and at checkpoints.

    Args:
        first_step: where to begin, in steps of the task.
        total_steps: steps of the task in all.
        steps_per_epoch: steps of each of its epochs.
        every: steps between checkpoints; 0 for none within the task.
        further: steps of the task to cut at as well.

    Example:
        >>> segments(0, 6, 3, 2)
        [(0, 0, 2), (0, 2, 3), (1, 0, 1), (1, 1, 3)]
    """
    cuts = {*range(0, total_steps + 1, steps_per_epoch), *further}
    if every:
        cuts |= set(range(0, total_steps + 1, every))
    bounds = [first_step, *sorted(cut for cut in cuts if cut > first_step)]
    return [
        (low // steps_per_epoch, low % steps_per_epoch, low % steps_per_epoch + high - low)
        for low, high in zip(bounds[:-1], bounds[1:], strict=True)
    ]
