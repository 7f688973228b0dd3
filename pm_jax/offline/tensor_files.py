"""Safetensors files larger than memory: headers first, then tensors piece by piece, both ways.

The `safetensors` package checks a file; its own readers and writers take whole tensors and whole
models, so the bytes are read and written here. The format is 8 bytes with the header's length, a
JSON header with type, shape and place of every tensor, and the tensors one after another.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput, cause

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Floating-point types, by their names in a header; these merge."""

WHOLE_NUMBERS = {"BOOL": np.dtype(np.bool_)} | {
    f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)
}
"""Types that are copied as they are."""

PIECE = 1 << 22
"""Bytes in memory at a time while a tensor is copied."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Type, shape and place of a tensor, from a header."""

    # The header's name of the type, such as "F32".
    dtype: str
    shape: tuple[int, ...]
    # First byte, counted from the end of the header.
    begin: int
    # One after its last byte.
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Safetensors file whose header is read and checked, and nothing else."""

    # The argument that named the file, for messages.
    argument: str
    # The path that the user gave, for messages; a conversion may have made the file from it.
    source: Path
    path: Path
    # Entries by name, in the order of the bytes.
    entries: dict[str, Entry]
    # Strings that the file holds.
    metadata: dict[str, str]
    # Byte at which the tensors begin.
    start: int

    @classmethod
    def open(cls, argument: str, path: str | os.PathLike) -> "TensorFile":
        """Read and check a header; `argument` names the file in messages.

        Raises:
            InvalidInput: the file is missing, damaged, or not safetensors.
        """
        from safetensors import safe_open

        path = Path(path)
        if path.suffix != ".safetensors":
            raise InvalidInput(f"{argument}={path}: must end in .safetensors")
        if not path.is_file():
            raise InvalidInput(f"{argument}={path}: there is no such file")
        try:
            # The package refuses tensors that overlap, leave gaps or lie beyond the end.
            with safe_open(path, "numpy"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        except Exception as error:  # Rust and the system raise many types for damaged files.
            raise InvalidInput(
                f"{argument}={path}: cannot be read ({cause(error)}); get it anew"
            ) from error
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            name: Entry(fields["dtype"], tuple(fields["shape"]), *fields["data_offsets"])
            for name, fields in header.items()
        }
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        return cls(argument, path, path, ordered, metadata, 8 + length)

    def read(self, name: str, first: int, stop: int) -> np.ndarray:
        """Read the elements `first` to `stop - 1` of a floating-point tensor, in row-major order.

        Raises:
            InvalidInput: an element is NaN or infinite, or the file has become shorter.
        """
        entry = self.entries[name]
        dtype = FLOATS[entry.dtype]
        place = self.start + entry.begin + first * dtype.itemsize
        # Not mapped into memory: the pages of a map that were read count as the process's memory.
        values = np.fromfile(self.path, dtype, stop - first, offset=place)
        if values.size < stop - first:
            raise InvalidInput(f"{self.argument}={self.source}: was changed meanwhile; start again")
        finite = np.isfinite(values)
        if not finite.all():
            bad = values[np.argmin(finite)]
            raise InvalidInput(
                f"{self.argument}={self.source}: {name} holds {bad}; merge a checkpoint from "
                "before it diverged"
            )
        return values

    def copy(self, name: str, target: BinaryIO) -> None:
        """Copy a tensor of any type to an open file, a piece at a time."""
        entry = self.entries[name]
        with self.path.open("rb") as source:
            source.seek(self.start + entry.begin)
            for place in range(entry.begin, entry.end, PIECE):
                target.write(source.read(min(PIECE, entry.end - place)))

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(
    path: str | os.PathLike,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> Iterator[BinaryIO]:
    """Yield an open file with the header in it, for the tensors' bytes in the order of `entries`.

    Raises:
        InvalidInput: as `check_output`, or the file cannot be written.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    try:
        with files.replacing(path, unique=True) as temporary:
            with temporary.open("wb") as file:
                file.write(_header(entries, metadata))
                yield file
                # On the disk before the rename: a power cut must not leave an empty output.
                file.flush()
                os.fsync(file.fileno())
            # Checked once more, as merging can take long.
            check_output(path, overwrite=overwrite)
    except OSError as error:
        raise InvalidInput(
            f"output={path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Check that a safetensors file can be written to a path.

    Raises:
        InvalidInput: the path has another ending, lies nowhere, or has something there already.
    """
    if path.suffix != ".safetensors":
        raise InvalidInput(f"output={path}: must end in .safetensors")
    if path.is_dir():
        raise InvalidInput(f"output={path}: is a folder already; choose another name")
    if path.exists() and not overwrite:
        raise InvalidInput(f"output={path}: exists; choose another name or set overwrite")
    files.check_folder("output", path)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs; raises ValueError if a name stands twice."""
    fields = dict(pairs)
    # `dict` keeps the last of equal names, and silently drops the others.
    if len(fields) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return fields


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        content[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    # The tensors must begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
