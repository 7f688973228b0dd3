"""Checkpoints under the names that other programs give them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import models, trees
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from pm_jax.weights.layouts import LAYOUTS
from pm_jax.weights.public_names import known

WIDTH, HEADS, SIDE = 8, 2, 8
VIT = models.VisionTransformer(5, 4, None, WIDTH, 2, HEADS)
DINO = VIT.clone(layer_scale=1e-5)
DINO_REG = DINO.clone(registers=3)
ROTARY = DINO_REG.clone(positions="rotary")
BERT = models.TextEncoder(5, 11, 6, WIDTH, 2, HEADS)


@functools.cache
def shapes_of(model):
    inputs = jnp.ones((1, SIDE, SIDE, 3)) if hasattr(model, "patch_size") else jnp.ones((1, 4), int)
    return jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]


def params_of(model, seed=0):
    """Random parameters, nothing of which is 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 1 + rng.normal(size=x.shape).astype(np.float32), shapes_of(model))


def random(*shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def matrices(*names):
    """Layers that no model here has."""
    return {f"{name}.{leaf}": random(WIDTH, WIDTH) for name in names for leaf in ("weight", "bias")}


def prefixed(prefix, tensors, without="classifier"):
    return {k if k.startswith(without) else prefix + k: v for k, v in tensors.items()}


def renamed(tensors, **pairs):
    for old, new in pairs.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def of_tensorflow(tensors):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias",
        "LayerNorm.beta"): tensor for name, tensor in tensors.items()
    }  # fmt: skip


def without(tensors, *beginnings):
    return {name: x for name, x in tensors.items() if not name.startswith(beginnings)}


def bert_of_google(bert):
    """bert-base-uncased: a prefix, gammas, and heads of pre-training instead of a classifier."""
    heads = matrices(
        "cls.predictions.transform.dense", "cls.predictions.decoder", "cls.seq_relationship"
    )
    heads |= {"cls.predictions.transform.LayerNorm.gamma": random(WIDTH)}
    heads |= {"bert.embeddings.position_ids": np.arange(6)[None], **matrices("bert.pooler.dense")}
    return prefixed("bert.", of_tensorflow(without(bert, "classifier"))) | heads


def bert_for_questions(bert):
    return prefixed("bert.", without(bert, "classifier")) | matrices("qa_outputs")


def bert_for_classification(bert):
    return prefixed("bert.", bert) | matrices("bert.pooler.dense")


def vit_model(vit):
    body = {name.removeprefix("vit."): x for name, x in without(vit, "classifier").items()}
    return body | matrices("pooler.dense") | {"embeddings.mask_token": random(1, 1, WIDTH)}


def vit_of_a_masked_autoencoder(vit):
    return without(vit, "classifier") | matrices("decoder.decoder_embed", "decoder.decoder_pred")


def ijepa(vit):
    return {name.replace("vit.", "ijepa."): x for name, x in vit.items()}


def original_dinov2(timm):
    """Files of the authors, whose class token has a position."""
    body = {("register_tokens" if k == "reg_token" else k): x for k, x in timm.items()}
    return without(body, "head.") | {"mask_token": random(1, WIDTH)}


def dinov2_model(dinov2):
    return without(dinov2, "classifier") | {"embeddings.mask_token": random(1, WIDTH)}


def dinov2_for_classification(dinov2):
    return prefixed("dinov2_with_registers.", dinov2)


def state_of_nnx(ours):
    return {f"{name}/value": x for name, x in ours.items()}


def train_state(ours):
    return {f"params/{name}": x for name, x in ours.items()}


KINDS = {
    "bert of google": (BERT, "bert", bert_of_google, [
        "bert.embeddings.position_ids", "bert.pooler.dense", "cls.predictions.decoder",
        "cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense",
        "cls.seq_relationship",
    ]),
    "bert for questions": (BERT, "bert", bert_for_questions, ["qa_outputs"]),
    "bert for classification": (
        BERT, "bert", bert_for_classification, ["bert.pooler.dense", "classifier"]),
    "ViTModel": (VIT, "transformers", vit_model, ["embeddings.mask_token", "pooler.dense"]),
    "masked autoencoder": (VIT, "transformers", vit_of_a_masked_autoencoder, [
        "decoder.decoder_embed", "decoder.decoder_pred"]),
    "I-JEPA": (VIT.clone(pooling="mean"), "transformers", ijepa, ["classifier"]),
    "in21k npz": (VIT, "augreg", lambda x: x | {
        "pre_logits/kernel": random(WIDTH, WIDTH), "pre_logits/bias": random(WIDTH)},
        ["head", "pre_logits"]),
    "in21k of timm": (
        VIT, "timm", lambda x: x | matrices("pre_logits.fc"), ["head", "pre_logits.fc"]),
    "gap of timm": (
        VIT.clone(registers=2, pooling="mean_norm"), "timm", dict, ["head"]),
    "DINOv2 of timm": (DINO, "timm", lambda x: without(x, "head"), []),
    "DINOv2 of its authors": (DINO_REG, "timm", original_dinov2, ["mask_token"]),
    "Dinov2Model": (DINO, "dinov2", dinov2_model, ["embeddings.mask_token"]),
    "Dinov2WithRegistersForImageClassification": (
        DINO_REG, "dinov2", dinov2_for_classification, ["classifier"]),
    "DINOv3ViTModel": (ROTARY, "dinov3", dinov2_model, ["embeddings.mask_token"]),
    "state of nnx": (DINO_REG, "flax", state_of_nnx, ["head"]),
    "train state": (BERT, "flax", train_state, ["params/head"]),
}  # fmt: skip
"""Model, layout, the file's tensors from those of the layout, and the modules left out."""


def exported(params, form):
    if form == "flax":
        return {path: np.asarray(x) for path, x in trees.leaves_by_path(params).items()}
    # The authors' form of DINOv2 keeps the position of the class token.
    form = form if isinstance(form, tuple) else pretrained.Form(form, class_position=True)
    return pretrained.export_params(params, form, num_heads=HEADS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_fills_the_model_and_goes_back_under_its_names(kind):
    model, layout, of_layout, wanted = KINDS[kind]
    params, start = params_of(model), params_of(model, 1)
    tensors = of_layout(exported(params, layout))
    assert pretrained.layout_of(tensors) == layout
    assert sorted(pretrained.left_out(tensors)) == wanted
    loaded = trees.leaves_by_path(pretrained.load_params(tensors, start))
    for path, leaf in trees.leaves_by_path({**params, "head": start["head"]}).items():
        assert np.array_equal(loaded[path], leaf), path
    if layout == "flax":
        return
    again = pretrained.export_params(params, known(tensors).form, num_heads=HEADS)
    modules = tuple(f"{name}{end}" for name in wanted for end in (".", "/", ""))
    body = [name for name in tensors if not name.startswith(modules)]
    assert len(body) > 25
    assert all(np.array_equal(again[name], tensors[name]) for name in body)
    # Besides the file's tensors there is the classifier, and nothing else.
    assert all(name in body or name.startswith(("head", "classifier")) for name in again)


def test_a_class_token_without_a_position_gets_that_of_zero_and_goes_back_so():
    """DeiT III and timm's DINOv2 with registers have added the position to the token."""
    for model, name in ((DINO, "blocks.0.ls1.gamma"), (DINO_REG, "reg_token")):
        params = params_of(model)
        tensors = pretrained.export_params(params, pretrained.Form("timm", class_position=False))
        assert name in tensors and tensors["pos_embed"].shape == (1, 4, WIDTH)
        loaded = pretrained.load_params(tensors, params_of(model, 1))
        assert (loaded["pos_embed"][:, 0] == 0).all()
        first = params["cls_token"] + params["pos_embed"][:, :1]
        np.testing.assert_array_equal(loaded["cls_token"], first)
        np.testing.assert_array_equal(loaded["pos_embed"][:, 1:], params["pos_embed"][:, 1:])
        form = known(tensors).form
        assert form.class_position is False
        again = pretrained.export_params({**loaded, "head": params["head"]}, form)
        assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
    # By the layout's name alone a model with registers goes out as timm's have it.
    assert pretrained.export_params(params, "timm")["pos_embed"].shape == (1, 4, WIDTH)


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_positions_are_resized_with_and_without_a_class_token(pooling):
    small = params_of(DINO.clone(pooling=pooling))
    form = pretrained.Form("timm", class_position=pooling != "class_token")
    tensors = pretrained.export_params(small, form)
    assert tensors["pos_embed"].shape[1] == 4
    model = DINO.clone(pooling=pooling, patch_size=2)
    large = {**shapes_of(model), "patch_embed": small["patch_embed"]}
    loaded = pretrained.load_params(tensors, large)["pos_embed"]
    first = int(pooling == "class_token")
    grid = jnp.asarray(tensors["pos_embed"]).reshape(1, 2, 2, WIDTH)
    wanted = jax.image.resize(grid, (1, 4, 4, WIDTH), "bicubic").reshape(1, 16, WIDTH)
    np.testing.assert_allclose(loaded[:, first:], wanted, rtol=1e-6)


def test_every_leaf_with_every_option_has_a_place_in_timms_layout():
    paths = {entry.path for entry in LAYOUTS["timm"](2)}
    for pooling in models.vit.POOLINGS:
        model = DINO_REG.clone(pooling=pooling)
        assert set(trees.leaves_by_path(params_of(model))) <= paths
    with pytest.raises(ValueError, match="'transformers': has no place for blocks_0/ls1/gamma"):
        pretrained.export_params(params_of(DINO), "transformers")
    with pytest.raises(ValueError, match="'timm': needs blocks_0/attn/key/bias, blocks_1"):
        pretrained.export_params(params_of(ROTARY), "timm")


def test_a_classifier_of_class_token_and_mean_is_ours_where_it_reads_no_mean():
    params = params_of(DINO)
    tensors = pretrained.export_params(params, "dinov2")
    assert tensors["classifier.weight"].shape == (5, 2 * WIDTH)
    loaded = pretrained.load_params(tensors, params_of(DINO, 1), head=True)
    np.testing.assert_array_equal(loaded["head"]["kernel"], params["head"]["kernel"])
    tensors["classifier.weight"][0, -1] = 1
    with pytest.raises(InvalidInput, match="misshapen classifier.weight"):
        pretrained.load_params(tensors, params_of(DINO, 1), head=True)


TIMM, LAYER = "blocks.0.mlp", "encoder.layer.0"
WITHOUT_MODEL = {
    "RoBERTa": ["roberta.embeddings.word_embeddings.weight", "lm_head.layer_norm.weight"],
    "SwiGLU": [f"{TIMM}.w12.weight", f"{LAYER}.mlp.weights_in.bias", f"{TIMM}.fc1_g.weight"],
    "distilled DeiT": ["dist_token", "deit.embeddings.distillation_token", "head_dist.bias"],
    "DINOv3": ["blocks.0.gamma_1", "rope_embed.periods", "storage_tokens"],
}


@pytest.mark.parametrize("what", WITHOUT_MODEL)
def test_what_has_no_model_is_refused_by_name(what):
    tensors = pretrained.export_params(params_of(VIT), "timm")
    for name in WITHOUT_MODEL[what]:
        with pytest.raises(InvalidInput, match=f"pretrained: is .*{what}.*; give .*weights of "):
            pretrained.load_params(tensors | {name: random(2)}, params_of(VIT))


def test_roberta_and_packed_swiglu_are_known_by_shapes():
    bert = pretrained.export_params(params_of(BERT), "bert")
    bert["embeddings.token_type_embeddings.weight"] = random(1, WIDTH)
    with pytest.raises(InvalidInput, match="is RoBERTa"):
        known(bert)
    timm = pretrained.export_params(params_of(VIT), "timm")
    timm["blocks.0.mlp.fc2.weight"] = random(WIDTH, 2 * WIDTH)
    with pytest.raises(InvalidInput, match="SwiGLU"):
        known(timm)


def test_settings_that_would_fit_the_weights_are_named():
    tensors = pretrained.export_params(params_of(DINO_REG), "timm")
    with pytest.raises(InvalidInput) as refused:
        pretrained.load_params(tensors, params_of(VIT))
    assert "missing reg_token in the model, " in str(refused.value)
    assert "(registers=3, layer_scale=1e-5), or get them anew" in str(refused.value)
    pooled = VIT.clone(pooling="mean_norm")
    tensors = pretrained.export_params(params_of(pooled), "timm")
    with pytest.raises(InvalidInput, match=r"\(pooling=mean_norm\)"):
        pretrained.load_params(tensors, params_of(VIT))
    jepa = pretrained.export_params(params_of(VIT.clone(pooling="mean")), "timm")
    with pytest.raises(InvalidInput, match=r"missing cls_token; .*\(pooling=mean\)"):
        pretrained.load_params(jepa, params_of(VIT))
    plain = pretrained.export_params(params_of(VIT), "transformers")
    with pytest.raises(InvalidInput, match="missing .*blocks_0/ls1/gamma in the weights"):
        pretrained.load_params(plain, params_of(DINO_REG))


def test_nothing_else_is_left_out_and_two_names_of_one_tensor_are_refused():
    bert = prefixed("bert.", pretrained.export_params(params_of(BERT), "bert"))
    with pytest.raises(InvalidInput, match="extra bert.adapter.down"):
        pretrained.load_params(bert | {"bert.adapter.down": random(2)}, params_of(BERT))
    with pytest.raises(InvalidInput, match="missing embeddings.LayerNorm.bias;"):
        pretrained.load_params(without(bert, "bert.embeddings.LayerNorm.bias"), params_of(BERT))
    twice = bert | {"bert.embeddings.LayerNorm.gamma": random(WIDTH)}
    with pytest.raises(InvalidInput, match="LayerNorm.weight and bert.*gamma, which are one"):
        known(twice)
