"""What a run has measured so far: part of its checkpoints, and the substance of its results."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pm_jax import metrics
from pm_jax.continual.merging import landscape
from pm_jax.rules import MergeInfo, MergeRule

MERGE_FIELDS = (
    *(name for name in MergeInfo._fields if name != "figures"),
    *("actual_loss_change", "loss_change_ratio"),
)
"""Figures of every merge; a rule may add its own, and `onset_gradients` one more."""
PHASES = ("train", "curvature", "merge", "classifier", "evaluate", "landscape")


def seconds_since(clock: float) -> float:
    """Seconds that have gone by, 0 if the clock was set back meanwhile.

    Args:
        clock: a reading of `time.perf_counter`.

    Returns:
        Seconds, not negative.

    Example:
        >>> seconds_since(float("inf"))
        0.0
    """
    return max(0.0, time.perf_counter() - clock)


class Records:
    """Accuracies, figures of the merges and times of a run, filled in task by task.

    Args:
        tasks: T.
        rule: of the run, which may have figures of its own.
        onset: whether the gradient norm at the onset of each task is among the figures.
        landscape_points: see `landscape.grid`; 0 for no landscapes.
        plane_points: see `landscape.plane`; 0 for no planes.

    Attributes:
        arrays: all that was recorded, for checkpoints; NaN for what is to come.

    Example:
        >>> from pm_jax import rules
        >>> records = Records(2, rules.sequential(), onset=False)
        >>> sorted(records.arrays), records.arrays["accuracy"].shape
        (['accuracy', 'initial', 'merges', 'seconds'], (2, 2, 2))
    """

    def __init__(
        self,
        tasks: int,
        rule: MergeRule,
        *,
        onset: bool,
        landscape_points: int = 0,
        plane_points: int = 0,
    ):
        self._fields = (
            *MERGE_FIELDS,
            *rule.needs.figures,
            *(("onset_gradient_norm",) if onset else ()),
            *(landscape.FIGURES if landscape_points else ()),
        )
        self.arrays: dict[str, np.ndarray] = {
            "accuracy": np.full((2, tasks, tasks), np.nan, np.float32),
            "initial": np.full((2, tasks), np.nan, np.float32),
            "merges": np.full((tasks, len(self._fields)), np.nan, np.float32),
            "seconds": np.zeros(len(PHASES), np.float64),
        }
        if landscape_points:
            shape = (tasks, len(landscape.grid(landscape_points)) + 1, len(landscape.SCORES), tasks)
            self.arrays["landscape"] = np.full(shape, np.nan, np.float32)
        if plane_points:
            grid = (tasks, plane_points, plane_points, len(landscape.SCORES), tasks)
            self.arrays["plane"] = np.full(grid, np.nan, np.float32)
            self.arrays["plane_merged"] = np.full((tasks, 3), np.nan, np.float32)

    def restore(self, arrays: dict[str, Any]) -> None:
        """Take over what a checkpoint has."""
        self.arrays = jax.tree.map(np.array, arrays)

    def add_time(self, phase: str, seconds: float) -> float:
        """Count seconds of one of `PHASES`; returns them."""
        self.arrays["seconds"][PHASES.index(phase)] += seconds
        return seconds

    def time(self, phase: str, clock: float) -> float:
        """Count the seconds since a reading of `time.perf_counter`; returns them."""
        return self.add_time(phase, seconds_since(clock))

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds that a block takes."""
        clock = time.perf_counter()
        yield
        self.time(phase, clock)

    def add_merge(self, task: int, info: MergeInfo, **more: float) -> dict[str, float]:
        """Keep the figures of a merge; returns them by name."""
        blank = dict.fromkeys(landscape.FIGURES, float("nan"))
        found = {**blank, **info._asdict(), **info.figures, **more}
        predicted = float(info.predicted_loss_change)
        ratio = more["actual_loss_change"] / predicted if predicted else float("nan")
        found["loss_change_ratio"] = ratio
        figures = {name: float(found[name]) for name in self._fields}
        self.arrays["merges"][task] = list(figures.values())
        return figures

    def results(self, *, initial: bool) -> dict[str, Any]:
        """What `results.json` has of them.

        Args:
            initial: whether accuracies before the first task were measured, for forward transfer.

        Returns:
            Accuracy matrices and their summaries, merges and seconds.
        """
        seen, aware = (
            {
                "accuracy_matrix": matrix.tolist(),
                **metrics.summarize(matrix, before if initial else None),
            }
            for matrix, before in zip(
                self.arrays["accuracy"].astype(np.float64),
                self.arrays["initial"].astype(np.float64),
                strict=True,
            )
        )
        merges = [
            dict(zip(self._fields, row, strict=True))
            for row in self.arrays["merges"].astype(np.float64).tolist()
        ]
        regrets = {
            f"mean_{name}": float(
                np.mean([merge.get(name, np.nan) for merge in merges[1:]] or [np.nan])
            )
            for name in ("regret_loss", "regret_accuracy")
        }
        return {
            **seen,
            **regrets,
            "task_aware": aware,
            "merges": merges,
            "seconds": dict(zip(PHASES, self.arrays["seconds"].tolist(), strict=True)),
        }
