"""Exports of the binary, of runs on digits from weights made here."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from pm_jax import models, trees
from pm_jax.continual import Config, Learner, export
from pm_jax.continual.report import inspection
from pm_jax.continual.storage import manifest
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from pm_jax.weights.peft_folder import PeftFolder, tensor_of
from tests import howto_pages
from tests.binaries import call, refused
from tests.experiments.train_test import results
from tests.small_runs import QUIET, leaves_equal

pytestmark = pytest.mark.slow

DIGITS = [
    *("--rule=averaging", "--scenario=class_incremental", "--num_tasks=2", "--epochs=1"),
    *("--model=vit", "--patch_size=4", "--width=16", "--depth=1", "--num_heads=2"),
    *("--adapter=lora", "--lora_rank=2", "--train_per_class=40", "--learning_rate=0.03"),
    "--classifiers=trained",
]
VIT = models.VisionTransformer(10, 4, None, 16, 1, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with weights, a run from them, and what that exported."""
    folder = tmp_path_factory.mktemp("finished")
    params = jax.jit(VIT.init)(jax.random.key(1), jnp.ones((1, 8, 8, 3)))["params"]
    pretrained.write_tensors(
        pretrained.export_params(params, "transformers"), folder / "start.safetensors"
    )
    call(
        "train",
        *arguments(folder),
        f"--export={folder / 'run' / 'merged.safetensors'}",
        f"--export_adapter={folder / 'adapter'}",
    )
    return folder


def arguments(folder):
    return [
        f"--workdir={folder / 'run'}", f"--pretrained={folder / 'start.safetensors'}", *DIGITS
    ]  # fmt: skip


def config_of(folder):
    fields = results(folder / "run")["config"]
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def merged_params(folder):
    return Learner(config_of(folder), 0, folder / "run" / "seed_0", QUIET).finished_params()


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


def test_what_is_exported_into_the_work_directory_is_covered_by_its_manifest(finished):
    found = inspection.inspect(finished / "run")
    assert not found.damaged and not found.unlisted
    assert "merged.safetensors" in manifest.read(finished / "run").files
    assert sorted(path.name for path in (finished / "adapter").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]


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


def displacements(adapter):
    return {module: adapter.displacement(module) for module in adapter.modules}


def test_a_run_goes_on_from_an_adapter_and_the_two_merge(finished, tmp_path, monkeypatch, capsys):
    """The how-to of pm_jax/README.md: continue from an adapter, then merge the new one with it."""
    monkeypatch.chdir(tmp_path)
    first = shutil.copytree(finished / "adapter", tmp_path / "first")
    section = howto_pages.sections(howto_pages.HOWTOS)["Go on from an adapter, or merge two"]
    both, go_on, with_heads_left = howto_pages.commands(section)
    # The stream and the weights are those of this test.
    named = ("--adapter_from", "--export_adapter", "--workdir")
    call("train", *arguments(finished)[1:], *(x for x in go_on if x.startswith(named)), "--seeds=1",
         f"--export={tmp_path / 'merged.safetensors'}")  # fmt: skip
    config = dataclasses.replace(config_of(finished), adapter_from=str(first))
    start, plain = (Learner(c, 0, options=QUIET).params for c in (config, config_of(finished)))
    merged = merged_params(finished)
    kernels = {path for path, leaf in trees.leaves_by_path(start).items()
               if not np.array_equal(leaf, trees.leaves_by_path(plain)[path])}  # fmt: skip
    assert kernels == {f"blocks_0/attn/{name}/kernel" for name in ("key", "value")}
    for path in kernels:  # where the first run ended, this one starts
        found, wanted = (trees.leaves_by_path(params)[path] for params in (start, merged))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    one, two = (PeftFolder.open("models", path) for path in (first, tmp_path / "second"))
    assert two.rank == 8  # two tasks of rank 2 after an adapter of rank 4
    weights = pretrained.read_tensors(finished / "start.safetensors")
    after = pretrained.read_tensors(tmp_path / "merged.safetensors")
    for module, step in displacements(two).items():
        name = tensor_of(module, weights)
        np.testing.assert_allclose(step, after[name] - weights[name], atol=2e-6)
        assert np.abs(step - one.displacement(module)).max() > 1e-3
    line = refused(capsys, *both, "--rule=task_arithmetic")
    assert re.search(r"classifier\.\w+ of modules_to_save differs", line)
    # transformers calls the classifier so, and timm a head.
    call(*(typed.replace("head", "classifier") for typed in with_heads_left))
    found = displacements(PeftFolder.open("models", tmp_path / "both"))
    for module, step in found.items():
        wanted = (one.displacement(module) + two.displacement(module)) / 2
        np.testing.assert_allclose(step, wanted, atol=2e-6)
    call(*both[:2], f"--base={finished / 'start.safetensors'}",
         f"--output={tmp_path / 'whole.safetensors'}", "--leave=classifier.*")  # fmt: skip
    whole = pretrained.read_tensors(tmp_path / "whole.safetensors")
    for module, step in found.items():
        name = tensor_of(module, weights)
        np.testing.assert_allclose(whole[name], weights[name] + step, atol=2e-6)
    check_weighed(one, two, finished)


def check_weighed(one, two, finished):
    """The how-to of merging.md, here: the two merge by the Fishers of their models."""
    fishers = {}
    for name, model in (("first", finished / "run" / "merged.safetensors"),
                        ("second", "merged.safetensors")):  # fmt: skip
        call("fisher", *DIGITS[1:], "--num_tasks=1", f"--pretrained={model}", "--train_per_class=4",
             f"--output={name}.fisher.safetensors")  # fmt: skip
        fishers[name] = pretrained.read_tensors(f"{name}.fisher.safetensors")
    section = howto_pages.sections(howto_pages.MERGING)["Adapters of PEFT"]
    call(*(typed.replace("head", "classifier") for typed in howto_pages.commands(section)[-1]))
    found = displacements(PeftFolder.open("models", pathlib.Path("weighed")))
    first, second = displacements(one), displacements(two)
    along = {
        name: sum(
            np.sum(fisher[tensor_of(m, fisher)] * (second[m] - first[m]).astype(np.float64) ** 2)
            for m in found
        )
        for name, fisher in fishers.items()
    }
    alpha = along["second"] / sum(along.values())
    assert 0.05 < alpha < 0.95
    for m, step in found.items():
        np.testing.assert_allclose(step, (1 - alpha) * first[m] + alpha * second[m], atol=2e-6)


def test_another_classifier_of_the_run_is_the_head_where_it_is_asked_for(finished, tmp_path):
    typed = [*arguments(finished)[1:], "--classifiers=trained,ridge:features=20,discriminant"]
    heads = {}
    for name in ("trained", "discriminant"):
        path = tmp_path / f"{name}.safetensors"
        call("train", f"--workdir={tmp_path / 'run'}", *typed, f"--export={path}",
             f"--classifier_in_export={name}")  # fmt: skip
        heads[name] = pretrained.read_tensors(path)
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata()["classifier"] == name
    before = pretrained.read_tensors(finished / "run" / "merged.safetensors")
    assert leaves_equal(heads["trained"], before)
    own = {name for name in before if not np.array_equal(before[name], heads["discriminant"][name])}
    assert own == {"classifier.weight", "classifier.bias"}
    empty = jax.tree.map(jnp.zeros_like, merged_params(finished))
    params = pretrained.load_params(heads["discriminant"], empty, head=True)
    stream = config_of(finished).task_stream(0)
    content = results(tmp_path / "run")["scores"]["discriminant"]["test"]["accuracy_matrix"][-1]
    for rows, wanted in zip(stream.test.rows(), content, strict=True):
        logits = VIT.apply({"params": params}, stream.inputs[rows] / 127.5 - 1.0)
        right = np.mean(np.argmax(logits, axis=1) == stream.labels[rows])
        np.testing.assert_allclose(right, wanted, atol=1.01 / len(rows))


def test_a_finished_run_exports_without_training(finished, tmp_path, monkeypatch, capsys):
    def no_training(self):
        raise AssertionError("trains")

    monkeypatch.setattr(Learner, "run", no_training)
    first = pretrained.read_tensors(finished / "run" / "merged.safetensors")
    again = tmp_path / "again.safetensors"
    call("train", *arguments(finished), f"--export={again}")
    assert leaves_equal(pretrained.read_tensors(again), first)
    line = refused(capsys, "train", *arguments(finished), f"--export={again}")
    assert line.startswith(f"error: --export={again}: exists") and "overwrite" in line
    adapter = [f"--export_adapter={finished / 'adapter'}"]
    assert "exists" in refused(capsys, "train", *arguments(finished), *adapter)
    again.write_bytes(b"old")
    call("train", *arguments(finished), f"--export={again}", *adapter, "--overwrite")
    assert leaves_equal(pretrained.read_tensors(again), first)
    assert list(tmp_path.iterdir()) == [again]


def test_a_run_without_its_last_checkpoint_does_not_export(finished, tmp_path, capsys):
    checkpoints = finished / "run" / "seed_0" / "checkpoints"
    checkpoints.rename(tmp_path / "moved")
    try:
        line = refused(
            capsys, "train", *arguments(finished), f"--export={tmp_path / 'm.safetensors'}"
        )
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
        lambda self, _: trees.replace(restored(self), {"blocks_0/attn/key/kernel": noise}),
    )
    exports = [f"--export={tmp_path / 'm.safetensors'}", f"--export_adapter={tmp_path / 'adapter'}"]
    line = refused(capsys, "train", *arguments(finished), *exports)
    assert re.search("--export_adapter=.*key.weight is not of rank 4.*rule=averaging", line)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_weights_of_augreg_and_none_go_out_in_timms_layout(tmp_path):
    shapes = jax.eval_shape(VIT.init, jax.random.key(1), jnp.ones((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    np.savez(tmp_path / "a.npz", **pretrained.export_params(params, "augreg", num_heads=2))
    for start in ("", str(tmp_path / "a.npz")):
        config = Config(model="vit", pretrained=start)
        assert export.form_for(config).layout == "timm"


def test_a_run_says_what_it_leaves_out_and_writes_the_names_that_it_started_from(tmp_path, capsys):
    model = VIT.clone(registers=2, layer_scale=1e-5)
    shapes = jax.eval_shape(model.init, jax.random.key(1), jnp.ones((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 5, shapes)
    tensors = pretrained.export_params(params, "dinov2")
    tensors = {
        name if name.startswith("classifier") else f"dinov2_with_registers.{name}": tensor
        for name, tensor in tensors.items()
    }
    masking = {"dinov2_with_registers.embeddings.mask_token": np.zeros((1, 16), np.float32)}
    folder, merged = tmp_path / "dino", tmp_path / "merged.safetensors"
    folder.mkdir()
    pretrained.write_tensors(tensors | masking, folder / "model.safetensors")
    (folder / "config.json").write_text(
        '{"model_type": "dinov2_with_registers", "num_register_tokens": 2, "layer_norm_eps": 1e-6}'
    )
    run = [f"--workdir={tmp_path / 'run'}", f"--pretrained={folder}", *DIGITS, "--registers=2"]
    run += ["--layer_scale=1e-5", "--noreport"]
    adapter = refused(capsys, "train", *run, f"--export_adapter={tmp_path / 'adapter'}")
    assert "is not written under transformers' names of DINO" in adapter
    call("train", *run, f"--export={merged}")
    said = f"averaging, seed 0: pretrained={folder}: left out {next(iter(masking))}, classifier\n"
    assert said in capsys.readouterr().err
    found = pretrained.read_tensors(merged)
    assert {name: x.shape for name, x in found.items()} == {
        name: x.shape for name, x in tensors.items()
    }
    kept = "dinov2_with_registers.encoder.layer.0.layer_scale1.lambda1"
    assert np.array_equal(found[kept], tensors[kept])


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InvalidInput, match="export=.*: cannot be written"):
        pretrained.write_tensors({"w": np.ones(2)}, tmp_path / "none" / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


# Other people's implementations, where they are installed (the extra `parity`).
