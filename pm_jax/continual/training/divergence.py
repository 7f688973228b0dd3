"""A run whose numbers are no longer finite ends with one line that says where and what to do."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.continual.settings.config import Config
from pm_jax.types import Array, PyTree


class TrainingDiverged(RuntimeError):
    """A number is no longer finite; the message names it, and task and step."""


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
        pm_jax.continual.training.divergence.TrainingDiverged: task 1, step 12: the loss is nan; ...
    """
    values = np.asarray(losses)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise TrainingDiverged(
            f"task {task + 1}, step {first_step + int(bad[0]) + 1}: the loss is "
            f"{values[bad[0]]}; {_remedy(config, directory)}"
        )


def check_state(
    state: PyTree, task: int, when: str, config: Config, directory: Path | None
) -> None:
    """Check what a run goes on with, before any of it is saved: a finite loss may hide what is not.

    Args:
        state: pytree of arrays; those that are not of floating-point numbers do not count.
        task: counted from 0.
        when: of the task, for the message.
        config: settings of the run.
        directory: where the run has saved something, or `None`.

    Raises:
        TrainingDiverged: a leaf holds NaN or infinity.

    Example:
        >>> check_state({"rule": {"w": jnp.asarray([1.0, jnp.inf])}}, 1, "merge", Config(), None)
        Traceback (most recent call last):
        pm_jax.continual.training.divergence.TrainingDiverged: task 2, merge: rule/w is not ...
    """
    leaves = {
        path: leaf
        for path, leaf in trees.leaves_by_path(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    sound = np.asarray(_are_finite(list(leaves.values())))
    if not sound.all():
        raise TrainingDiverged(
            f"task {task + 1}, {when}: {list(leaves)[int(np.argmin(sound))]} is not finite; "
            f"{_remedy(config, directory)}"
        )


@jax.jit
def _are_finite(leaves: list[Array]) -> Array:
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in leaves])


def _remedy(config: Config, directory: Path | None) -> str:
    kept = f"; what was saved is kept in {directory}" if directory else ""
    return (
        f"lower learning_rate={config.learning_rate} or set clip_norm, in another work "
        f"directory{kept}"
    )
