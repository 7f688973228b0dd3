"""The measurements of a run so far, which are part of its checkpoints and of its results."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pm_jax import metrics
from pm_jax.continual.merging import landscape
from pm_jax.continual.merging.classifying import DRIFT_FIGURES
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import SPLITS
from pm_jax.rules import MergeInfo

MERGE_FIELDS = (
    *(name for name in MergeInfo._fields if name not in ("figures", "comparison")),
    *("actual_loss_change", "loss_change_ratio"),
)
"""Figures of every merge; a rule may add its own, and `onset_gradients` one more."""
PHASES = ("train", "curvature", "merge", "classifier", "evaluate", "landscape")


def seconds_since(clock: float) -> float:
    """Return the seconds since a reading of `time.perf_counter`, 0 if the clock was set back."""
    return max(0.0, time.perf_counter() - clock)


class Records:
    """Accuracies, figures of the merges and times of a run, filled in task by task.

    Attributes:
        arrays: all records, for checkpoints; NaN until they are measured.
        on_phase: is called with the name of a phase whose time is taken, when it begins.
    """

    def __init__(self, tasks: int, config: Config, with_onset: bool):
        landscape_points, plane_points = config.landscape_points, config.plane_points
        self.on_phase: Callable[[str], None] = lambda phase: None
        self._classifiers, self._evaluate_on = config.classifiers, config.evaluate_on
        self._fields = (
            *MERGE_FIELDS,
            *config.merge_rule.needs.figures,
            *(("onset_gradient_norm",) if with_onset else ()),
            *(landscape.FIGURES if landscape_points else ()),
            *(DRIFT_FIGURES if any(each.moves for each in config.chosen_classifiers) else ()),
        )
        # By classifier, by split, over all classes seen and over the task's own: see `Learner`.
        measured = (len(self._classifiers), len(SPLITS), 2)
        self.arrays: dict[str, np.ndarray] = {
            "scores": np.full((*measured, tasks, tasks), np.nan, np.float32),
            "initial_scores": np.full((*measured, tasks), np.nan, np.float32),
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

    @property
    def merged(self) -> bool:
        """True once a task was merged."""
        return bool(np.isfinite(self.arrays["merges"]).any())

    def restore(self, arrays: dict[str, Any]) -> None:
        """Replace all records by those of a checkpoint."""
        # Copies: the arrays of a checkpoint may be read-only.
        self.arrays = jax.tree.map(np.array, arrays)

    def add_time(self, phase: str, seconds: float) -> float:
        """Add seconds to one of `PHASES`; returns them."""
        self.arrays["seconds"][PHASES.index(phase)] += seconds
        return seconds

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that a block takes to one of `PHASES`."""
        self.on_phase(phase)
        clock = time.perf_counter()
        yield
        self.add_time(phase, seconds_since(clock))

    def add_merge(self, task: int, info: MergeInfo, **more: float) -> dict[str, float]:
        """Record the figures of a merge; returns them by name."""
        blank = dict.fromkeys(landscape.FIGURES, float("nan"))
        values = {**blank, **info._asdict(), **info.figures, **more}
        predicted = float(info.predicted_loss_change)
        ratio = more["actual_loss_change"] / predicted if predicted else float("nan")
        values["loss_change_ratio"] = ratio
        figures = {name: float(values[name]) for name in self._fields}
        self.arrays["merges"][task] = list(figures.values())
        return figures

    def results(self, *, initial: bool, by_class: np.ndarray | None = None) -> dict[str, Any]:
        """Return the records as `results.json` has them.

        `initial` accuracies give the transfer. `by_class` has the final accuracy of each class.
        """
        # Means are taken in float64.
        names = ("scores", "initial_scores", "merges", "seconds")
        arrays = {name: self.arrays[name].astype(np.float64) for name in names}

        def figures(place: tuple[int, int]) -> dict[str, Any]:
            seen, task_aware = (
                {
                    "accuracy_matrix": matrix.tolist(),
                    **metrics.summarize(matrix, before if initial else None),
                }
                for matrix, before in zip(
                    arrays["scores"][place], arrays["initial_scores"][place], strict=True
                )
            )
            result = {**seen, "task_aware": task_aware}
            if by_class is not None:
                values = by_class[place].tolist()
                result["class_accuracy"] = [None if np.isnan(x) else x for x in values]
            return result

        scores = {
            name: {split: figures((row, column)) for column, split in enumerate(SPLITS)}
            for row, name in enumerate(self._classifiers)
        }
        merges = [dict(zip(self._fields, row, strict=True)) for row in arrays["merges"].tolist()]
        # The first merge has nothing to regret: there is no earlier model.
        regrets = {
            f"mean_{name}": float(np.mean([m.get(name, np.nan) for m in merges[1:]] or np.nan))
            for name in ("regret_loss", "regret_accuracy")
        }
        return {
            # The table shows the first classifier on one split; `scores` has all of them.
            **scores[self._classifiers[0]][self._evaluate_on],
            **regrets,
            "evaluate_on": self._evaluate_on,
            "classifiers": list(self._classifiers),
            "merges": merges,
            "seconds": dict(zip(PHASES, arrays["seconds"].tolist(), strict=True)),
            "scores": scores,
        }
