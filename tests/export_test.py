import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from pm_jax import models, trees
from pm_jax.continual import Config, Learner, export
from pm_jax.models import peft_adapter, pretrained
from pm_jax.types import InvalidInput
from tests.small_runs import leaves_equal
from tests.train_test import refused, results, run

VIT_TINY = pathlib.Path(__file__).parent.parent.parent / "shared/data/vit_tiny/model.safetensors"
SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 16, 8, 24, 2, 3, 5
VOCABULARY, POSITIONS = 40, 12
IDS = jnp.asarray([[3, 9, 4, 17, 0, 0], [5, 6, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
PATTERN = r".*/attn/(key|value)/kernel"
MODULES = {
    "timm": ["blocks.{}.attn.qkv"],
    "transformers": ["vit.layers.{}.attention.k_proj", "vit.layers.{}.attention.v_proj"],
    "bert": ["encoder.layer.{}.attention.self.key", "encoder.layer.{}.attention.self.value"],
}
SAVED = {
    **MODULES,
    "transformers": [
        "vit.encoder.layer.{}.attention.attention.key",
        "vit.encoder.layer.{}.attention.attention.value",
    ],
}
HEADS_OF = {"timm": "head", "transformers": "classifier"}


def network(layout, epsilon=1e-6):
    if layout == "bert":
        return models.TextEncoder(CLASSES, VOCABULARY, POSITIONS, WIDTH, DEPTH, HEADS)
    return models.VisionTransformer(
        CLASSES, PATCH, None, WIDTH, DEPTH, HEADS, layer_norm_epsilon=epsilon
    )


def inputs(layout):
    return IDS if layout == "bert" else jax.random.normal(jax.random.key(3), (3, SIZE, SIZE, 3))


def random_params(layout, seed=0):
    shapes = jax.eval_shape(network(layout).init, jax.random.key(0), inputs(layout))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )


def moved(start, pattern=PATTERN, rank=4):
    """The model after adapters of a rank in all, with another classifier."""
    rng = np.random.default_rng(5)
    leaves = {
        path: kernel
        + jnp.asarray(
            0.1 * rng.normal(size=(kernel.shape[0], rank)) @ rng.normal(size=(rank, WIDTH)),
            jnp.float32,
        )
        for path, kernel in trees.select(start, pattern).items()
    }
    return {**trees.replace(start, leaves), "head": jax.tree.map(lambda x: x + 1.0, start["head"])}


def adapter_of(layout, start, merged, pattern=PATTERN, rank=4):
    return peft_adapter.peft_adapter(start, merged, trees.match_paths(start, pattern), layout, rank)


@pytest.mark.parametrize("layout", MODULES)
def test_the_adapters_product_is_the_displacement(layout):
    start = random_params(layout)
    merged = moved(start)
    adapter = adapter_of(layout, start, merged)
    rank = 8 if layout == "timm" else 4
    assert adapter.config["r"] == adapter.config["lora_alpha"] == rank
    modules = [name.format(layer) for layer in range(DEPTH) for name in MODULES[layout]]
    assert adapter.config["target_modules"] == sorted(modules)
    keys = {f"base_model.model.{name}.lora_{f}.weight" for name in modules for f in "AB"}
    assert {key for key in adapter.tensors if "lora" in key} == keys
    before, after = (pretrained.export_params(params, layout) for params in (start, merged))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    saved = [f"{name.format(layer)}.weight" for layer in range(DEPTH) for name in SAVED[layout]]
    assert {name for name in changed if not name.startswith(("head", "classifier"))} == set(saved)
    for module, name in zip(modules, saved, strict=True):
        a, b = (adapter.tensors[f"base_model.model.{module}.lora_{f}.weight"] for f in "AB")
        assert a.shape == (rank, WIDTH) and b.shape == (len(after[name]), rank)
        # Both sides carry the rounding of the float32 weights that were subtracted.
        np.testing.assert_allclose(b @ a, after[name] - before[name], atol=1e-6)


def test_a_fused_matrix_moves_only_where_it_was_adapted():
    start = random_params("timm")
    adapter = adapter_of("timm", start, moved(start))
    b = adapter.tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    query, key, value = np.split(b, 3)
    assert not query.any() and key.any() and value.any()
    pattern = r".*/attn/value/kernel"
    adapter = adapter_of("timm", start, moved(start, pattern), pattern)
    b = adapter.tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert b.shape == (3 * WIDTH, 4) and not b[: 2 * WIDTH].any() and b[2 * WIDTH :].any()


def test_other_layers_than_attention_have_names_too():
    pattern = r".*/(attn/(query|proj)|mlp/fc1)/kernel"
    start = random_params("transformers")
    hidden = {path: k for path, k in trees.select(start, pattern).items()}
    merged = trees.replace(start, {path: k.at[0].add(1.0) for path, k in hidden.items()})
    names = adapter_of("transformers", start, merged, pattern).config["target_modules"]
    assert [name for name in names if ".0." in name] == [
        *("vit.layers.0.attention.o_proj", "vit.layers.0.attention.q_proj"),
        "vit.layers.0.mlp.fc1",
    ]


@pytest.mark.parametrize("layout", MODULES)
def test_the_classifier_goes_along(layout):
    start = random_params(layout)
    merged = moved(start)
    adapter = adapter_of(layout, start, merged)
    kernel = np.asarray(merged["head"]["kernel"]).T
    if layout == "bert":
        assert adapter.config["modules_to_save"] is None
        assert np.array_equal(adapter.head["classifier.weight"], kernel)
    else:
        name = HEADS_OF[layout]
        assert adapter.config["modules_to_save"] == [name] and not adapter.head
        assert np.array_equal(adapter.tensors[f"base_model.model.{name}.weight"], kernel)


def test_a_displacement_of_higher_rank_is_no_adapter():
    start = random_params("transformers")
    with pytest.raises(ValueError, match=r"displacement of vit\S+(key|value)\S+ is not of rank 3"):
        adapter_of("transformers", start, moved(start), rank=3)
    whole = adapter_of("transformers", start, random_params("transformers", 1), rank=1000)
    assert whole.config["r"] == WIDTH


def test_a_displacement_as_small_as_the_weights_rounding_is_an_adapter():
    start = random_params("transformers")
    noise = jax.tree.map(lambda x: x * (1 + 1e-7), start)
    assert adapter_of("transformers", start, noise, rank=1).config["r"] == 1


def test_an_adapter_is_written_over_and_beside_what_is_there(tmp_path):
    directory = tmp_path / "adapter"
    start = random_params("bert")
    adapter = adapter_of("bert", start, moved(start))
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")
    for _ in range(2):
        peft_adapter.write_adapter(adapter, directory)
    assert sorted(path.name for path in directory.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "thesis.tex"),
    ]
    assert json.loads((directory / "adapter_config.json").read_text()) == adapter.config
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="export_adapter=.*cannot be written"):
        peft_adapter.write_adapter(adapter, tmp_path / "file")


# The binary, on digits, from weights made here.

DIGITS = [
    *("--rule=averaging", "--scenario=class_incremental", "--num_tasks=2", "--epochs=1"),
    *("--model=vit", "--patch_size=4", "--width=16", "--depth=1", "--num_heads=2"),
    *("--adapter=lora", "--lora_rank=2", "--train_per_class=40", "--learning_rate=0.03"),
]
VIT = models.VisionTransformer(10, 4, None, 16, 1, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with weights, a run from them, and what that exported."""
    folder = tmp_path_factory.mktemp("finished")
    params = VIT.init(jax.random.key(1), jnp.ones((1, 8, 8, 1)))["params"]
    pretrained.write_tensors(
        pretrained.export_params(params, "transformers"), folder / "start.safetensors"
    )
    run(*arguments(folder), f"--export={folder / 'run' / 'merged.safetensors'}",
        f"--export_adapter={folder / 'adapter'}")  # fmt: skip
    return folder


def arguments(folder):
    return [
        f"--workdir={folder / 'run'}", f"--pretrained={folder / 'start.safetensors'}", *DIGITS
    ]  # fmt: skip


def config_of(folder):
    fields = results(folder / "run")["config"]
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def merged_params(folder):
    return Learner(config_of(folder), 0, folder / "run" / "seed_0", quiet=True).finished_params()


def test_the_merged_model_comes_back_with_the_accuracy_of_the_run(finished):
    path = finished / "run" / "merged.safetensors"
    tensors = pretrained.read_tensors(path)
    assert pretrained.layout_of(tensors) == "transformers"
    empty = jax.tree.map(jnp.zeros_like, merged_params(finished))
    params = pretrained.load_params(tensors, empty, head=True)
    assert leaves_equal(params, merged_params(finished))
    stream = config_of(finished).task_stream(0)
    positions = [p[:n] for p, n in zip(stream.test.positions, stream.test.sizes, strict=True)]
    logits = [VIT.apply({"params": params}, stream.inputs[p] / 127.5 - 1.0) for p in positions]
    found = [
        np.mean(np.argmax(row, axis=1) == stream.labels[p])
        for row, p in zip(logits, positions, strict=True)
    ]
    wanted = results(finished / "run")["accuracy_matrix"][-1]
    assert np.mean(wanted) > 0.15
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_metadata_says_how_to_build_the_model_and_what_made_it(finished):
    path = finished / "run" / "merged.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        found = file.metadata()
    wanted = {
        "format": "pt", "layout": "transformers", "num_heads": "2", "width": "16", "depth": "1",
        "patch_size": "4", "num_classes": "10", "image_size": "8", "layer_norm_epsilon": "1e-06",
        "rule": "averaging", "model": "vit", "dataset": "digits", "num_tasks": "2",
        "seed": "0",
    }  # fmt: skip
    assert wanted.items() <= found.items()
    assert found["made_by"].startswith("pm_jax") and str(finished) not in str(found)


def test_the_adapter_of_a_run_adds_up_to_its_merged_model(finished):
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 == config["lora_alpha"]  # two tasks of rank 2
    tensors = pretrained.read_tensors(finished / "adapter" / "adapter_model.safetensors")
    start = pretrained.read_tensors(finished / "start.safetensors")
    merged = pretrained.read_tensors(finished / "run" / "merged.safetensors")
    for ours, theirs in (("key", "k_proj"), ("value", "v_proj")):
        name = f"vit.encoder.layer.0.attention.attention.{ours}.weight"
        module = f"base_model.model.vit.layers.0.attention.{theirs}"
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        step = merged[name] - start[name]
        assert np.abs(step).max() > 1e-3
        np.testing.assert_allclose(product, step, atol=1e-6)  # rounding of the weights


def test_a_finished_run_exports_without_training(finished, tmp_path, monkeypatch, capsys):
    def no_training(self):
        raise AssertionError("trains")

    monkeypatch.setattr(Learner, "run", no_training)
    first = pretrained.read_tensors(finished / "run" / "merged.safetensors")
    again = tmp_path / "again.safetensors"
    run(*arguments(finished), f"--export={again}")
    assert leaves_equal(pretrained.read_tensors(again), first)
    line = refused(capsys, *arguments(finished), f"--export={again}")
    assert line.startswith(f"error: --export={again}: exists") and "overwrite" in line
    adapter = [f"--export_adapter={finished / 'adapter'}"]
    assert "exists" in refused(capsys, *arguments(finished), *adapter)
    again.write_bytes(b"old")
    run(*arguments(finished), f"--export={again}", *adapter, "--overwrite")
    assert leaves_equal(pretrained.read_tensors(again), first)
    assert list(tmp_path.iterdir()) == [again]


def test_a_run_without_its_last_checkpoint_does_not_export(finished, tmp_path, capsys):
    checkpoints = finished / "run" / "seed_0" / "checkpoints"
    checkpoints.rename(tmp_path / "moved")
    try:
        line = refused(capsys, *arguments(finished), f"--export={tmp_path / 'm.safetensors'}")
    finally:
        if checkpoints.exists():
            checkpoints.rmdir()
        (tmp_path / "moved").rename(checkpoints)
    assert "no checkpoint of the end" in line and not (tmp_path / "m.safetensors").exists()


def test_a_displacement_without_low_rank_is_refused_and_the_model_written(
    finished, tmp_path, monkeypatch, capsys
):
    """As a merge rule that works element by element would leave it."""
    restored = Learner.finished_params
    noise = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    monkeypatch.setattr(
        Learner,
        "finished_params",
        lambda self: trees.replace(restored(self), {"blocks_0/attn/key/kernel": noise}),
    )
    line = refused(
        *(capsys, *arguments(finished), f"--export={tmp_path / 'm.safetensors'}"),
        f"--export_adapter={tmp_path / 'adapter'}",
    )
    assert re.search("--export_adapter=.*key.weight is not of rank 4.*rule=averaging", line)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_weights_of_augreg_and_none_go_out_in_timms_layout(tmp_path):
    shapes = jax.eval_shape(VIT.init, jax.random.key(1), jnp.ones((1, 8, 8, 1)))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    np.savez(tmp_path / "a.npz", **pretrained.export_params(params, "augreg", num_heads=2))
    for start in ("", str(tmp_path / "a.npz")):
        config = Config(model="vit", pretrained=start)
        assert export.layout_for(config) == "timm"


REFUSED = {
    "ending": (["--export={}/m.bin", "--model=vit"], r"--export=\S*m\.bin: must end in \.saf"),
    "folder": (["--export={}/none/m.safetensors", "--model=vit"], "folder .*none does not exist"),
    "is a folder": (["--export={}/d.safetensors", "--model=vit", "--overwrite"], "is a folder"),
    "model": (["--export={}/m.safetensors"], "--model=mlp: has no public layout"),
    "seeds": (
        ["--export={}/m.safetensors", "--model=vit", "--seeds=1,2"],
        r"--export=.*: takes the model of one seed; .*seeds=1,2",
    ),
    "no adapter": (
        ["--export_adapter={}/a", "--model=vit"],
        "--export_adapter=.*: needs adapter=lora and pretrained",
    ),
    "adapter from scratch": (
        ["--export_adapter={}/a", "--model=vit", "--adapter=lora"],
        "--export_adapter=.*: needs adapter=lora and pretrained",
    ),
    "adapter's ending": (
        ["--export_adapter={}/a.safetensors", "--model=vit"],
        "--export_adapter=.*: is a folder of two files",
    ),
    "adapter is a file": (["--export_adapter={}/file", "--model=vit"], "file: is a file already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_training(case, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "d.safetensors").mkdir()
    given, pattern = REFUSED[case]
    given = [argument.format(tmp_path) for argument in given]
    line = refused(capsys, f"--workdir={tmp_path / 'run'}", "--patch_size=4", *given)
    assert re.search(pattern, line)
    assert not (tmp_path / "run").exists()


def test_the_weights_that_a_run_starts_from_are_not_replaced(finished, capsys):
    path = finished / "start.safetensors"
    line = refused(capsys, *arguments(finished), f"--export={path}", "--overwrite")
    assert "is what the run starts from" in line


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InvalidInput, match="export=.*: cannot be written"):
        pretrained.write_tensors({"w": np.ones(2)}, tmp_path / "none" / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


# Other people's implementations, where they are installed (the extra `parity`).


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
def test_timm_and_peft_load_a_merged_vit_tiny(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    timm = pytest.importorskip("timm", reason="needs the extra parity")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(16, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(16) % 4
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    run(f"--workdir={tmp_path / 'run'}", f"--dataset={tmp_path / 'mine.npz'}",
        "--scenario=class_incremental", "--num_tasks=2", "--epochs=2", "--model=vit_tiny_patch16",
        f"--pretrained={VIT_TINY}", "--adapter=lora", "--learning_rate=0.01", "--rule=averaging",
        f"--export={tmp_path / 'merged.safetensors'}", f"--export_adapter={tmp_path / 'adapter'}",
    )  # fmt: skip
    learner = Learner(config_of(tmp_path), 0, tmp_path / "run" / "seed_0", quiet=True)
    start, merged = learner.params, learner.finished_params()
    pixels = images / np.float32(127.5) - 1.0
    model = models.VisionTransformer(4, 16, None, 192, 12, 3)
    wanted, before = (np.asarray(model.apply({"params": p}, pixels)) for p in (merged, start))
    assert np.std(wanted) > 0.05 and np.abs(wanted - before).max() > 0.05
    batch = torch.tensor(pixels.transpose(0, 3, 1, 2))

    def check(theirs):
        with torch.no_grad():
            np.testing.assert_allclose(theirs.eval()(batch).numpy(), wanted, rtol=1e-4, atol=1e-4)

    sizes = {"img_size": 32, "num_classes": 4}
    check(timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=tmp_path / "merged.safetensors", **sizes
    ))  # fmt: skip
    base = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(VIT_TINY)},
        **sizes,
    )  # fmt: skip
    check(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
