"""Merging checkpoints in files, without training and without whole models in memory.

The rule's `scope` says what must be in memory at once: a block of elements, one tensor, or all
tensors for a rule that looks across them.
"""

import functools
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pm_jax
from pm_jax import files, lapack
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.offline import outputs, recipes
from pm_jax.offline.agreement import differing_configs
from pm_jax.offline.displacements import Displacement, as_displacements
from pm_jax.offline.matrices import StoredMatrix, described, stored_matrices
from pm_jax.offline.outputs import Output, writing_model
from pm_jax.offline.requests import DTYPES, Inputs, Merge, open_inputs, rules_by_settings
from pm_jax.offline.tensor_files import FLOATS, Entry, TensorFile, laid_out, writing
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
    outputs.check(merge.output, overwrite=merge.overwrite)
    # Beside the output: its disk has room for a model, the system's folder may have none.
    with (
        tempfile.TemporaryDirectory(
            prefix=f"{merge.output.name}.", dir=merge.output.parent
        ) as folder,
        lapack.one_thread(),
    ):
        inputs = open_inputs(merge, Path(folder))
        outputs.check(merge.output, inputs.base, overwrite=merge.overwrite)
        return merge_inputs(merge, inputs, Path(folder))


def merge_inputs(merge: Merge, inputs: Inputs, folder: Path) -> str:
    """Merge files that are open, with a folder for temporary files; as `merge_files`."""
    by_settings = rules_by_settings(merge, inputs)
    of_tensor = {name: rule for rule, names in by_settings for name in names}
    configs = differing_configs(inputs.base, inputs.models)
    stored: dict[str, StoredMatrix] = {}
    for rule, names in by_settings:
        if rule.needs.parts:
            stored |= stored_matrices(inputs.base.entries, names, rule.needs.parts, merge.layout)
    output = _output(merge, inputs)
    same = _Comparison(inputs)
    with (
        # float64 is on for this merge only if a file holds it: it would slow the others down.
        jax.enable_x64(
            any(e.dtype == "F64" for file in inputs.files for e in file.entries.values())
        ),
        writing_model(output, folder) as file,
    ):
        pieces = _Pieces(inputs, by_settings, stored, merge.seed)
        if any(rule.needs.parts and rule.needs.parts.factor for rule, _ in by_settings):
            pieces = _Rescaled(inputs, pieces, of_tensor, folder)
        for name, entry in output.entries.items():
            # Second names of a tied tensor are merged as the first.
            merged = inputs.agreement.copies.get(name, name)
            if merged in of_tensor:
                first = 0
                for values in pieces.of(merged, of_tensor[merged]):
                    rounded = _rounded(merge, name, values, FLOATS[entry.dtype])
                    same.look_at(name, first, rounded)
                    file.write(rounded.view(np.uint8).data)
                    first += rounded.size
            elif entry.dtype == inputs.base.entries[name].dtype:
                inputs.base.copy(name, file)
            else:
                for values in _blocks(inputs.base, name):
                    rounded = _rounded(merge, name, values, FLOATS[entry.dtype])
                    file.write(rounded.view(np.uint8).data)
    return "\n".join([*_report(merge, inputs, of_tensor, stored), *configs, *same.lines()])


def _output(merge: Merge, inputs: Inputs) -> Output:
    """Describe the merged model: the base's tensors, in the type that is asked for."""
    base = inputs.base.entries
    kinds = {
        name: DTYPES.get(merge.dtype, entry.dtype) if entry.dtype in FLOATS else entry.dtype
        for name, entry in base.items()
    }
    bytes_of = {
        name: base[name].size * FLOATS[kind].itemsize
        if kind in FLOATS
        else base[name].end - base[name].begin
        for name, kind in kinds.items()
    }
    entries = laid_out({name: (kinds[name], base[name].shape, bytes_of[name]) for name in base})
    recipe = merge.recipe()
    output = Output(
        merge.output,
        entries,
        {**provenance(merge, inputs), "recipe": recipe},
        inputs.base,
        merge.overwrite,
        outputs.bytes_of(merge.shard_size) if merge.shard_size else 0,
        merge.dtype,
        recipes.card(merge.output.name, recipe),
    )
    if merge.shard_size and not output.is_sharded:
        raise InvalidInput(
            f"shard_size={merge.shard_size}: goes with an output that is a folder of safetensors; "
            "leave it out"
        )
    return output


class _Comparison:
    """The inputs that the output equals so far, bit for bit, in all tensors that merge."""

    def __init__(self, inputs: Inputs):
        self._equal = [inputs.base, *inputs.models]

    def look_at(self, name: str, first: int, values: np.ndarray) -> None:
        """Compare values that are written, from an element of a tensor on."""
        self._equal = [
            file
            for file in self._equal
            if FLOATS[file.entries[name].dtype] == values.dtype and file.holds(name, first, values)
        ]

    def lines(self) -> list[str]:
        """Say what the output equals."""
        names = list(dict.fromkeys(f"{file.argument}={file.source}" for file in self._equal))
        return [f"all merged tensors equal those of {files.listed(names)} bit for bit"] * bool(
            names
        )


class _Pieces:
    """Merger of tensors piece by piece, in the order of the elements of each tensor."""

    def __init__(
        self,
        inputs: Inputs,
        by_settings: list[tuple[MergeRule, tuple[str, ...]]],
        stored: dict[str, StoredMatrix],
        seed: int,
    ):
        self.inputs, self._by_settings, self._stored = inputs, by_settings, stored
        self._merged: dict[str, np.ndarray] = {}
        self._seed, self._run = seed, dict[int, Callable[..., Params]]()

    def on(self, inputs: Inputs) -> "_Pieces":
        """Return the same merger of other files with the same tensors."""
        return _Pieces(inputs, self._by_settings, self._stored, self._seed)

    def of(self, name: str, rule: MergeRule) -> Iterator[np.ndarray]:
        """Yield the merged pieces of a tensor."""
        parts, size = rule.needs.parts, self.inputs.base.entries[name].size
        is_matrix = name in self._stored
        of_tensor = rule if parts is None else parts.matrix if is_matrix else parts.other
        run = self._runner(of_tensor)
        # Draws depend on the tensor's name, not on its place among the others.
        place = zlib.crc32(name.encode())
        if is_matrix:
            matrices = run(
                lambda file: self._stored[name].separate(self._tensor(file, name)), place
            )
            yield self._stored[name].joined(matrices, self.inputs.base.entries[name].shape)
        elif of_tensor.needs.scope == "element":
            for block, first in enumerate(range(0, size, BLOCK)):
                stop = min(first + BLOCK, size)
                yield run(self._block(name, first, stop), place, block)[: stop - first]
        elif of_tensor.needs.scope == "tensor":
            yield run(lambda file: self._tensor(file, name), place)
        else:
            if name not in self._merged:
                names = next(names for other, names in self._by_settings if other is rule)
                self._merged |= run(lambda file: {n: self._tensor(file, n) for n in names})
            # A tied tensor is asked for once more, under its second name.
            tied = name in self.inputs.agreement.copies.values()
            yield self._merged[name] if tied else self._merged.pop(name)

    def _runner(self, rule: MergeRule) -> Callable[..., Params]:
        if id(rule) not in self._run:
            self._run[id(rule)] = _runner(rule, self.inputs, self._seed)
        return self._run[id(rule)]

    def _block(self, name: str, first: int, stop: int) -> Load:
        def load(file: TensorFile) -> np.ndarray:
            # Padded to one shape, so that one compilation serves all blocks.
            values: np.ndarray = np.zeros(BLOCK, self.dtype(name))
            values[: stop - first] = _values(file, name, first, stop)
            return values

        return load

    def _tensor(self, file: TensorFile, name: str) -> np.ndarray:
        entry = file.entries[name]
        values = _values(file, name, 0, entry.size).astype(self.dtype(name), copy=False)
        return values.reshape(entry.shape)

    def dtype(self, name: str) -> np.dtype:
        """Return the type in which a tensor is merged."""
        double = any(file.entries[name].dtype == "F64" for file in self.inputs.files)
        return np.dtype(np.float64 if double else np.float32)


class _Rescaled(_Pieces):
    """Merger of a rule that multiplies the whole displacement by a number that all of it gives.

    The displacements are merged into a file in a folder first, and from there into the output.
    """

    def __init__(
        self, inputs: Inputs, pieces: _Pieces, of_tensor: dict[str, MergeRule], folder: Path
    ):
        self.inputs, displaced = inputs, as_displacements(inputs)
        pieces, entries, begin = pieces.on(displaced), dict[str, Entry](), 0
        for name in of_tensor:
            dtype, size = pieces.dtype(name), inputs.base.entries[name].size
            kind = "F64" if dtype == np.float64 else "F32"
            entries[name] = Entry(kind, (size,), begin, begin + size * dtype.itemsize)
            begin = entries[name].end
        path, squares = folder / "displacement.safetensors", []
        with writing(path, entries, {}) as file:
            for name, rule in of_tensor.items():
                for values in pieces.of(name, rule):
                    squares.append(float(np.sum(values.astype(np.float64) ** 2)))
                    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._displacement = TensorFile.open("models", path)
        lengths = jnp.asarray(
            [file.length for file in displaced.models if isinstance(file, Displacement)]
        )
        parts = next(rule.needs.parts for rule in of_tensor.values())
        assert parts and parts.factor
        self._factor = float(parts.factor(lengths, jnp.asarray(math.sqrt(math.fsum(squares)))))

    def of(self, name: str, rule: MergeRule) -> Iterator[np.ndarray]:
        """Yield the merged pieces of a tensor."""
        del rule
        dtype = self.dtype(name)
        for start, step in zip(
            _blocks(self.inputs.base, name), _blocks(self._displacement, name), strict=True
        ):
            yield start.astype(dtype) + dtype.type(self._factor) * step.astype(dtype)


def _blocks(file: TensorFile, name: str) -> Iterator[np.ndarray]:
    """Read a tensor of floating-point numbers block by block."""
    size = file.entries[name].size
    for first in range(0, size, BLOCK):
        yield file.read(name, first, min(first + BLOCK, size))


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


def _rounded(merge: Merge, name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round values, in row-major order, to the type in which they are written."""
    # NumPy would warn of an overflow; the error below names the tensor.
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values).astype(dtype, copy=False)
    if not np.isfinite(rounded).all():
        wider = "another dtype" if merge.dtype else "a base of a wider type"
        raise InvalidInput(
            f"rule={merge.rule}: takes {name} out of the range of {dtype.name}; take smaller "
            f"settings or {wider}"
        )
    return rounded.reshape(-1)


def provenance(merge: Merge, inputs: Inputs) -> dict[str, str]:
    """Return the base's metadata and how the output is made; folders of files are left out."""

    def described(file: TensorFile) -> dict[str, Any]:
        digests = file.sha256()
        return {"name": file.source.name, "sha256": digests[0] if len(digests) == 1 else digests}

    made_from = {
        "base": described(inputs.base),
        "models": [described(file) for file in inputs.models],
        "fishers": [described(file) for file in inputs.fishers],
    }
    return {
        **inputs.base.metadata,
        "made_by": f"pm_jax {pm_jax.__version__}",
        "rule": merge.rule,
        "rule_settings": merge.rule_settings,
        "settings": json.dumps(merge.settings),
        "seed": str(merge.seed),
        "made_from": json.dumps(made_from),
    }


def _report(
    merge: Merge,
    inputs: Inputs,
    of_tensor: dict[str, MergeRule],
    stored: dict[str, StoredMatrix],
) -> list[str]:
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
        written = merge.dtype or "the base's"
        lines.append(f"of several types, written in {written}: {files.listed(mixed)}")
    lines += inputs.agreement.lines()
    parts = next(iter(of_tensor.values())).needs.parts
    if parts:
        lines += described(stored, parts)
        if others := [name for name in of_tensor if name not in stored]:
            lines.append(f"merged as other tensors than matrices: {files.listed(others)}")
    elif any(rule.needs.scope == "model" for rule in of_tensor.values()):
        lines.append(f"{merge.rule} looks at all tensors at once: they were held in memory")
    return lines
