"""A finished run as the report reads it: settings, results of all seeds, and logs."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.continual.report.results import Shown, classifiers_of, read_seeds, view
from pm_jax.continual.report.sentences import NAMES
from pm_jax.continual.settings.settings import as_now
from pm_jax.continual.storage.logs import JSONL_FILE
from pm_jax.continual.storage.workdir import CONFIG_FILE
from pm_jax.types import InvalidInput

EPOCH = {"task": int, "epoch": int, "loss": (int, float)}
"""Form of a line of the log that tells of an epoch."""


class FinishedRun(NamedTuple):
    """The finished seeds of a work directory, in their order."""

    directory: Path
    # The rule in words, and "(baseline)" after it for a baseline.
    label: str
    # Settings as config.json has them.
    config: dict[str, Any]
    # Content of results.json of each seed, as it is shown.
    results: list[dict[str, Any]]

    @property
    def split(self) -> str:
        """The split whose accuracies are shown."""
        return Shown.of(self.results[0]).split

    @property
    def classifiers(self) -> list[str]:
        """The classifiers that were evaluated, the one that is shown first."""
        return classifiers_of(self.results[0])

    @property
    def shown(self) -> str:
        """Words for what is shown: the split, and the classifier where there are several."""
        several = len(self.classifiers) > 1
        return f"{self.split} split" + (f", {self.classifiers[0]}" if several else "")


def read_run(directory: Path, suffix: str = "", split: str | None = None) -> FinishedRun:
    """Read settings and results of a work directory; the suffix ends the run's label.

    Without a split, the one is shown that the run was started with.

    Raises:
        InvalidInput: a file is damaged, no seed is finished, or one has no figures on the split.
    """
    path = directory / CONFIG_FILE
    if not path.exists():
        raise InvalidInput(
            f"workdir={directory}: has no {CONFIG_FILE}; give the work directory of a run of "
            "experiments.train"
        )
    try:
        config = as_now(files.read_json(path, {"rule": str, "dataset": str}))
    except ValueError:
        raise InvalidInput(
            f"workdir={directory}: its {CONFIG_FILE} is damaged; take another directory"
        ) from None
    results = [view(content, split=split) for content in read_seeds(directory)]
    if not results:
        raise InvalidInput(
            f"workdir={directory}: has no finished seed; run the command that made it to its end"
        )
    return FinishedRun(
        directory, NAMES.get(config["rule"], config["rule"]) + suffix, config, results
    )


def training_losses(run: FinishedRun) -> tuple[np.ndarray, np.ndarray] | None:
    """Read when epochs ended, in tasks [E], and their mean losses [S, E]; `None` without logs.

    Raises:
        InvalidInput: a log is damaged.
    """
    by_seed = []
    for content in run.results:
        path = run.directory / f"seed_{content['seed']}" / JSONL_FILE
        if not path.exists():
            return None
        try:
            by_seed.append(_losses_of_epochs(path))
        except (ArithmeticError, ValueError):
            raise InvalidInput(
                f"workdir={run.directory}: {path.parent.name}/{JSONL_FILE} is damaged; move it "
                "away for a report without the training loss"
            ) from None
    keys = sorted(by_seed[0])
    # A later epoch of the same task replaces an earlier one: the last number stays.
    epochs_of_task = dict(keys)
    ends = np.asarray([task - 1 + epoch / epochs_of_task[task] for task, epoch in keys])
    return ends, np.asarray([[losses.get(key, math.nan) for key in keys] for losses in by_seed])


def _losses_of_epochs(path: Path) -> dict[tuple[int, int], float]:
    """Read the mean loss by task and epoch; raises ValueError or ArithmeticError for damage."""
    sums: dict[tuple[int, int], tuple[int, float]] = {}
    before = 0
    for text in path.read_bytes().splitlines():
        line = files.parse_json(text, {"event": str, "step": int})
        # A checkpoint within an epoch splits the epoch's line into several.
        if line["event"] == "epoch":
            if not files.fits(line, EPOCH) or min(line["task"], line["epoch"]) < 1:
                raise ValueError("tasks and epochs are whole numbers from 1 on")
            key, steps = (line["task"], line["epoch"]), line["step"] - before
            earlier_steps, earlier_loss = sums.get(key, (0, 0.0))
            sums[key] = earlier_steps + steps, earlier_loss + steps * line["loss"]
        before = line["step"]
    if not sums:
        raise ValueError("no line tells of an epoch")
    return {key: float(loss / steps) for key, (steps, loss) in sums.items()}
