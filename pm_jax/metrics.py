"""Figures of continual learning from the accuracy matrix.

`R[t, i]` is the accuracy on task i after training on task t, both counted from 0; NaN where it was
not or cannot be measured. Accuracies are fractions. A figure that does not apply is NaN.

References:
    Lopez-Paz and Ranzato, `Gradient Episodic Memory <https://arxiv.org/abs/1706.08840>`_, 2017;
    Chaudhry et al., `Riemannian Walk <https://arxiv.org/abs/1801.10112>`_, 2018
"""

import numpy as np


def _matrix(accuracy) -> np.ndarray:
    matrix = np.asarray(accuracy, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"accuracy of shape {matrix.shape}: must be square, [tasks, tasks]")
    return matrix


def final_average_accuracy(accuracy) -> float:
    """Mean over tasks of the accuracy after the last one, `mean_i R[T-1, i]`.

    Args:
        accuracy: R, [T, T].

    Returns:
        A fraction.

    Raises:
        ValueError: R is not square.

    Example:
        >>> final_average_accuracy([[1.0, 0.0], [0.5, 1.0]])
        0.75
    """
    return float(np.mean(_matrix(accuracy)[-1]))


def average_incremental_accuracy(accuracy) -> float:
    """Mean over time of the mean accuracy on the tasks seen, `mean_t mean_{i<=t} R[t, i]` (AAA).

    Args:
        accuracy: R, [T, T].

    Returns:
        A fraction.

    Raises:
        ValueError: R is not square.

    Example:
        >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 1.0]])
        0.875
    """
    matrix = _matrix(accuracy)
    return float(np.mean([np.mean(row[: t + 1]) for t, row in enumerate(matrix)]))


def forgetting(accuracy) -> float:
    """Mean drop from the best earlier accuracy, `mean_{i<T-1} max_{i<=t<T-1} R[t, i] - R[T-1, i]`.

    Args:
        accuracy: R, [T, T].

    Returns:
        A fraction, negative where tasks improved afterwards; NaN for a single task.

    Raises:
        ValueError: R is not square.

    Example:
        >>> forgetting([[0.75, 0.0, 0.0], [1.0, 0.5, 0.0], [0.5, 0.5, 1.0]])
        0.25
    """
    matrix = _matrix(accuracy)
    last = len(matrix) - 1
    if last == 0:
        return float("nan")
    return float(np.mean([matrix[i:last, i].max() - matrix[last, i] for i in range(last)]))


def backward_transfer(accuracy) -> float:
    """Mean change since a task was learned, `mean_{i<T-1} R[T-1, i] - R[i, i]`.

    Args:
        accuracy: R, [T, T].

    Returns:
        A fraction, negative where tasks were forgotten; NaN for a single task.

    Raises:
        ValueError: R is not square.

    Example:
        >>> backward_transfer([[1.0, 0.0], [0.5, 1.0]])
        -0.5
    """
    matrix = _matrix(accuracy)
    if len(matrix) == 1:
        return float("nan")
    return float(np.mean((matrix[-1] - np.diag(matrix))[:-1]))


def forward_transfer(accuracy, initial) -> float:
    """Mean gain on a task before it is trained, `mean_{i>0} R[i-1, i] - initial[i]`.

    Args:
        accuracy: R, [T, T], measured above the diagonal too (domain-incremental streams).
        initial: accuracy of the untrained model on each task, [T].

    Returns:
        A fraction; NaN for a single task or where R has no figures above the diagonal.

    Raises:
        ValueError: R is not square.

    Example:
        >>> forward_transfer([[1.0, 0.5], [0.5, 1.0]], [0.1, 0.25])
        0.25
    """
    matrix = _matrix(accuracy)
    if len(matrix) == 1:
        return float("nan")
    return float(np.mean(np.diag(matrix, 1) - np.asarray(initial, np.float64)[1:]))


def learning_accuracy(accuracy) -> float:
    """Mean accuracy on each task just after it was learned, `mean_i R[i, i]`.

    Args:
        accuracy: R, [T, T].

    Returns:
        A fraction.

    Raises:
        ValueError: R is not square.

    Example:
        >>> learning_accuracy([[1.0, 0.0], [0.5, 0.5]])
        0.75
    """
    return float(np.mean(np.diag(_matrix(accuracy))))


def summarize(accuracy, initial=None) -> dict[str, float]:
    """All figures of an accuracy matrix by name.

    Args:
        accuracy: R, [T, T].
        initial: accuracy of the untrained model on each task, for the forward transfer.

    Returns:
        `{name: fraction}`, NaN where a figure does not apply.

    Raises:
        ValueError: R is not square.

    Example:
        >>> summarize([[1.0]])["forgetting"]
        nan
    """
    return {
        "final_average_accuracy": final_average_accuracy(accuracy),
        "average_incremental_accuracy": average_incremental_accuracy(accuracy),
        "forgetting": forgetting(accuracy),
        "backward_transfer": backward_transfer(accuracy),
        "forward_transfer": float("nan")
        if initial is None
        else forward_transfer(accuracy, initial),
        "learning_accuracy": learning_accuracy(accuracy),
    }
