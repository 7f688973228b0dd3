"""Figures of continual learning from the accuracy matrix.

Every function reads `accuracy`, the matrix R [T, T]: `R[t, i]` is the accuracy on task i after
training on task t, both counted from 0, as a fraction; NaN where it was not or cannot be measured.
It returns a fraction, or NaN where the figure does not apply, such as forgetting after a single
task, and raises a ValueError where R is not square.

References:
    Lopez-Paz and Ranzato, `Gradient Episodic Memory <https://arxiv.org/abs/1706.08840>`_, 2017;
    Chaudhry et al., `Riemannian Walk <https://arxiv.org/abs/1801.10112>`_, 2018
"""

import numpy as np


def final_average_accuracy(accuracy) -> float:
    """Mean over tasks of the accuracy after the last one, `mean_i R[T-1, i]`.

    Example:
        >>> final_average_accuracy([[1.0, 0.0], [0.5, 1.0]])
        0.75
    """
    return _mean(_matrix(accuracy)[-1])


def average_incremental_accuracy(accuracy) -> float:
    """Mean over time of the mean accuracy on the tasks seen, `mean_t mean_{i<=t} R[t, i]` (AAA).

    Example:
        >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 1.0]])
        0.875
    """
    return _mean([np.mean(row[: t + 1]) for t, row in enumerate(_matrix(accuracy))])


def forgetting(accuracy) -> float:
    """Mean drop from the best earlier accuracy, `mean_{i<T-1} max_{i<=t<T-1} R[t, i] - R[T-1, i]`.

    It is negative where tasks improved afterwards.

    Example:
        >>> forgetting([[0.75, 0.0, 0.0], [1.0, 0.5, 0.0], [0.5, 0.5, 1.0]])
        0.25
    """
    matrix = _matrix(accuracy)
    last = len(matrix) - 1
    # The best from task i on: accuracies before a task was trained are no knowledge to forget.
    return _mean([matrix[i:last, i].max() - matrix[last, i] for i in range(last)])


def backward_transfer(accuracy) -> float:
    """Mean change since a task was learned, `mean_{i<T-1} R[T-1, i] - R[i, i]`.

    It is negative where tasks were forgotten.

    Example:
        >>> backward_transfer([[1.0, 0.0], [0.5, 1.0]])
        -0.5
    """
    matrix = _matrix(accuracy)
    return _mean((matrix[-1] - np.diag(matrix))[:-1])


def forward_transfer(accuracy, initial) -> float:
    """Mean gain on a task before it is trained, `mean_{i>0} R[i-1, i] - initial[i]`.

    It needs figures above the diagonal (domain-incremental streams) and the accuracies of the
    untrained model on every task, `initial` [T].

    Example:
        >>> forward_transfer([[1.0, 0.5], [0.5, 1.0]], [0.1, 0.25])
        0.25
    """
    matrix = _matrix(accuracy)
    return _mean(np.diag(matrix, 1) - np.asarray(initial, np.float64)[1:])


def learning_accuracy(accuracy) -> float:
    """Mean accuracy on a task just after it was learned, `mean_i R[i, i]`.

    Example:
        >>> learning_accuracy([[1.0, 0.0], [0.5, 0.5]])
        0.75
    """
    return _mean(np.diag(_matrix(accuracy)))


def summarize(accuracy, initial=None) -> dict[str, float]:
    """All figures by name; the forward transfer is NaN without the `initial` accuracies [T].

    Example:
        >>> summarize([[1.0]])["forgetting"]
        nan
    """
    if initial is None:
        initial = np.full(len(_matrix(accuracy)), np.nan)
    return {
        "final_average_accuracy": final_average_accuracy(accuracy),
        "average_incremental_accuracy": average_incremental_accuracy(accuracy),
        "forgetting": forgetting(accuracy),
        "backward_transfer": backward_transfer(accuracy),
        "forward_transfer": forward_transfer(accuracy, initial),
        "learning_accuracy": learning_accuracy(accuracy),
    }


def _matrix(accuracy) -> np.ndarray:
    matrix = np.asarray(accuracy, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"accuracy of shape {matrix.shape}: must be square, [tasks, tasks]")
    return matrix


def _mean(values) -> float:
    # NumPy would warn about the mean of no values.
    return float(np.mean(values)) if len(values) else float("nan")
