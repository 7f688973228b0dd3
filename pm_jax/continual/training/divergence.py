"""A run whose numbers are no longer finite ends with one line that says where and what to do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.continual.placement import processes
from pm_jax.continual.settings.config import Config
from pm_jax.types import Array, PyTree


class TrainingDiverged(RuntimeError):
    """A run that stops because a number is not finite; the message names it, task and step."""


def check_finite(
    losses: np.ndarray, task: int, first_step: int, config: Config, directory: Path | None
) -> None:
    """Check the losses of consecutive steps, the first of which is `first_step`, from 0.

    Raises:
        TrainingDiverged: a loss is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        step, loss = first_step + int(bad[0]) + 1, losses[bad[0]]
        raise _diverged(f"task {task + 1}, step {step}: the loss is {loss}", config, directory)


def check_state(
    state: PyTree, task: int, when: str, config: Config, directory: Path | None
) -> None:
    """Check the floating-point leaves that a run goes on with, before any of them is saved.

    Raises:
        TrainingDiverged: a leaf holds NaN or infinity.
    """
    # Losses do not suffice: the loss of a step is measured before its update.
    leaves = {
        path: leaf
        for path, leaf in trees.leaves_by_path(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    finite = np.asarray(_are_finite(list(leaves.values())))
    if not finite.all():
        path = list(leaves)[int(np.argmin(finite))]
        raise _diverged(f"task {task + 1}, {when}: {path} is not finite", config, directory)


def _are_finite(leaves: list[Array]) -> Sequence[Any]:
    if jax.default_backend() == "cpu" and not processes.several():
        # NumPy reads them where they lie, and has nothing to compile.
        return [np.isfinite(leaf).all() for leaf in leaves]
    return _finite_on_device(leaves)


# Compiled, so that one small array comes to the host instead of every leaf.
@jax.jit
def _finite_on_device(leaves: list[Array]) -> Array:
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in leaves])


def _diverged(problem: str, config: Config, directory: Path | None) -> TrainingDiverged:
    kept = f"; what was saved is kept in {directory}" if directory else ""
    return TrainingDiverged(
        f"{problem}; lower learning_rate={config.learning_rate} or set clip_norm, in another work "
        f"directory{kept}"
    )
