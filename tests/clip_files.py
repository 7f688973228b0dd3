"""A tiny CLIP model as files: random weights of both towers, a config and a tokenizer."""

import json
import string

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import models
from pm_jax.weights import clip, pretrained

WIDTH, DEPTH, HEADS, PATCH, EMBEDDING, POSITIONS, SIDE = 8, 1, 2, 4, 6, 40, 8
MERGES = [("t", "h"), ("th", "e</w>"), ("o", "f</w>"), ("h", "o"), ("p", "ho"), ("pho", "t"),
          ("c", "a"), ("ca", "t</w>"), ("'", "s</w>")]  # fmt: skip
SIGNS = string.ascii_lowercase + string.digits + "'.,!?-_()\""
VOCABULARY = [
    *SIGNS,
    *(f"{sign}</w>" for sign in SIGNS),
    *("".join(pair) for pair in MERGES),
    *("<|startoftext|>", "<|endoftext|>"),
]
NAMES = ("red_cat", "green fish", "blue bird", "grey car")

SIZES = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_size": 3 * WIDTH,
         "embedding": EMBEDDING}  # fmt: skip


def image_tower(**changes):
    return models.ClipImageTower(len(NAMES), PATCH, **SIZES | changes)


def text_tower(**changes):
    return models.ClipTextTower(len(VOCABULARY), POSITIONS, **SIZES | changes)


def random_params(tower, inputs, seed=0):
    """Nothing at its initial zero or one, so that every tensor counts."""
    params = jax.jit(tower.init)(jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params
    )


def blank_images(side=SIDE):
    return jnp.zeros((1, side, side, 3))


def params_of_both(seed=0):
    image = random_params(image_tower(), blank_images(), seed)
    return image, random_params(text_tower(), jnp.zeros((1, 3), jnp.int32), seed + 1)


def tensors(layout="clip", seed=0):
    """Both towers under the names of a layout, `clip` or `open_clip`."""
    image, text = params_of_both(seed)
    scale = {"logit_scale": np.asarray(2.0, np.float32)}
    return {
        **pretrained.export_params(clip.without_columns(image), layout),
        **pretrained.export_params(text, f"{layout}_text"),
        **scale,
    }


def config(**changes):
    shared = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
              "intermediate_size": 3 * WIDTH}  # fmt: skip
    vision = {**shared, "patch_size": PATCH, "image_size": SIDE}
    text = {**shared, "vocab_size": len(VOCABULARY), "max_position_embeddings": POSITIONS,
            "eos_token_id": len(VOCABULARY) - 1}  # fmt: skip
    whole = {"model_type": "clip", "projection_dim": EMBEDDING, "vision_config": vision,
             "text_config": text}  # fmt: skip
    return {**whole, **changes}


def open_clip_config(**changes):
    shared = {"width": WIDTH, "layers": DEPTH, "mlp_ratio": 3.0}
    vision = {**shared, "patch_size": PATCH, "image_size": SIDE, "head_width": WIDTH // HEADS}
    text = {**shared, "heads": HEADS, "vocab_size": len(VOCABULARY), "context_length": POSITIONS}
    whole = {"embed_dim": EMBEDDING, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": {**whole, **changes}}


def write_tokenizer(folder):
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return folder / "vocab.json"


def write_model(folder, layout="clip", seed=0):
    """A folder with all of it; returns the path of the weights."""
    folder.mkdir(exist_ok=True)
    name, content = {
        "clip": ("config.json", config()),
        "open_clip": ("open_clip_config.json", open_clip_config()),
    }[layout]
    (folder / name).write_text(json.dumps(content))
    write_tokenizer(folder)
    pretrained.write_tensors(tensors(layout, seed), folder / "model.safetensors", overwrite=True)
    return folder / "model.safetensors"


def write_names(folder, names=NAMES):
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
    return folder / "names.txt"
