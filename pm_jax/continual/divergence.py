"""Training whose loss is no longer finite ends with one line that says where and what to do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pm_jax.continual.config import Config


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the message names task and step."""


def check_finite(
    losses: Sequence[float] | np.ndarray,
    task: int,
    first_step: int,
    config: Config,
    directory: Path | None,
) -> None:
    """Check the losses of consecutive steps.

    Args:
        losses: one a step.
        task: that they are of, counted from 0.
        first_step: step of the task that the first loss is of, counted from 0.
        config: settings of the run.
        directory: where the run has saved something, or `None`.

    Raises:
        TrainingDiverged: one is NaN or infinite.

    Example:
        >>> check_finite([0.5, float("nan")], 0, 10, Config(), None)
        Traceback (most recent call last):
        pm_jax.continual.divergence.TrainingDiverged: task 1, step 12: the loss is nan; ...
    """
    values = np.asarray(losses)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        kept = f"; what was saved is kept in {directory}" if directory else ""
        raise TrainingDiverged(
            f"task {task + 1}, step {first_step + int(bad[0]) + 1}: the loss is "
            f"{values[bad[0]]}; lower learning_rate={config.learning_rate} or set clip_norm, in "
            f"another work directory{kept}"
        )
