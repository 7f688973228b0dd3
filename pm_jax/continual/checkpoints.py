"""Checkpoints of a run by Orbax: one directory per training step that was saved."""

from pathlib import Path

import jax
import numpy as np
from orbax import checkpoint as orbax

from pm_jax.types import InvalidInput, PyTree

KEPT = 2


class Checkpoints:
    """The checkpoints in a directory, the newest two kept.

    Args:
        directory: made if absent.

    Example:
        >>> import tempfile
        >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
        ...     checkpoints.save(3, {"w": np.ones(2)})
        ...     checkpoints.latest(), checkpoints.restore(3, {"w": np.zeros(2)})["w"].tolist()
        (3, [1.0, 1.0])
    """

    def __init__(self, directory: Path):
        options = orbax.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, create=True
        )
        self._directory = directory.absolute()
        self._manager = orbax.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest step saved, or `None`."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Save a pytree of arrays under a step; atomic."""
        self._manager.save(step, args=orbax.args.StandardSave(tree))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree saved under a step.

        Args:
            step: one that was saved.
            like: pytree of arrays or `jax.ShapeDtypeStruct`, of the same structure.

        Returns:
            Pytree of arrays on the default device, of NumPy arrays where those were saved.

        Raises:
            InvalidInput: the checkpoint cannot be read; nothing is deleted.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), like)
        try:
            return self._manager.restore(step, args=orbax.args.StandardRestore(abstract))
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files.
            others = [str(s) for s in sorted(self._manager.all_steps()) if s != step]
            earlier = f"step {others[-1]}" if others else "the beginning"
            raise InvalidInput(
                f"workdir={self._directory}: checkpoint {step} cannot be read "
                f"({type(error).__name__}); move the folder {step} away to go on from {earlier}"
            ) from error
