"""Models that are a base plus an adapter, read like the files that they would be saved to."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax.offline.tensor_files import FLOATS, Entry, TensorFile, laid_out
from pm_jax.types import InvalidInput
from pm_jax.weights import checkpoint_files
from pm_jax.weights.checkpoint_files import CheckpointFiles
from pm_jax.weights.peft_folder import PeftFolder, tensor_of, tensors_of


@dataclasses.dataclass(frozen=True)
class AdaptedFile(TensorFile):
    """A base plus the displacement of an adapter; only the rows that are asked for are multiplied.

    The tensors that differ from the base are float32, or float64 where the base's are.
    """

    # Theta_0; `None` for zeros, so that the numbers are those of the displacement alone.
    origin: TensorFile | None
    adapter: PeftFolder
    # The module that adapts a tensor, by the tensor's name.
    modules: Mapping[str, str]

    @classmethod
    def on(cls, origin: TensorFile, adapter: PeftFolder) -> "AdaptedFile":
        """Return a base with an adapter.

        Raises:
            InvalidInput: the adapter has modules or shapes that the base does not have.
        """
        modules, entries = tensors_of(adapter, origin.entries), dict(origin.entries)
        for name, module in modules.items():
            shape, entry = adapter.modules[module].shape, entries[name]
            if entry.shape not in (shape, shape[::-1]) or entry.dtype not in FLOATS:
                raise InvalidInput(
                    f"{adapter.argument}={adapter.source}: the displacement of {module} is "
                    f"{list(shape)}, and {name} of the base is {list(entry.shape)} of type "
                    f"{entry.dtype}; give the base that it was trained on"
                )
            entries[name] = _widened(entry, entry.shape)
        for name, shape in adapter.saved.items():
            entries[name] = _widened(entries.get(name), shape)
        return cls(**_fields(adapter, entries), origin=origin, adapter=adapter, modules=modules)

    @classmethod
    def alone(cls, adapter: PeftFolder, entries: Mapping[str, Entry]) -> "AdaptedFile":
        """Return the displacement of an adapter, 0 in those of some entries that it lacks."""
        modules = {f"{module}.weight": module for module in adapter.modules}
        return cls(**_fields(adapter, entries), origin=None, adapter=adapter, modules=modules)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that differ from the base."""
        return frozenset(self.modules) | frozenset(self.adapter.saved)

    def _fetched(self, name: str, first: int, stop: int, dtype: np.dtype) -> np.ndarray:
        if self.origin and name not in self.changed:
            return self.origin._fetched(name, first, stop, dtype)
        stored = FLOATS[self.entries[name].dtype]
        if dtype == stored:
            return self._values(name, first, stop).astype(stored, copy=False)
        # The bytes of numbers, of which the first and the last may be asked for in part.
        first_byte, stop_byte = first * dtype.itemsize, stop * dtype.itemsize
        low, high = first_byte // stored.itemsize, -(-stop_byte // stored.itemsize)
        values = self._values(name, low, high).astype(stored).view(np.uint8)
        begin = low * stored.itemsize
        return values[first_byte - begin : stop_byte - begin].view(dtype)

    def _values(self, name: str, first: int, stop: int) -> np.ndarray:
        if name in self.adapter.saved:
            return self.adapter.saved_tensor(name).reshape(-1)[first:stop]
        values: np.ndarray = np.zeros(stop - first, np.float32)
        if self.origin:
            values = self.origin.read(name, first, stop)
            values = values.astype(np.result_type(np.float32, values.dtype), copy=False)
        if name not in self.modules:
            return values
        b, a = self.adapter.factors(self.modules[name])
        if self._is_transposed(name):
            b, a = a.T, b.T
        width = a.shape[1]
        top = first // width
        rows = b[top : -(-stop // width)] @ a
        return values + rows.reshape(-1)[first - top * width : stop - top * width]

    def _is_transposed(self, name: str) -> bool:
        """Tell whether a tensor is stored as [in, out]: tables of ids, and GPT-2's Conv1D."""
        factors = self.adapter.modules[self.modules[name]]
        if self.origin is None or len(factors.shape) > 2:
            return False
        stored = self.entries[name].shape
        may_be = factors.is_embedding or bool(self.adapter.config.get("fan_in_fan_out"))
        # A square one follows the config; in GPT-2 all of them are of this kind.
        return stored != factors.shape or (may_be and stored == factors.shape[::-1])


class NoDisplacement(TensorFile):
    """The displacement of theta_0 from itself, which is zero."""

    @classmethod
    def like(cls, adapter: PeftFolder, entries: Mapping[str, Entry]) -> "NoDisplacement":
        """Return zeros in the shapes of some entries."""
        about = {"argument": "base", "source": Path("no displacement")}
        return cls(**_fields(adapter, entries) | about)

    def sha256(self) -> list[str]:
        """Return nothing, as there is no file."""
        return []

    def _fetched(self, name: str, first: int, stop: int, dtype: np.dtype) -> np.ndarray:
        del name
        return np.zeros(stop - first, dtype)


def changed_tensors(models: Sequence[TensorFile]) -> frozenset[str] | None:
    """Names of the tensors that some of the adapters change; `None` if a model is whole."""
    names: frozenset[str] = frozenset()
    for model in models:
        if not isinstance(model, AdaptedFile):
            return None
        names |= model.changed
    return names


def common_shapes(adapters: Sequence[PeftFolder]) -> dict[str, tuple[int, ...]]:
    """Find the shapes of all displacements, by module.

    Raises:
        InvalidInput: the adapters are of several bases, or name one module in two ways.
    """
    first = adapters[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        given = f"{adapter.argument}={adapter.source}"
        names = {first.base_name, adapter.base_name} - {""}
        if len(names) > 1:
            raise InvalidInput(
                f"{given}: is of the base {adapter.base_name}, and {first.source} of "
                f"{first.base_name}; give adapters of one base, and if it is one, set "
                "base_model_name_or_path alike"
            )
        # Only names that this adapter does not have itself can be others for its modules.
        elsewhere = [f"{module}.weight" for module in shapes if module not in adapter.modules]
        for module, factors in adapter.modules.items():
            alike = None if module in shapes else tensor_of(module, elsewhere)
            if alike:
                raise InvalidInput(
                    f"{given}: adapts {module}, which another adapter seems to call "
                    f"{alike.removesuffix('.weight')}; give adapters that name the modules alike"
                )
            if shapes.setdefault(module, factors.shape) != factors.shape:
                raise InvalidInput(
                    f"{given}: the displacement of {module} is {list(factors.shape)}, and of "
                    f"another adapter {list(shapes[module])}; give adapters of one base"
                )
        if bool(adapter.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            raise InvalidInput(
                f"{given}: has another fan_in_fan_out than {first.source}; give adapters of one "
                "base"
            )
    return dict(sorted(shapes.items()))


def displacement_entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Return entries for the displacements of modules, by the names of their weights."""
    return laid_out({f"{m}.weight": ("F32", s, 4 * math.prod(s)) for m, s in shapes.items()})


def fisher_of_displacements(
    path: Path, adapters: Sequence[PeftFolder], entries: Mapping[str, Entry]
) -> TensorFile:
    """Open the Fisher of a model, with the tensors that adapters displace under the modules' names.

    Raises:
        InvalidInput: it is not safetensors, lacks a tensor or has one of another shape or type, or
            one that is displaced may be stored as [in, out].
    """
    found = checkpoint_files.find("fishers", path)
    if found.kind != "safetensors":
        raise InvalidInput(f"fishers={path}: must be safetensors, as experiments.fisher writes it")
    file, names = TensorFile.open("fishers", path, found), dict[str, str]()
    are_transposed = any(adapter.config.get("fan_in_fan_out") for adapter in adapters)
    for name, entry in entries.items():
        module = name.removesuffix(".weight")
        owners = [adapter.modules[module] for adapter in adapters if module in adapter.modules]
        if are_transposed or any(factors.is_embedding for factors in owners):
            raise InvalidInput(
                f"fishers={path}: may have {module} stored as [in, out], which the displacement of "
                "an adapter is not; give as base the model that the adapters are of"
            )
        stored = tensor_of(module, file.entries)
        if stored is None:
            raise InvalidInput(
                f"fishers={path}: has no {name}, which the adapters displace; give the Fisher of "
                "the model that they are of"
            )
        there = file.entries[stored]
        if there.shape != entry.shape or there.dtype not in FLOATS:
            raise InvalidInput(
                f"fishers={path}: {stored} is {list(there.shape)} of type {there.dtype}, and the "
                f"adapters displace {list(entry.shape)}; give the Fisher of the model that they "
                "are of"
            )
        if stored in names.values():
            raise InvalidInput(
                f"fishers={path}: has one {stored} for several modules, {module} among them; give "
                "adapters that call a module by one name, and the Fisher of the model that they "
                "are of"
            )
        names[name] = stored
    return dataclasses.replace(
        file,
        entries={name: file.entries[stored] for name, stored in names.items()},
        places={name: file.places[stored] for name, stored in names.items()},
    )


def _widened(entry: Entry | None, shape: tuple[int, ...]) -> Entry:
    """Return the entry of a tensor that is read in float32 or wider."""
    kind = "F64" if entry and entry.dtype == "F64" else "F32"
    return Entry(kind, shape, 0, math.prod(shape) * FLOATS[kind].itemsize)


def _fields(adapter: PeftFolder, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the fields of a file that an adapter stands for."""
    return {
        "argument": adapter.argument,
        "source": adapter.source,
        "entries": dict(entries),
        "metadata": {},
        "places": dict.fromkeys(entries, (adapter.weights, 0)),
        "form": CheckpointFiles("safetensors", (adapter.weights,)),
    }
