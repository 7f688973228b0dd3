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
from typing import Any, BinaryIO, Protocol

import jax.numpy as jnp
import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput, cause
from pm_jax.weights import checkpoint_files
from pm_jax.weights.checkpoint_files import CheckpointFiles

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


class Target(Protocol):
    """An open file, or several, that bytes are written to."""

    def write(self, data: Any, /) -> Any:
        """Write bytes, or a memory view of them."""


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
    """Safetensors file, or its shards, whose headers are read and checked, and nothing else."""

    # The argument that named the file, for messages.
    argument: str
    # The path that the user gave, for messages; a conversion may have made the file from it.
    source: Path
    # Entries by name, in the order of the shards and of the bytes.
    entries: dict[str, Entry]
    # Strings that the file holds.
    metadata: dict[str, str]
    # The file that each tensor is in, and the byte at which the tensors of that file begin.
    places: dict[str, tuple[Path, int]]
    # The checkpoint as the user gave it, which may be of another kind than safetensors.
    form: CheckpointFiles

    @classmethod
    def open(
        cls, argument: str, path: str | os.PathLike, found: CheckpointFiles | None = None
    ) -> "TensorFile":
        """Read and check the headers of a file, or of the files found at a path.

        Raises:
            InvalidInput: a file is missing, damaged, or not safetensors; or shards do not make one
                model. `argument` names the path in the message.
        """
        path = Path(path)
        found = found or checkpoint_files.find(argument, path)
        headers = {
            file: _read_header(f"{argument}={path}", file, named=file != path)
            for file in found.tensors
        }
        names = {file: header[0] for file, header in headers.items()}
        checkpoint_files.check_shards(argument, path, found, names)
        entries, metadata = dict[str, Entry](), dict[str, str]()
        places: dict[str, tuple[Path, int]] = {}
        for file, (of_file, strings, start) in headers.items():
            entries |= of_file
            metadata |= strings
            places |= dict.fromkeys(of_file, (file, start))
        return cls(argument, path, entries, metadata, places, found)

    def read(self, name: str, first: int, stop: int) -> np.ndarray:
        """Read the elements `first` to `stop - 1` of a floating-point tensor, in row-major order.

        Raises:
            InvalidInput: an element is NaN or infinite, or the file has become shorter.
        """
        dtype = FLOATS[self.entries[name].dtype]
        values = self._fetched(name, first, stop, dtype)
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

    def copy(self, name: str, target: Target) -> None:
        """Copy a tensor of any type to an open file, a piece at a time."""
        for piece in self.pieces(name):
            target.write(piece.data)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[np.ndarray]:
        """Yield the bytes of a tensor of any type, so many at a time."""
        entry = self.entries[name]
        for first in range(0, entry.end - entry.begin, size):
            stop = min(first + size, entry.end - entry.begin)
            yield self._fetched(name, first, stop, np.dtype(np.uint8))

    def holds(self, name: str, first: int, values: np.ndarray) -> bool:
        """Tell whether a tensor has some values, bit for bit, from an element on."""
        stored = self._fetched(name, first, first + values.size, values.dtype)
        return stored.tobytes() == values.tobytes()

    def sha256(self) -> list[str]:
        """Return the SHA-256 of each file, in hexadecimal."""
        return [_digest(file) for file in dict.fromkeys(file for file, _ in self.places.values())]

    def _fetched(self, name: str, first: int, stop: int, dtype: np.dtype) -> np.ndarray:
        file, start = self.places[name]
        place = start + self.entries[name].begin + first * dtype.itemsize
        # Not mapped into memory: the pages of a map that were read count as the process's memory.
        return np.fromfile(file, dtype, stop - first, offset=place)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def laid_out(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Entry]:
    """Lay tensors, by name with type, shape and number of bytes, behind one another."""
    entries, begin = {}, 0
    for name, (kind, shape, size) in tensors.items():
        entries[name] = Entry(kind, shape, begin, begin + size)
        begin += size
    return entries


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
        InvalidInput: it cannot be written, or something is there.
    """
    path = Path(path)
    with replacing(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        file.write(header(entries, metadata))
        yield file
        on_the_disk(file)


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path for an output, which takes its place at the end.

    Raises:
        InvalidInput: it cannot be written, or something has come to be there.
    """
    try:
        with files.replacing(path, unique=True) as temporary:
            yield temporary
            # Checked once more, as merging can take long.
            if path.exists() and not overwrite:
                raise InvalidInput(f"output={path}: exists; choose another name or set overwrite")
    except OSError as error:
        raise InvalidInput(
            f"output={path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


def on_the_disk(file: BinaryIO) -> None:
    """Wait for the disk, before a rename: a power cut must not leave an empty output."""
    file.flush()
    os.fsync(file.fileno())


def _read_header(
    given: str, path: Path, *, named: bool
) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Read entries, metadata and the length of a header; `named` if the message names the file."""
    from safetensors import safe_open

    try:
        # The package refuses tensors that overlap, leave gaps or lie beyond the end.
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except Exception as error:  # Rust and the system raise many types for damaged files.
        which = f"{path.name} " if named else ""
        raise InvalidInput(
            f"{given}: {which}cannot be read ({cause(error)}); get it anew"
        ) from error
    metadata = content.pop("__metadata__", None) or {}
    entries = {
        name: Entry(fields["dtype"], tuple(fields["shape"]), *fields["data_offsets"])
        for name, fields in content.items()
    }
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    return ordered, metadata, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs; raises ValueError if a name stands twice."""
    fields = dict(pairs)
    # `dict` keeps the last of equal names, and silently drops the others.
    if len(fields) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return fields


def header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Write the header of a file, which comes before the bytes of its tensors."""
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
