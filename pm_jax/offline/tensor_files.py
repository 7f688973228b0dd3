"""Safetensors files larger than memory: headers first, then tensors piece by piece, both ways.

The `safetensors` package checks a file; its own readers and writers take whole tensors and whole
models, so the bytes are read and written here. The format is 8 bytes with the header's length, a
JSON header of type, shape and place of every tensor, and the tensors one after another.
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
"""Floating-point types that are computed with, by their names in a header."""

WHOLE_NUMBERS = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}")
        for kind in "iu"
        for size in (1, 2, 4, 8)
    },
}
"""Types that are passed on as they are."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a header says of a tensor.

    Attributes:
        dtype: the header's name of its type, such as "F32".
        shape: of the tensor.
        begin: first byte, counted from the end of the header.
        end: one after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read and checked, and nothing else.

    Attributes:
        argument: the argument that named the file, for messages.
        source: what the user gave, for messages: the path, or where the file was made from.
        path: of the file.
        entries: `{name: Entry}` in the order of the bytes.
        metadata: strings that the file holds.
        start: byte at which the tensors begin.

    Example:
        >>>         >>> from safetensors.numpy import save_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"w": np.arange(6.0).reshape(2, 3)}, path)
        >>> file = TensorFile.open("base", path)
        >>> file.entries["w"].shape, file.read("w", 2, 4).tolist()
        ((2, 3), [2.0, 3.0])
    """

    argument: str
    source: Path
    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int

    @classmethod
    def open(cls, argument: str, path: str | os.PathLike) -> "TensorFile":
        """Read and check a header.

        Args:
            argument: what the caller calls the file, for messages.
            path: of the file, ending in .safetensors.

        Returns:
            A `TensorFile`.

        Raises:
            InvalidInput: the file is missing, damaged, or of another kind.
        """
        from safetensors import safe_open

        path = Path(path)
        if path.suffix != ".safetensors":
            raise InvalidInput(f"{argument}={path}: must end in .safetensors")
        if not path.is_file():
            raise InvalidInput(f"{argument}={path}: there is no such file")
        try:
            with safe_open(path, "numpy"):
                pass  # places that overlap, leave gaps or lie beyond the end are refused here
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        except Exception as error:  # Rust and the system raise many types for damaged files.
            raise InvalidInput(
                f"{argument}={path}: cannot be read ({cause(error)}); get it anew"
            ) from error
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            name: Entry(found["dtype"], tuple(found["shape"]), *found["data_offsets"])
            for name, found in header.items()
        }
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        return cls(argument, path, path, ordered, metadata, 8 + length)

    def read(self, name: str, first: int, stop: int) -> np.ndarray:
        """Elements of a floating-point tensor, in row-major order.

        Args:
            name: of the tensor, of a type in `FLOATS`.
            first: position of the first element.
            stop: one after the last.

        Returns:
            [stop - first], in the file's type.

        Raises:
            InvalidInput: one of them is NaN or infinite, or the file has become shorter.
        """
        entry = self.entries[name]
        dtype = FLOATS[entry.dtype]
        place = self.start + entry.begin + first * dtype.itemsize
        # Not mapped into memory: pages of a map that were read count as memory of the process.
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

    def copy(self, name: str, target: BinaryIO, piece: int = 1 << 22) -> None:
        """Copy a tensor's bytes, whatever its type.

        Args:
            name: of the tensor.
            target: file that takes them.
            piece: bytes in memory at a time.
        """
        entry = self.entries[name]
        with self.path.open("rb") as source:
            source.seek(self.start + entry.begin)
            for place in range(entry.begin, entry.end, piece):
                target.write(source.read(min(piece, entry.end - place)))

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the whole file."""
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
    """A safetensors file in the making, which takes its name when all of it is on the disk.

    Args:
        path: of the file, ending in .safetensors.
        entries: `{name: Entry}` in the order of the bytes.
        metadata: strings to keep with it.
        overwrite: replace a file that is there.

    Yields:
        An open file with the header in it; the tensors' bytes follow in the order of `entries`. If
        the context ends in an error, the file is gone.

    Raises:
        InvalidInput: as `check_output`, or the file cannot be written.

    Example:
        >>>         >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with writing(path, {"w": Entry("F32", (2,), 0, 8)}, {}) as file:
        ...     _ = file.write(np.ones(2, np.float32).tobytes())
        >>> TensorFile.open("output", path).read("w", 0, 2).tolist()
        [1.0, 1.0]
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
    """Raise for a path that no safetensors file may be written to.

    Args:
        path: of the file.
        overwrite: a file that is there may be replaced.

    Raises:
        InvalidInput: another ending, a folder that is absent or cannot be written, or something
            that is there already.

    Example:
        >>> check_output(Path("merged.bin"))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: output=merged.bin: must end in .safetensors
    """
    if path.suffix != ".safetensors":
        raise InvalidInput(f"output={path}: must end in .safetensors")
    if path.is_dir():
        raise InvalidInput(f"output={path}: is a folder already; choose another name")
    if path.exists() and not overwrite:
        raise InvalidInput(f"output={path}: exists; choose another name or set overwrite")
    files.check_folder("output", path)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON header, in which a name says one thing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        content[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
