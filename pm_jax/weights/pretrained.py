"""Reading public checkpoints into our models, and writing models under the same names.

A ViT has three layouts: timm's and transformers' safetensors, and the `.npz` of AugReg and the
original ViT. A text encoder has that of BERT in transformers. The tables of names are in `layouts`,
and serve both directions.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import files, trees
from pm_jax.types import InvalidInput, Params, cause
from pm_jax.weights.layouts import LAYOUTS, Entry, depth_of

Tensors = dict[str, np.ndarray]

_SIGNATURES = {
    "timm": "blocks.0.attn.qkv.weight",
    "transformers": "vit.encoder.layer.0.layernorm_before.weight",
    "augreg": "Transformer/encoder_norm/scale",
    "bert": "encoder.layer.0.attention.self.query.weight",
}
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Tensors of BERT that are not used with mean pooling, and may be there."""


def read_tensors(path: str | os.PathLike) -> Tensors:
    """Read all tensors of a `.safetensors` or `.npz` file; nothing is unpickled.

    Raises:
        InvalidInput: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise InvalidInput(f"pretrained={path}: must end in .safetensors or .npz")
    if not path.is_file():
        raise InvalidInput(f"pretrained={path}: there is no such file")
    try:
        if path.suffix == ".npz":
            # Opened here, because NumPy leaves a file open that it cannot read.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return dict(archive)
        from safetensors.numpy import load_file

        return load_file(path)
    except Exception as error:  # Rust, zip and NumPy raise many types for damaged files.
        raise InvalidInput(
            f"pretrained={path}: cannot be read ({cause(error)}); get it anew"
        ) from error


def layout_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the key of `LAYOUTS` that a checkpoint's names follow; raises `InvalidInput`."""
    for layout, signature in _SIGNATURES.items():
        if signature in tensors:
            return layout
    layouts = "; ".join(f"{layout} has {name}" for layout, name in _SIGNATURES.items())
    raise InvalidInput(
        f"pretrained: its tensors ({files.listed(sorted(tensors))}) are not named in a known "
        f"layout: {layouts}; give weights of one of them"
    )


def load_params(tensors: Mapping[str, np.ndarray], params: Params, *, head: bool = False) -> Params:
    """Fill the parameters of a ViT or a text encoder with the tensors of a public checkpoint.

    Raises:
        InvalidInput: tensors are missing, left over, of another shape or type, NaN or infinite; all
            are listed.
    """
    ours = trees.leaves_by_path(params)
    all_entries = LAYOUTS[layout_of(tensors)](depth_of(ours))
    entries = [entry for entry in all_entries if head or not entry.path.startswith("head/")]
    missing = sorted({entry.name for entry in entries} - set(tensors))
    extra = sorted(set(tensors) - {entry.name for entry in all_entries} - set(_UNUSED))
    leaves: dict[str, jax.Array] = {}
    unfit: dict[str, list[str]] = {"missing": missing, "extra": extra, "misshapen": []}
    unfit |= {"not of floating-point numbers": [], "not finite": []}
    for entry in entries:
        if entry.name not in tensors or entry.path not in ours:
            missing += [] if entry.path in ours else [f"{entry.path} in the model"]
            continue
        shape, tensor = ours[entry.path].shape, np.asarray(tensors[entry.name])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            unfit["not of floating-point numbers"].append(entry.name)
            continue
        # A float64 beyond float32 becomes infinite, which is reported below.
        with np.errstate(over="ignore"):
            tensor = tensor.astype(np.float32)
        if not np.isfinite(tensor).all():
            unfit["not finite"].append(entry.name)
        leaf = _fitting(entry, tensor, shape)
        if leaf.shape != shape:
            unfit["misshapen"].append(
                f"{entry.name} gives {leaf.shape} for {entry.path} of {shape}"
            )
        leaves[entry.path] = jnp.asarray(leaf)
    # A tensor that holds several of our leaves is named once.
    problems = [f"{kind} {files.listed([*dict.fromkeys(names)])}" for kind, names in unfit.items()
                if names]  # fmt: skip
    if problems:
        raise InvalidInput(
            f"pretrained: does not fit the model: {'; '.join(problems)}; choose the architecture "
            "that the weights are of, or get them anew"
        )
    return trees.replace(params, leaves)


def export_params(params: Params, layout: str, *, num_heads: int = 1) -> Tensors:
    """Turn parameters into the tensors of a layout, float32 and contiguous.

    Raises:
        ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
    ours = trees.leaves_by_path(params)
    parts: dict[str, list[np.ndarray]] = {}
    for entry in LAYOUTS[layout](depth_of(ours)):
        leaf = _to_theirs(entry, np.asarray(ours[entry.path], np.float32), num_heads)
        parts.setdefault(entry.name, []).append(leaf)
    return {
        name: np.ascontiguousarray(np.concatenate(leaves) if len(leaves) > 1 else leaves[0])
        for name, leaves in parts.items()
    }


def write_tensors(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file, whole or not at all, with metadata.

    Raises:
        InvalidInput: the path exists, has another ending or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"export={path}: must end in .safetensors")
    if path.exists() and not overwrite:
        raise InvalidInput(f"export={path}: exists; choose another name or set overwrite")
    try:
        with files.replacing(path) as temporary:
            save_file(dict(tensors), temporary, {"format": "pt", **(metadata or {})})
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"export={path}: cannot be written ({error})") from error


def resize_positions(positions: np.ndarray, tokens: int) -> np.ndarray:
    """Resize position embeddings [1, 1 + g * g, D] to [1, tokens, D], bicubically on their grid.

    Raises:
        ValueError: a number of patches is no square.
    """
    if positions.shape[1] == tokens:
        return positions
    old, new = (round((count - 1) ** 0.5) for count in (positions.shape[1], tokens))
    if old * old + 1 != positions.shape[1] or new * new + 1 != tokens:
        raise ValueError(f"tokens={tokens}: positions are resized between square grids only")
    # The first position belongs to the class token, and stays as it is.
    grid = jnp.asarray(positions[:, 1:]).reshape(1, old, old, -1)
    resized = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "bicubic")
    flat = np.asarray(resized).reshape(1, new * new, -1)
    return np.concatenate([positions[:, :1], flat], axis=1)


def _fitting(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turn a tensor into our leaf; a tensor whose axes cannot fit stays as it is."""
    try:
        leaf = _to_ours(entry, tensor)
        return resize_positions(leaf, shape[1]) if entry.path == "pos_embed" else leaf
    except (ValueError, IndexError, TypeError, ArithmeticError):
        return tensor


def _to_ours(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    if entry.part:
        part, count = entry.part
        tensor = np.split(tensor, count)[part]
    match entry.kind:
        case "dense":
            return tensor.transpose(1, 0)
        case "conv":
            return tensor.transpose(2, 3, 1, 0)
        case "heads_in":
            return tensor.reshape(tensor.shape[0], -1)
        case "heads_out":
            return tensor.reshape(-1, tensor.shape[-1])
        case "heads_bias":
            return tensor.reshape(-1)
    return tensor


def _to_theirs(entry: Entry, leaf: np.ndarray, num_heads: int) -> np.ndarray:
    match entry.kind:
        case "dense":
            return leaf.T
        case "conv":
            return leaf.transpose(3, 2, 0, 1)
        case "heads_in":
            return leaf.reshape(leaf.shape[0], num_heads, -1)
        case "heads_out":
            return leaf.reshape(num_heads, -1, leaf.shape[-1])
        case "heads_bias":
            return leaf.reshape(num_heads, -1)
    return leaf
