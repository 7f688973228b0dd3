"""Copies of the merging leaves along the training of a task, for the rules that ask for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.continual.placement.devices import Devices
from pm_jax.continual.training.partition import Trainable, trained_params
from pm_jax.types import Array, Params


class Snapshots:
    """Takes snapshots at fractions of a task's steps; nothing at all without fractions.

    Args:
        fractions: K numbers in [0, 1].
        merging: paths of the leaves.
        resident_bytes: what of them may be on the device; more than that is kept by the host.
        devices: of the run.

    Example:
        >>> snapshots = Snapshots((0.5, 1.0), ("w",), 1e6, Devices.of())
        >>> start = {"w": jnp.zeros(1)}
        >>> cuts = snapshots.steps(7)
        >>> trainable = Trainable({}, {"w": jnp.ones(1)}, {})
        >>> found = snapshots.taken(snapshots.blank(start), cuts, 7, start, trainable)
        >>> cuts, found["w"].tolist()
        ((4, 7), [[0.0], [1.0]])
    """

    def __init__(
        self,
        fractions: tuple[float, ...],
        merging: tuple[str, ...],
        resident_bytes: float,
        devices: Devices,
    ):
        self._fractions, self._merging, self._budget = fractions, merging, resident_bytes
        self._devices, self._filled = devices, devices.jit(_filled, donate_argnums=0)

    def steps(self, total: int) -> tuple[int, ...]:
        """After how many of a task's steps each snapshot is taken."""
        return tuple(snapshot_step(fraction, total) for fraction in self._fractions)

    def blank(self, params: Params) -> dict[str, Any] | None:
        """Stacked leaves [K, ...] to be filled; `None` where nothing is to be taken."""
        if not self._fractions:
            return None
        selected = trees.select(params, self._merging)
        shapes = {
            path: jax.ShapeDtypeStruct(
                (len(self._fractions), *leaf.shape), trees.compute_dtype(leaf)
            )
            for path, leaf in selected.items()
        }
        nbytes = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
        blank = {path: np.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
        return self._devices.place(blank) if nbytes <= self._budget else blank

    def taken(
        self,
        trajectory: dict[str, Any] | None,
        cuts: tuple[int, ...],
        step: int,
        start: Params,
        trainable: Trainable,
    ) -> dict[str, Any] | None:
        """The trajectory with the snapshots that are due after a step; the old one is donated."""
        if trajectory is None or step not in cuts:
            return trajectory
        if isinstance(next(iter(trajectory.values())), np.ndarray):
            found = self._devices.whole(_selected(start, trainable, tuple(trajectory)))
            for path, stack in trajectory.items():
                stack[np.asarray(cuts) == step] = found[path]
            return trajectory
        return self._filled(trajectory, np.asarray(cuts) == step, start, trainable)


def snapshot_step(fraction: float, total: int) -> int:
    """The step of a task at a fraction of its steps.

    Args:
        fraction: in [0, 1].
        total: steps of the task.

    Returns:
        0 to `total`, the nearest.

    Example:
        >>> snapshot_step(0.5, 7)
        4
    """
    return round(fraction * total)


def _filled(trajectory, due: Array, start: Params, trainable: Trainable) -> dict[str, Array]:
    leaves = _selected(start, trainable, tuple(trajectory))
    return {
        path: jnp.where(due.reshape(-1, *[1] * leaf.ndim), leaf[None], trajectory[path])
        for path, leaf in leaves.items()
    }


@functools.partial(jax.jit, static_argnums=2)
def _selected(start: Params, trainable: Trainable, paths: tuple[str, ...]) -> Params:
    return trees.select(trained_params(start, trainable), paths)
