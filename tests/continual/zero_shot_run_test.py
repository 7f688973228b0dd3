"""Runs with CLIP's frozen text columns: what stays, what moves, and what the start predicts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from pm_jax import classifiers, trees
from pm_jax.continual import Config, Learner
from pm_jax.continual.training import text_columns
from pm_jax.data import clip_tokens
from pm_jax.weights import pretrained
from tests import clip_files
from tests.binaries import call
from tests.small_runs import QUIET

pytest.importorskip("tokenizers", reason="needs the extra text")
TEMPLATES = "a photo of the {}.|the {}!"


def write_data(folder):
    """Images of four classes that differ in their mean colour."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 4
    colours = np.asarray([[200, 60, 60], [60, 200, 60], [60, 60, 200], [150, 150, 150]])
    noise = rng.integers(-50, 50, size=(48, 8, 8, 3))
    images = (colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    path = folder / "colours.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("clip")
    clip_files.write_model(made)
    clip_files.write_names(made)
    write_data(made)
    return made


def config_of(folder, **changes):
    settings = {
        "dataset": str(folder / "colours.npz"), "class_names": str(folder / "names.txt"),
        "pretrained": str(folder / "model.safetensors"), "scenario": "class_incremental",
        "num_tasks": 2, "model": "clip", "classifiers": ("zero_shot",), "templates": TEMPLATES,
        "rule": "magmax", "perturbation": "none", "epochs": 2, "batch_size": 8,
        "learning_rate": 1e-2, "validation_fraction": 0.1, "class_order": "given",
    }  # fmt: skip
    return Config(**settings | changes)


def columns_by_hand(folder):
    """The columns, phrase by phrase."""
    _, params = clip_files.params_of_both()
    encode = clip_tokens.encoder(folder)
    apply = jax.jit(lambda ids: clip_files.text_tower().apply({"params": params}, ids))
    kernel = []
    for name in clip_files.NAMES:
        phrases = [t.replace("{}", name.replace("_", " ")) for t in TEMPLATES.split("|")]
        mean = np.mean([np.asarray(apply(encode([phrase]))[0]) for phrase in phrases], axis=0)
        kernel.append(np.exp(2.0) * mean / np.linalg.norm(mean))
    return np.stack(kernel, axis=1)


@pytest.mark.slow
def test_a_run_from_start_to_end(folder, tmp_path, capsys):
    config = config_of(folder)
    learner = Learner(config, 0, options=QUIET)
    start, wanted = learner.params, columns_by_hand(folder)
    np.testing.assert_allclose(start["head"]["kernel"], wanted, rtol=1e-5, atol=1e-5)
    assert not np.any(start["head"]["bias"])
    arguments = [
        f"--{name}={','.join(value) if isinstance(value, tuple) else value}"
        for name, value in dataclasses.asdict(config).items()
        if value != getattr(Config, name)
    ]
    exported = tmp_path / "merged.safetensors"
    call("train", f"--workdir={tmp_path / 'run'}", *arguments, f"--export={exported}", "--noreport")
    results = json.loads((tmp_path / "run" / "seed_0" / "results.json").read_text())
    assert results["classifiers"] == ["zero_shot"]
    assert results["manifest"]["class_names"] == list(clip_files.NAMES)
    finished = Learner(config, 0, tmp_path / "run" / "seed_0", QUIET).finished_params()
    before, after = trees.leaves_by_path(start), trees.leaves_by_path(finished)
    for path, leaf in before.items():
        assert np.array_equal(leaf, after[path]) is path.startswith("head/"), path
    # What the merged model predicts on the last task's classes is what the results say.
    stream = learner.stream
    rows = np.concatenate(stream.test.rows())
    logits = clip_files.image_tower().apply(
        {"params": finished}, stream.inputs[rows] / np.float32(127.5) - 1
    )
    hits = np.mean(np.asarray(logits).argmax(axis=1) == stream.labels[rows])
    assert results["final_average_accuracy"] == pytest.approx(hits, abs=1e-6)
    # The file holds the merged image tower, and the text tower as it was.
    tensors, base = (pretrained.read_tensors(p) for p in (exported, folder / "model.safetensors"))
    assert tensors.keys() == base.keys()
    same = {name for name in base if np.array_equal(base[name], tensors[name])}
    assert same == {name for name in base if name.startswith("text") or name == "logit_scale"}


@pytest.mark.slow
def test_without_training_the_start_predicts(folder):
    """The zero-shot accuracy of the model, beside a classifier made from features."""
    config = config_of(folder, rule="frozen", classifiers=("zero_shot", "discriminant"))
    assert not config.trains(0)
    learner = Learner(config, 0, options=QUIET)
    start, results = learner.params, learner.run()
    stream = learner.stream
    logits = clip_files.image_tower().apply(
        {"params": start}, stream.inputs / np.float32(127.5) - 1
    )
    for task, rows in enumerate(stream.test.rows()):
        seen = stream.class_masks[: task + 1].any(axis=0)
        guess = np.where(seen, logits, -np.inf)[rows].argmax(axis=1)
        accuracy = results["scores"]["zero_shot"]["test"]["accuracy_matrix"][task][task]
        assert accuracy == pytest.approx(np.mean(guess == stream.labels[rows]))
    assert results["scores"]["discriminant"]["test"]["final_average_accuracy"] > 0.5


@pytest.mark.slow
def test_columns_stay_in_domains_and_with_adapters(folder):
    """A domain-incremental stream would train and merge a classifier that is not frozen."""
    from pm_jax.data.stream import LabelledArrays

    archive = np.load(folder / "colours.npz")
    arrays = LabelledArrays(
        *(archive[name] for name in ("x_train", "y_train", "x_test", "y_test")),
        class_names=clip_files.NAMES,
    )
    changes = {"class_names": "", "scenario": "domain_incremental", "adapter": "lora",
               "lora_rank": 1, "rule": "perturb_and_merge", "perturbation": "symmetric",
               "dataset": "digits"}  # fmt: skip
    config = config_of(folder, **changes)
    learner = Learner(config, 0, options=QUIET, stream=[arrays, arrays])
    start = trees.leaves_by_path(learner.params)
    learner.run()
    merged = trees.leaves_by_path(learner.params)
    moved = {path for path, leaf in start.items() if not np.array_equal(leaf, merged[path])}
    assert moved == {"blocks_0/attn/key/kernel", "blocks_0/attn/value/kernel"}


def test_columns_are_made_once_for_all_seeds(folder, monkeypatch):
    config, calls = config_of(folder), []
    text_columns._columns.cache_clear()
    make = classifiers.text_columns

    def counted(*arguments):
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(text_columns.classifiers, "text_columns", counted)
    first, again = (text_columns.text_columns(config, clip_files.NAMES) for _ in range(2))
    assert len(calls) == 1 and first["head/kernel"] is again["head/kernel"]
    text_columns.text_columns(config, tuple(reversed(clip_files.NAMES)))
    assert len(calls) == 2


def test_training_programs_know_that_the_columns_stay(folder):
    """Rules share their training; `without_merging` must not forget what trains."""
    for classifiers_ in (("zero_shot",), ("discriminant", "zero_shot")):
        config = config_of(folder, classifiers=classifiers_)
        assert config.without_merging().has_text_columns
    other = config_of(folder, classifiers=("discriminant",), templates="a photo of a {}.")
    assert not other.without_merging().has_text_columns
    assert config_of(folder).without_merging() == config_of(folder, rule="ties").without_merging()
