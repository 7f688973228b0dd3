"""The config.json of a checkpoint against the model that it is read into."""

import json

import numpy as np
import pytest

from pm_jax import models
from pm_jax.types import InvalidInput
from pm_jax.weights.model_config import check_config, remark_on_pixels
from pm_jax.weights.pretrained import write_tensors

VIT = models.VisionTransformer(5, 4, None, 8, 1, 2, layer_norm_epsilon=1e-12)
BERT = models.TextEncoder(5, 11, 6, 8, 1, 2)
CONFIG_OF_VIT = {
    "model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 4,
    "image_size": 224,
}  # fmt: skip
CONFIG_OF_BERT = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 11,
    "pad_token_id": 0, "position_embedding_type": "absolute", "is_decoder": False,
}  # fmt: skip
CONFIG_OF_DINO = {
    "model_type": "dinov2_with_registers", "hidden_size": 8, "mlp_ratio": 4, "layer_norm_eps": 1e-6,
    "num_register_tokens": 3, "use_swiglu_ffn": False, "patch_size": [4, 4],
}  # fmt: skip
DINO = VIT.clone(layer_norm_epsilon=1e-6, registers=3, layer_scale=1.0)


@pytest.fixture
def folder(tmp_path):
    write_tensors({"w": np.ones(1)}, tmp_path / "model.safetensors")
    return tmp_path


def line(folder, content, model, source=None):
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput) as refused:
        check_config(source or folder, model)
    return str(refused.value)


def test_a_config_that_describes_the_model_passes(folder):
    check_config(folder, VIT)  # without any
    for content, model in (
        (CONFIG_OF_VIT, VIT),
        (CONFIG_OF_BERT, BERT),
        (CONFIG_OF_DINO, DINO),
        ({"architecture": "deit3_small_patch16_224"}, models.VisionTransformer(5, num_heads=6)),
        ({"architecture": "vit_huge_patch4_gap"}, VIT),
        # Not a model's: the settings of a run.
        ({"num_heads": 4, "layer_norm_eps": 1.0}, VIT),
    ):
        (folder / "config.json").write_text(json.dumps(content))
        check_config(folder, model)
        check_config(folder / "model.safetensors", model)


@pytest.mark.parametrize(
    "model, config, change, said",
    [
        (VIT, CONFIG_OF_VIT, {"num_attention_heads": 4}, "num_heads=4"),
        (VIT, CONFIG_OF_VIT, {"hidden_size": 16}, "width=16"),
        (VIT, CONFIG_OF_VIT, {"num_hidden_layers": 2}, "depth=2"),
        (VIT, CONFIG_OF_VIT, {"layer_norm_eps": 1e-6}, "layer_norm_epsilon=1e-06"),
        (VIT, CONFIG_OF_VIT, {"patch_size": 8}, "patch_size=8"),
        (VIT, CONFIG_OF_VIT, {"hidden_act": "gelu_new"}, ""),
        (VIT, CONFIG_OF_VIT, {"intermediate_size": 16}, ""),
        (BERT, CONFIG_OF_BERT, {"num_attention_heads": 1}, "num_heads=1"),
        (BERT, CONFIG_OF_BERT, {"hidden_act": "relu"}, ""),
        (BERT, CONFIG_OF_BERT, {"pad_token_id": 1}, ""),
        (BERT, CONFIG_OF_BERT, {"is_decoder": True}, ""),
        (BERT, CONFIG_OF_BERT, {"position_embedding_type": "relative_key"}, ""),
        (BERT, CONFIG_OF_BERT, {"vocab_size": 12}, "vocabulary=12"),
        (DINO, CONFIG_OF_DINO, {"num_register_tokens": 4}, "registers=4"),
        (DINO, CONFIG_OF_DINO, {"use_swiglu_ffn": True}, ""),
        (DINO, CONFIG_OF_DINO, {"mlp_ratio": 2}, ""),
        (DINO, CONFIG_OF_DINO, {"patch_size": [14, 14]}, "patch_size=14"),
    ],
)
def test_each_difference_is_named_with_the_setting_that_is_right(
    model, config, change, said, folder
):
    text = line(folder, config | change, model)
    ((name, value),) = change.items()
    value = value[0] if isinstance(value, list) else value
    assert text.startswith(
        f"pretrained={folder}: its config.json says {name}={value} and the model"
    )
    assert (f"; set {said}, or choose" in text) if said else "; choose the architecture" in text
    beside = folder / "model.safetensors"
    assert line(folder, config | change, model, beside) == text.replace(str(folder), str(beside))


def test_another_architecture_is_refused_by_its_name(folder):
    text = line(folder, CONFIG_OF_BERT | {"model_type": "roberta"}, BERT)
    assert "says model_type=roberta, and this model is bert;" in text
    assert "model_type=bert, and this model is vit, " in line(folder, CONFIG_OF_BERT, VIT)
    timm = models.VisionTransformer(5, num_heads=3)
    text = line(folder, {"architecture": "vit_small_patch16_224"}, timm)
    assert "num_attention_heads=6 and the model has 3; set num_heads=6, or" in text
    text = line(folder, {"architecture": "vit_base_patch32_clip_quickgelu_224"}, timm)
    assert "hidden_act=quick_gelu and the model has gelu" in text


@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_other_pixels_than_a_runs_are_said(form, folder):
    def said(mean, deviation):
        if form == "timm":
            pixels = {"architecture": "vit", "pretrained_cfg": {"mean": mean, "std": deviation}}
            (folder / "config.json").write_text(json.dumps(pixels))
        else:
            pixels = json.dumps({"image_mean": mean, "image_std": deviation})
            (folder / "preprocessor_config.json").write_text(pixels)
        return remark_on_pixels(folder)

    assert remark_on_pixels(folder) == said([0.5] * 3, [0.5] * 3) == ""
    assert said([0.4, 0.5, 0.5], [0.5] * 3) == (
        f"pretrained={folder}: trained on pixels less [0.4, 0.5, 0.5] over [0.5, 0.5, 0.5]; a run "
        "has them less 0.5 over 0.5"
    )
    assert said("mean", None) == ""


def test_a_damaged_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(InvalidInput, match="its config.json cannot be read .*; get it anew"):
        check_config(folder, VIT)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InvalidInput, match="its config.json cannot be read"):
        check_config(folder, VIT)
