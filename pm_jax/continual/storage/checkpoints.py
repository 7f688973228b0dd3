"""Checkpoints of a run by Orbax: one directory per training step that was saved."""

import concurrent.futures
import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from orbax import checkpoint as orbax

from pm_jax.continual.placement import processes
from pm_jax.continual.storage import manifest
from pm_jax.types import InvalidInput, PyTree

KEPT = 2
DELETED, UNFINISHED = "deleted_", ".orbax-checkpoint-tmp"
"""In the names of folders that are being deleted, and by Orbax of those that are being written."""
T = TypeVar("T")


def check_keep(keep: int) -> None:
    """Raise `InvalidInput` for a number of checkpoints that cannot be kept.

    Args:
        keep: to be at least 1.

    Raises:
        InvalidInput: it is not.

    Example:
        >>> check_keep(0)
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: keep_checkpoints=0: must be at least 1
    """
    if keep < 1:
        raise InvalidInput(f"keep_checkpoints={keep}: must be at least 1")


class DamagedCheckpoint(InvalidInput):
    """A checkpoint that is not as it was saved, or is not known to be and cannot be read.

    Args:
        message: for the user.
        why: what is wrong, in a few words.
    """

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


class Checkpoints:
    """The checkpoints in a directory, the newest of them kept, and a manifest of those.

    The manifest is written by the thread that calls, and speaks of a checkpoint once it is whole.

    Args:
        directory: made if absent.
        keep: number of checkpoints, at least 1.
        asynchronous: let `save` return once the arrays are copied, and write them meanwhile; not
            with several processes.

    Raises:
        InvalidInput: `keep` is below 1.

    Example:
        >>> import tempfile
        >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
        ...     checkpoints.save(3, {"w": np.ones(2)})
        ...     checkpoints.latest(), checkpoints.restore(3, {"w": np.zeros(2)})["w"].tolist()
        (3, [1.0, 1.0])
    """

    def __init__(self, directory: Path, keep: int = KEPT, *, asynchronous: bool = False):
        check_keep(keep)
        options = orbax.CheckpointManagerOptions(enable_async_checkpointing=True, create=True)
        self._directory, self._keep = directory.absolute(), keep
        self._asynchronous = asynchronous and not processes.several()
        self._manager = orbax.CheckpointManager(self._directory, options=options)
        self._behind = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: tuple[int, concurrent.futures.Future[dict[str, manifest.Entry]]] | None
        self._pending = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.closing(self._manager), self._behind:
            self.finish()

    def latest(self) -> int | None:
        """The newest step saved, or `None`."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Save a pytree of arrays under a step; atomic.

        Waits for the save before. The arrays may be donated or overwritten when this returns.

        Args:
            step: one that was not saved.
            tree: of arrays.

        Raises:
            OSError: this or the save before could not be written.
        """
        self.finish()
        manifest.uncover(self._directory, str(step))
        with self._writing(step):
            self._manager.save(step, args=orbax.args.StandardSave(tree))
        self._pending = step, self._behind.submit(self._checksums, step)
        if not self._asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until the last save is whole; then it is in the manifest and the oldest one goes.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is None:
            return
        (step, checksums), self._pending = self._pending, None
        with self._writing(step):
            self._manager.wait_until_finished()
        manifest.enter(self._directory, checksums.result())
        kept = sorted(self._manager.all_steps())[-self._keep :]
        covered = {name.split("/")[0] for name in manifest.known(self._directory).files}
        manifest.uncover(self._directory, *covered.difference(map(str, kept)))
        if processes.is_first():
            for old in set(self._manager.all_steps()).difference(kept):
                # So that a kill leaves no step with some of its files.
                (self._directory / str(old)).rename(self._directory / f"{DELETED}{old}")
            self._behind.submit(self._delete, f"{DELETED}*")
        processes.wait_for_all("saved")
        self._manager.reload()

    def newest(self, restore: Callable[[int], T]) -> tuple[int, T | None, list[str]]:
        """Go back to the newest step that is whole; damaged ones are set aside by name.

        Args:
            restore: of a step; it calls the method `restore`.

        Returns:
            The step and what `restore` returned, (0, None) where no step is left, and a line for
            each that was set aside.

        Raises:
            InvalidInput: a checkpoint is as it was saved and cannot be restored all the same.
        """
        self.finish()
        if processes.is_first():
            self._delete(f"{DELETED}*", f"*{UNFINISHED}*")  # what a process was killed at
        processes.wait_for_all("deleted")
        warnings: list[str] = []
        while step := self.latest():
            try:
                restored = restore(step)
            except DamagedCheckpoint as error:
                processes.wait_for_all("damaged")
                aside = self._directory / str(step)
                if processes.is_first():
                    aside = manifest.set_aside(aside)
                processes.wait_for_all("set aside")
                manifest.uncover(self._directory, str(step))
                self._manager.reload()
                warnings.append(
                    f"warning: checkpoint {step} is damaged ({error.why}); kept as {aside.name}, "
                    f"going on from {self._newest_but(step)}"
                )
                continue
            manifest.cover(self._directory, str(step))  # killed right after it was written
            return step, restored, warnings
        return 0, None, warnings

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree saved under a step.

        Args:
            step: one that was saved.
            like: pytree of arrays or `jax.ShapeDtypeStruct`, of the same structure.

        Returns:
            Pytree of arrays on the default device, of NumPy arrays where those were saved.

        Raises:
            DamagedCheckpoint: it is not as it was saved; nothing is deleted.
            InvalidInput: it is, and cannot be restored.
        """
        self.finish()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)
            ),
            like,
        )
        saved = manifest.known(self._directory, str(step)).files
        if found := manifest.damage(self._directory, saved):
            raise self._damaged(step, " ".join(found[0]))
        try:
            return self._manager.restore(step, args=orbax.args.StandardRestore(abstract))
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files.
            damaged = self._damaged(step, type(error).__name__)
            raise (InvalidInput(str(damaged)) if saved else damaged) from error

    def _checksums(self, step: int) -> dict[str, manifest.Entry]:
        """Of a step's files once they are all there."""
        self._manager.wait_until_finished()
        return manifest.checksums(self._directory, str(step))

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Errors of the operating system as such: TensorStore raises another type."""
        try:
            yield
        except ValueError as error:
            found = re.search(r"os_error_code='(\d+)'", str(error))
            if not found:
                raise
            number, path = int(found[1]), str(self._directory / str(step))
            raise OSError(number, os.strerror(number), path) from error

    def _delete(self, *names: str) -> None:
        for folder in (folder for each in names for folder in self._directory.glob(each)):
            shutil.rmtree(folder, ignore_errors=True)

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            f"workdir={self._directory}: checkpoint {step} cannot be read ({why}); move the folder "
            f"{step} away to go on from {self._newest_but(step)}",
            why,
        )

    def _newest_but(self, step: int) -> str:
        others = [other for other in self._manager.all_steps() if other != step]
        return f"step {max(others)}" if others else "the beginning"
