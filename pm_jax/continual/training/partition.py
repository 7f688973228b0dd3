"""Which parameters train, which merge, and which stay."""

from typing import NamedTuple

from pm_jax import lora, trees
from pm_jax.rules.base import Moving
from pm_jax.types import Array, Key, Params

HEAD_PATTERN = r"head/.*"


class Partition(NamedTuple):
    """Paths of the parameters by what happens to them; the others are frozen.

    Attributes:
        adapted: dense kernels that train through an adapter, merge and are perturbed.
        direct: leaves that train themselves, merge and are perturbed.
        head: leaves whose last axis is the classes, of which a task trains its own columns; they
            neither merge nor are perturbed.
    """

    adapted: tuple[str, ...]
    direct: tuple[str, ...]
    head: tuple[str, ...]

    @property
    def merging(self) -> tuple[str, ...]:
        """Paths of the leaves that merge, in whose coordinates curvature is measured."""
        return self.adapted + self.direct


class Trainable(NamedTuple):
    """What the optimiser sees, by the same names as in `Partition`.

    Attributes:
        adapters: `{path: Adapter}`.
        direct: `{path: leaf}`.
        head: `{path: leaf}`.
    """

    adapters: lora.Adapters
    direct: dict[str, Array]
    head: dict[str, Array]

    @property
    def moving(self) -> Moving:
        """All but the head, as the hooks of merge rules see it."""
        return {**self.adapters, **self.direct}

    def moved(self, moving: Moving) -> "Trainable":
        """The same with all but the head replaced."""
        adapters = {path: x for path, x in moving.items() if isinstance(x, lora.Adapter)}
        direct = {path: x for path, x in moving.items() if not isinstance(x, lora.Adapter)}
        return Trainable(adapters, direct, self.head)


def partition(
    params: Params, *, class_incremental: bool, lora_pattern: str | None = None, rank: int = 1
) -> Partition:
    """Sort the parameters of a model.

    Class-incremental heads have columns that belong to tasks; otherwise the head is shared and
    merges like any parameter.

    Args:
        params: model parameters whose classifier is the module `head`.
        class_incremental: whether the head's columns belong to tasks.
        lora_pattern: kernels to adapt, all else but the head frozen; `None` to train everything.
        rank: of the adapters.

    Returns:
        A `Partition`.

    Raises:
        ValueError: the pattern or the rank does not fit the model.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"fc": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
        >>> partition(params, class_incremental=True, lora_pattern="fc/.*")
        Partition(adapted=('fc/kernel',), direct=(), head=('head/kernel',))
    """
    head = trees.match_paths(params, HEAD_PATTERN)
    adapted: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    if lora_pattern is None:
        direct = tuple(path for path in trees.leaves_by_path(params) if path not in head)
    else:
        adapted = lora.adapted_paths(params, lora_pattern, rank)
        if overlap := [path for path in adapted if path in head]:
            raise ValueError(
                f"pattern={lora_pattern!r}: matches {overlap[0]} of the classifier, which trains "
                "in full; narrow the pattern"
            )
    if class_incremental:
        return Partition(adapted, direct, head)
    return Partition(adapted, direct + head, ())


def fresh_trainable(key: Key, partition: Partition, start: Params, rank: int) -> Trainable:
    """Trainable parameters at the onset of a task: the model `start`, exactly.

    Args:
        key: PRNG key of the adapters.
        partition: of the parameters.
        start: the model that the task starts from.
        rank: of the adapters.

    Returns:
        A `Trainable`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fresh_trainable(jax.random.key(0), Partition((), ("w",), ()), {"w": 1.0}, 1).direct
        {'w': 1.0}
    """
    kernels = trees.select(start, partition.adapted)
    adapters = lora.init(key, kernels, ".*", rank) if kernels else {}
    return Trainable(
        adapters, trees.select(start, partition.direct), trees.select(start, partition.head)
    )


def trained_params(start: Params, trainable: Trainable) -> Params:
    """The trained model `theta_t*` as a full parameter tree, adapters folded in.

    Args:
        start: the model that the task started from.
        trainable: what was trained.

    Returns:
        Parameters of the structure of `start`.

    Example:
        >>> trained_params({"w": 1.0, "v": 2.0}, Trainable({}, {"w": 5.0}, {}))
        {'v': 2.0, 'w': 5.0}
    """
    updated = trees.replace(start, {**trainable.direct, **trainable.head})
    return lora.fold(updated, trainable.adapters) if trainable.adapters else updated
