"""CLIP models as files: the sizes of both towers, which their config says, and the weights of each.

A config.json of transformers or an open_clip_config.json lies beside the weights. It alone says
which activation the model was trained with: the weights have the same names and shapes for both.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.models.clip import ACTIVATIONS, PIXEL_DEVIATION, PIXEL_MEAN
from pm_jax.types import InvalidInput, Params, cause
from pm_jax.weights import checkpoint_files
from pm_jax.weights.checkpoint_files import CONFIG_FILE
from pm_jax.weights.public_names import Tensors

OPEN_CLIP_FILE, PREPROCESSOR_FILE = "open_clip_config.json", "preprocessor_config.json"
SCALE = "logit_scale"
"""The tensor that holds the logarithm of the logits' scale."""

# The entries that are read, with the values that transformers and open_clip take for absent ones.
_BOTH = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_VISION = _BOTH | {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
}
_TEXT = _BOTH | {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_OPEN_CLIP_BOTH = {"layers": 12, "mlp_ratio": 4.0}
_OPEN_CLIP_VISION = _OPEN_CLIP_BOTH | {"width": 768, "patch_size": 16, "head_width": 64}
_OPEN_CLIP_TEXT = _OPEN_CLIP_BOTH | {
    "width": 512,
    "heads": 8,
    "vocab_size": 49408,
    "context_length": 77,
}
_HARMLESS = ("image_size", "patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id")
"""Entries of open_clip that change none of our logits."""
_AS_BUILT = (("pool_type", "tok"), ("pool_type", "argmax"), ("pos_embed_type", "learnable"),
             ("proj_type", "linear"))  # fmt: skip
"""Entries of open_clip that say what is built here anyway."""
_TEXT_NAMES = (
    *("text_model.", "text_projection", "transformer.", "token_embedding."),
    *("positional_embedding", "ln_final."),
)
_NOT_WEIGHTS = (
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    *("attn_mask", "input_resolution", "context_length", "vocab_size"),
)
"""Numbers that some files hold beside the weights."""


class Sizes(NamedTuple):
    """The fields of `ClipImageTower` and of `ClipTextTower` that belong to a model."""

    image: dict[str, Any]
    text: dict[str, Any]


class Parts(NamedTuple):
    """The tensors of a model by tower, and the scale of its logits."""

    image: Tensors
    text: Tensors
    scale: float


def folder_of(weights: str) -> Path:
    """Return the folder that the files of a model lie in; raises `InvalidInput` for none."""
    path = checkpoint_files.find("pretrained", weights).tensors[0]
    return path if path.is_dir() else path.parent


def sizes(weights: str) -> Sizes:
    """Read the sizes of the model that weights are of.

    Raises:
        InvalidInput: there are no weights or no config beside them, or it is damaged or of another
            model.
    """
    folder = folder_of(weights)
    present = [folder / name for name in (CONFIG_FILE, OPEN_CLIP_FILE) if (folder / name).is_file()]
    if not present:
        raise InvalidInput(
            f"pretrained={weights}: has neither {CONFIG_FILE} nor {OPEN_CLIP_FILE} beside it, "
            "which say the activation and the heads of a CLIP model; put its own there"
        )
    of_each = {path: _json(weights, path) for path in present}
    # Folders with both have the same model in both forms.
    path = next((p for p in present if of_each[p].get("model_type") == "clip"), present[-1])
    where = f"pretrained={weights}: {path.name}"
    if path.name == OPEN_CLIP_FILE:
        found = _of_open_clip(where, of_each[path])
    else:
        beside = path.with_name(PREPROCESSOR_FILE)
        pixels = _json(weights, beside) if beside.is_file() else {}
        found = _of_transformers(where, of_each[path], pixels)
    for fields in found:
        if fields["width"] % fields["num_heads"]:
            raise InvalidInput(
                f"{where} gives {fields['num_heads']} heads, which do not divide the width "
                f"{fields['width']}; get it anew"
            )
    return found


def parted(weights: str, tensors: Mapping[str, np.ndarray]) -> Parts:
    """Sort the tensors of a model by tower; those of neither are with the image tower's.

    Raises:
        InvalidInput: there is no scale of logits.
    """
    scale = np.asarray(tensors.get(SCALE, ()), np.float64)
    if scale.size != 1:
        raise InvalidInput(
            f"pretrained={weights}: has no {SCALE}, the scale of the logits; give a CLIP model "
            "with both towers"
        )
    image: Tensors = {}
    text: Tensors = {}
    for name, tensor in tensors.items():
        # open_clip has its text tower at the top or, in some models, in a module of its own.
        name = name.removeprefix("text.")
        if name not in (SCALE, *_NOT_WEIGHTS):
            (text if name.startswith(_TEXT_NAMES) else image)[name] = tensor
    return Parts(image, text, math.exp(scale.item()))


def without_columns(params: Params) -> Params:
    """Return an image tower's parameters but for its classifier, which a CLIP model has not."""
    return {name: leaf for name, leaf in params.items() if name != "head"}


def _json(weights: str, path: Path) -> dict[str, Any]:
    try:
        return files.read_json(path, {str: object})
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"pretrained={weights}: {path.name} beside it cannot be read ({cause(error)}); get it "
            "anew"
        ) from error


def _of_transformers(where: str, config: dict[str, Any], pixels: dict[str, Any]) -> Sizes:
    if config.get("model_type") != "clip":
        raise InvalidInput(
            f"{where} is of the model_type {config.get('model_type')}; model=clip takes CLIP "
            "models with both towers, whose model_type is clip"
        )
    projection = _entries(where, config, {"projection_dim": 512})
    vision = _entries(where, config.get("vision_config"), _VISION)
    text = _entries(where, config.get("text_config"), _TEXT)

    def shared(of: dict[str, Any]) -> dict[str, Any]:
        return {
            "width": of["hidden_size"],
            "depth": of["num_hidden_layers"],
            "num_heads": of["num_attention_heads"],
            "mlp_size": of["intermediate_size"],
            "embedding": projection["projection_dim"],
            "activation": of["hidden_act"],
            "layer_norm_epsilon": of["layer_norm_eps"],
        }

    mean, deviation = pixels.get("image_mean"), pixels.get("image_std")
    image = {**shared(vision), "patch_size": vision["patch_size"], **_pixels(mean, deviation)}
    positions = text["max_position_embeddings"]
    return Sizes(image, {**shared(text), "vocabulary": text["vocab_size"], "positions": positions})


def _of_open_clip(where: str, content: dict[str, Any]) -> Sizes:
    config = content.get("model_cfg")
    if not files.fits(config, {"embed_dim": int, "vision_cfg": {str: object},
                               "text_cfg": {str: object}}):  # fmt: skip
        raise InvalidInput(f"{where} has no model_cfg of two towers; get it anew")
    assert isinstance(config, dict)
    vision = _entries(where, config["vision_cfg"], _OPEN_CLIP_VISION)
    text = _entries(where, config["text_cfg"], _OPEN_CLIP_TEXT)
    for part, known in ((config["vision_cfg"], vision), (config["text_cfg"], text)):
        for item in part.items():
            # Entries that are off say nothing.
            if item[0] not in (*known, *_HARMLESS) and item not in _AS_BUILT and item[1]:
                raise InvalidInput(
                    f"{where} has {item[0]}={item[1]}, which model=clip does not build; give "
                    "another CLIP model"
                )

    def shared(of: dict[str, Any]) -> dict[str, Any]:
        return {
            "width": of["width"],
            "depth": of["layers"],
            "mlp_size": int(of["width"] * of["mlp_ratio"]),
            "embedding": config["embed_dim"],
            "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
            "layer_norm_epsilon": 1e-5,
        }

    pixels = content.get("preprocess_cfg") or {}
    image = {
        **shared(vision),
        "num_heads": max(1, vision["width"] // vision["head_width"]),
        "patch_size": vision["patch_size"],
        **_pixels(pixels.get("mean"), pixels.get("std")),
    }
    more = {"vocabulary": text["vocab_size"], "positions": text["context_length"]}
    return Sizes(image, {**shared(text), "num_heads": text["heads"], **more})


def _entries(where: str, given: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Read entries of a config, which have the types of the usual ones; raises `InvalidInput`."""
    if not files.fits(given or {}, {str: object}):
        raise InvalidInput(f"{where} is damaged; get it anew")
    found = {name: (given or {}).get(name, value) for name, value in usual.items()}
    for name, value in found.items():
        if isinstance(usual[name], str):
            holds = value in ACTIVATIONS
        else:
            form = int if isinstance(usual[name], int) else (int, float)
            holds = files.fits(value, form) and value > 0
        if not holds:
            raise InvalidInput(
                f"{where} has {name}={value}, which model=clip does not build; give another CLIP "
                "model"
            )
    return found


def _pixels(mean: Any, deviation: Any) -> dict[str, tuple[float, ...]]:
    def numbers(given: Any, usual: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(given) if files.fits(given, [(int, float)]) and len(given) == 3 else usual

    return {
        "pixel_mean": numbers(mean, PIXEL_MEAN),
        "pixel_deviation": numbers(deviation, PIXEL_DEVIATION),
    }
