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
HEAD_FILE = "head.safetensors"

TOLERANCE = 1e-3
"""Largest relative error of the factors."""

_PREFIX = "base_model.model."
_MODULES_OF_TRANSFORMERS = (
    ("vit.encoder.layer.", "vit.layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
"""What a ViT's saved tensors are called, and its modules since transformers 5; in this order."""


class PeftAdapter(NamedTuple):
    """What PEFT reads.

    Attributes:
        config: content of adapter_config.json.
        tensors: content of adapter_model.safetensors; for each adapted module `lora_A` [r, in] and
            `lora_B` [out, r], and the classifier of a ViT (PEFT's `modules_to_save`).
        head: the classifier of a text encoder, which transformers' BertModel has no module for.
    """

    config: dict[str, Any]
    tensors: Tensors
    head: Tensors


def peft_adapter(
    start: Params, merged: Params, paths: Sequence[str], layout: str, rank: int
) -> PeftAdapter:
    """One adapter that turns the pre-trained model into the merged one.

    Merging adapters of T tasks with coefficients gives a displacement that is the product of their
    factors concatenated along the rank. What is written is that product in another basis: the
    leading right singular vectors of the displacement as A, and the displacement's components
    along them as B, with lora_alpha = r, a factor of 1. So an adapter needs no memory of the tasks,
    and its rank is at most the width of the model. Where a layout keeps query, key and value in one
    matrix the adapter is of that matrix, with zero rows in B for what did not train.

    Where the run's resolution is not that of the weights, the model that takes the adapter must
    have its position embeddings resized as here: timm resizes so, transformers does not.

    Args:
        start: theta_0.
        merged: theta_hat_T, of the same structure.
        paths: of the adapted dense kernels.
        layout: a key of `LAYOUTS`, of safetensors.
        rank: bound on the rank of each kernel's displacement: tasks times rank of an adapter.

    Returns:
        A `PeftAdapter`, float32.

    Raises:
        ValueError: the displacement is not of this rank.

    Example:
        >>> import jax
        >>> from pm_jax.models import VisionTransformer
        >>> model = VisionTransformer(10, patch_size=2, width=8, depth=1, num_heads=2)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 4, 4, 3)))["params"]
        >>> start = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
        >>> merged = jax.tree.map(lambda leaf: leaf + 1, start)
        >>> adapter = peft_adapter(start, merged, ["blocks_0/attn/key/kernel"], "timm", rank=1)
        >>> adapter.tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"].shape
        (24, 1)
    """
    entries = LAYOUTS[layout](depth_of(trees.leaves_by_path(merged)))
    factors = _factors_by_name(start, merged, [e for e in entries if e.path in paths], rank)
    modules = {name: _module(name, layout) for name in factors}
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{_PREFIX}{modules[name]}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{modules[name]}.lora_B.weight"] = b
    theirs = export_params(merged, layout)
    head = {entry.name: theirs[entry.name] for entry in entries if entry.path.startswith("head/")}
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
    if layout == "bert":
        return PeftAdapter(config, tensors, head)
    tensors |= {_PREFIX + name: tensor for name, tensor in head.items()}
    config["modules_to_save"] = sorted({name.rsplit(".", 1)[0] for name in head})
    return PeftAdapter(config, tensors, {})


def write_adapter(adapter: PeftAdapter, directory: Path) -> None:
    """Write an adapter as `PeftModel.from_pretrained` reads it.

    All files are complete before the first is put in place, and the configuration, without which
    nothing loads, is so last.

    Args:
        adapter: as `peft_adapter` gives it.
        directory: made if absent; what it holds under other names stays.

    Raises:
        InvalidInput: the files cannot be written.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> write_adapter(PeftAdapter({"r": 1}, {"w": np.ones(1)}, {}), directory)
        >>> sorted(path.name for path in directory.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    try:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=directory.name) as made:
            staged = Path(made)
            write_tensors(adapter.tensors, staged / WEIGHTS_FILE)
            write_tensors(adapter.head, staged / HEAD_FILE)
            files.write_json(staged / CONFIG_FILE, adapter.config)
            directory.mkdir(exist_ok=True)
            (directory / CONFIG_FILE).unlink(missing_ok=True)
            names = (HEAD_FILE,) if adapter.head else ()
            for name in (*names, WEIGHTS_FILE, CONFIG_FILE):
                os.replace(staged / name, directory / name)
    except OSError as error:
        raise InvalidInput(f"export_adapter={directory}: cannot be written ({error})") from error


def _factors_by_name(
    start: Params, merged: Params, entries: Sequence[Entry], rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [r, in] and B [out, r] for each of their matrices, r the same for all."""
    members: dict[str, list[Entry]] = {}
    for entry in entries:
        members.setdefault(entry.name, []).append(entry)
    before, after = (_stacked(params, members) for params in (start, merged))
    largest = rank * max(len(group) for group in members.values())
    rank = min(largest, *(side for matrix in before.values() for side in matrix.shape))
    found = {}
    for name, weight in before.items():
        step = after[name] - weight
        right = np.linalg.svd(step, full_matrices=False)[2][:rank]
        # B as a product, not U S: zero rows of the displacement are zero rows of B exactly.
        a, b = right.astype(np.float32), (step @ right.T).astype(np.float32)
        # Folding adapters into float32 weights leaves their rounding, which has no low rank.
        rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(weight)
        if np.linalg.norm(step - b @ a) > TOLERANCE * np.linalg.norm(step) + rounding:
            raise ValueError(f"the displacement of {name} is not of rank {rank}")
        found[name] = a, b
    return found


def _stacked(params: Params, members: Mapping[str, Sequence[Entry]]) -> Tensors:
    """float64 matrices [out, in] by their names, zero where nothing adapted lies."""
    leaves, matrices = trees.leaves_by_path(params), {}
    for name, group in members.items():
        columns, rows = leaves[group[0].path].shape
        blocks = np.zeros((group[0].part[1] if group[0].part else 1, rows, columns))
        for entry in group:
            blocks[entry.part[0] if entry.part else 0] = np.asarray(leaves[entry.path]).T
        matrices[name] = blocks.reshape(-1, columns)
    return matrices


def _module(name: str, layout: str) -> str:
    module = name.removesuffix(".weight")
    if layout == "transformers":
        for saved, current in _MODULES_OF_TRANSFORMERS:
            module = module.replace(saved, current)
    return module
