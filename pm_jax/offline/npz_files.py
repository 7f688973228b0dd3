"""NumPy's `.npz` archives as safetensors files and back, a piece at a time."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax.offline.tensor_files import (
    FLOATS,
    PIECE,
    WHOLE_NUMBERS,
    TensorFile,
    laid_out,
    replacing,
    writing,
)
from pm_jax.types import InvalidInput, cause

_ENDING = ".npy"
_BFLOAT16 = np.dtype("V2")
"""The type that NumPy stores bfloat16 as, which it does not know."""


def to_safetensors(argument: str, source: Path, path: Path) -> None:
    """Write the arrays of an archive as a safetensors file; nothing is unpickled.

    Raises:
        InvalidInput: the archive cannot be read, or safetensors cannot store its content.
    """
    given = f"{argument}={source}"
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name.removesuffix(_ENDING) for name in archive.namelist()]
            tensors = {}
            for name in names:
                shape, _, dtype = _opened(archive, name)[1:]
                size = math.prod(shape) * dtype.itemsize
                tensors[name] = (_kind(f"{given}: {name}", dtype), shape, size)
            with writing(path, laid_out(tensors), {}) as file:
                for name in names:
                    member, shape, by_columns, dtype = _opened(archive, name)
                    if by_columns:
                        # Rows of such an array lie scattered: it is read whole.
                        columns = np.frombuffer(member.read(), dtype).reshape(shape[::-1])
                        file.write(np.ascontiguousarray(columns.T).tobytes())
                    while piece := member.read(PIECE):
                        file.write(piece)
    except InvalidInput:
        raise
    except Exception as error:  # zip and NumPy raise many types for damaged files.
        raise InvalidInput(f"{given}: cannot be read ({cause(error)}); get it anew") from error


def from_safetensors(merged: TensorFile, path: Path, comment: str, *, overwrite: bool) -> None:
    """Write a safetensors file as an archive, with a comment that NumPy does not read.

    Raises:
        InvalidInput: the archive cannot be written.
    """
    with (
        replacing(path, overwrite=overwrite) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        # The format has no room for more.
        archive.comment = comment.encode()[: 2**16 - 1]
        for name, entry in merged.entries.items():
            dtype = (FLOATS | WHOLE_NUMBERS)[entry.dtype]
            stored = _BFLOAT16 if entry.dtype == "BF16" else dtype
            with archive.open(f"{name}{_ENDING}", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member,
                    {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False,
                     "shape": entry.shape},
                )  # fmt: skip
                merged.copy(name, member)


def _opened(archive: zipfile.ZipFile, name: str) -> tuple[Any, tuple[int, ...], bool, np.dtype]:
    """Open an array of an archive: its bytes, shape, whether it is stored by columns, and type."""
    member: Any = archive.open(f"{name}{_ENDING}")
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    return member, *read(member)


def _kind(what: str, dtype: np.dtype) -> str:
    if dtype == _BFLOAT16:
        return "BF16"
    kinds = {stored: kind for kind, stored in (FLOATS | WHOLE_NUMBERS).items()}
    if dtype not in kinds:
        raise InvalidInput(f"{what} is {dtype}, which safetensors does not hold; save it without")
    return kinds[dtype]
