"""Checks of a checkpoint's config.json against our model.

Heads, the epsilon of the norms and the activation leave no trace in the shapes of tensors: weights
of a model with others would load, and mean something else.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pm_jax import files, models
from pm_jax.types import InvalidInput, cause
from pm_jax.weights import checkpoint_files
from pm_jax.weights.checkpoint_files import CONFIG_FILE

_TYPES = {
    models.TextEncoder: ("bert",),
    models.VisionTransformer: (
        *("vit", "vit_mae", "vit_msn", "ijepa"),
        *("dinov2", "dinov2_with_registers", "dinov3_vit"),
    ),
}
"""Values of `model_type`, transformers' name of an architecture, that a model reads."""

_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hidden_size": ("width", lambda model: model.width),
    "num_hidden_layers": ("depth", lambda model: model.depth),
    "num_attention_heads": ("num_heads", lambda model: model.num_heads),
    "intermediate_size": ("", lambda model: int(model.width * model.mlp_ratio)),
    "mlp_ratio": ("", lambda model: model.mlp_ratio),
    "layer_norm_eps": ("layer_norm_epsilon", lambda model: model.layer_norm_epsilon),
    "patch_size": ("patch_size", lambda model: model.patch_size),
    "num_register_tokens": ("registers", lambda model: model.registers),
    "vocab_size": ("vocabulary", lambda model: model.vocabulary),
    "pad_token_id": ("", lambda model: model.padding_id),
    "hidden_act": ("", lambda model: "gelu"),
    "position_embedding_type": ("", lambda model: "absolute"),
    "is_decoder": ("", lambda model: False),
    "use_swiglu_ffn": ("", lambda model: False),
    "use_gated_mlp": ("", lambda model: False),
    "rope_theta": ("", lambda model: models.vit.ROTARY_BASE),
}
"""Settings of transformers, those of the binaries that are the same, and what a model has."""

_TIMM = re.compile(r"(?:vit|deit3?)_(tiny|small|base|large)_patch(\d+).*")
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}


def remark_on_pixels(path: str | os.PathLike) -> str:
    """Say in a line on what other pixels the weights were trained than a run gives them.

    Args:
        path: what `pretrained.read_tensors` takes.

    Returns:
        The line; empty where the pixels are the same, or nothing beside the weights tells.
    """
    folder = _folder(path)
    for name, keys in (
        ("preprocessor_config.json", ("image_mean", "image_std")),
        (CONFIG_FILE, ("mean", "std")),
    ):
        try:
            content = files.read_json(folder / name, dict)
            content = content.get("pretrained_cfg", content)
            mean, deviation = ([float(x) for x in content[key]] for key in keys)
        except (ValueError, OSError, KeyError, TypeError, AttributeError):
            # Only the model depends on a damaged config.json, and `check_config` refuses it.
            continue
        if set(mean + deviation) == {0.5}:
            return ""
        return (
            f"pretrained={path}: trained on pixels less {mean} over {deviation}; a run has them "
            "less 0.5 over 0.5"
        )
    return ""


def _folder(path: str | os.PathLike) -> Path:
    """Return the folder of a checkpoint's files."""
    file = checkpoint_files.find("pretrained", path).tensors[0]
    return file if file.is_dir() else file.parent


def check_config(path: str | os.PathLike, model: Any) -> None:
    """Check that the config.json of a checkpoint, if there is one, describes a model.

    Args:
        path: what `pretrained.read_tensors` takes.
        model: a `VisionTransformer` or a `TextEncoder`.

    Raises:
        InvalidInput: it cannot be read, or describes another model.
    """
    file = _folder(path) / CONFIG_FILE
    if not file.is_file():
        return
    try:
        content = files.read_json(file, dict)
    except (ValueError, OSError) as error:
        raise InvalidInput(
            f"pretrained={path}: its {CONFIG_FILE} cannot be read ({cause(error)}); get it anew"
        ) from error
    if "architecture" in content:
        content = _of_timm(str(content["architecture"]))
    elif "model_type" not in content:
        # Another program's file, such as the settings of a run.
        return
    _check_type(path, content.get("model_type"), model)
    _check_settings(path, content, model)


def _of_timm(architecture: str) -> dict[str, Any]:
    """Return what timm's name of an architecture says, in the words of transformers."""
    if "quickgelu" in architecture:
        return {"hidden_act": "quick_gelu"}
    known = _TIMM.fullmatch(architecture)
    if not known:
        return {}
    return {"num_attention_heads": _TIMM_HEADS[known[1]], "patch_size": int(known[2])}


def _check_type(path: str | os.PathLike, model_type: Any, model: Any) -> None:
    allowed = _TYPES.get(type(model), (model_type,))
    if model_type is not None and model_type not in allowed:
        raise InvalidInput(
            f"pretrained={path}: its {CONFIG_FILE} says model_type={model_type}, and this model is "
            f"{', '.join(allowed)}; give weights of one of them, or choose another model"
        )


def _check_settings(path: str | os.PathLike, content: Mapping[str, Any], model: Any) -> None:
    differences, remedies = [], []
    for name, (setting, value_of) in _SETTINGS.items():
        try:
            ours = value_of(model)
        except AttributeError:  # a setting of the other kind of model
            continue
        theirs = content.get(name)
        # A patch may be given by its two sides, which are the same in all public models.
        if isinstance(theirs, list) and len(set(map(str, theirs))) == 1:
            theirs = theirs[0]
        if theirs is None or _same(theirs, ours):
            continue
        differences.append(f"{name}={theirs} and the model has {ours}")
        remedies += [f"{setting}={theirs}"] if setting else []
    if differences:
        remedy = f"set {', '.join(remedies)}, or " if remedies else ""
        raise InvalidInput(
            f"pretrained={path}: its {CONFIG_FILE} says {'; '.join(differences)}; {remedy}choose "
            "the architecture that the weights are of"
        )


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, (int, float)) and isinstance(ours, (int, float)):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return bool(theirs == ours)
