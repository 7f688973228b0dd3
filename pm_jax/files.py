"""Files that are written whole or not at all, and JSON that may be damaged."""

import contextlib
import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pm_jax.types import InvalidInput

TEMPORARY = ".tmp"
"""A file that is being written has this ending after its own."""
SHOWN = 6
"""A message lists this many names or differences, and counts the others."""
LARGEST = 2**63
"""A whole number beyond this is damage: no run writes one, and it may not fit into a float."""


@contextlib.contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path, which replaces the file at the end unless an error is raised."""
    # Unique names let several processes write the same file at a time; the last one wins.
    middle = f".{uuid.uuid4().hex}" if unique else ""
    temporary = path.with_name(path.name + middle + TEMPORARY)
    try:
        yield temporary
        # A rename within a folder is atomic: a reader sees the old file or the new one.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity become null."""
    write_text(path, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Replace every float that is not finite, however deep, by `None`; JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def listed(names: Sequence[str]) -> str:
    """Write the first few of some names for a message, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def read_json(path: Path, form: Any = object) -> Any:
    """Read a JSON file that may be damaged.

    Raises:
        ValueError: the file is damaged, or not of the form; see `fits`.
        OSError: the file cannot be read.
    """
    return parse_json(path.read_bytes(), form)


def parse_json(content: str | bytes, form: Any = object) -> Any:
    """Parse JSON that may be damaged.

    Raises:
        ValueError: the content is damaged, or not of the form; see `fits`.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not fits(value, form):
        raise ValueError("not of the expected form")
    return value


def fits(value: Any, form: Any) -> bool:
    """Tell whether a JSON value has a form."""
    # A form is a type, a tuple of types, [form] for a list, {str: form} for a dict with any names,
    # or {name: form, ...} for a dict that has at least these names.
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(fits(item, form[str]) for item in value.values())
        return all(name in value and fits(value[name], inner) for name, inner in form.items())
    # Python counts True as a whole number; JSON does not.
    of_type = isinstance(value, form) and not (isinstance(value, bool) and form is not object)
    return of_type and not (isinstance(value, int) and abs(value) > LARGEST)


def check_folder(argument: str, path: Path) -> None:
    """Check that something can be made at a path.

    Raises:
        InvalidInput: its folder is absent or cannot be written.
    """
    if not path.parent.is_dir():
        raise InvalidInput(f"{argument}={path}: the folder {path.parent} does not exist; make it")
    try:
        # Only an attempt tells: permissions do not know of full disks and read-only mounts.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidInput(
            f"{argument}={path}: the folder {path.parent} cannot be written ({error.strerror}); "
            "choose another"
        ) from error
