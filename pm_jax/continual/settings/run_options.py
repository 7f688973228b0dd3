"""Options of a run: what it saves, shows and shares, none of which changes its numbers."""

import dataclasses
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from pm_jax.types import InvalidInput

KEPT = 2
"""Checkpoints that stay by default: the newest, and the one before in case that one is damaged."""
Data = TypeVar("Data")


class Stop(Protocol):
    """The object that a run asks whether to end early, such as `interruption.StopRequests`."""

    def received(self) -> signal.Signals | None:
        """Return the signal that came, or `None`."""

    def cut(self, stretches: Iterable[tuple[int, int, Data]]) -> Iterator[tuple[int, int, Data]]:
        """Cut stretches of steps into pieces short enough to obey a signal soon."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Settings of a run that do not change its numbers.

    Attributes:
        checkpoint_every: steps between checkpoints within a task; 0 for task boundaries only.
        keep_checkpoints: number of a seed's newest checkpoints that stay, at least 1.
        quiet: print nothing.
        tensorboard: write TensorBoard events beside the other logs.
        keep_task_models: write the models that are merged, in `seed_<n>/task_models`.
        shared: folder of the task training in common with other merge rules; `None` for none.
        stop: object that is asked whether to end early; `None` never to.
        label: what lines about the run call it; empty for the name of its rule.
        runs_before: how many runs come before this one, which a terminal shows.
        runs_in_all: how many runs there are.

    Raises:
        InvalidInput: a number out of range; the message names it, its value and the remedy.
    """

    checkpoint_every: int = 0
    keep_checkpoints: int = KEPT
    quiet: bool = False
    tensorboard: bool = False
    keep_task_models: bool = False
    shared: Path | None = None
    stop: Stop | None = None
    label: str = ""
    runs_before: int = 0
    runs_in_all: int = 1

    def title(self, rule: str, seed: int) -> str:
        """Name a run, and say which of several it is."""
        name = f"{self.label or rule}, seed {seed}"
        if self.runs_in_all < 2:
            return name
        return f"run {self.runs_before + 1} of {self.runs_in_all}, {name}"

    def __post_init__(self):
        if self.checkpoint_every < 0:
            raise InvalidInput(f"checkpoint_every={self.checkpoint_every}: must not be negative")
        if self.keep_checkpoints < 1:
            raise InvalidInput(f"keep_checkpoints={self.keep_checkpoints}: must be at least 1")
