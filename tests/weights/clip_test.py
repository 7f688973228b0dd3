"""CLIP models as files: names, sizes and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import trees
from pm_jax.models.clip import PIXEL_DEVIATION, PIXEL_MEAN
from pm_jax.types import InvalidInput
from pm_jax.weights import clip, pretrained
from tests import clip_files

LAYOUTS = ("clip", "open_clip")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_towers_are_read_back_bit_for_bit(layout, tmp_path):
    weights = str(clip_files.write_model(tmp_path, layout))
    parts = clip.parted(weights, pretrained.read_tensors(weights))
    assert parts.scale == pytest.approx(np.exp(2.0))
    wanted, others = clip_files.params_of_both(), clip_files.params_of_both(5)
    for tensors, tower, other in zip(parts[:2], wanted, others, strict=True):
        loaded = pretrained.load_params(tensors, other)
        for path, leaf in trees.leaves_by_path(tower).items():
            # The columns are no part of the model.
            from_file = path.startswith("head/")
            like = trees.leaves_by_path(other)[path] if from_file else leaf
            assert jnp.array_equal(trees.leaves_by_path(loaded)[path], like), path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_those_of_the_config(layout, tmp_path):
    image, text = clip.sizes(str(clip_files.write_model(tmp_path, layout)))
    wanted = {**clip_files.SIZES, "layer_norm_epsilon": 1e-5, "activation": "quick_gelu"}
    pixels = {"pixel_mean": PIXEL_MEAN, "pixel_deviation": PIXEL_DEVIATION}
    assert image == {**wanted, **pixels, "patch_size": clip_files.PATCH}
    vocabulary = len(clip_files.VOCABULARY)
    assert text == {**wanted, "positions": clip_files.POSITIONS, "vocabulary": vocabulary}


def test_exact_gelu_and_other_pixels_come_from_the_config(tmp_path):
    weights = str(clip_files.write_model(tmp_path))
    parts = {f"{x}_config": {**clip_files.config()[f"{x}_config"], "hidden_act": "gelu"}
             for x in ("vision", "text")}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(clip_files.config(**parts)))
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    image, text = clip.sizes(weights)
    assert image["activation"] == text["activation"] == "gelu"
    assert image["pixel_mean"] == (0.5, 0.5, 0.5)
    assert image["pixel_deviation"] == (0.25, 0.5, 1)
    # open_clip's default is the exact one, and a folder may have both configs.
    (tmp_path / "config.json").write_text("{}")
    content = clip_files.open_clip_config(quick_gelu=False)
    content["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    image, text = clip.sizes(weights)
    assert image["activation"] == text["activation"] == "gelu"
    assert image["pixel_mean"] == (0.1, 0.2, 0.3)


def test_a_text_tower_in_a_module_of_its_own_is_found():
    tensors = clip_files.tensors("open_clip")
    apart = {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": tensor
        for name, tensor in tensors.items()
    }
    parts, plain = clip.parted("x", {**apart, "attn_mask": np.zeros(1)}), clip.parted("x", tensors)
    assert parts.text.keys() == plain.text.keys() and parts.image.keys() == plain.image.keys()


def test_what_belongs_to_neither_tower_is_refused():
    parts = clip.parted("x", {**clip_files.tensors(), "logit_bias": np.zeros(1, np.float32)})
    with pytest.raises(InvalidInput, match="extra logit_bias"):
        pretrained.load_params(parts.image, clip_files.params_of_both()[0])
    towerless = {name: x for name, x in clip_files.tensors().items() if name != "logit_scale"}
    with pytest.raises(InvalidInput, match="pretrained=x: has no logit_scale"):
        clip.parted("x", towerless)


TRANSFORMERS = {
    "model_type=siglip": ("model_type", "siglip"),
    "hidden_act=gelu_new": ("vision_config", {"hidden_act": "gelu_new"}),
    "num_attention_heads=0": ("text_config", {"num_attention_heads": 0}),
    "hidden_size=many": ("text_config", {"hidden_size": "many"}),
    "projection_dim=None": ("projection_dim", None),
    "3 heads, which do not divide": ("vision_config", {"hidden_size": 8, "num_attention_heads": 3}),
    "is damaged": ("text_config", [1]),
}
OPEN_CLIP = {
    "pool_type=avg": ("vision_cfg", {"pool_type": "avg"}),
    "timm_model_name=vit": ("vision_cfg", {"timm_model_name": "vit"}),
    "embed_cls=True": ("text_cfg", {"embed_cls": True}),
    "no_causal_mask=True": ("text_cfg", {"no_causal_mask": True}),
    r"layers=\[3, 4, 6, 3\]": ("vision_cfg", {"layers": [3, 4, 6, 3]}),
    "no model_cfg of two towers": ("text_cfg", None),
}


@pytest.mark.parametrize("layout, message, changes", [
    *(("clip", message, changes) for message, changes in TRANSFORMERS.items()),
    *(("open_clip", message, changes) for message, changes in OPEN_CLIP.items()),
])  # fmt: skip
def test_what_is_not_built_is_refused_by_name(layout, message, changes, tmp_path):
    name, content = {
        "clip": ("config.json", clip_files.config(**dict([changes]))),
        "open_clip": ("open_clip_config.json", clip_files.open_clip_config(**dict([changes]))),
    }[layout]
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "model.safetensors").touch()
    message = message.replace("model_type=siglip", "model_type siglip")
    with pytest.raises(InvalidInput, match=message):
        clip.sizes(str(tmp_path / "model.safetensors"))


def test_a_config_that_is_absent_or_damaged_is_said(tmp_path):
    weights = str(tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match="there is no such file"):
        clip.sizes(weights)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InvalidInput, match="neither config.json nor open_clip_config.json beside"):
        clip.sizes(weights)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match="config.json beside it cannot be read"):
        clip.sizes(weights)
