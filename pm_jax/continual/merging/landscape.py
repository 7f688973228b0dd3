"""The scores of other models around each merge, on validation data and for analysis only.

The models lie on the segment from the model that a task started from to the trained one, and in the
plane of the last two task vectors, which holds the models of the last two merges:

    previous + along (trained - previous) + across (the previous task's trained - its previous)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files, trees
from pm_jax.types import PyTree

FILE = "landscape.npz"
SCORES = ("accuracy", "task_aware_accuracy", "loss")
FIGURES = ("oracle_alpha", "regret_loss", "most_accurate_alpha", "regret_accuracy")
"""Figures that a landscape adds to those of its merge."""
BEYOND = 4
"""The grid goes beyond both ends of the segment by a quarter of it, rounded down to points."""


def grid(points: int) -> np.ndarray:
    """Return even coefficients from about -1/4 to 5/4, of which so many points are in [0, 1]."""
    beyond = (points - 1) // BEYOND
    return (np.arange(-beyond, points + beyond) / (points - 1)).astype(np.float32)


def plane(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates in a plane: `along` from -1/2 to 3/2, `across` from -1 to 1, [P] each."""
    # The previous model is at (0, 0), the trained one at (1, 0), and the models of the last merge
    # lie at along = 0 on either side.
    steps = np.linspace(0.0, 2.0, points, dtype=np.float32)
    return steps - 0.5, steps - 1.0


def regret(alphas: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Compare a merge with the best points of its segment, by total loss and by mean accuracy.

    `scores` [A + 1, 3, t] has `SCORES` of t tasks at the coefficients [A] and at the merged model.
    """
    # The merge could have chosen coefficients in [0, 1] only.
    inside = (alphas >= 0) & (alphas <= 1)
    loss, accuracy = scores[:, 2].sum(axis=-1), scores[:, 0].mean(axis=-1)
    least = np.where(inside, loss[:-1], np.inf)
    most = np.where(inside, accuracy[:-1], -np.inf)
    # A merged model that is better than the grid has no regret.
    return {
        "oracle_alpha": float(alphas[least.argmin()]),
        "regret_loss": float(max(0.0, loss[-1] - least.min())),
        "most_accurate_alpha": float(alphas[most.argmax()]),
        "regret_accuracy": float(max(0.0, most.max() - accuracy[-1])),
    }


def coordinates(axes: tuple[PyTree, PyTree], offset: PyTree) -> np.ndarray:
    """Return where a model lies by a plane's two axes, and the share of its offset that is outside.

    The result is [along, across, share]; `offset` is the displacement from the plane's origin.
    """
    gram = np.asarray([[trees.inner(left, right) for right in axes] for left in axes])
    slopes = np.asarray([trees.inner(axis, offset) for axis in axes])
    square = float(trees.inner(offset, offset))
    # Least squares, as the axes may be parallel or zero.
    place = np.linalg.lstsq(gram, slopes, rcond=1e-6)[0]
    outside = max(0.0, square - place @ gram @ place) / square if square else 0.0
    return np.asarray([*place, np.sqrt(outside)], np.float32)


def write(path: Path, points: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the landscapes of a run to an .npz, whole or not at all.

    By task merged and task scored, NaN for tasks to come, the file has `accuracy`,
    `task_aware_accuracy` and `loss` [T, A, T] at the coefficients `alphas` [A], `merged_accuracy`
    and so on [T, T] at the merged model, `plane_accuracy` and so on [T, P, P, T] at the coordinates
    `plane_along` and `plane_across` [P], and `plane_merged` [T, 3], see `coordinates`.
    """
    written: dict[str, Any] = {}
    if "landscape" in arrays:
        scores, written["alphas"] = arrays["landscape"], grid(points)
        for number, name in enumerate(SCORES):
            written[name] = scores[:, :-1, number]
            written[f"merged_{name}"] = scores[:, -1, number]
    if "plane" in arrays:
        scores, written["plane_merged"] = arrays["plane"], arrays["plane_merged"]
        written["plane_along"], written["plane_across"] = plane(scores.shape[1])
        for number, name in enumerate(SCORES):
            written[f"plane_{name}"] = scores[..., number, :]
    # An open file: NumPy would add its ending to the temporary name.
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **written)
