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
    """Takes snapshots at K fractions of a task's steps, none without fractions.

    Beyond a budget of bytes the host keeps them instead of the devices.
    """

    def __init__(
        self,
        fractions: tuple[float, ...],
        merging: tuple[str, ...],
        budget: float,
        devices: Devices,
    ):
        self._fractions, self._merging, self._budget = fractions, merging, budget
        self._devices, self._filled = devices, devices.jit(_filled, donate_argnums=0)

    def steps(self, total: int) -> tuple[int, ...]:
        """Return the steps of a task of `total` steps after which a snapshot is taken."""
        return tuple(snapshot_step(fraction, total) for fraction in self._fractions)

    def blank(self, params: Params) -> dict[str, Any] | None:
        """Make stacked leaves [K, ...] of zeros to be filled; `None` without fractions."""
        if not self._fractions:
            return None
        # The size decides where the leaves lie, before any is made.
        count, leaves = len(self._fractions), trees.select(params, self._merging)
        shapes = {
            path: jax.ShapeDtypeStruct((count, *leaf.shape), trees.compute_dtype(leaf))
            for path, leaf in leaves.items()
        }
        nbytes = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
        blank = {path: np.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
        return self._devices.place(blank) if nbytes <= self._budget else blank

    def updated(
        self,
        trajectory: dict[str, Any] | None,
        cuts: tuple[int, ...],
        step: int,
        start: Params,
        trainable: Trainable,
    ) -> dict[str, Any] | None:
        """Add the snapshots that are due after a step; the trajectory's buffers are donated."""
        if trajectory is None or step not in cuts:
            return trajectory
        if isinstance(next(iter(trajectory.values())), np.ndarray):
            leaves = self._devices.whole(_selected(start, trainable, tuple(trajectory)))
            for path, stack in trajectory.items():
                stack[np.asarray(cuts) == step] = leaves[path]
            return trajectory
        return self._filled(trajectory, np.asarray(cuts) == step, start, trainable)


def snapshot_step(fraction: float, total: int) -> int:
    """Return the step nearest to a fraction of a task's steps."""
    return round(fraction * total)


def _filled(trajectory, due: Array, start: Params, trainable: Trainable) -> dict[str, Array]:
    leaves = _selected(start, trainable, tuple(trajectory))
    # Fractions of a short task can round to the same step, so that several rows are due.
    return {
        path: jnp.where(due.reshape(-1, *[1] * leaf.ndim), leaf[None], trajectory[path])
        for path, leaf in leaves.items()
    }


@functools.partial(jax.jit, static_argnums=2)
def _selected(start: Params, trainable: Trainable, paths: tuple[str, ...]) -> Params:
    return trees.select(trained_params(start, trainable), paths)
