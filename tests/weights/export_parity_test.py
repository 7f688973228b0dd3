"""What timm, transformers and PEFT make of what is exported; needs the extra `parity`."""

import pathlib
import re

import numpy as np
import pytest

from pm_jax import models
from pm_jax.continual import Learner
from pm_jax.weights import peft_adapter, pretrained
from tests import howto_pages
from tests.binaries import call
from tests.continual.export_test import config_of
from tests.small_runs import QUIET
from tests.weights.peft_adapter_test import (
    CLASSES,
    DEPTH,
    HEADS,
    IDS,
    MODULES,
    PATCH,
    POSITIONS,
    SIZE,
    VOCABULARY,
    WIDTH,
    adapter_of,
    inputs,
    moved,
    network,
    random_params,
)

VIT_TINY = pathlib.Path(__file__).parents[3] / "shared/data/vit_tiny/model.safetensors"


def make_theirs(layout):
    """Their model with room for our weights, and its logits or pooled states on our inputs."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    if layout == "timm":
        timm = pytest.importorskip("timm", reason="needs the extra parity")
        return timm.models.VisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            num_classes=CLASSES,
        )  # fmt: skip
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
    }  # fmt: skip
    if layout == "bert":
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **sizes
        )
        return transformers.BertModel(config, add_pooling_layer=False)
    config = transformers.ViTConfig(
        image_size=SIZE, patch_size=PATCH, num_labels=CLASSES, layer_norm_eps=1e-6, **sizes
    )
    return transformers.ViTForImageClassification(config)


def with_weights(theirs, layout, params, folder):
    """Their model, loaded in their own way from what we write."""
    import torch

    tensors = pretrained.export_params(params, layout)
    if layout == "timm":
        theirs.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
        return theirs
    theirs.save_pretrained(folder)
    if layout == "bert":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
    pretrained.write_tensors(tensors, folder / "model.safetensors", overwrite=True)
    extra = {"add_pooling_layer": False} if layout == "bert" else {}
    return type(theirs).from_pretrained(folder, **extra)


def logits_of(theirs, layout, head=None):
    import torch

    with torch.no_grad():
        if layout == "bert":
            ids = torch.tensor(np.asarray(IDS))
            mask = (ids != 0).long()
            states = theirs(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
            weights = mask[:, :, None].numpy()
            pooled = (states * weights).sum(1) / weights.sum(1)
            return pooled @ head["classifier.weight"].T + head["classifier.bias"]
        found = theirs(torch.tensor(np.asarray(inputs(layout)).transpose(0, 3, 1, 2)))
    return getattr(found, "logits", found).numpy()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("layout", MODULES)
def test_peft_turns_the_start_into_the_merged_model(layout, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    start = random_params(layout)
    merged = moved(start)
    adapter = adapter_of(layout, start, merged)
    peft_adapter.write_adapter(adapter, tmp_path / "adapter")
    theirs = with_weights(make_theirs(layout), layout, start, tmp_path).eval()
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    got = logits_of(loaded, layout, adapter.head)
    wanted, other = (
        network(layout).apply({"params": params}, inputs(layout)) for params in (merged, start)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - other - 1.0).max() > 0.05
    plain = logits_of(loaded.merge_and_unload().eval(), layout, adapter.head)
    np.testing.assert_allclose(plain, wanted, rtol=1e-4, atol=1e-4)


def test_positions_are_resized_as_timm_does():
    """So that its models, with pre-trained weights at a run's resolution, are the start."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    layers = pytest.importorskip("timm.layers", reason="needs the extra parity")
    positions = np.random.default_rng(0).normal(size=(1, 197, 8)).astype(np.float32)
    for side in (4, 10, 20):
        theirs = layers.resample_abs_pos_embed(torch.tensor(positions), [side, side])
        ours = pretrained.resize_positions(positions, 1 + side * side)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not VIT_TINY.exists(), reason="needs the shared ViT-Ti weights")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_timm_and_peft_load_a_merged_vit_tiny(tmp_path, monkeypatch):
    """By the lines of the how-to as they stand, but for the sizes."""
    monkeypatch.chdir(tmp_path)
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    timm = pytest.importorskip("timm", reason="needs the extra parity")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(16, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(16) % 4
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    call("train", f"--workdir={tmp_path / 'run'}", f"--dataset={tmp_path / 'mine.npz'}",
        "--scenario=class_incremental", "--num_tasks=2", "--epochs=2", "--model=vit_tiny_patch16",
        "--classifiers=trained",
        f"--pretrained={VIT_TINY}", "--adapter=lora", "--learning_rate=0.01", "--rule=averaging",
        f"--export={tmp_path / 'merged.safetensors'}", f"--export_adapter={tmp_path / 'adapter'}",
    )  # fmt: skip
    learner = Learner(config_of(tmp_path), 0, tmp_path / "run" / "seed_0", QUIET)
    start, merged = learner.params, learner.finished_params()
    pixels = images / np.float32(127.5) - 1.0
    model = models.VisionTransformer(4, 16, None, 192, 12, 3)
    wanted, before = (np.asarray(model.apply({"params": p}, pixels)) for p in (merged, start))
    assert np.std(wanted) > 0.05 and np.abs(wanted - before).max() > 0.05
    batch = torch.tensor(pixels.transpose(0, 3, 1, 2))

    def check(theirs):
        with torch.no_grad():
            np.testing.assert_allclose(theirs.eval()(batch).numpy(), wanted, rtol=1e-4, atol=1e-4)

    page = howto_pages.HOWTOS.read_text()
    [by_timm], [by_peft] = (re.findall(rf"`({name}.*?)`", page) for name in ("timm", "peft"))
    assert "img_size=160, num_classes=100" in by_timm
    check(eval(by_timm.replace("160", "32").replace("100", "4"), {"timm": timm}))
    base = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(VIT_TINY)},
        img_size=32, num_classes=4,
    )  # fmt: skip
    check(eval(by_peft, {"peft": peft, "base": base}))
