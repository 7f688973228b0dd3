"""Weights of tasks from target data, for Tunable MAGMAX: which tasks the target resembles.

Features are rows of float arrays, [A, D] of the source and [B, D] of the target. The caller chooses
the layer and the model that give them: one model for all, or for task i the model `theta_0 + tau_i`
on both sides. Everything is computed once and in float64, by NumPy.

References:
    Tunable MAGMAX, `arXiv 2605.20803 <https://arxiv.org/abs/2605.20803>`_
"""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

SHARPNESS = 100.0
"""Factor of the distances in `weights_of_distances`, as in the paper's code."""
REGULARIZATION, ITERATIONS = 0.1, 100
"""Settings of Sinkhorn's algorithm, as in the paper's code."""


def label_counts(labels: ArrayLike, class_masks: ArrayLike) -> tuple[float, ...]:
    """Weights of T tasks of sum 1: the shares of the target's labels among each task's classes.

    Args:
        labels: labels of the target's examples, int [M].
        class_masks: bool [T, C], the classes of each task; a class of several tasks counts for
            all of them.

    Raises:
        ValueError: no label is of any task.

    Example:
        >>> label_counts([0, 2, 2, 3], [[True, True, False, False], [False, False, True, True]])
        (0.25, 0.75)
    """
    masks = np.asarray(class_masks, bool)
    counts = masks[:, np.asarray(labels, np.int64)].sum(axis=1)
    if not counts.sum():
        raise ValueError("labels: none is of the classes of any task")
    return tuple((counts / counts.sum()).tolist())


def weights_of_distances(distances: Sequence[float]) -> tuple[float, ...]:
    """Weights of T tasks from the target's distance to each, `exp(-100 d)` brought to sum 1."""
    exponents = -SHARPNESS * np.asarray(distances, np.float64)
    # Relative to the largest, because all might underflow.
    values = np.exp(exponents - exponents.max())
    return tuple((values / values.sum()).tolist())


def cosine_distance(source: ArrayLike, target: ArrayLike) -> float:
    """Half of one minus the cosine of both mean features, from 0 to 1."""
    left, right = (np.asarray(x, np.float64).mean(axis=0) for x in (source, target))
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return float((1 - left @ right / lengths) / 2)


def mmd_distance(source: ArrayLike, target: ArrayLike) -> float:
    """Maximum mean discrepancy: the root of its unbiased square, or 0 where that is negative.

    The kernel matrices (within source, within target, across) are Gaussian, `exp(-|x - y|^2 / 2 m)`
    with m the median of the matrix's squared distances; this scale is our choice. Both sides have
    two examples at least.

    References:
        Gretton et al., `A Kernel Two-Sample Test
        <https://jmlr.org/papers/v13/gretton12a.html>`_, 2012, equation 3
    """
    left, right = (np.asarray(x, np.float64) for x in (source, target))
    # Without the diagonal, on which an example meets itself: so the square is unbiased.
    within = sum(_kernel_mean(x, x, ~np.eye(len(x), dtype=bool)) for x in (left, right))
    across = _kernel_mean(left, right, np.ones((len(left), len(right)), bool))
    return float(np.sqrt(max(0.0, within - 2 * across)))


def _kernel_mean(left: np.ndarray, right: np.ndarray, pairs: np.ndarray) -> float:
    squares = _squared_distances(left, right)[pairs]
    median = np.median(squares)
    # A median of 0 has no scale: most examples are the same, and their kernel is 1.
    return float(np.exp(-squares / (2 * median)).mean()) if median else 1.0


def _squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.spatial import distance  # here, because SciPy would slow the package's import

    return distance.cdist(left, right, "sqeuclidean")


def sinkhorn_distance(source: ArrayLike, target: ArrayLike) -> float:
    """Cost of entropic optimal transport between both sets of features, from 0 to 1.

    The cost of a pair is its squared distance over that of the farthest pair; examples of a set
    weigh the same. Regularisation 0.1, 100 iterations.

    References:
        Cuturi, `Sinkhorn Distances <https://arxiv.org/abs/1306.0895>`_, NeurIPS 2013
    """
    left, right = (np.asarray(x, np.float64) for x in (source, target))
    cost = _squared_distances(left, right)
    if not cost.max():
        return 0.0
    cost /= cost.max()
    # At least exp(-10), because costs are at most 1: no sum below is 0.
    kernel = np.exp(-cost / REGULARIZATION)
    columns = np.ones(len(right))
    for _ in range(ITERATIONS):
        rows = 1 / (len(left) * (kernel @ columns))
        columns = 1 / (len(right) * (kernel.T @ rows))
    return float(rows @ (kernel * cost) @ columns)


DISTANCES = {"cosine": cosine_distance, "mmd": mmd_distance, "sinkhorn": sinkhorn_distance}


def from_features(
    distance: str, sources: Sequence[ArrayLike], target: ArrayLike
) -> tuple[float, ...]:
    """Weights of T tasks of sum 1, a `preference` of `tunable_magmax`, from features.

    Args:
        distance: "cosine", "mmd" or "sinkhorn".
        sources: features [A_i, D] of the examples of each task.
        target: features of the target's examples, [B, D], or [T, B, D] where every task's model
            gives them.

    Raises:
        ValueError: an unknown distance, or another number of targets than tasks.

    Example:
        >>> from_features("cosine", [[[1.0, 0.0]], [[0.0, 1.0]]], [[1.0, 1.0]])
        (0.5, 0.5)
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance}: must be one of {', '.join(DISTANCES)}")
    targets = np.asarray(target)
    if targets.ndim == 2:
        targets = np.broadcast_to(targets, (len(sources), *targets.shape))
    if len(targets) != len(sources):
        raise ValueError(f"target: features by {len(targets)} models for {len(sources)} tasks")
    return weights_of_distances(
        [DISTANCES[distance](*pair) for pair in zip(sources, targets, strict=True)]
    )
