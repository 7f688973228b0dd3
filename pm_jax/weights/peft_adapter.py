"""The displacement of a merged model as one LoRA adapter in PEFT's layout.

References:
    PEFT, `PEFT checkpoint format
    <https://huggingface.co/docs/peft/developer_guides/checkpoint>`_
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax import files, trees
from pm_jax.types import InvalidInput, Params
from pm_jax.weights.layouts import LAYOUTS, Entry, depth_of
from pm_jax.weights.pretrained import Tensors, export_params, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD_FILE, CARD_FILE = "head.safetensors", "README.md"
CONFIG_IN_METADATA = "adapter_config"
"""Entry of a file's metadata that has the config of an adapter in one file."""

TOLERANCE = 1e-3
"""The product of the factors may differ from the displacement by this share of its norm."""

PREFIX = "base_model.model."
"""Begins the names of all tensors of an adapter."""
_MODULES_OF_TRANSFORMERS = (
    ("vit.encoder.layer.", "vit.layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
"""Names in a saved ViT, and of its modules since transformers 5; replaced in this order."""


class PeftAdapter(NamedTuple):
    """The files that PEFT reads.

    Attributes:
        config: content of adapter_config.json.
        tensors: content of adapter_model.safetensors; for each adapted module `lora_A` [r, in] and
            `lora_B` [out, r] (for a convolution [r, in, h, w] and [out, r, 1, 1]), and the
            classifier of a ViT (PEFT's `modules_to_save`).
        head: classifier of a text encoder, which transformers' BertModel has no module for.
    """

    config: dict[str, Any]
    tensors: Tensors
    head: Tensors


def peft_adapter(
    start: Params, merged: Params, paths: Sequence[str], layout: str, rank: int
) -> PeftAdapter:
    """Make one adapter, in float32, that turns the pre-trained model into the merged one.

    Raises:
        ValueError: a displacement is not of this rank.
        InvalidInput: PEFT has no such adapter for a leaf.
    """
    entries = LAYOUTS[layout](depth_of(trees.leaves_by_path(merged)))
    # Merging the adapters of T tasks gives the product of their factors, concatenated along the
    # rank. This adapter is that product in another basis: A has the leading right singular vectors
    # of the displacement, and B its components along them.
    factors = _factors_by_name(start, merged, [e for e in entries if e.path in paths], rank)
    modules = {name: _module(name, layout) for name in factors}
    tensors = {}
    windows = {e.name: trees.leaves_by_path(merged)[e.path].shape[:-2] for e in entries
               if e.kind == "conv"}  # fmt: skip
    for name, (a, b) in factors.items():
        if name in windows:
            # PEFT convolves with A and then, at every place, with B.
            a, b = a.reshape(len(a), -1, *windows[name]), b[:, :, None, None]
        tensors[f"{PREFIX}{modules[name]}.lora_A.weight"] = a
        tensors[f"{PREFIX}{modules[name]}.lora_B.weight"] = b
    theirs = export_params(merged, layout)
    head = {entry.name: theirs[entry.name] for entry in entries if entry.path.startswith("head/")}
    # With lora_alpha = r PEFT's factor lora_alpha / r is 1.
    exported_rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "r": exported_rank,
        "lora_alpha": exported_rank,
        "target_modules": sorted(modules.values()),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "task_type": None,
    }
    if layout == "bert" or not head:
        return PeftAdapter(config, tensors, head)
    tensors |= {PREFIX + name: tensor for name, tensor in head.items()}
    config["modules_to_save"] = sorted({name.rsplit(".", 1)[0] for name in head})
    return PeftAdapter(config, tensors, {})


def write_adapter(
    adapter: PeftAdapter,
    directory: Path,
    *,
    argument: str = "export_adapter",
    metadata: Mapping[str, str] | None = None,
    card: str = "",
) -> None:
    """Write the files of an adapter into a directory, and a model card if there is a text for one.

    Other files there stay. `argument` is what names the directory in messages.

    Raises:
        InvalidInput: the files cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=directory.name) as made:
            staged = Path(made)
            write_tensors(adapter.tensors, staged / WEIGHTS_FILE, metadata=metadata)
            write_tensors(adapter.head, staged / HEAD_FILE)
            files.write_json(staged / CONFIG_FILE, adapter.config)
            directory.mkdir(exist_ok=True)
            # PEFT reads a folder by its config, which goes first and comes last: a kill in between
            # leaves no adapter rather than a mixed one.
            (directory / CONFIG_FILE).unlink(missing_ok=True)
            names: tuple[str, ...] = (HEAD_FILE,) if adapter.head else ()
            if card:
                (staged / CARD_FILE).write_text(card)
                names += (CARD_FILE,)
            for name in (*names, WEIGHTS_FILE, CONFIG_FILE):
                os.replace(staged / name, directory / name)
    except OSError as error:
        raise InvalidInput(f"{argument}={directory}: cannot be written ({error})") from error


def _factors_by_name(
    start: Params, merged: Params, entries: Sequence[Entry], rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Factor the displacement of each matrix into A [r, in] and B [out, r], r the same for all."""
    members: dict[str, list[Entry]] = {}
    for entry in entries:
        members.setdefault(entry.name, []).append(entry)
    before, after = (_stacked(params, members) for params in (start, merged))
    largest = rank * max(len(group) for group in members.values())
    rank = min(largest, *(side for matrix in before.values() for side in matrix.shape))
    factors = {}
    for name, weight in before.items():
        step = after[name] - weight
        right = np.linalg.svd(step, full_matrices=False)[2][:rank]
        # B is a product, not U S: then zero rows of the displacement are exactly zero in B.
        a, b = right.astype(np.float32), (step @ right.T).astype(np.float32)
        # Weights that adapters were folded into are rounded, and rounding has no low rank.
        rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(weight)
        if np.linalg.norm(step - b @ a) > TOLERANCE * np.linalg.norm(step) + rounding:
            raise ValueError(f"the displacement of {name} is not of rank {rank}")
        factors[name] = a, b
    return factors


def _stacked(params: Params, members: Mapping[str, Sequence[Entry]]) -> Tensors:
    """Stack kernels into float64 matrices [out, in] by name, zero where nothing is adapted."""
    leaves, matrices = trees.leaves_by_path(params), {}
    for name, group in members.items():
        theirs = {entry: _their_matrix(entry, leaves[entry.path]) for entry in group}
        rows, columns = theirs[group[0]].shape
        blocks = np.zeros((group[0].part[1] if group[0].part else 1, rows, columns))
        for entry, matrix in theirs.items():
            # Rows of parts that did not train, as the key of a joint matrix, stay zero.
            blocks[entry.part[0] if entry.part else 0] = matrix
        matrices[name] = blocks.reshape(-1, columns)
    return matrices


def _their_matrix(entry: Entry, leaf: Any) -> np.ndarray:
    """A kernel as the matrix [out, in] of PyTorch, or [out, in h w] of a convolution."""
    axes = {"dense": (1, 0), "conv": (3, 2, 0, 1)}.get(entry.kind)
    if axes is None or np.ndim(leaf) != len(axes):
        raise InvalidInput(
            f"export_adapter: {entry.path} of shape {np.shape(leaf)} is neither a dense kernel nor "
            "one of a convolution, for which alone PEFT's layout is written; export the model"
        )
    theirs = np.asarray(leaf).transpose(axes)
    return theirs.reshape(len(theirs), -1)


def _module(name: str, layout: str) -> str:
    module = name.removesuffix(".weight")
    if layout == "transformers":
        for saved, current in _MODULES_OF_TRANSFORMERS:
            module = module.replace(saved, current)
    return module


def saved_module(module: str) -> str:
    """Return the name that a module of a ViT has in transformers' files, from its current one.

    Example:
        >>> saved_module("vit.layers.0.attention.q_proj")
        'vit.encoder.layer.0.attention.attention.query'
    """
    for saved, current in reversed(_MODULES_OF_TRANSFORMERS):
        module = module.replace(current, saved)
    # A ViT without a head has no prefix.
    return module.replace("layers.", "encoder.layer.", 1) if module[:7] == "layers." else module
