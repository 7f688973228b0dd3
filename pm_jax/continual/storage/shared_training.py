"""Task training that several merge rules have in common, done once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pm_jax import files, trees
from pm_jax.continual.settings.config import Config
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.provenance import configuration_hash
from pm_jax.types import InvalidInput, Params, cause

LINES = [{"seconds": (int, float), "step": int, "event": str}]
"""Form of the lines that a task's training wrote to the log."""


class SharedTraining:
    """The task models of training in which each task goes on from the one trained before it.

    How a task is trained depends on the model it starts from, the settings of training, the seed
    and the task's number, and not on the merge rule. Rules that merge for inference only follow
    this one trajectory to its end, the others as far as their merges leave the model as it was
    trained. Whether a task lies on it is decided by the model that it starts from, bit for bit.

    Args:
        directory: of one seed of one configuration; made when there is something to keep.

    Example:
        >>> import tempfile
        >>> shared = SharedTraining(Path(tempfile.mkdtemp()))
        >>> shared.keep(0, {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, [])
        >>> shared.find(0, {"w": jnp.zeros(1)})[0]["w"].tolist()
        [1.0]
        >>> shared.keep(1, {"w": jnp.ones(1)}, {"w": jnp.full(1, 2.0)}, [])
        >>> shared.find(1, {"w": jnp.full(1, 0.5)}) is None  # it starts from another model
        True
    """

    def __init__(self, directory: Path):
        self._directory = directory

    def find(self, task: int, start: Params) -> tuple[Params, list[dict[str, Any]]] | None:
        """The model that a task's training ends with, if it is known.

        Args:
            task: counted from 0.
            start: the model that the task starts from, full tree.

        Returns:
            The trained model and the lines that its training wrote to the log, or `None`.

        Raises:
            InvalidInput: a file that is damaged.
        """
        if not self._path(task).exists() or not self._on_trajectory(task, start):
            return None
        leaves, lines = self._read(task, start)
        return trees.replace(
            start, {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
        ), lines

    def keep(
        self, task: int, start: Params, trained: Params, lines: Sequence[dict[str, Any]]
    ) -> None:
        """Keep what a task's training ended with, if it lies on the trajectory.

        Args:
            task: counted from 0.
            start: the model that the task started from, full tree.
            trained: the trained model, full tree.
            lines: that its training wrote to the log.

        Raises:
            InvalidInput: the file cannot be written.
        """
        if self._path(task).exists() or not self._on_trajectory(task, start):
            return
        from pm_jax.weights.pretrained import write_tensors

        self._directory.mkdir(parents=True, exist_ok=True)
        leaves = {path: np.asarray(leaf) for path, leaf in trees.leaves_by_path(trained).items()}
        with manifest.covering(self._directory, self._path(task).name):
            write_tensors(leaves, self._path(task), metadata={"log": json.dumps(list(lines))})

    def _path(self, task: int) -> Path:
        return self._directory / f"task_{task + 1}.safetensors"

    def _on_trajectory(self, task: int, start: Params) -> bool:
        if task == 0:
            return True
        if not self._path(task - 1).exists():
            return False
        before, _ = self._read(task - 1, start)
        # By bytes: zeros of either sign are equal and may still lead apart.
        return all(
            np.asarray(leaf).tobytes() == before[path].tobytes()
            for path, leaf in trees.leaves_by_path(start).items()
        )

    def _read(self, task: int, like: Params) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """The trained model, of the shapes of another, and the lines of its log."""
        from safetensors import safe_open

        path = self._path(task)
        try:
            if manifest.damage(
                self._directory, manifest.read_or_empty(self._directory, path.name).files
            ):
                raise OSError("it is not as it was saved")
            with safe_open(path, "np") as file:
                lines = files.parse_json(file.metadata()["log"], LINES)
                leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _form(leaves) != _form(trees.leaves_by_path(like)):
                raise ValueError("it holds another model")
        except Exception as error:  # Rust, JSON and what is not in it raise many types.
            raise InvalidInput(
                f"workdir={path}: cannot be read ({cause(error)}); move it away to have its task "
                "trained again"
            ) from None
        return leaves, lines


def _form(leaves: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()}


def folder_name(config: Config) -> str:
    """A name for the settings that training depends on, the same for every merge rule.

    Args:
        config: settings.

    Returns:
        Ten hexadecimal digits.

    Example:
        >>> folder_name(Config(rule="averaging")) == folder_name(Config(rule="sequential"))
        True
        >>> folder_name(Config(epochs=2)) == folder_name(Config(epochs=3))
        False
    """
    return configuration_hash(config.without_merging())[:10]
