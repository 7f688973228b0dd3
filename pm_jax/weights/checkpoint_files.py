"""The files of a checkpoint as people have them: one file, a folder of transformers, or of Orbax.

    model.safetensors, model.npz                one file
    model/                                      a folder of transformers: config.json, tokenizer and
                                                model.safetensors, or shards and their index
    checkpoint/, manager/, manager@1000         a tree that Orbax saved; the newest step of a
                                                CheckpointManager, or the step that is named

Names and indices are read here, and no tensor.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pm_jax import files
from pm_jax.types import InvalidInput, cause

SAFETENSORS, NPZ = ".safetensors", ".npz"
WEIGHTS_FILE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
INDEX_FILE = f"model{INDEX_ENDING}"
CONFIG_FILE, CARD_FILE, ADAPTER_CONFIG_FILE = "config.json", "README.md", "adapter_config.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that are read by running code."""

_OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
_TEXTS = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE")
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")
_REMOTE = re.compile(r"(\w+://.+)|[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")


class CheckpointFiles(NamedTuple):
    """Where the tensors of a checkpoint are.

    Attributes:
        kind: "safetensors", "npz" or "orbax".
        tensors: the safetensors files in the order of their names, one for each shard; or the one
            `.npz`; or the folder of one tree that Orbax saved.
        beside: config, tokenizer and licence of a folder of transformers, which any model made
            from this one needs too.
        shard_of: `{name of a tensor: its file}` by an index; empty without one.
    """

    kind: str
    tensors: tuple[Path, ...]
    beside: tuple[Path, ...] = ()
    shard_of: Mapping[str, Path] = {}

    @property
    def config(self) -> Path | None:
        """The config.json, if there is one."""
        path = self.tensors[0].parent / CONFIG_FILE
        return path if path in self.beside else None


def find(argument: str, path: str | os.PathLike) -> CheckpointFiles:
    """Find the files of a checkpoint; `argument` is what names the path in messages.

    Raises:
        InvalidInput: there is nothing, a pickle, something else, more than one model, or a shard is
            missing.

    Example:
        >>> find("pretrained", "google/vit-base-patch16-224")
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: pretrained=google/vit-base-patch16-224: there is no such file or
        folder, and nothing is downloaded; for a model of the Hugging Face Hub run hf download
        google/vit-base-patch16-224 --local-dir=FOLDER, and give the folder
    """
    path = Path(path)
    given = f"{argument}={path}"
    # `Path.exists` raises for a name that is too long.
    if not os.path.exists(path):
        folder, at, step = str(path).rpartition("@")
        if at and step.isdigit() and Path(folder).is_dir():
            return _step(given, Path(folder), int(step))
        raise _absent(argument, path)
    if path.name.endswith(INDEX_ENDING):
        return _shards(given, path)
    if path.is_dir():
        return _in_folder(given, path)
    if path.suffix in PICKLES:
        raise _pickle(given, path)
    if path.suffix not in (SAFETENSORS, NPZ):
        raise InvalidInput(f"{given}: must be a {SAFETENSORS} or {NPZ} file, or a folder")
    shard = _SHARD.fullmatch(path.name)
    if shard and path.with_name(shard[1] + INDEX_ENDING).exists():
        raise InvalidInput(f"{given}: is one shard of a model; give its folder, {path.parent}")
    return CheckpointFiles(path.suffix[1:], (path,))


def check_shards(
    argument: str, path: Path, found: CheckpointFiles, names: Mapping[Path, Iterable[str]]
) -> None:
    """Check that shards hold what their index says, `names` by file.

    Raises:
        InvalidInput: a tensor is in two shards, or not where the index has it.
    """
    place: dict[str, Path] = {}
    for file, tensors in names.items():
        for name in tensors:
            if name in place:
                raise InvalidInput(
                    f"{argument}={path}: {name} is in two shards, {place[name].name} and "
                    f"{file.name}; get the files anew"
                )
            place[name] = file
    if not found.shard_of or place == found.shard_of:
        return
    wrong = [
        f"{name} is in {place[name].name if name in place else 'no shard'}, "
        f"not in {found.shard_of[name].name if name in found.shard_of else 'the index'}"
        for name in dict.fromkeys([*found.shard_of, *place])
        if place.get(name) != found.shard_of.get(name)
    ]
    raise InvalidInput(
        f"{argument}={path}: shards and index differ: {files.listed(wrong)}; get the files anew"
    )


def _absent(argument: str, path: Path) -> InvalidInput:
    if path.suffix in (SAFETENSORS, NPZ):
        return InvalidInput(f"{argument}={path}: there is no such file")
    remedy = "give a file or folder that is there"
    # `Path` makes one slash of the two in a URL.
    if _REMOTE.fullmatch(str(path).replace(":/", "://")) and not path.parent.exists():
        name = re.sub(r"^\w+:/+(huggingface\.co/)?", "", str(path))
        remedy = (
            f"for a model of the Hugging Face Hub run hf download {name} --local-dir=FOLDER, and "
            "give the folder"
        )
    return InvalidInput(
        f"{argument}={path}: there is no such file or folder, and nothing is downloaded; {remedy}"
    )


def _pickle(given: str, path: Path) -> InvalidInput:
    return InvalidInput(
        f"{given}: {path.name} is a pickle, and reading one can run any code; convert it in "
        "PyTorch, where you trust it: safetensors.torch.save_file(torch.load(FILE, "
        "weights_only=True), 'model.safetensors')"
    )


def _in_folder(given: str, folder: Path) -> CheckpointFiles:
    single = sorted(path for path in folder.glob(f"*{SAFETENSORS}") if _is_model(path))
    indices = sorted(folder.glob(f"*{INDEX_ENDING}"))
    # The usual names go before others, which some folders hold besides (a second precision).
    for name in (WEIGHTS_FILE, INDEX_FILE):
        chosen = folder / name
        if chosen in single + indices:
            other = folder / (INDEX_FILE if name == WEIGHTS_FILE else WEIGHTS_FILE)
            if other.exists():
                raise InvalidInput(
                    f"{given}: holds both {WEIGHTS_FILE} and {INDEX_FILE}; give one of the two"
                )
            single, indices = [chosen] * (chosen in single), [chosen] * (chosen in indices)
            break
    whole = [path for path in single if not _SHARD.fullmatch(path.name)]
    if single and not indices and not whole:
        raise InvalidInput(f"{given}: holds shards and no {INDEX_FILE}; get it too")
    models = [*indices, *whole]
    if len(models) > 1:
        raise InvalidInput(
            f"{given}: holds several models, {files.listed([path.name for path in models])}; give "
            "one of them"
        )
    if indices:
        return _shards(given, indices[0])
    if whole:
        return CheckpointFiles("safetensors", (whole[0],), _beside(folder))
    return _without_safetensors(given, folder)


def _is_model(path: Path) -> bool:
    """Tell a model's file from those of adapters beside it."""
    return not path.name.startswith("adapter_")


def _without_safetensors(given: str, folder: Path) -> CheckpointFiles:
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise InvalidInput(f"{given}: is an adapter of PEFT; a model is needed here")
    if _is_of_orbax(folder) or _steps(folder):
        return _tree(given, folder)
    present = sorted(path for path in folder.iterdir() if path.is_file())
    if pickles := [path for path in present if path.suffix in PICKLES]:
        raise _pickle(given, pickles[0])
    if others := [path.name for path in present if path.suffix in _OTHER_WEIGHTS]:
        raise InvalidInput(f"{given}: holds {others[0]} and no {SAFETENSORS}; convert it to those")
    raise InvalidInput(
        f"{given}: holds no model: neither {WEIGHTS_FILE}, nor shards with {INDEX_FILE}, nor what "
        "Orbax saves"
    )


def _shards(given: str, index: Path) -> CheckpointFiles:
    folder = index.parent
    try:
        content = files.read_json(index, {"weight_map": {str: str}})
    except (ValueError, OSError) as error:
        raise InvalidInput(
            f"{given}: {index.name} cannot be read ({cause(error)}); get it anew"
        ) from error
    named = sorted(set(content["weight_map"].values()))
    if not named:
        raise InvalidInput(f"{given}: {index.name} names no tensor; get it anew")
    if strange := [name for name in named if Path(name).name != name]:
        raise InvalidInput(f"{given}: {index.name} names {strange[0]}, outside of the folder")
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise InvalidInput(
            f"{given}: lacks {files.listed(missing)}, which {index.name} names; get the files anew"
        )
    shard_of = {tensor: folder / name for tensor, name in content["weight_map"].items()}
    shards = tuple(folder / name for name in named)
    return CheckpointFiles("safetensors", shards, _beside(folder), shard_of)


def _beside(folder: Path) -> tuple[Path, ...]:
    """List the small files of a folder that a model made from this one needs as well."""
    # sentence-transformers keeps the settings of its further modules in folders of their own.
    candidates = [*folder.iterdir(), *folder.glob(f"[0-9]*_*/{CONFIG_FILE}")]
    return tuple(
        path
        for path in sorted(candidates)
        if path.is_file()
        and not path.name.endswith(".index.json")
        and path.name != ADAPTER_CONFIG_FILE
        and (path.suffix in _TEXTS or path.stem.upper() in _LEGAL)
    )


def _is_of_orbax(folder: Path) -> bool:
    """Tell whether Orbax saved a tree, or the items of a step, in a folder."""
    return any((folder / name).is_file() for name in _ORBAX) or bool(_items(folder))


def _items(folder: Path) -> list[Path]:
    """List the trees of a step of a CheckpointManager, beside which it may have other items."""
    return sorted(path.parent for path in folder.glob("*/_METADATA"))


def _steps(folder: Path) -> dict[int, Path]:
    """List the steps of a CheckpointManager, which are folders such as 100 or step_0100."""
    steps = {}
    for path in sorted(folder.iterdir()):
        number = re.fullmatch(r"(?:\w*_)?(\d+)", path.name)
        if number and path.is_dir() and _is_of_orbax(path):
            steps[int(number[1])] = path
    return steps


def _step(given: str, folder: Path, step: int) -> CheckpointFiles:
    steps = _steps(folder)
    if step not in steps:
        there = files.listed([str(number) for number in sorted(steps)]) or "none"
        raise InvalidInput(f"{given}: {folder} has no step {step}; it has {there}")
    return _tree(given, steps[step])


def _tree(given: str, folder: Path) -> CheckpointFiles:
    """Find the one tree that Orbax saved in a folder, in its newest step or its one item."""
    if any((folder / name).is_file() for name in _ORBAX if name != "_CHECKPOINT_METADATA"):
        return CheckpointFiles("orbax", (folder,))
    if steps := _steps(folder):
        return _tree(given, steps[max(steps)])
    if len(items := _items(folder)) > 1:
        raise InvalidInput(
            f"{given}: {folder.name} holds several trees, "
            f"{files.listed([path.name for path in items])}; give the folder of one, such as "
            f"{items[0]}"
        )
    # A damaged folder is refused by Orbax, which knows what is wrong with it.
    return CheckpointFiles("orbax", (items[0] if items else folder,))
