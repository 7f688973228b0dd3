"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp"
"""The ending, after its own, of the name that a file has while it is written."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name; it takes its own at the end, unless there is an error.

    Args:
        path: of the file; one that is there stays as it is until then.

    Yields:
        The path to write to, in the same directory.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.txt"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("one line")
        ...     path.exists()
        False
        >>> path.read_text(), temporary.exists()
        ('one line', False)
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
