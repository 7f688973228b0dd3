"""Merging checkpoints in files, without training and without whole models in memory.

The rule's `scope` says what must be in memory at once: a block of elements, one tensor, or all
tensors for a rule that looks across them.
"""

import functools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import files
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.offline.requests import Inputs, Merge, open_inputs, rules_by_settings
from pm_jax.offline.tensor_files import FLOATS, TensorFile, check_output, writing
from pm_jax.rules import Evidence, MergeRule, jit_merge
from pm_jax.types import InvalidInput, Params

BLOCK = 1 << 16
"""Elements merged at a time by a rule of scope "element"."""

Load = Callable[[TensorFile], Params]
"""Function that loads, from a file, the part that is merged at once."""


def merge_files(merge: Merge) -> str:
    """Merge checkpoints in files into another file, and return lines that say what was done.

    Raises:
        InvalidInput: a file cannot be read, has other tensors or has NaN; the rule needs more than
            the files contain; or the output exists.
    """
    check_output(merge.output, overwrite=merge.overwrite)
    # Beside the output: its disk has room for a model, the system's folder may have none.
    with tempfile.TemporaryDirectory(
        prefix=f"{merge.output.name}.", dir=merge.output.parent
    ) as folder:
        return _merge(merge, open_inputs(merge, Path(folder)))


def _merge(merge: Merge, inputs: Inputs) -> str:
    by_settings = rules_by_settings(merge, inputs)
    of_tensor = {name: rule for rule, names in by_settings for name in names}
    entries = inputs.base.entries
    with (
        # float64 is on for this merge only if a file holds it: it would slow the others down.
        jax.enable_x64(
            any(e.dtype == "F64" for file in inputs.files for e in file.entries.values())
        ),
        writing(
            merge.output, entries, _provenance(merge, inputs), overwrite=merge.overwrite
        ) as file,
    ):
        pieces = _Pieces(inputs, by_settings, merge.seed)
        for name in entries:
            if name not in of_tensor:
                inputs.base.copy(name, file)
                continue
            for values in pieces.of(name, of_tensor[name]):
                file.write(_rounded(merge, name, values, FLOATS[entries[name].dtype]))
    return _report(merge, inputs, of_tensor)


class _Pieces:
    """Merger of tensors piece by piece, in the order of the elements of each tensor."""

    def __init__(
        self, inputs: Inputs, by_settings: list[tuple[MergeRule, tuple[str, ...]]], seed: int
    ):
        self._inputs, self._by_settings = inputs, by_settings
        self._merged: dict[str, np.ndarray] = {}
        self._run = {id(rule): _runner(rule, inputs, seed) for rule, _ in by_settings}

    def of(self, name: str, rule: MergeRule) -> Iterator[np.ndarray]:
        """Yield the merged pieces of a tensor."""
        run, size = self._run[id(rule)], self._inputs.base.entries[name].size
        # Draws depend on the tensor's name, not on its place among the others.
        place = zlib.crc32(name.encode())
        if rule.needs.scope == "element":
            for block, first in enumerate(range(0, size, BLOCK)):
                stop = min(first + BLOCK, size)
                yield run(self._block(name, first, stop), place, block)[: stop - first]
        elif rule.needs.scope == "tensor":
            yield run(lambda file: self._tensor(file, name), place)
        else:
            if name not in self._merged:
                names = next(names for other, names in self._by_settings if other is rule)
                self._merged |= run(lambda file: {n: self._tensor(file, n) for n in names})
            yield self._merged.pop(name)

    def _block(self, name: str, first: int, stop: int) -> Load:
        def load(file: TensorFile) -> np.ndarray:
            # Padded to one shape, so that one compilation serves all blocks.
            values: np.ndarray = np.zeros(BLOCK, self._dtype(name))
            values[: stop - first] = _values(file, name, first, stop)
            return values

        return load

    def _tensor(self, file: TensorFile, name: str) -> np.ndarray:
        entry = file.entries[name]
        values = _values(file, name, 0, entry.size).astype(self._dtype(name), copy=False)
        return values.reshape(entry.shape)

    def _dtype(self, name: str) -> np.dtype:
        double = any(file.entries[name].dtype == "F64" for file in self._inputs.files)
        return np.dtype(np.float64 if double else np.float32)


def _values(file: TensorFile, name: str, first: int, stop: int) -> np.ndarray:
    values = file.read(name, first, stop)
    if file.argument == "fishers" and values.size and values.min() < 0:
        raise InvalidInput(
            f"fishers={file.source}: {name} holds {values.min()}; must not be negative"
        )
    return values


def _runner(rule: MergeRule, inputs: Inputs, seed: int) -> Callable[..., Params]:
    """Compile a function that merges, over all models, the part that a `load` loads."""

    @jax.jit
    def init(base):
        # A copy, because `update` donates the state, which may be the base itself.
        return rule.init(jax.tree.map(jnp.copy, base))

    @jit_merge
    def update(state, previous, trained, fisher, place):
        evidence = Evidence()
        if "quadratic" in rule.needs.evidence:
            evidence = evidence._replace(quadratic=DiagonalQuadratic.at(trained, fisher))
        if "key" in rule.needs.evidence:
            key = functools.reduce(jax.random.fold_in, place, jax.random.key(seed))
            evidence = evidence._replace(key=key)
        merged, state, _ = rule.update(state, previous=previous, trained=trained, evidence=evidence)
        return state, merged

    def run(load: Load, *part: int) -> Params:
        previous = load(inputs.base)
        state = init(previous)
        for task, file in enumerate(inputs.models):
            trained = load(file)
            fisher = load(inputs.fishers[task]) if inputs.fishers else None
            # The part and the task number the draws, so that no two parts draw alike.
            place = np.asarray([*part, task], np.uint32)
            state, merged = update(state, previous, trained, fisher, place)
            # Otherwise the next model is loaded while this one is still in memory.
            jax.block_until_ready(merged)
            previous = merged if rule.needs.next_task_from == "merged" else trained
        return jax.tree.map(_with_lost_bits, merged, trained)

    return run


def _with_lost_bits(merged: jax.Array, trained: np.ndarray) -> np.ndarray:
    """Restore signed zeros and subnormal numbers, which compiled arithmetic turns into zero."""
    values = np.asarray(merged)
    lost = np.abs(values - trained) < np.finfo(values.dtype).tiny
    return np.where(lost, trained, values)


def _rounded(merge: Merge, name: str, values: np.ndarray, dtype: np.dtype) -> memoryview:
    # NumPy would warn of an overflow; the error below names the tensor.
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values).astype(dtype, copy=False)
    if not np.isfinite(rounded).all():
        raise InvalidInput(
            f"rule={merge.rule}: takes {name} out of the range of {dtype.name}; take smaller "
            "settings or a base of a wider type"
        )
    return rounded.reshape(-1).view(np.uint8).data


def _version() -> str:
    try:
        return metadata.version("pm_jax")
    except metadata.PackageNotFoundError:
        return "that is not installed"


def _provenance(merge: Merge, inputs: Inputs) -> dict[str, str]:
    """Return the base's metadata and how the output is made; folders of files are left out."""

    def described(file: TensorFile) -> dict[str, str]:
        return {"name": file.source.name, "sha256": file.sha256()}

    made_from = {
        "base": described(inputs.base),
        "models": [described(file) for file in inputs.models],
        "fishers": [described(file) for file in inputs.fishers],
    }
    return {
        **inputs.base.metadata,
        "made_by": f"pm_jax {_version()}",
        "rule": merge.rule,
        "rule_settings": merge.rule_settings,
        "settings": json.dumps(merge.settings),
        "seed": str(merge.seed),
        "made_from": json.dumps(made_from),
    }


def _report(merge: Merge, inputs: Inputs, of_tensor: dict[str, MergeRule]) -> str:
    entries = inputs.base.entries
    numbers = sum(entries[name].size for name in of_tensor)
    lines = [
        f"merged {len(inputs.models)} models by {merge.rule}: {len(of_tensor)} tensors, "
        f"{numbers} numbers"
    ]
    mixed = [
        name
        for name in of_tensor
        if any(file.entries[name].dtype != entries[name].dtype for file in inputs.models)
    ]
    if mixed:
        lines.append(f"of several types, written in the base's: {files.listed(mixed)}")
    if copied := [name for name, entry in entries.items() if entry.dtype not in FLOATS]:
        lines.append(f"not floating-point, left as the base's: {files.listed(copied)}")
    if any(rule.needs.scope == "model" for rule in of_tensor.values()):
        lines.append(f"{merge.rule} looks at all tensors at once: they were held in memory")
    return "\n".join(lines)
