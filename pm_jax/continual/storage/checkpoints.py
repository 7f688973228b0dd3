"""Checkpoints of a run in Orbax: a directory for each training step that was saved."""

import concurrent.futures
import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax import checkpoint as orbax

from pm_jax import trees
from pm_jax.continual.placement import processes
from pm_jax.continual.settings.run_options import KEPT
from pm_jax.continual.storage import manifest
from pm_jax.types import InvalidInput, PyTree

DELETED, UNFINISHED = "deleted_", ".orbax-checkpoint-tmp"
"""Marks in the names of folders that are being deleted, and that Orbax is writing."""
T = TypeVar("T")


class DamagedCheckpoint(InvalidInput):
    """A checkpoint differs from what was saved, or is in no manifest and cannot be read."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        # The damage in a few words, without the remedy that the message ends with.
        self.why = why


class Checkpoints:
    """The checkpoints in a directory, of which the `keep` newest stay, and their manifest.

    If `asynchronous`, `save` returns once the arrays are copied, and a thread writes them.

    Raises:
        InvalidInput: `keep` is below 1.
    """

    def __init__(self, directory: Path, keep: int = KEPT, *, asynchronous: bool = False):
        options = orbax.CheckpointManagerOptions(enable_async_checkpointing=True, create=True)
        self._directory, self._keep = directory.absolute(), keep
        # Several processes must write and list in step, so they always wait.
        self._asynchronous = asynchronous and not processes.several()
        self._manager = orbax.CheckpointManager(self._directory, options=options)
        # Checksums and deletions run in this thread, one after another, beside the training.
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: tuple[int, concurrent.futures.Future[dict[str, manifest.Entry]]] | None
        self._pending = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.closing(self._manager), self._background:
            self.finish()

    def latest(self) -> int | None:
        """Return the newest step saved, or `None`."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Save a pytree of arrays, which may be donated afterwards, whole or not at all.

        Raises:
            OSError: this save or the previous one could not be written.
        """
        self.finish()
        # A kill during the save then leaves an unlisted folder, never one that looks damaged.
        manifest.uncover(self._directory, str(step))
        with self._writing(step):
            self._manager.save(step, args=orbax.args.StandardSave(tree))
        self._pending = step, self._background.submit(self._checksums, step)
        if not self._asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until the last save is whole, list it in the manifest, and delete the oldest.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is None:
            return
        (step, checksums), self._pending = self._pending, None
        with self._writing(step):
            self._manager.wait_until_finished()
        # This thread alone writes the manifest, so that no entry is lost between two writers.
        manifest.enter(self._directory, checksums.result())
        kept = sorted(self._manager.all_steps())[-self._keep :]
        listed = {name.split("/")[0] for name in manifest.read_or_empty(self._directory).files}
        # Out of the manifest before out of the directory, or a kill would leave missing files.
        manifest.uncover(self._directory, *listed.difference(map(str, kept)))
        if processes.is_first():
            for old in set(self._manager.all_steps()).difference(kept):
                # Renamed first: a kill during the deletion leaves no step with half its files.
                (self._directory / str(old)).rename(self._directory / f"{DELETED}{old}")
            self._background.submit(self._delete, f"{DELETED}*")
        # All processes must see the same steps before any of them goes on.
        processes.wait_for_all("saved")
        self._manager.reload()

    def newest(self, restore: Callable[[int], T]) -> tuple[int, T | None, list[str]]:
        """Restore the newest whole step by a function; returns step, result and warnings, or 0.

        Raises:
            InvalidInput: a checkpoint is as it was saved and still cannot be restored.
        """
        self.finish()
        if processes.is_first():
            # An earlier process may have been killed while it deleted or wrote these.
            self._delete(f"{DELETED}*", f"*{UNFINISHED}*")
        processes.wait_for_all("deleted")
        warnings: list[str] = []
        while step := self.latest():
            try:
                restored = restore(step)
            except DamagedCheckpoint as error:
                # The folder is renamed only when no process reads it any more.
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
            # The process that wrote it may have been killed before it listed it.
            manifest.cover(self._directory, str(step))
            return step, restored, warnings
        return 0, None, warnings

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Restore the tree saved under a step; `like` has its structure, shapes and devices.

        Raises:
            DamagedCheckpoint: it differs from what was saved; nothing is deleted.
            InvalidInput: it is as it was saved and cannot be restored.
        """
        self.finish()

        def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
            # Without a sharding Orbax gives a NumPy array back.
            sharding = getattr(leaf, "sharding", None)
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

        target = orbax.args.StandardRestore(jax.tree.map(abstract, like))
        saved = manifest.read_or_empty(self._directory, str(step)).files
        if damages := manifest.damage(self._directory, saved):
            raise self._damaged(step, " ".join(damages[0]))
        try:
            return self._manager.restore(step, args=target)
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files.
            why = type(error).__name__
            if not saved:
                raise self._damaged(step, why) from error
            # The manifest has just confirmed every byte, so the files are as they were saved.
            if difference := self._other_model(step, like):
                raise InvalidInput(
                    f"workdir={self._directory}: checkpoint {step} is of another model: "
                    f"{difference}; use another workdir, or go on with that model"
                ) from error
            raise InvalidInput(
                f"workdir={self._directory}: checkpoint {step} cannot be read ({why}): another "
                "version of pm_jax saved it, whose state has another form; use another workdir, or "
                "go on with that version"
            ) from error

    def _other_model(self, step: int, like: PyTree) -> str:
        """Say by which leaf the model in a checkpoint differs from the present one, if it does."""
        saved = getattr(self._manager.item_metadata(step), "tree", {})
        if "params" not in like:
            return ""
        for part in ("params", "model_state"):
            before, now = (
                {
                    path.removesuffix("/value"): tuple(leaf.shape)
                    for path, leaf in trees.leaves_by_path(tree.get(part, {})).items()
                }
                for tree in (saved, like)
            )
            for path in {**before, **now}:
                shapes = [str(tree.get(path, "absent")) for tree in (before, now)]
                if shapes[0] != shapes[1]:
                    return f"{part}/{path} is {shapes[0]} there and {shapes[1]} in the present one"
        return ""

    def _checksums(self, step: int) -> dict[str, manifest.Entry]:
        """Measure the files of a step once they are all written."""
        self._manager.wait_until_finished()
        return manifest.checksums(self._directory, str(step))

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Turn TensorStore's errors about files into OSError; it raises ValueError with a code."""
        try:
            yield
        except ValueError as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if not code:
                raise
            number, path = int(code[1]), str(self._directory / str(step))
            raise OSError(number, os.strerror(number), path) from error

    def _delete(self, *patterns: str) -> None:
        for pattern in patterns:
            for folder in self._directory.glob(pattern):
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
