"""The work directory: whose it is, and files that are written whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pm_jax import whole_files
from pm_jax.continual.placement import processes
from pm_jax.continual.settings.config import Config
from pm_jax.continual.storage import manifest
from pm_jax.types import InvalidInput

CONFIG_FILE = "config.json"
COMPARISON_FILE = "comparison_config.json"
RESULTS_FILE = "results.json"
SUMMARY_FILE = "summary.json"
SHOWN = 8
"""Differing settings that a message names before the others are counted."""


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; of several processes the first does.

    Args:
        path: of the file.
        text: its content.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.txt"
        >>> write_text(path, "one line")
        >>> path.read_text()
        'one line'
    """
    if processes.is_first():
        with whole_files.replacing(path) as temporary:
            temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_text` does; NaN becomes null.

    Args:
        path: of the file.
        content: dicts, lists, strings and numbers.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.json"
        >>> write_json(path, {"a": float("nan")})
        >>> json.loads(path.read_text())
        {'a': None}
    """
    write_text(path, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.

    Returns:
        Dicts, lists, strings and numbers.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.json"
        >>> write_json(path, [1])
        >>> read_json(path)
        [1]
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def claim(workdir: Path, config: Config, file_name: str = CONFIG_FILE) -> None:
    """Make a directory the work directory of a configuration, or see that it already is.

    Of several processes the first writes.

    Args:
        workdir: a directory that is absent, empty, or claimed by the same configuration before.
        config: settings.
        file_name: of the file that the claim is kept in, one for each kind of work directory.

    Raises:
        InvalidInput: the directory cannot be written, holds something else, or belongs to another
            configuration (the differing flags are named). Nothing in it is touched then.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> claim(directory, Config())
        >>> claim(directory, Config(epochs=7))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: workdir=...: holds a run with epochs=3, not 7; ...
    """
    check_claim(workdir, config, file_name)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("no permission to write")
        if (workdir / file_name).exists():
            manifest.cover(workdir, file_name)  # killed right after it was written
            return
        with manifest.covering(workdir, file_name):
            write_json(workdir / file_name, dataclasses.asdict(config))
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInput(
            f"workdir={workdir}: cannot be written ({reason}); choose another directory"
        ) from None


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keep other runs out of a work directory meanwhile; the first process of a run does.

    Args:
        workdir: present.

    Raises:
        InvalidInput: another process, or another call, runs in it.

    Example:
        >>> import tempfile
        >>> workdir = Path(tempfile.mkdtemp())
        >>> with held(workdir), held(workdir):
        ...     pass
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: workdir=...: another process runs in it; wait for its end or ...
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    if not processes.is_first():
        yield
        return
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
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
    """Raise as `claim` would for what a directory holds, without writing anything.

    Args:
        workdir: a directory, present or not.
        config: settings.
        file_name: as for `claim`.

    Raises:
        InvalidInput: as `claim`.

    Example:
        >>> check_claim(Path("/nonexistent"), Config())
    """
    path = workdir / file_name
    if os.path.lexists(workdir) and not workdir.is_dir():  # a link may lead nowhere
        raise InvalidInput(f"workdir={workdir}: is not a directory; choose another path")
    try:
        if not path.exists():
            own = (file_name, manifest.FILE)
            killed = {manifest.FILE, *(name + whole_files.TEMPORARY for name in own)}
            if workdir.exists() and any(each.name not in killed for each in workdir.iterdir()):
                raise InvalidInput(
                    f"workdir={workdir}: is not empty and holds no run of this program; choose "
                    "another directory"
                )
            return
        saved = read_json(path)
        if not isinstance(saved, dict) or not saved:
            raise ValueError("no settings")
    except OSError as error:
        raise InvalidInput(
            f"workdir={workdir}: cannot be read ({error.strerror}); choose another directory"
        ) from None
    except InvalidInput:
        raise
    except ValueError:
        raise InvalidInput(
            f"workdir={workdir}: its {file_name} is damaged; choose another directory"
        ) from None
    current = json.loads(json.dumps(dataclasses.asdict(config)))
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
