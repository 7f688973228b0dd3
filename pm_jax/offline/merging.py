"""Merging checkpoints in files, without training and without whole models in memory."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pm_jax
from pm_jax import files, lapack
from pm_jax.offline import outputs, recipes
from pm_jax.offline.agreement import differing_configs
from pm_jax.offline.matrices import StoredMatrix, described, stored_matrices
from pm_jax.offline.outputs import Output, writing_model
from pm_jax.offline.pieces import Pieces, Rescaled, stored_blocks
from pm_jax.offline.requests import DTYPES, Inputs, Merge, open_inputs, rules_by_settings
from pm_jax.offline.tensor_files import FLOATS, TensorFile, laid_out
from pm_jax.rules import MergeRule
from pm_jax.types import InvalidInput


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
        pieces = Pieces(inputs, by_settings, stored, merge.seed)
        if any(rule.needs.parts and rule.needs.parts.factor for rule, _ in by_settings):
            pieces = Rescaled(inputs, pieces, of_tensor, folder)
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
                for values in stored_blocks(inputs.base, name):
                    rounded = _rounded(merge, name, values, FLOATS[entry.dtype])
                    file.write(rounded.view(np.uint8).data)
    lines = _report(merge, inputs, of_tensor, stored)
    lines += _coefficient_lines(inputs, list(pieces.coefficients.values()))
    return "\n".join([*lines, *configs, *same.lines()])


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
    if inputs.fishers and inputs.agreement.copies:
        lines.append(
            "of tied tensors the Fisher of the one that merges counts, the other's does not"
        )
    accounted = {*of_tensor, *inputs.agreement.copies, *inputs.agreement.left}
    others = [n for n, e in entries.items() if e.dtype in FLOATS and e.size and n not in accounted]
    if others:
        lines.append(f"changed by no adapter, so the base's: {files.listed(others)}")
    parts = next(iter(of_tensor.values())).needs.parts
    if parts:
        lines += described(stored, parts)
        if others := [name for name in of_tensor if name not in stored]:
            lines.append(f"merged as other tensors than matrices: {files.listed(others)}")
    elif any(
        rule.needs.scope == "model" and not rule.needs.meets_in_sums for rule in of_tensor.values()
    ):
        lines.append(f"{merge.rule} looks at all tensors at once: they were held in memory")
    return lines


def _coefficient_lines(inputs: Inputs, of_groups: Sequence[np.ndarray]) -> Iterator[str]:
    """Say how far the merges went to each model after the first, as curvature says."""
    if not of_groups or len(inputs.models) == 1:
        return
    alphas, fallen_back = np.moveaxis(np.stack(of_groups), -1, 0)
    shown = []
    for task, file in enumerate(inputs.models[1:], start=1):
        low, high = alphas[:, task].min(), alphas[:, task].max()
        among = f"{low:.3g} to {high:.3g}" if low < high else f"{low:.3g}"
        shown.append(f"{file.source} {among}")
    yield f"merge coefficients: {files.listed(shown)}"
    for task, file in enumerate(inputs.models[1:], start=1):
        if count := int(fallen_back[:, task].sum()):
            where = f" for {count} of {len(of_groups)} groups of tensors" * (len(of_groups) > 1)
            yield (f"{file.source}: the Fishers give no coefficient{where}, so it is 1/{task + 1}")
