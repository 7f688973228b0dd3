"""Merging LoRA adapters into one adapter: their displacements are merged, and never the factors.

Where the merged displacement is `sum_t c_t s_t B_t A_t`, for a rule that is linear, the factors
side by side give it exactly. Other rules, and a smaller rank, take the nearest matrices of that
rank.
"""

import dataclasses
import json
import math
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pm_jax import files, lapack
from pm_jax.offline import outputs, recipes, tensor_files
from pm_jax.offline.adapted_files import (
    AdaptedFile,
    NoDisplacement,
    common_shapes,
    displacement_entries,
    fisher_of_displacements,
)
from pm_jax.offline.agreement import Agreement, matching
from pm_jax.offline.merging import merge_inputs, provenance
from pm_jax.offline.requests import DTYPES, Inputs, Merge, check_paths, rules_by_settings
from pm_jax.offline.tensor_files import FLOATS, Entry, TensorFile
from pm_jax.rules import Evidence, MergeRule
from pm_jax.types import InvalidInput, Params
from pm_jax.weights.checkpoint_files import NPZ, SAFETENSORS
from pm_jax.weights.peft_adapter import CONFIG_IN_METADATA, PREFIX, PeftAdapter, write_adapter
from pm_jax.weights.peft_folder import PeftFolder, is_adapter
from pm_jax.weights.pretrained import Tensors

LINEAR = frozenset({"sequential", "averaging", "linear", "slao", "coma", "task_arithmetic"})
"""Rules whose merged model is a sum of the models with coefficients that depend on their number."""

Pair = tuple[np.ndarray, np.ndarray]
"""Factors B [out, r] and A [r, in]."""


@dataclasses.dataclass
class Merged:
    """The merged factors by module, and by how much they miss the displacements.

    Attributes:
        pairs: the factors.
        squares: sum of the squares of all displacements.
        missed: sum of the squares of what the factors miss of them.
        cut: whether a displacement had to be cut to a rank.
    """

    pairs: dict[str, Pair] = dataclasses.field(default_factory=dict)
    squares: float = 0.0
    missed: float = 0.0
    cut: bool = False

    @property
    def error(self) -> float:
        """Norm of what the factors miss of all displacements, over the norm of these."""
        return math.sqrt(self.missed / self.squares) if self.squares else 0.0


def are_adapters(merge: Merge) -> bool:
    """Tell whether a request has nothing but adapters; one with a model has its output too."""
    paths = (*merge.models, *([merge.base] if merge.base else []))
    return bool(merge.models) and all(map(is_adapter, paths))


def merge_adapters(merge: Merge) -> str:
    """Merge adapters into an adapter that PEFT loads, and return lines that say what was done.

    `merge.base` is an adapter too, whose displacement is theta_0, or `None` for a theta_0 of no
    displacement.

    Raises:
        InvalidInput: an adapter cannot be read, is of another base or kind; a rule that does not
            merge displacements; or the output exists.
    """
    _check(merge)
    base = PeftFolder.open("base", merge.base) if merge.base else None
    adapters = [PeftFolder.open("models", path) for path in merge.models]
    everyone = [base, *adapters] if base else adapters
    shapes = common_shapes(everyone)
    saved_names = [name for adapter in everyone for name in adapter.saved]
    left = matching(merge.leave, [*displacement_entries(shapes), *saved_names])
    shapes = {m: shape for m, shape in shapes.items() if f"{m}.weight" not in left}
    if not shapes:
        raise InvalidInput(f"leave={','.join(merge.leave)}: leaves no displacement to merge")
    entries = displacement_entries(shapes)
    fishers = tuple(fisher_of_displacements(path, everyone, entries) for path in merge.fishers)
    inputs = _inputs(base, adapters, fishers, entries, tuple(left))
    by_settings = rules_by_settings(merge, inputs)
    saved = _saved_modules(merge, everyone, [rule for rule, _ in by_settings], left)
    lines: list[str] = []
    with lapack.one_thread():
        if merge.rule in LINEAR:
            merged = _exactly(everyone, base is not None, by_settings, merge.rank)
        else:
            merged, lines = _from_displacements(merge, inputs, everyone, shapes)
    _write(merge, _adapter(everyone, merged, saved), provenance(merge, inputs))
    return "\n".join([*_report(merge, base, adapters, merged, saved), *lines])


def _check(merge: Merge) -> None:
    """Check a request before any file is read; raises `InvalidInput`."""
    if merge.output.suffix == NPZ:
        raise InvalidInput(f"output={merge.output}: must be a folder or end in {SAFETENSORS}")
    outputs.check(merge.output, overwrite=merge.overwrite)
    check_paths(merge)
    if merge.rank < 0:
        raise InvalidInput(f"rank={merge.rank}: must not be negative")
    if merge.shard_size:
        raise InvalidInput(f"shard_size={merge.shard_size}: an adapter is one file; leave it out")


def _write(merge: Merge, adapter: PeftAdapter, metadata: dict[str, str]) -> None:
    """Write a merged adapter in a folder or, with its config among the metadata, in one file."""
    from safetensors.numpy import save_file

    recipe = merge.recipe()
    kind = FLOATS[DTYPES[merge.dtype or "float32"]]
    tensors = {name: x.astype(kind, copy=False) for name, x in adapter.tensors.items()}
    metadata |= {"format": "pt", "recipe": recipe}
    if merge.output.suffix == SAFETENSORS:
        metadata[CONFIG_IN_METADATA] = json.dumps(adapter.config)
        with tensor_files.replacing(merge.output, overwrite=merge.overwrite) as temporary:
            save_file(tensors, temporary, metadata)
        return
    card = recipes.card(merge.output.name, recipe)
    write_adapter(
        adapter._replace(tensors=tensors), merge.output, argument="output", metadata=metadata,
        card=card,
    )  # fmt: skip


def _inputs(
    base: PeftFolder | None,
    adapters: Sequence[PeftFolder],
    fishers: tuple[TensorFile, ...],
    entries: Mapping[str, Entry],
    left: tuple[str, ...],
) -> Inputs:
    """Return the adapters as files of their displacements, which are never written."""
    origin: TensorFile = (
        AdaptedFile.alone(base, entries) if base else NoDisplacement.like(adapters[0], entries)
    )
    models = tuple(AdaptedFile.alone(adapter, entries) for adapter in adapters)
    found = Agreement((origin, *models, *fishers), tuple(entries), left, (), {}, ())
    return Inputs(origin, models, fishers, found)


def coefficients(rule: MergeRule, count: int) -> np.ndarray:
    """Return the coefficients of theta_0 and of `count` models in what a linear rule merges."""
    # The rule merges the unit vectors: entry t of the result is the coefficient of model t.
    start, *models = np.eye(count + 1, dtype=np.float32)

    @jax.jit  # one compilation in place of one for each operation
    def merge(start: Params, models: list[Params]) -> Params:
        state, previous, merged = rule.init(start), start, start
        for trained in models:
            merged, state, _ = rule.update(
                state, previous=previous, trained=trained, evidence=Evidence()
            )
            previous = merged if rule.needs.next_task_from == "merged" else trained
        return merged

    return np.asarray(merge(start, models))


def _exactly(
    adapters: Sequence[PeftFolder],
    has_base: bool,
    by_settings: Sequence[tuple[MergeRule, tuple[str, ...]]],
    rank: int,
) -> Merged:
    """Put factors side by side, with the coefficients of a linear rule, and cut them to a rank."""
    merged = Merged()
    for rule, names in by_settings:
        factors = coefficients(rule, len(adapters) - has_base)[0 if has_base else 1 :]
        for name in names:
            module = name.removesuffix(".weight")
            pairs = [
                (factor * b, a)
                for factor, adapter in zip(factors, adapters, strict=True)
                if module in adapter.modules and factor
                for b, a in [adapter.factors(module)]
            ]
            # A rule such as sequential may leave nothing of the only adapter of a module.
            if pairs:
                b, a = zip(*pairs, strict=True)
                _enter(merged, module, np.concatenate(b, axis=1), np.concatenate(a), rank)
    return merged


def _enter(merged: Merged, module: str, b: np.ndarray, a: np.ndarray, rank: int) -> None:
    """Enter factors, cut to a rank if theirs is larger, without multiplying them out."""
    merged.pairs[module] = b, a
    limit = min(rank or len(a), b.shape[0], a.shape[1])
    # The product is that of two triangles between orthogonal matrices.
    (left, upper), (right, lower) = (np.linalg.qr(x.astype(np.float64)) for x in (b, a.T))
    core = upper @ lower.T
    merged.squares += float(np.sum(core**2))
    if limit < len(a):
        inner_b, inner_a = _nearest(core, limit)
        merged.missed += float(np.sum((core - inner_b @ inner_a) ** 2))
        merged.cut = True
        pair = left @ inner_b, inner_a @ right.T
        merged.pairs[module] = pair[0].astype(np.float32), pair[1].astype(np.float32)


def _from_displacements(
    merge: Merge,
    inputs: Inputs,
    adapters: Sequence[PeftFolder],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Merged, list[str]]:
    """Merge displacements by any rule, and return the nearest factors and what the rule said."""
    merged = Merged(cut=True)
    # Beside the output: its disk has room for it, the system's folder may have none.
    with tempfile.TemporaryDirectory(
        prefix=f"{merge.output.name}.", dir=merge.output.parent
    ) as made:
        path = Path(made) / "dense.safetensors"
        dense = dataclasses.replace(merge, output=path, dtype="")
        lines = merge_inputs(dense, inputs, Path(made))
        file = TensorFile.open("output", path)
        for module, shape in shapes.items():
            name = f"{module}.weight"
            step = file.read(name, 0, file.entries[name].size).reshape(shape[0], -1)
            ranks = [x.modules[module].rank for x in adapters if module in x.modules]
            wide = step.astype(np.float64)
            b, a = _nearest(wide, min(merge.rank or sum(ranks), *wide.shape))
            merged.squares += float(np.sum(wide**2))
            merged.missed += float(np.sum((wide - b @ a) ** 2))
            merged.pairs[module] = b.astype(np.float32), a.astype(np.float32)
    return merged, lines.splitlines()[1:]


def _nearest(matrix: np.ndarray, rank: int) -> Pair:
    """Return the factors of the nearest matrix of a rank, for a float64 matrix."""
    import scipy.linalg

    if matrix.shape[0] < matrix.shape[1]:
        b, a = _nearest(matrix.T, rank)
        return a.T, b.T
    # Eigenvectors of the smaller Gram matrix take a fraction of an SVD's time; squares of float64
    # have room for all that float32 tells apart.
    size = matrix.shape[1]
    chosen = (size - rank, size - 1)
    _, vectors = scipy.linalg.eigh(matrix.T @ matrix, subset_by_index=chosen)
    right = vectors[:, ::-1]
    return matrix @ right, right.T


def _saved_modules(
    merge: Merge,
    everyone: Sequence[PeftFolder],
    rules: Sequence[MergeRule],
    left: Collection[str],
) -> Tensors:
    """Merge the whole modules that adapters hold beside factors, whose theta_0 is not known.

    Raises:
        InvalidInput: they differ, and the rule needs theta_0 or is not linear.
    """
    merged: Tensors = {}
    for name in dict.fromkeys(name for adapter in everyone for name in adapter.saved):
        owners = [adapter for adapter in everyone if name in adapter.saved]
        tensors = [adapter.saved_tensor(name) for adapter in owners]
        if name in left:
            continue
        merged[name] = tensors[0]
        given = f"models={owners[-1].source}: {name} of modules_to_save"
        if len({tensor.shape for tensor in tensors}) > 1 or len(owners) < len(everyone):
            raise InvalidInput(
                f"{given} is not in all adapters with one shape, so it cannot be merged; leave it "
                "to the base by leave"
            )
        if all(np.array_equal(tensors[0], other) for other in tensors):
            continue
        known = len(rules) == 1 and merge.rule in LINEAR
        factors = coefficients(rules[0], len(merge.models)) if known else [1.0]
        if not known or (factors[0] and not merge.base):
            raise InvalidInput(
                f"{given} differs between the adapters, and rule={merge.rule} needs the base's; "
                "give as base the model that they are of, use averaging, or leave it to the base "
                "by leave"
            )
        merged[name] = np.tensordot(factors[0 if merge.base else 1 :], np.stack(tensors), 1)
    return merged


def _adapter(adapters: Sequence[PeftFolder], merged: Merged, saved: Tensors) -> PeftAdapter:
    """Write merged factors in PEFT's form, with the scale in B and so `lora_alpha = r`."""
    tensors: Tensors = {}
    for module, (b, a) in merged.pairs.items():
        factors = next(x.modules[module] for x in adapters if module in x.modules)
        _, *inputs = factors.shape
        name = f"{PREFIX}{module}.lora_"
        if factors.is_embedding:
            tensors |= {f"{name}embedding_A": a, f"{name}embedding_B": b}
        else:
            tensors[f"{name}A.weight"] = a.reshape(-1, *inputs)
            tensors[f"{name}B.weight"] = b.reshape(*b.shape, *(1 for _ in inputs[1:]))
    tensors |= {PREFIX + name: tensor for name, tensor in saved.items()}
    ranks = {module: len(a) for module, (_, a) in merged.pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes the names as ends of names, which the sign for the beginning prevents.
    others = {f"^{module}": number for module, number in ranks.items() if number != rank}
    first = adapters[0].config
    modules_to_save = sorted({name.rpartition(".")[0] for name in saved})
    # By some types of a task PEFT would look for a classifier, which may be left to the base.
    has_type = bool(saved) or not any(adapter.saved for adapter in adapters)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": next(
            (x.config["base_model_name_or_path"] for x in adapters if x.base_name), None
        ),
        "task_type": first.get("task_type") if has_type else None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    contiguous = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    return PeftAdapter(config, contiguous, {})


def _report(
    merge: Merge,
    base: PeftFolder | None,
    adapters: Sequence[PeftFolder],
    merged: Merged,
    saved: Tensors,
) -> Iterator[str]:
    """Say in lines what was done."""
    ranks = sorted({len(a) for _, a in merged.pairs.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    yield (
        f"merged the displacements of {len(adapters)} adapters by {merge.rule}: "
        f"{len(merged.pairs)} modules, {shown}, lora_alpha = r"
    )
    if merged.cut:
        yield f"cut by SVD: {merged.error:.2g} of the norm of the merged displacement is missed"
    if not merged.squares:
        yield "the merged displacement is 0: the output is the base"
    if saved:
        yield f"merged beside them, or equal in all adapters: {files.listed([*saved])}"
    if base:
        yield f"theta_0 is the adapter {base.source}: task vectors count from its displacement"
    if merge.output.suffix == SAFETENSORS:
        yield (
            "one file, with the adapter's config in its metadata; PEFT loads a folder, which an "
            "output without an ending is"
        )
