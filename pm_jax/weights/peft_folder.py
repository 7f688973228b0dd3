"""LoRA adapters that PEFT wrote, read module by module.

PEFT writes a folder with `adapter_config.json` and `adapter_model.safetensors`. The folder stands
for the adapter, and so does the file in it. A file alone counts if it has the config among its
metadata, as merged adapters in one file do.

A module's displacement is `scale B A`, with `scale = alpha / r`, or `alpha / sqrt(r)` for rslora.

References:
    PEFT, `PEFT checkpoint format
    <https://huggingface.co/docs/peft/developer_guides/checkpoint>`_
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput, cause
from pm_jax.weights.peft_adapter import (
    CONFIG_FILE,
    CONFIG_IN_METADATA,
    PREFIX,
    WEIGHTS_FILE,
    saved_module,
)

PICKLE = "adapter_model.bin"

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(embedding_)?([AB])(\.weight)?")
_OTHER_METHODS = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_bdlora"),
)
"""Options of PEFT with which a displacement is not `scale B A` of whole modules."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that take something out of the weights adapted."""

_PATTERNS: dict[str, Any] = {
    "rank_pattern": {str: int},
    "alpha_pattern": {str: (int, float)},
    "modules_to_save": [str],
}
"""Form of the settings that hold regular expressions over the names of modules."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """Where the factors of one module are, and the displacement `scale B A` that they make."""

    # Names of the two tensors in the file.
    a: str
    b: str
    # Outputs first: [out, in], [out, in, *window] of a convolution, [size, ids] of an embedding.
    shape: tuple[int, ...]
    rank: int
    scale: float
    # An embedding stores its table as [ids, size], the transposed displacement.
    is_embedding: bool


@dataclasses.dataclass(frozen=True)
class PeftFolder:
    """An adapter whose config and header are read and checked, and no tensor."""

    # The argument that named the adapter, for messages.
    argument: str
    # The path that the user gave, for messages.
    source: Path
    # The file of the tensors.
    weights: Path
    config: Mapping[str, Any]
    # By the name of the module in the model that was adapted.
    modules: Mapping[str, Factors]
    # Shapes of the tensors of whole modules that were trained beside the factors
    # (`modules_to_save`), by their names in the model.
    saved: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, argument: str, path: Path) -> "PeftFolder":
        """Read and check an adapter; `argument` names it in messages.

        Raises:
            InvalidInput: there is none, it is damaged, or it is of another kind than LoRA.
        """
        given = f"{argument}={path}"
        weights = path / WEIGHTS_FILE if path.is_dir() else path
        if not weights.is_file():
            if weights.with_name(PICKLE).is_file():
                raise InvalidInput(
                    f"{given}: {PICKLE} is a pickle, and reading one can run any code; load it in "
                    "PEFT, where you trust it, and save it again by save_pretrained"
                )
            raise InvalidInput(f"{given}: has no {WEIGHTS_FILE}; give the folder of an adapter")
        shapes, metadata = _header(given, weights)
        config = _config(given, weights, metadata)
        _check_kind(given, config)
        saved, factors = dict[str, tuple[int, ...]](), dict[str, dict[str, str]]()
        for name, shape in shapes.items():
            if found := _FACTOR.fullmatch(name):
                factors.setdefault(found[1], {})[found[3]] = name
            elif _is_saved(name, config):
                saved[name.removeprefix(PREFIX)] = shape
            else:
                raise InvalidInput(
                    f"{given}: holds {name}, which is neither a factor of LoRA nor of "
                    "modules_to_save; save the adapter by PEFT's save_pretrained, with "
                    "save_embedding_layers=False"
                )
        if not factors:
            raise InvalidInput(f"{given}: holds no factors of LoRA; give another adapter")
        modules = {
            module: _factors(given, config, module, names, shapes)
            for module, names in sorted(factors.items())
        }
        return cls(argument, path, weights, config, modules, saved)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(factors.rank for factors in self.modules.values())

    @property
    def base_name(self) -> str:
        """The last part of the base's path or name, as the config has it; empty if it has none."""
        return Path(self.config.get("base_model_name_or_path") or "").name

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """Read `scale B` [out, r] and A [r, in] of a module, float32; raises `InvalidInput`."""
        found = self.modules[module]
        a, b = (self._tensor(name) for name in (found.a, found.b))
        return np.float32(found.scale) * b.reshape(-1, found.rank), a.reshape(found.rank, -1)

    def displacement(self, module: str) -> np.ndarray:
        """Multiply the factors of a module out, to `Factors.shape`; raises `InvalidInput`."""
        b, a = self.factors(module)
        return (b @ a).reshape(self.modules[module].shape)

    def saved_tensor(self, name: str) -> np.ndarray:
        """Read a tensor of a whole module, float32; raises `InvalidInput`."""
        return self._tensor(PREFIX + name)

    def _tensor(self, name: str) -> np.ndarray:
        with _opened(f"{self.argument}={self.source}", self.weights) as file:
            tensor = np.asarray(file.get_tensor(name), np.float32)
        if not np.isfinite(tensor).all():
            raise InvalidInput(
                f"{self.argument}={self.source}: {name} is not finite; take an adapter from before "
                "it diverged"
            )
        return tensor


def is_adapter(path: Path) -> bool:
    """Tell whether a path is that of a LoRA adapter: a folder of PEFT, or a file of factors."""
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE))
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with _opened("", path) as file:
            return any(_FACTOR.fullmatch(name) for name in file.keys())
    except InvalidInput:
        # The reader of models says what is wrong with the file.
        return False


def tensor_of(module: str, names: Collection[str]) -> str | None:
    """Find the weight that a module's adapter belongs to among the names of a model's tensors.

    A name may have a prefix more or less than the module, as a model inside another one has, and
    may be the one that transformers had in files before its version 5.

    Example:
        >>> tensor_of("bert.encoder.query", ["encoder.query.weight", "encoder.key.weight"])
        'encoder.query.weight'
    """
    for candidate in (module, saved_module(module)):
        wanted = f"{candidate}.weight"
        if wanted in names:
            return wanted
        # A name without a dot would be the end of any other.
        nested = [
            name
            for name in names
            if name.endswith(f".{wanted}") or ("." in name and wanted.endswith(f".{name}"))
        ]
        if len(nested) == 1:
            return nested[0]
    return None


def tensors_of(adapter: PeftFolder, names: Collection[str]) -> dict[str, str]:
    """Find the weight of every module of an adapter, as `{name: module}`.

    Raises:
        InvalidInput: a module is not in the model, or two are the same weight.
    """
    found: dict[str, str] = {}
    strange = []
    for module in adapter.modules:
        name = tensor_of(module, names)
        if name is None or name in found:
            strange.append(module)
        else:
            found[name] = module
    if strange:
        raise InvalidInput(
            f"{adapter.argument}={adapter.source}: adapts {files.listed(strange)}, which the base "
            "does not have; give the base that it was trained on"
        )
    return found


@contextlib.contextmanager
def _opened(given: str, path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    # Opened for each tensor: the pages of a map count as the process's memory until it is closed.
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{given}: cannot be read ({cause(error)}); get it anew") from error


def _header(given: str, path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read the shapes and the metadata of a file of floating-point tensors."""
    with _opened(given, path) as file:
        # Its order is that of the bytes or of the names, as the version of the package has it.
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        if strange := [
            name
            for name, tensor in slices.items()
            if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16")
        ]:
            raise InvalidInput(
                f"{given}: {strange[0]} is of type {slices[strange[0]].get_dtype()}; save the "
                "adapter in float32"
            )
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
        return shapes, file.metadata() or {}


def _config(given: str, weights: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    form = {"peft_type": str}
    path = weights.with_name(CONFIG_FILE)
    try:
        if CONFIG_IN_METADATA in metadata:
            return files.parse_json(metadata[CONFIG_IN_METADATA], form)
        return files.read_json(path, form)
    except FileNotFoundError:
        raise InvalidInput(
            f"{given}: has no {CONFIG_FILE} beside it, which says by what the factors are "
            "multiplied; give the whole folder"
        ) from None
    except (ValueError, OSError) as error:
        raise InvalidInput(
            f"{given}: {CONFIG_FILE} cannot be read ({cause(error)}); get it anew"
        ) from error


def _check_kind(given: str, config: Mapping[str, Any]) -> None:
    """Check that an adapter adds `scale B A` to weights and does nothing else."""
    remedy = "fold it by PEFT's merge_and_unload and give the model"
    if config["peft_type"] != "LORA":
        raise InvalidInput(f"{given}: is of peft_type {config['peft_type']}, not LORA; {remedy}")
    for name in _OTHER_METHODS:
        # An empty list switches activated LoRA on as well.
        if config.get(name) not in (None, False, {}, 0):
            raise InvalidInput(
                f"{given}: has {name}, with which its displacement is not alpha / r B A; {remedy}"
            )
    if (bias := config.get("bias") or "none") != "none":
        raise InvalidInput(f"{given}: has bias={bias}, trained beside the factors; {remedy}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        raise InvalidInput(
            f"{given}: has init_lora_weights={start}, which changes the base too; save it by "
            "PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        )
    form = {"r": int, "lora_alpha": (int, float)}
    if not files.fits(config, form) or min(config["r"], config["lora_alpha"]) <= 0:
        raise InvalidInput(f"{given}: {CONFIG_FILE} lacks r or lora_alpha above 0; get it anew")
    for name, form in _PATTERNS.items():
        patterns = config.get(name) or type(form)()
        if not files.fits(patterns, form) or not all(map(_is_pattern, patterns)):
            raise InvalidInput(f"{given}: {name} of {CONFIG_FILE} cannot be read; get it anew")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_saved(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor is of a module that is saved whole, by PEFT's own rule."""
    modules = config.get("modules_to_save") or ()
    inner = name.removeprefix(PREFIX)
    return name.startswith(PREFIX) and any(
        re.match(rf"(^|.*\.){module}\..*", inner) for module in modules
    )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Read a number of a module, where PEFT's first pattern that matches its end counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _factors(
    given: str,
    config: Mapping[str, Any],
    module: str,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Factors:
    if missing := [letter for letter in "AB" if letter not in names]:
        raise InvalidInput(f"{given}: {module} has no lora_{missing[0]}; get it anew")
    a, b = shapes[names["A"]], shapes[names["B"]]
    # The second factor of a convolution acts on single places.
    fits = len(a) == len(b) > 1 and b[1] == a[0] > 0 and set(b[2:]) <= {1}
    if not fits:
        raise InvalidInput(
            f"{given}: lora_A of {module} is {list(a)} and lora_B {list(b)}, which are no factors "
            "of one displacement; get it anew, or fold it by PEFT's merge_and_unload"
        )
    rank = a[0]
    if (said := _by_pattern(config.get("rank_pattern"), module, config["r"])) != rank:
        raise InvalidInput(
            f"{given}: {module} is of rank {rank}, and {CONFIG_FILE} says {said}; get both from "
            "the same training"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    is_embedding = ".lora_embedding_" in names["A"]
    return Factors(names["A"], names["B"], (b[0], *a[1:]), rank, scale, is_embedding)
