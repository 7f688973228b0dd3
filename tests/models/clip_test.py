"""CLIP's towers against a few lines of float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import models
from pm_jax.models.clip import PIXEL_DEVIATION, PIXEL_MEAN
from pm_jax.models.vit import patches
from tests import clip_files

START, END = len(clip_files.VOCABULARY) - 2, len(clip_files.VOCABULARY) - 1
IDS = np.asarray([[START, 3, 9, 4, END, 0], [START, 5, 6, END, 0, 0], [START, 1, 2, 3, 4, END]])


def norm(x, layer):
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / spread * layer["scale"] + layer["bias"]


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def blocks(x, params, mask, activation):
    """Tokens [T, D] of one example."""
    size = clip_files.WIDTH // clip_files.HEADS
    for layer in range(clip_files.DEPTH):
        block = params[f"blocks_{layer}"]
        attention, inputs = block["attn"], norm(x, block["norm1"])
        query, key, value = (dense(inputs, attention[n]) for n in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for head in range(clip_files.HEADS):
            part = slice(head * size, (head + 1) * size)
            weights = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size)) * mask
            mixed[:, part] = weights / weights.sum(1, keepdims=True) @ value[:, part]
        x = x + dense(mixed, attention["proj"])
        hidden = activation(dense(norm(x, block["norm2"]), block["mlp"]["fc1"]))
        x = x + dense(hidden, block["mlp"]["fc2"])
    return x


def unit_of(x, params):
    projected = norm(x, params["norm"]) @ params["projection"]["kernel"]
    return projected / np.linalg.norm(projected)


def quick(x):
    return x / (1 + np.exp(-1.702 * x))


exact = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)


def in_float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers_are_what_the_formulas_say(activation):
    image, text = (in_float64(params) for params in clip_files.params_of_both())
    use = {"quick_gelu": quick, "gelu": exact}[activation]
    tower = clip_files.text_tower(activation=activation)
    found = tower.apply({"params": jax.tree.map(np.float32, text)}, IDS)
    for row, ids in enumerate(IDS):
        x = text["word_embed"]["embedding"][ids] + text["position_embed"]["embedding"][: len(ids)]
        x = blocks(x, text, np.tril(np.ones((len(ids), len(ids)))), use)
        wanted = unit_of(x[ids.tolist().index(END)], text)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4, atol=1e-5)
    pixels = np.random.default_rng(0).uniform(-1, 1, size=(2, 8, 8, 3)).astype(np.float32)
    tower = clip_files.image_tower(activation=activation)
    found = tower.apply({"params": jax.tree.map(np.float32, image)}, pixels)
    normalised = ((pixels + 1.0) / 2 - PIXEL_MEAN) / PIXEL_DEVIATION
    for row, cut in enumerate(np.asarray(patches(normalised, clip_files.PATCH), np.float64)):
        x = np.tensordot(cut, image["patch_embed"]["kernel"], 3)
        x = np.concatenate([image["cls_token"][0], x]) + image["pos_embed"][0]
        x = blocks(norm(x, image["norm_pre"]), image, np.ones((5, 5)), use)
        wanted = dense(unit_of(x[0], image), image["head"])
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_what_stands_behind_the_end_of_a_text_changes_nothing():
    params = clip_files.params_of_both()[1]
    apply = functools.partial(clip_files.text_tower().apply, {"params": params})
    changed = np.where(IDS == 0, 7, IDS)
    np.testing.assert_allclose(apply(IDS), apply(changed), rtol=1e-6)
    assert float(jnp.abs(apply(IDS[:, :4])[1] - apply(IDS)[1]).max()) < 1e-6
    swapped = IDS[:, [0, 2, 1, 3, 4, 5]]
    assert float(jnp.abs(apply(IDS) - apply(swapped)).max(axis=1).min()) > 1e-4


@pytest.mark.slow
def test_bfloat16_keeps_unit_vectors_and_logits_in_float32():
    params, images = clip_files.params_of_both()[0], jnp.ones((2, 8, 8, 3)) * 0.3
    scaled = {**params, "head": {"kernel": 100 * params["head"]["kernel"],
                                 "bias": params["head"]["bias"]}}  # fmt: skip
    tower = clip_files.image_tower(dtype=jnp.bfloat16)
    logits = tower.apply({"params": scaled}, images)
    assert logits.dtype == jnp.float32
    # The vectors are rounded, and their products are not rounded again.
    wanted = clip_files.image_tower().apply({"params": scaled}, images)
    assert 0 < float(jnp.abs(logits - wanted).max()) < 0.02 * float(jnp.abs(wanted).max())
    # Padded tokens are not attended to, and the blocks may be computed again.
    for changes in ({"pad_tokens": 8}, {"remat": True}):
        other = clip_files.image_tower(**changes).apply({"params": scaled}, images)
        np.testing.assert_allclose(other, wanted, rtol=1e-5)


def test_sizes_of_the_published_models():
    """Parameters of ViT-B/16's towers: 86,192,640 and 63,428,097 less the scale of the logits."""
    image, text = models.ClipImageTower(1), models.ClipTextTower()
    inputs = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32)
    counts = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(tower.init, jax.random.key(0), given)))
        for tower, given in zip((image, text), inputs, strict=True)
    ]
    assert counts == [86_192_640 + 513, 63_428_096]
