"""The parameters sorted by what happens to them: some train, some merge, the others stay."""

import re
from typing import Any, NamedTuple

from pm_jax import lora, trees
from pm_jax.curvature.kernels import Axes
from pm_jax.rules.base import Moving
from pm_jax.types import Array, Key, Params


class Partition(NamedTuple):
    """Paths of the parameters that train, by how they do; the others are frozen.

    Attributes:
        adapted: dense kernels that train through an adapter, merge and are perturbed.
        direct: leaves that train themselves, merge and are perturbed.
        head: leaves whose last axis is the classes, of which a task trains its own columns; they
            neither merge nor are perturbed.
        axes: how the axes of each adapted kernel divide.
    """

    adapted: tuple[str, ...]
    direct: tuple[str, ...]
    head: tuple[str, ...]
    axes: tuple[Axes, ...] = ()

    @property
    def merging(self) -> tuple[str, ...]:
        """Paths of the leaves that merge, in whose coordinates curvature is measured."""
        return self.adapted + self.direct

    def fresh_adapters(self, key: Key, params: Params, rank: int) -> lora.Adapters:
        """Make adapters whose products are 0; none without adapted kernels."""
        if not self.adapted:
            return {}
        of_kernel = {re.escape(p): x for p, x in zip(self.adapted, self.axes, strict=True)}
        return lora.init(
            key,
            params,
            self.adapted,
            rank,
            input_axes={path: axes.inputs for path, axes in of_kernel.items()},
            stacked_axes={path: axes.stacked for path, axes in of_kernel.items()},
        )


class Trainable(NamedTuple):
    """The leaves that the optimiser sees by path, under the names of `Partition`."""

    adapters: lora.Adapters
    direct: dict[str, Array]
    head: dict[str, Array]

    @property
    def moving(self) -> Moving:
        """All leaves but the head, as the hooks of merge rules see them."""
        return {**self.adapters, **self.direct}

    def moved(self, moving: Moving) -> "Trainable":
        """Replace all leaves but the head."""
        adapters = {path: x for path, x in moving.items() if isinstance(x, lora.Adapter)}
        direct = {path: x for path, x in moving.items() if not isinstance(x, lora.Adapter)}
        return Trainable(adapters, direct, self.head)


def partition(
    params: Params,
    *,
    class_incremental: bool,
    lora_pattern: str | None = None,
    rank: int = 1,
    head_pattern: str = "head/.*",
    frozen_head: bool = False,
    **axes_from: Any,
) -> Partition:
    """Sort the parameters of a model; without a LoRA pattern everything trains.

    `head_pattern` matches the paths of the classifier, which does not train if it is frozen;
    further arguments are those by which `lora.adapted_axes` finds the axes of kernels.

    Raises:
        ValueError: the pattern or the rank does not fit the model.
    """
    head = trees.match_paths(params, head_pattern)
    adapted: tuple[str, ...]
    axes: dict[str, Axes]
    if lora_pattern is None:
        adapted, axes = (), {}
        direct = tuple(path for path in trees.leaves_by_path(params) if path not in head)
    else:
        axes = lora.adapted_axes(params, lora_pattern, rank, **axes_from)
        adapted, direct = tuple(axes), ()
        if overlap := [path for path in adapted if path in head]:
            raise ValueError(
                f"pattern={lora_pattern!r}: matches {overlap[0]} of the classifier, which trains "
                "in full; narrow the pattern"
            )
    if frozen_head:
        return Partition(adapted, direct, (), tuple(axes.values()))
    # Tasks share the classes of other scenarios, whose head merges like any parameter.
    if class_incremental:
        return Partition(adapted, direct, head, tuple(axes.values()))
    return Partition(adapted, direct + head, (), tuple(axes.values()))


def fresh_trainable(key: Key, partition: Partition, start: Params, rank: int) -> Trainable:
    """Make the trainable parameters at the onset of a task, which give `start` exactly."""
    adapters = partition.fresh_adapters(key, start, rank)
    return Trainable(
        adapters, trees.select(start, partition.direct), trees.select(start, partition.head)
    )


def trained_params(start: Params, trainable: Trainable) -> Params:
    """Return the trained model `theta_t*` as a full parameter tree, adapters folded in."""
    updated = trees.replace(start, {**trainable.direct, **trainable.head})
    return lora.fold(updated, trainable.adapters) if trainable.adapters else updated
