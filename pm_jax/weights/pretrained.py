"""Reading public checkpoints into our models, and writing models under the same names.

A ViT has the layouts of timm, of ViT and DINOv2 in transformers, and of the `.npz` of AugReg and
the original ViT; a text encoder has that of BERT in transformers; the towers of CLIP, which `clip`
tells apart, have those of transformers and open_clip. The tables of names are in `layouts`, and
serve both directions; `public_names` knows what else files call the same tensors.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import files, trees
from pm_jax.types import InvalidInput, Params, cause
from pm_jax.weights import checkpoint_files
from pm_jax.weights.layouts import LAYOUTS, Entry, depth_of, entries_of
from pm_jax.weights.public_names import Form, Tensors, known

_OPTIONS = {
    "reg_token": "registers={registers}",
    "blocks_0/ls1/gamma": "layer_scale=1e-5",
    "fc_norm/scale": "pooling=mean_norm",
    "cls_token": "pooling=class_token",
    "pos_embed": "positions=learned",
}
"""Settings by which a ViT gets leaves that it lacks."""


def read_tensors(path: str | os.PathLike) -> Tensors:
    """Read all tensors of a checkpoint; nothing is unpickled.

    Args:
        path: a `.safetensors` or `.npz` file, a folder of transformers with one file or shards, or
            a folder of Orbax, of which `folder@step` names a step.

    Raises:
        InvalidInput: there is no checkpoint, or it is damaged or of another kind.
    """
    found = checkpoint_files.find("pretrained", path)
    tensors: Tensors = {}
    names = {}
    for file in found.tensors:
        try:
            read = _READERS[found.kind](file)
        except Exception as error:  # Rust, zip, NumPy and Orbax raise many types for damage.
            shown = "" if file == Path(path) else f"{file.name} "
            raise InvalidInput(
                f"pretrained={path}: {shown}cannot be read ({cause(error)}); get it anew"
            ) from error
        names[file] = tuple(read)
        tensors |= read
    checkpoint_files.check_shards("pretrained", Path(path), found, names)
    return tensors


def layout_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the layout, a key of `LAYOUTS` or `OURS`, of a checkpoint; raises `InvalidInput`."""
    return known(tensors).form.layout


def left_out(tensors: Mapping[str, np.ndarray], *, head: bool = False) -> tuple[str, ...]:
    """List the modules of a checkpoint that `load_params` leaves out.

    They are poolers, heads of other objectives, tokens of masking and, without `head`, the
    classifier; nothing else is left out.

    Raises:
        InvalidInput: the checkpoint has no known layout.

    Example:
        >>> layer, width = "encoder.layer.0.attention.self.query.weight", np.eye(2)
        >>> left_out({f"bert.{layer}": width, "bert.pooler.dense.weight": width})
        ('bert.pooler.dense',)
    """
    found = known(tensors)
    names = list(found.left_out)
    if not head:
        heads = {"head.weight", "head.bias", "head/kernel", "head/bias", "classifier.weight",
                 "classifier.bias"}  # fmt: skip
        names += [found.form.names.get(name, name) for name in found.tensors if name in heads]
    leaf = re.compile(r"[./](weight|bias|kernel|gamma|beta)(/value)?$")
    return tuple(dict.fromkeys(leaf.sub("", name) for name in names))


def load_params(tensors: Mapping[str, np.ndarray], params: Params, *, head: bool = False) -> Params:
    """Fill the parameters of a ViT or a text encoder with the tensors of a public checkpoint.

    Args:
        tensors: what `read_tensors` returns; what `left_out` lists of them is not used.
        params: parameters of the model, or their shapes.
        head: whether the classifier is filled too.

    Raises:
        InvalidInput: tensors are missing, left over, of another shape or type, NaN or infinite; all
            are listed.
    """
    ours, checkpoint = trees.leaves_by_path(params), known(tensors)
    tensors, theirs = checkpoint.tensors, checkpoint.form.names
    all_entries = entries_of(checkpoint.form.layout, ours)
    entries = [entry for entry in all_entries if head or not entry.path.startswith("head/")]
    missing = sorted({entry.name for entry in entries if entry.path in ours} - set(tensors))
    lacking = [e for e in entries if e.path not in ours and e.name in tensors]
    placed = {entry.path for entry in all_entries}
    wanted = [path for path in ours if head or not path.startswith("head/")]
    missing += [f"{path} in the weights" for path in wanted if path not in placed]
    missing += [f"{entry.path} in the model" for entry in lacking]
    extra = sorted(set(tensors) - {entry.name for entry in all_entries})
    leaves: dict[str, jax.Array] = {}
    unfit: dict[str, list[str]] = {"missing": missing, "extra": extra, "misshapen": []}
    unfit |= {"not of floating-point numbers": [], "not finite": []}
    for entry in entries:
        if entry.name not in tensors or entry.path not in ours:
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
        leaf = _fitting(entry, tensor, shape, has_class="cls_token" in ours)
        if leaf.shape != shape:
            unfit["misshapen"].append(
                f"{entry.name} gives {leaf.shape} for {entry.path} of {shape}"
            )
        leaves[entry.path] = jnp.asarray(leaf)
    # A tensor that holds several of our leaves is named once, by its name in the file.
    problems = [
        f"{kind} {files.listed([*dict.fromkeys(theirs.get(name, name) for name in names)])}"
        for kind, names in unfit.items()
        if names
    ]
    if problems:
        options = _options_for(lacking, missing, tensors)
        raise InvalidInput(
            f"pretrained: does not fit the model: {'; '.join(problems)}; choose the architecture "
            f"that the weights are of{options}, or get them anew"
        )
    return trees.replace(params, leaves)


def _options_for(lacking: Sequence[Entry], missing: Sequence[str], tensors: Tensors) -> str:
    """Name the settings by which a ViT gets the leaves of a checkpoint."""
    names = {entry.path: entry.name for entry in lacking}
    options = [
        text.format(registers=np.shape(tensors[names["reg_token"]])[1])
        if path == "reg_token"
        else text
        for path, text in _OPTIONS.items()
        if path in names
    ]
    if not options:
        # The layouts of ViTs call it so, by itself or after the embeddings.
        options += ["pooling=mean"] * any(name.endswith("cls_token") for name in missing)
        options += ["positions=rotary"] * ("pos_embed in the weights" in missing)
    return f" ({', '.join(options)})" if options else ""


def export_params(params: Params, form: str | Form, *, num_heads: int = 1) -> Tensors:
    """Turn parameters into the tensors of a checkpoint, float32 and contiguous.

    Args:
        params: parameters of a ViT or a text encoder.
        form: a key of `LAYOUTS`; or the form of the checkpoint that the model started from, whose
            names the tensors then have.
        num_heads: number of heads, for the layout of AugReg.

    Raises:
        ValueError: there is no such layout, or it has no place for a leaf.
    """
    ours = trees.leaves_by_path(params)
    form = Form(form) if isinstance(form, str) else form
    if form.layout not in LAYOUTS:
        raise ValueError(f"layout={form.layout!r}: must be one of {', '.join(LAYOUTS)}")
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in ours.items()}
    entries = {entry.path: entry for entry in LAYOUTS[form.layout](depth_of(ours))}
    if strange := [path for path in ours if path not in entries]:
        raise ValueError(f"layout={form.layout!r}: has no place for {files.listed(strange)}")
    present = {entry.name for path, entry in entries.items() if path in leaves}
    if cut := [p for p, entry in entries.items() if p not in leaves and entry.name in present]:
        # A tensor of several leaves would lack a part.
        raise ValueError(f"layout={form.layout!r}: needs {files.listed(cut)} beside the others")
    adds_position = form.layout == "timm" and {"reg_token", "cls_token"} <= set(ours)
    if adds_position if form.class_position is None else not form.class_position:
        positions = leaves["pos_embed"]
        leaves["cls_token"] = leaves["cls_token"] + positions[:, :1]
        leaves["pos_embed"] = positions[:, 1:]
    parts: dict[str, list[np.ndarray]] = {}
    for path, entry in entries.items():
        if path in leaves:
            leaf = _to_theirs(entry, leaves[path], num_heads)
            parts.setdefault(form.names.get(entry.name, entry.name), []).append(leaf)
    return {
        name: np.ascontiguousarray(np.concatenate(part) if len(part) > 1 else part[0])
        for name, part in parts.items()
    }


def write_tensors(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    argument: str = "export",
) -> None:
    """Write a safetensors file, whole or not at all, with metadata; `argument` named its path.

    Raises:
        InvalidInput: the path exists, has another ending or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"{argument}={path}: must end in .safetensors")
    if path.exists() and not overwrite:
        raise InvalidInput(f"{argument}={path}: exists; choose another name or set overwrite")
    try:
        with files.replacing(path) as temporary:
            save_file(dict(tensors), temporary, {"format": "pt", **(metadata or {})})
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{argument}={path}: cannot be written ({error})") from error


def resize_positions(positions: np.ndarray, tokens: int, *, prefix: int = 1) -> np.ndarray:
    """Resize position embeddings [1, prefix + g * g, D] to [1, tokens, D], bicubically.

    Args:
        positions: [1, prefix + g * g, D] of a square grid; others keep their number.
        tokens: prefix + h * h, the number of positions wanted.
        prefix: number of positions at the beginning that stay as they are: 1 for a class token.

    Raises:
        ValueError: a number of patches is no square.
    """
    if positions.shape[1] == tokens:
        return positions
    patches = positions.shape[1] - prefix, tokens - prefix
    old, new = (math.isqrt(max(count, 0)) for count in patches)
    if (old * old, new * new) != patches or not old:
        raise ValueError(f"tokens={tokens}: positions are resized between square grids only")
    grid = jnp.asarray(positions[:, prefix:]).reshape(1, old, old, -1)
    resized = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "bicubic")
    flat = np.asarray(resized).reshape(1, new * new, -1)
    return np.concatenate([positions[:, :prefix], flat], axis=1)


def _fitting(
    entry: Entry, tensor: np.ndarray, shape: tuple[int, ...], *, has_class: bool
) -> np.ndarray:
    """Turn a tensor into our leaf; a tensor whose axes cannot fit stays as it is."""
    try:
        leaf = _to_ours(entry, tensor)
        if entry.path != "pos_embed" or leaf.shape == shape:
            return leaf
        rows = leaf.shape[1]
        of_patches = rows == shape[1] - 1 or math.isqrt(rows) ** 2 == rows
        if has_class and of_patches and math.isqrt(rows - 1) ** 2 != rows - 1:
            # Without a position of its own, the class token has that of 0.
            leaf = np.concatenate([np.zeros_like(leaf[:, :1]), leaf], axis=1)
        return resize_positions(leaf, shape[1], prefix=int(has_class))
    except (ValueError, IndexError, TypeError, ArithmeticError):
        return tensor


def _read_npz(path: Path) -> Tensors:
    # Opened here, because NumPy leaves a file open that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def _read_safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_orbax(path: Path) -> Tensors:
    from orbax import checkpoint as orbax

    with orbax.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree
        as_arrays = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(
            path.absolute(), args=orbax.args.PyTreeRestore(restore_args=as_arrays)
        )
    return {name: np.asarray(leaf) for name, leaf in trees.leaves_by_path(restored).items()}


_READERS = {"npz": _read_npz, "safetensors": _read_safetensors, "orbax": _read_orbax}
"""Functions that read a file, or a folder of Orbax, by the kind of checkpoint."""


def _to_ours(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    if entry.part:
        part, count = entry.part
        tensor = np.split(tensor, count)[part]
    match entry.kind:
        case "dense":
            return tensor.transpose(1, 0)
        case "conv":
            return tensor.transpose(2, 3, 1, 0)
        case "class_half":
            # A classifier that does read the mean of the patches is none of a ViT here.
            first, second = np.split(tensor, 2, axis=1)
            return tensor if second.any() else first.T
        case "heads_in":
            return tensor.reshape(tensor.shape[0], -1)
        case "heads_out":
            return tensor.reshape(-1, tensor.shape[-1])
        case "heads_bias":
            return tensor.reshape(-1)
        case "squeezed":
            return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor


def _to_theirs(entry: Entry, leaf: np.ndarray, num_heads: int) -> np.ndarray:
    match entry.kind:
        case "dense":
            return leaf.T
        case "conv":
            return leaf.transpose(3, 2, 0, 1)
        case "class_half":
            return np.concatenate([leaf.T, np.zeros_like(leaf.T)], axis=1)
        case "heads_in":
            return leaf.reshape(leaf.shape[0], num_heads, -1)
        case "heads_out":
            return leaf.reshape(num_heads, -1, leaf.shape[-1])
        case "heads_bias":
            return leaf.reshape(num_heads, -1)
        case "squeezed":
            return leaf.squeeze()
    return leaf
