"""Public checkpoints: the layout of one, the names in which it differs, and what it leaves out.

The same model is saved under several names: with the prefix of the model that it is part of
(`bert.encoder.layer.0...`) or without, with the gammas of TensorFlow, with a pooler or another
head. A `Form` says how a file differs from its layout, so that a model goes back under its names.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput
from pm_jax.weights.layouts import OURS

Tensors = dict[str, np.ndarray]


class Form(NamedTuple):
    """How a checkpoint names and shapes its tensors.

    Attributes:
        layout: a key of `LAYOUTS`, or `OURS`.
        names: names in the file by names of the layout, where the two differ.
        class_position: whether the positions begin with one for the class token; `None` for what
            is usual, which is so except in timm's models with registers.
    """

    layout: str
    names: Mapping[str, str] = {}
    class_position: bool | None = None


class Known(NamedTuple):
    """A checkpoint whose layout is known.

    Attributes:
        form: how it names and shapes its tensors.
        tensors: its tensors by the names of the layout, but for those left out.
        left_out: names in the file of what no model here has a place for: poolers, heads of other
            objectives, tokens of masking.
    """

    form: Form
    tensors: Tensors
    left_out: tuple[str, ...]


class _Naming(NamedTuple):
    """The names that files of a layout have."""

    # A tensor that only this layout has.
    signature: str
    # Files may have these before the names of the body; the first is the layout's.
    prefixes: tuple[str, ...] = ("",)
    # Regular expressions of other names, and what the layout has instead.
    renamed: tuple[tuple[str, str], ...] = ()
    # Names, by the layout, of what is left out.
    left_out: str = "(?!)"
    # Names, by the layout, of what never has a prefix.
    outside: str = r"classifier\..*|decoder\..*"


_NAMINGS = {
    "timm": _Naming(
        "blocks.0.attn.qkv.weight",
        # DINOv2's own files call the registers so.
        renamed=((r"register_tokens", "reg_token"),),
        left_out=r"mask_token|pre_logits\.fc\..*",
    ),
    "transformers": _Naming(
        "vit.encoder.layer.0.layernorm_before.weight",
        prefixes=("vit.", "ijepa.", ""),
        left_out=r"vit\.embeddings\.mask_token|vit\.pooler\..*|decoder\..*",
    ),
    "dinov2": _Naming(
        "encoder.layer.0.layer_scale1.lambda1",
        prefixes=("", "dinov2.", "dinov2_with_registers."),
        left_out=r"embeddings\.mask_token",
    ),
    "dinov3": _Naming(
        "layer.0.attention.q_proj.weight",
        left_out=r"embeddings\.mask_token",
    ),
    "augreg": _Naming(
        "Transformer/encoder_norm/scale",
        left_out=r"pre_logits/.*",
    ),
    "bert": _Naming(
        "encoder.layer.0.attention.self.query.weight",
        prefixes=("", "bert."),
        renamed=((r"(.*LayerNorm)\.gamma", r"\1.weight"), (r"(.*LayerNorm)\.beta", r"\1.bias")),
        left_out=r"embeddings\.position_ids|pooler\..*|cls\..*|qa_outputs\..*",
        outside=r"classifier\..*|cls\..*|qa_outputs\..*",
    ),
    "clip": _Naming("vision_model.embeddings.class_embedding"),
    "clip_text": _Naming("text_model.final_layer_norm.weight"),
    "open_clip": _Naming("visual.class_embedding"),
    "open_clip_text": _Naming("ln_final.weight"),
    OURS: _Naming(
        "blocks_0/attn/query/kernel",
        prefixes=("", "params/"),
        # A state of nnx has its arrays one level lower.
        renamed=((r"(.*)/value", r"\1"),),
    ),
}
"""How files of each layout may name their tensors."""

_ROBERTA = (
    "RoBERTa, which counts positions from 2 and pads with id 1, unlike text_encoder; give weights "
    "of BERT"
)
_SWIGLU = (
    "a transformer with SwiGLU, as the giant DINOv2 is, for which there is no model; give weights "
    "of a smaller one"
)
_WITHOUT_MODEL = {
    r"roberta\..*|lm_head\.layer_norm\..*": _ROBERTA,
    r".*\bmlp\.(w12|w3|weights_in|weights_out|gate_proj|fc1_g)\..*": _SWIGLU,
    r"(.*\.)?(dist_token|distillation_token|head_dist\..*)": "a distilled DeiT, whose second token "
    "all others read; give weights of one that is not distilled",
    r"storage_tokens|blocks\.0\.gamma_1|(.*\.)?rope(_embed)?\..*": "DINOv3 or EVA by the names of "
    "its authors or timm; give transformers' weights of DINOv3",
}
"""Names of tensors by which a checkpoint is refused, and of what it is."""


def known(tensors: Mapping[str, np.ndarray]) -> Known:
    """Find the layout of a checkpoint, and name its tensors as the layout does.

    Raises:
        InvalidInput: there is no model for the checkpoint, or no layout of its names.

    Example:
        >>> layer = "encoder.layer.0.attention.self.query"
        >>> found = known({f"bert.{layer}.weight": np.eye(2), "cls.seq.bias": np.zeros(2)})
        >>> found.form.layout, list(found.tensors), found.left_out
        ('bert', ['encoder.layer.0.attention.self.query.weight'], ('cls.seq.bias',))
    """
    _check_has_model(tensors)
    layout, prefix = _layout(tensors)
    naming = _NAMINGS[layout]
    named: dict[str, str] = {}
    left_out = []
    for theirs in tensors:
        name = _name_in_layout(theirs, naming, prefix)
        if re.fullmatch(naming.left_out, name):
            left_out.append(theirs)
        elif name in named:
            raise InvalidInput(
                f"pretrained: holds {named[name]} and {theirs}, which are one tensor by two names; "
                "get the weights anew"
            )
        else:
            named[name] = theirs
    names = {name: theirs for name, theirs in named.items() if name != theirs}
    form = Form(layout, names, _has_class_position(tensors) if layout == "timm" else None)
    return Known(form, {name: tensors[theirs] for name, theirs in named.items()}, (*left_out,))


def _check_has_model(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse by its name what has no model here; raises `InvalidInput`."""
    for pattern, what in _WITHOUT_MODEL.items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            raise InvalidInput(f"pretrained: is {what}")
    kinds = tensors.get("embeddings.token_type_embeddings.weight")
    if kinds is not None and np.shape(kinds)[:1] == (1,):
        raise InvalidInput(f"pretrained: is {_ROBERTA}")
    mlp = (tensors.get(f"blocks.0.mlp.{name}.weight", 0) for name in ("fc1", "fc2"))
    first, second = map(np.shape, mlp)
    # timm keeps the gate and what it opens in one matrix.
    if len(first) == len(second) == 2 and first[0] == 2 * second[1]:
        raise InvalidInput(f"pretrained: is {_SWIGLU}")


def _layout(tensors: Iterable[str]) -> tuple[str, str]:
    """Return the layout of some names, and the prefix of their body; raises `InvalidInput`."""
    tensors = sorted(tensors)
    for layout, naming in _NAMINGS.items():
        present = {_renamed(name, naming) for name in tensors}
        body = naming.signature.removeprefix(naming.prefixes[0])
        for prefix in naming.prefixes:
            if prefix + body in present:
                return layout, prefix
    layouts = "; ".join(f"{layout} has {naming.signature}" for layout, naming in _NAMINGS.items())
    raise InvalidInput(
        f"pretrained: its tensors ({files.listed(tensors)}) are not named in a known layout: "
        f"{layouts}; give weights of one of them"
    )


def _name_in_layout(theirs: str, naming: _Naming, prefix: str) -> str:
    """Return the name that the layout has for a tensor of a file with a prefix."""
    has_prefix = theirs.startswith(prefix) and not re.fullmatch(naming.outside, theirs)
    name = naming.prefixes[0] + theirs.removeprefix(prefix) if has_prefix else theirs
    return _renamed(name, naming)


def _renamed(name: str, naming: _Naming) -> str:
    for pattern, replacement in naming.renamed:
        name = re.sub(f"^(?:{pattern})$", replacement, name)
    return name


def _has_class_position(tensors: Mapping[str, np.ndarray]) -> bool:
    """Tell whether timm's positions begin with one for the class token."""
    if "pos_embed" not in tensors or "cls_token" not in tensors:
        return True
    # timm adds the position to the class token in models with registers and in DeiT III.
    added = {"reg_token", "register_tokens", "blocks.0.ls1.gamma"} & set(tensors)
    (*_, rows, _) = (0, 0, *np.shape(tensors["pos_embed"]))
    return not (added and math.isqrt(rows) ** 2 == rows)
