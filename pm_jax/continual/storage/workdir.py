"""The work directory of a run: claimed by one configuration, locked by one process at a time."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pm_jax import files
from pm_jax.continual.placement import processes
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import as_now
from pm_jax.continual.storage import manifest
from pm_jax.types import InvalidInput

CONFIG_FILE = "config.json"
COMPARISON_FILE = "comparison_config.json"
RESULTS_FILE = "results.json"
SUMMARY_FILE = "summary.json"
SHOWN = 8
"""A message names this many differing settings, and counts the others."""


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; only the first of several processes writes."""
    if processes.is_first():
        files.write_text(path, text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, NaN as null; only the first of several processes writes."""
    if processes.is_first():
        files.write_json(path, content)


def saved_form(config: Config) -> dict[str, Any]:
    """Return settings as a config.json gives them back: tuples have become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def claim(workdir: Path, config: Config, file_name: str = CONFIG_FILE) -> None:
    """Make a directory the work directory of a configuration, or see that it already is.

    Raises:
        InvalidInput: the directory cannot be written, or has other content or settings.
    """
    # Nothing is touched if the claim fails.
    check_claim(workdir, config, file_name)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("no permission to write")
        if (workdir / file_name).exists():
            # An earlier process may have been killed between writing the file and listing it.
            manifest.cover(workdir, file_name)
            return
        with manifest.covering(workdir, file_name):
            write_json(workdir / file_name, dataclasses.asdict(config))
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInput(
            f"workdir={workdir}: cannot be written ({reason}); choose another directory"
        ) from None


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other runs out of a work directory; of several processes the first does it for all.

    Raises:
        InvalidInput: another process, or another call, runs in the directory.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no fcntl: runs are then not kept apart.
        yield
        return
    if not processes.is_first():
        yield
        return
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
            # The system frees the lock when the process ends, however it ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"workdir={workdir}: another process runs in it; wait for its end or choose "
                "another directory"
            ) from None
        yield
    finally:
        os.close(descriptor)


def check_claim(workdir: Path, config: Config, file_name: str = CONFIG_FILE) -> None:
    """Check whether `claim` would succeed, without writing anything.

    Raises:
        InvalidInput: as `claim`.
    """
    path = workdir / file_name
    # `exists` follows links, and a link may lead nowhere.
    if os.path.lexists(workdir) and not workdir.is_dir():
        raise InvalidInput(f"workdir={workdir}: is not a directory; choose another path")
    try:
        if not path.exists():
            # A process that was killed while it claimed the directory leaves these.
            names = (file_name, manifest.FILE)
            leftovers = {manifest.FILE, *(name + files.TEMPORARY for name in names)}
            if workdir.exists() and any(file.name not in leftovers for file in workdir.iterdir()):
                raise InvalidInput(
                    f"workdir={workdir}: is not empty and holds no run of this program; choose "
                    "another directory"
                )
            return
        saved = files.read_json(path, {})
        if not saved:
            raise ValueError("no settings")
    except OSError as error:
        raise InvalidInput(
            f"workdir={workdir}: cannot be read ({error.strerror}); choose another directory"
        ) from None
    except InvalidInput:
        # InvalidInput is a ValueError, which the next clause takes for damage.
        raise
    except ValueError:
        raise InvalidInput(
            f"workdir={workdir}: its {file_name} is damaged; choose another directory"
        ) from None
    _check_same_settings(workdir, as_now(saved), saved_form(config))


def _check_same_settings(workdir: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    # Settings that do not change what a run computes may differ from call to call.
    free = {f.name for f in dataclasses.fields(Config) if not f.metadata["identity"]}
    differing = [
        f"{name}={_shown(saved.get(name))}, not {_shown(current.get(name))}"
        for name in sorted({*saved, *current} - free)
        if saved.get(name) != current.get(name)
    ]
    if differing:
        rest = [f"{len(differing) - SHOWN} more"] if len(differing) > SHOWN else []
        raise InvalidInput(
            f"workdir={workdir}: holds a run with {'; '.join([*differing[:SHOWN], *rest])}; choose "
            "another directory or the same flags"
        )


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
