"""The output of a merge: a file, a folder of transformers, an `.npz` or a folder of Orbax.

Every output is written whole or not at all: under a temporary name beside its own, which it gets
at the end.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pm_jax import files
from pm_jax.offline import npz_files, orbax_files
from pm_jax.offline.tensor_files import (
    Entry,
    Target,
    TensorFile,
    header,
    laid_out,
    on_the_disk,
    writing,
)
from pm_jax.types import InvalidInput
from pm_jax.weights.checkpoint_files import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    NPZ,
    PICKLES,
    SAFETENSORS,
    WEIGHTS_FILE,
    CheckpointFiles,
)

MADE_BY = "made_by"
"""Key of the metadata that says that pm_jax wrote a file."""

_DTYPE_KEYS = ("dtype", "torch_dtype")
_UNITS = {unit: 10**power for unit, power in (("KB", 3), ("MB", 6), ("GB", 9))}


@dataclasses.dataclass(frozen=True)
class Output:
    """A merged model before its numbers."""

    path: Path
    # Types and shapes in the order in which the tensors are written.
    entries: dict[str, Entry]
    # Strings that say how it was made.
    metadata: dict[str, str]
    # The model whose form it gets.
    base: TensorFile
    overwrite: bool = False
    # Most bytes of a file of a folder; 0 to divide it as the base is divided.
    shard_size: int = 0
    # The name that a config has for the type of all its numbers, where that is a new one.
    dtype: str = ""
    # The model card of a folder.
    card: str = ""

    @property
    def is_sharded(self) -> bool:
        """True for a folder of safetensors, of which there may be several."""
        return self.path.suffix not in (SAFETENSORS, NPZ) and self.base.form.kind != "orbax"


def check(path: Path, base: TensorFile | None = None, *, overwrite: bool = False) -> None:
    """Check that an output can be written to a path, in the form of a base that is open.

    Raises:
        InvalidInput: the path has another ending, lies nowhere, or has something there already.
    """
    given = f"output={path}"
    if path.suffix in (*PICKLES, ".json", ".toml", ".txt", ".h5", ".gguf"):
        raise InvalidInput(f"{given}: must be a folder or end in {SAFETENSORS}")
    if path.suffix == NPZ and base and base.form.kind != "npz":
        raise InvalidInput(f"{given}: must end in {SAFETENSORS}, as the base is no {NPZ}")
    if path.suffix in (SAFETENSORS, NPZ):
        if path.is_dir():
            raise InvalidInput(f"{given}: is a folder already; choose another name")
        if path.exists() and not overwrite:
            raise InvalidInput(f"{given}: exists; choose another name or set overwrite")
    elif path.is_file():
        raise InvalidInput(f"{given}: is a file already; choose another name")
    elif path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise InvalidInput(f"{given}: exists; choose another name or set overwrite")
        if not _is_ours(path):
            raise InvalidInput(
                f"{given}: is a folder that no merge has written, and is not replaced; choose "
                "another name"
            )
    files.check_folder("output", path)


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is what `writing_model` leaves, so that it may be replaced."""
    if (folder / "_METADATA").is_file():
        return MADE_BY in (folder / "_METADATA").read_text()
    for path in folder.glob(f"*{SAFETENSORS}"):
        with contextlib.suppress(InvalidInput):
            file = CheckpointFiles("safetensors", (path,))
            return MADE_BY in TensorFile.open("output", path, file).metadata
    return False


def bytes_of(text: str) -> int:
    """Read a size such as 5GB or 500MB; raises InvalidInput for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]B)", text.strip())
    if not match or not float(match[1]):
        raise InvalidInput(f"shard_size={text}: must be a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


@contextlib.contextmanager
def writing_model(output: Output, folder: Path) -> Iterator[Target]:
    """Yield what the tensors' bytes are written to, in the order of the output's entries.

    Args:
        output: what is written.
        folder: for files that are turned into another kind.

    Raises:
        InvalidInput: the output cannot be written, or something has come to be there.
    """
    path, kind = output.path, output.base.form.kind
    if path.suffix == SAFETENSORS:
        with writing(path, output.entries, output.metadata, overwrite=output.overwrite) as file:
            yield file
    elif path.suffix == NPZ or kind == "orbax":
        merged = folder / "merged.safetensors"
        with writing(merged, output.entries, {}) as file:
            yield file
        whole = TensorFile.open("output", merged)
        if path.suffix == NPZ:
            made = json.dumps(output.metadata)
            npz_files.from_safetensors(whole, path, made, overwrite=output.overwrite)
        else:
            with _replacing_folder(output) as temporary:
                like = output.base.form.tensors[0]
                orbax_files.from_safetensors(whole, like, temporary, output.metadata)
    else:
        with _replacing_folder(output) as temporary:
            temporary.mkdir()
            shards = _Shards(_parts(output, temporary), output.metadata)
            try:
                yield shards
                shards.finish()
            finally:
                shards.close()
            _write_beside(output, temporary)


@contextlib.contextmanager
def _replacing_folder(output: Output) -> Iterator[Path]:
    """Yield the temporary path of a folder, which takes the place of an older one at the end."""
    path = output.path
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{files.TEMPORARY}")
    try:
        yield temporary
        # Checked once more, as merging can take long.
        check(path, output.base, overwrite=output.overwrite)
        if path.is_dir():
            # No folder replaces one that is not empty, so the old one steps aside.
            aside = temporary.with_name(f"{temporary.name}.old")
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise InvalidInput(
            f"output={path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Shards:
    """The bytes of tensors, which go to one file after another."""

    def __init__(self, parts: Mapping[Path, Mapping[str, Entry]], metadata: Mapping[str, str]):
        self._parts, self._metadata = iter(parts.items()), metadata
        self._file: BinaryIO | None = None
        self._left = 0

    def write(self, data: Any) -> None:
        """Write bytes of one tensor."""
        while not self._left:
            self._next()
        assert self._file
        self._file.write(data)
        self._left -= len(data)

    def finish(self) -> None:
        """Write what is left: headers of files whose tensors are all empty."""
        with contextlib.suppress(StopIteration):
            while True:
                self._next()

    def close(self) -> None:
        """Close the file that is open."""
        if self._file:
            on_the_disk(self._file)
            self._file.close()
            self._file = None

    def _next(self) -> None:
        path, entries = next(self._parts)
        self.close()
        self._file = path.open("wb")
        self._file.write(header(entries, self._metadata))
        self._left = sum(entry.end - entry.begin for entry in entries.values())


def _parts(output: Output, folder: Path) -> dict[Path, dict[str, Entry]]:
    """Divide the tensors among the files of a folder."""
    groups: list[list[str]] = []
    last, filled = None, 0
    for name, entry in output.entries.items():
        size, shard = entry.end - entry.begin, output.base.places[name][0]
        full = filled + size > output.shard_size if output.shard_size else shard != last
        if full or not groups:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        last, filled = shard, filled + size
    names = [WEIGHTS_FILE]
    if len(groups) > 1:
        stem = WEIGHTS_FILE.removesuffix(SAFETENSORS)
        count = len(groups)
        names = [f"{stem}-{n:05d}-of-{count:05d}{SAFETENSORS}" for n in range(1, count + 1)]
    of_group = [{name: output.entries[name] for name in group} for group in groups]
    return {
        folder / name: laid_out({n: (e.dtype, e.shape, e.end - e.begin) for n, e in part.items()})
        for name, part in zip(names, of_group, strict=True)
    }


def _write_beside(output: Output, folder: Path) -> None:
    """Write the index and the model card, and copy config and tokenizer of the base."""
    parts = _parts(output, folder)
    if len(parts) > 1:
        entries = output.entries.values()
        index = {
            "metadata": {
                "total_parameters": sum(entry.size for entry in entries),
                "total_size": sum(entry.end - entry.begin for entry in entries),
            },
            "weight_map": {name: path.name for path, part in parts.items() for name in part},
        }
        files.write_json(folder / INDEX_FILE, index)
    for path in output.base.form.beside:
        target = folder / path.relative_to(output.base.form.tensors[0].parent)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if output.dtype and (folder / CONFIG_FILE).exists():
        content = json.loads((folder / CONFIG_FILE).read_text())
        files.write_json(folder / CONFIG_FILE, _with_dtype(content, output.dtype))
    files.write_text(folder / CARD_FILE, output.card)


def _with_dtype(config: Any, dtype: str) -> Any:
    """Replace the type of numbers in a config, by which transformers reads them, however deep."""
    if isinstance(config, list):
        return [_with_dtype(item, dtype) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in _DTYPE_KEYS and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }
