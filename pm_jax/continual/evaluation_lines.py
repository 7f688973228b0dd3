"""The lines that a run writes about a task whose merged model was evaluated."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import SPLITS
from pm_jax.continual.storage.logs import RunLog


def write(
    log: RunLog,
    config: Config,
    step: int,
    task: int,
    tasks: int,
    alpha: float,
    accuracies: np.ndarray,
    fits: Sequence[Mapping[str, Any]],
) -> None:
    """Log the accuracies [classifiers, splits] on the tasks seen, and say those that are shown.

    `task` is the number of one of `tasks`, from 0; `fits` has figures about each classifier.
    """
    names, shown_split = config.classifiers, config.evaluate_on
    shown = accuracies[:, SPLITS.index(shown_split)]
    figures = {
        f"{split}_accuracy_{name}": float(value)
        for name, row in zip(names, accuracies, strict=True)
        for split, value in zip(SPLITS, row, strict=True)
    }
    figures |= {
        f"{name}_{figure}": float(value)
        for name, of_fit in zip(names, fits, strict=True)
        for figure, value in of_fit.items()
    }
    log.write(
        "evaluate",
        step=step,
        task=task + 1,
        accuracy=float(shown[0]),
        split=shown_split,
        classifier=names[0],
        **figures,
    )
    for each, of_fit in zip(config.chosen_classifiers, fits, strict=True):
        for remark in each.classifier.remarks({name: float(x) for name, x in of_fit.items()}):
            log.tell(f"task {task + 1}: {each.label}: {remark}")
    texts = [
        f"{name if len(names) > 1 else ''} {100 * value:.1f} %".strip()
        for name, value in zip(names, shown, strict=True)
    ]
    log.tell(
        f"task {task + 1} of {tasks}: alpha {alpha:.3f}, {shown_split} accuracy on the "
        f"tasks seen {', '.join(texts)}"
    )
