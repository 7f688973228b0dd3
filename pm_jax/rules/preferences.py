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

    Kernels are Gaussian, `exp(-|x - y|^2 / (2 m^2))`. Within the source and across, m is the lower
    median of the source's pairwise distances; within the target, of the target's own. Across, the
    median of the distances themselves would grow with the separation and hide it. Both sides have
    two examples at least.

    References:
        Tunable MAGMAX, `arXiv 2605.20803 <https://arxiv.org/abs/2605.20803>`_;
        Gretton et al., `A Kernel Two-Sample Test
        <https://jmlr.org/papers/v13/gretton12a.html>`_, 2012, equation 3
    """
    left, right = (np.asarray(x, np.float64) for x in (source, target))
    # Each pair once, without the diagonal, on which an example meets itself: the square is
    # unbiased by that.
    within = [_squared_distances(x, x)[np.triu_indices(len(x), 1)] for x in (left, right)]
    # The square of the lower median: the lower one of the squares, which have the same order.
    source_scale, target_scale = (np.sort(x)[(len(x) - 1) // 2] for x in within)
    both = _kernel_mean(within[0], source_scale) + _kernel_mean(within[1], target_scale)
    across = _kernel_mean(_squared_distances(left, right), source_scale)
    return float(np.sqrt(max(0.0, both - 2 * across)))


def _kernel_mean(squares: np.ndarray, scale: float) -> float:
    """Mean of `exp(-squares / (2 scale))`; of its limit where most examples are the same."""
    if not scale:
        return float(np.mean(squares == 0))
    return float(np.exp(-squares / (2 * scale)).mean())


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
"""The distances between sets of features, by name."""


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
