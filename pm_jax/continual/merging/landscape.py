"""What other models would have done: every task's loss and accuracy around each merge.

Along the segment from the model that a task started from to the trained one, and in the plane of
the last two task vectors,

    previous + along (trained - previous) + across (the previous task's trained - its previous)

which holds the models that the last two merges were about. A look at the validation data of all
tasks, for analysis: nothing of it goes back into the run.
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


def plane(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates at which a plane is looked at.

    Args:
        points: on each axis, at least 2.

    Returns:
        `along` from -1/2 to 3/2 and `across` from -1 to 1, float32 [P] each, evenly spaced: the
        model before is at (0, 0), the trained one at (1, 0), and what the last merge was of lies at
        along = 0 on either side.

    Example:
        >>> [axis.tolist() for axis in plane(3)]
        [[-0.5, 0.5, 1.5], [-1.0, 0.0, 1.0]]
    """
    steps = np.linspace(0.0, 2.0, points, dtype=np.float32)
    return steps - 0.5, steps - 1.0


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


def coordinates(axes: tuple[PyTree, PyTree], offset: PyTree) -> np.ndarray:
    """Where a model lies that is near a plane.

    Args:
        axes: the two task vectors that span the plane.
        offset: displacement of the model from the plane's origin, of the same structure.

    Returns:
        `along`, `across`, and the share of the offset's length that is outside the plane; float32
        [3].

    Example:
        >>> axes = np.asarray([2.0, 0.0, 0.0]), np.asarray([0.0, 1.0, 0.0])
        >>> coordinates(axes, np.asarray([1.0, 2.0, 0.0])).tolist()
        [0.5, 2.0, 0.0]
    """
    gram = np.asarray([[trees.inner(left, right) for right in axes] for left in axes])
    slopes = np.asarray([trees.inner(axis, offset) for axis in axes])
    square = float(trees.inner(offset, offset))
    found = np.linalg.lstsq(gram, slopes, rcond=1e-6)[0]
    outside = max(0.0, square - found @ gram @ found) / square if square else 0.0
    return np.asarray([*found, np.sqrt(outside)], np.float32)


def write(path: Path, points: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the landscapes of a run, whole or not at all.

    Args:
        path: of an .npz. By task merged and task looked at, NaN for tasks to come, it has
            `accuracy`, `task_aware_accuracy` and `loss` [T, A, T] at the coefficients `alphas`
            [A] and `merged_accuracy` ... [T, T] at the merged model; `plane_accuracy` ...
            [T, P, P, T] at the coordinates `plane_along` and `plane_across` [P], and `plane_merged`
            [T, 3], see `coordinates`.
        points: of the `grid` of coefficients.
        arrays: `landscape` [T, A + 1, 3, T]; `plane` [T, P, P, 3, T] and `plane_merged` [T, 3].
            Either may lack.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / FILE
        >>> write(path, 2, {"landscape": np.zeros((2, 3, 3, 2))})
        >>> np.load(path)["loss"].shape, np.load(path)["merged_loss"].shape
        ((2, 2, 2), (2, 2))
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
    # An open file, as NumPy would add its ending to a name.
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **written)
