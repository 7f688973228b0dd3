"""The Fisher of a fine-tuned model in a file, and the way from two data sets to a merged model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pm_jax.models import VisionTransformer
from pm_jax.weights import pretrained
from tests import howto_pages
from tests.binaries import call, refused

NETWORK = VisionTransformer(4, 4, None, 8, 1, 2)
SIZES = ("--model=vit", "--patch_size=4", "--width=8", "--depth=1", "--num_heads=2",
         "--scenario=class_incremental", "--num_tasks=1")  # fmt: skip
CLASSES = 4


def images(path, seed):
    """A data set of four classes, each with its own pattern, and noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(48) % CLASSES
    patterns = np.random.default_rng(7).integers(0, 200, (CLASSES, 8, 8, 3))
    noisy = (patterns[labels] + rng.integers(0, 55, (48, 8, 8, 3))).astype(np.uint8)
    np.savez(path, x_train=noisy, y_train=labels, x_test=noisy, y_test=labels)
    return path


def model_file(path, seed, layout="timm", **more):
    blank = jnp.ones((1, 8, 8, 3))
    params = jax.jit(NETWORK.init)(jax.random.key(seed), blank)["params"]
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    tensors = pretrained.export_params(params, layout, num_heads=2) | more
    pretrained.write_tensors(tensors, path)
    return params


def measured(folder, *more):
    call("fisher", *SIZES, f"--pretrained={folder / 'model.safetensors'}",
         f"--dataset={folder / 'data.npz'}", f"--output={folder / 'fisher.safetensors'}",
         "--overwrite", *more)  # fmt: skip
    return load_file(folder / "fisher.safetensors")


@jax.jit
def by_hand(params, inputs, labels=None):
    """The mean of squared gradients, example by example; over all labels without any."""
    images = jnp.asarray(inputs, jnp.float32) / 127.5 - 1

    def of_label(image, label):
        def loss(params):
            return jax.nn.log_softmax(NETWORK.apply({"params": params}, image[None])[0])[label]

        weight = jnp.exp(loss(params)) if labels is None else 1.0
        return jax.tree.map(lambda x: weight * x**2, jax.grad(loss)(params))

    if labels is not None:
        all_of_them = jax.vmap(of_label)(images, jnp.asarray(labels))
    else:
        grid = jnp.repeat(images, CLASSES, axis=0), jnp.tile(jnp.arange(CLASSES), len(images))
        all_of_them = jax.tree.map(lambda x: CLASSES * x, jax.vmap(of_label)(*grid))
    return jax.tree.map(lambda x: x.mean(axis=0), all_of_them)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_the_file_holds_the_mean_of_squared_gradients_under_the_models_names(
    layout, tmp_path, capsys
):
    params = model_file(tmp_path / "model.safetensors", 0, layout)
    images(tmp_path / "data.npz", 0)
    # All but the held-out examples, which a run of the same seed holds out too.
    found = measured(tmp_path, "--curvature_samples=0", "--validation_fraction=0.01")
    with safe_open(tmp_path / "fisher.safetensors", "numpy") as file:
        about = file.metadata()
    assert about["curvature"] == "fisher_exact" and about["examples"] == "44"
    assert "wrote the Fisher of" in capsys.readouterr().out
    with np.load(tmp_path / "data.npz") as archive:
        inputs, labels = archive["x_train"], archive["y_train"]
    rows = trained_rows(labels)
    wanted = by_hand(params, inputs[rows])
    exported = pretrained.export_params(wanted, layout, num_heads=2)
    assert set(found) == set(exported)
    for name, leaf in exported.items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-4, atol=1e-7, err_msg=name)
    if layout == "timm":
        found = measured(tmp_path, "--curvature=fisher_empirical", "--validation_fraction=0.01")
        wanted = pretrained.export_params(by_hand(params, inputs[rows], labels[rows]), layout)
        for name, leaf in wanted.items():
            np.testing.assert_allclose(found[name], leaf, rtol=2e-4, atol=1e-7, err_msg=name)


def trained_rows(labels):
    """The rows that a run of seed 0 trains on, one example of each class held out."""
    from pm_jax.data import stream

    blank = np.zeros((len(labels), 1), np.uint8)
    arrays = stream.LabelledArrays(blank, labels, blank, labels)
    tasks = stream.class_incremental(arrays, 1, 0, validation_fraction=0.01)
    return tasks.train.rows()[0]


@pytest.mark.slow
def test_two_models_are_tuned_measured_and_merged_by_their_fishers(tmp_path, monkeypatch):
    """The how-to of merging.md from start to end, on small data."""
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path / "base.safetensors", 0)
    tasks = ("first", "second")
    for seed, task in enumerate(tasks):
        images(tmp_path / f"{task}.npz", seed)
    section = howto_pages.sections(howto_pages.MERGING)["Two models and their Fishers"]
    own = {"train": (*SIZES, "--epochs=2", "--noreport"), "fisher": SIZES, "merge": ()}
    for binary, *typed in howto_pages.commands(section):
        call(binary, *typed, *own[binary])
    found = load_file(tmp_path / "merged.safetensors")
    base, *models = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", *tasks))
    fishers = [load_file(f"{tmp_path / task}.fisher.safetensors") for task in tasks]
    for name, leaf in found.items():
        if name.startswith("head."):  # the command leaves it
            np.testing.assert_array_equal(leaf, base[name])
            continue
        weights, steps = (
            np.stack([x[name].astype(np.float64) for x in group]) for group in (fishers, models)
        )
        total = weights.sum(axis=0)
        wanted = base[name] + (weights * (steps - base[name])).sum(axis=0) / np.where(
            total > 1e-30, total, 1
        )
        used = total > 1e-30
        assert used.mean() > 0.5
        np.testing.assert_allclose(leaf[used], wanted[used], rtol=1e-4, atol=1e-5, err_msg=name)
    # The merged model is one of the same kind, of which a Fisher can be measured again.
    call("fisher", *SIZES, f"--dataset={tmp_path / 'first.npz'}", "--curvature_examples=4",
         f"--pretrained={tmp_path / 'merged.safetensors'}",
         f"--output={tmp_path / 'again.safetensors'}")  # fmt: skip


def test_a_model_without_its_classifier_is_refused(tmp_path, capsys):
    model_file(tmp_path / "model.safetensors", 0)
    images(tmp_path / "data.npz", 0)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.weight"], tensors["head.bias"]
    pretrained.write_tensors(tensors, tmp_path / "model.safetensors", overwrite=True)
    line = refused(
        capsys, "fisher", *SIZES, f"--pretrained={tmp_path / 'model.safetensors'}",
        f"--dataset={tmp_path / 'data.npz'}", f"--output={tmp_path / 'f.safetensors'}",
    )  # fmt: skip
    assert re.search(r"model.safetensors: has no classifier \(head.weight, head.bias\), and", line)
    assert not (tmp_path / "f.safetensors").exists()
