"""What other coefficients would have done: every task's loss and accuracy along a merge segment.

A look at the validation data of all tasks after each merge, for analysis: nothing of it goes back
into the run.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

FILE = "landscape.npz"
SCORES = ("accuracy", "task_aware_accuracy", "loss")
FIGURES = ("oracle_alpha", "regret_loss", "most_accurate_alpha", "regret_accuracy")
"""What a merge's landscape adds to its figures."""
BEYOND = 4
"""The grid goes on by one part in so many of the segment on both sides."""


def grid(points: int) -> np.ndarray:
    """Coefficients at which a segment is looked at.

    Args:
        points: from 0 to 1, at least 2.

    Returns:
        float32 [A], evenly spaced, from about -1/4 to 5/4.

    Example:
        >>> grid(5).tolist()
        [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    """
    beyond = (points - 1) // BEYOND
    return (np.arange(-beyond, points + beyond) / (points - 1)).astype(np.float32)


def regret(alphas: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """How far a merge is from the best point of its segment.

    Args:
        alphas: [A], the grid; what lies outside [0, 1] does not count.
        scores: [A + 1, 3, t] of `SCORES`, of the t tasks seen, at the grid and at the merged model.

    Returns:
        `oracle_alpha`, where the sum of the losses is least, `regret_loss`, that sum at the merged
        model less the least one, `most_accurate_alpha`, where the mean accuracy is best, and
        `regret_accuracy`, a fraction. A regret is 0 where the merged model is better than the grid.

    Example:
        >>> scores = np.zeros((3, 3, 1))
        >>> scores[:, 0, 0], scores[:, 2, 0] = [0.5, 0.75, 0.5], [2.0, 1.0, 1.5]
        >>> list(regret(np.asarray([0.0, 1.0]), scores).values())
        [1.0, 0.5, 1.0, 0.25]
    """
    inside = (alphas >= 0) & (alphas <= 1)
    loss, accuracy = scores[:, 2].sum(axis=-1), scores[:, 0].mean(axis=-1)
    least = np.where(inside, loss[:-1], np.inf)
    most = np.where(inside, accuracy[:-1], -np.inf)
    return {
        "oracle_alpha": float(alphas[least.argmin()]),
        "regret_loss": float(max(0.0, loss[-1] - least.min())),
        "most_accurate_alpha": float(alphas[most.argmax()]),
        "regret_accuracy": float(max(0.0, most.max() - accuracy[-1])),
    }


def write(path: Path, alphas: np.ndarray, scores: np.ndarray) -> None:
    """Write the landscapes of a run, whole or not at all.

    Args:
        path: of an .npz with `alphas` [A] and, by task merged, coefficient and task looked at, the
            arrays `accuracy`, `task_aware_accuracy` and `loss` [T, A, T] and the same at the merged
            model, `merged_accuracy` ... [T, T]; NaN for tasks to come.
        alphas: [A].
        scores: [T, A + 1, 3, T].

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / FILE
        >>> write(path, np.zeros(1), np.zeros((2, 2, 3, 2)))
        >>> np.load(path)["loss"].shape, np.load(path)["merged_loss"].shape
        ((2, 1, 2), (2, 2))
    """
    arrays: dict[str, Any] = {"alphas": alphas}
    for number, name in enumerate(SCORES):
        arrays[name], arrays[f"merged_{name}"] = scores[:, :-1, number], scores[:, -1, number]
    temporary = path.with_name(f"tmp_{path.name}")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)
