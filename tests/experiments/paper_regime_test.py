"""The study of the paper's regime: the order of its cells, its packed folder, and whole runs."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.studies import packed_images, paper_regime
from pm_jax import models
from pm_jax.continual import Config
from pm_jax.data import sources
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from tests.small_data_sets import encoded, labelled, prepare

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ("--model=vit", "--patch_size=8", "--width=8", "--depth=1", "--num_heads=2")


def study(*arguments, **environment):
    command = [sys.executable, "-m", "experiments.studies.paper_regime", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_cells_come_in_the_order_of_what_they_teach():
    regime = types.SimpleNamespace(base=Config(learning_rate=1e-3), cell=lambda *cell: cell)
    cells = list(paper_regime.cells(regime, tiny=False))
    assert len(cells) == len(set(cells)) == 5 + 1 + 12 + 8 + 6
    assert cells[0] == ("frozen", 1e-3, 0) and cells[3] == ("perturb_and_merge", 1e-3, 0)
    assert cells[5] == ("joint", 1e-3, 0) and cells[-1][0].startswith("averaging+")
    assert [seed for *_, seed in cells] == [0] * 6 + [1] * 6 + [2] * 6 + [0] * 14
    assert [rate for _, rate, _ in cells[18:26]] == [3e-4] * 4 + [1e-4] * 4
    tiny = list(paper_regime.cells(regime, tiny=True))
    assert len(tiny) == 5 and set(tiny) < set(cells)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("prepared")
    features = {
        "image": tfds.features.Image(shape=(16, 16, 3)),
        "label": tfds.features.ClassLabel(num_classes=100),
    }
    parts = {"train": 40, "test": 12}
    splits = {part: labelled(count, 4, size=(16, 16)) for part, count in parts.items()}
    prepare(folder, "cifar100", "3.0.2", splits, features)
    return folder


def test_packed_images_are_those_that_a_run_reads_from_the_prepared_data(data_dir, tmp_path):
    kept = {"train_per_class": 3, "test_per_class": 2, "class_subset": 3}
    config = Config(
        dataset="cifar100", data_dir=str(data_dir), scenario="class_incremental", **kept
    )
    packed_images.pack(config, tmp_path / "packed")
    packed_images.unpack(tmp_path / "packed", tmp_path / "new" / "images.npz")
    found = sources.load(str(tmp_path / "new" / "images.npz"))
    expected = sources.load("cifar100", str(data_dir), **kept)
    for part in ("train", "test"):
        labels = getattr(expected, f"{part}_labels")
        order = np.argsort(labels, kind="stable")
        np.testing.assert_array_equal(getattr(found, f"{part}_labels"), labels[order])
        images = getattr(expected, f"{part}_inputs")[order]
        np.testing.assert_array_equal(getattr(found, f"{part}_inputs"), images)
    assert found.train_inputs.shape == (9, 16, 16, 3)
    (tmp_path / "packed").write_bytes((tmp_path / "packed").read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="packed: cannot be read .*; pack the images again"):
        packed_images.unpack(tmp_path / "packed", tmp_path / "images.npz")


def test_jpeg_files_are_packed_as_they_are_and_others_of_a_class_together():
    pictures = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 200)]
    as_jpeg = [encoded(picture, "JPEG").getvalue() for picture in pictures]
    assert list(packed_images._together(as_jpeg, "x")) == [(1, data) for data in as_jpeg]
    as_png = [encoded(picture).getvalue() for picture in pictures]
    [(count, data)] = packed_images._together(as_png, "x")
    assert count == 2 and data[8:12] == b"WEBP"


@pytest.mark.slow
def test_the_study_runs_small_and_does_nothing_twice(tmp_path):
    ended = study("--tiny", f"--workdir={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    ledger = tmp_path / "paper_regime.jsonl"
    lines = list(map(json.loads, ledger.read_text().splitlines()))
    assert [line["seed"] for line in lines] == [0, 0, 2, 0, 0]
    for line in lines:
        run = json.loads((tmp_path / line["results"] / "results.json").read_text())
        for name, matrices in line["accuracy_matrices"].items():
            expected = run["scores"][name]["test"]["accuracy_matrix"]
            as_arrays = (np.asarray(each, float) for each in (matrices["test"], expected))
            np.testing.assert_allclose(*as_arrays, atol=1e-6)
        assert line["versions"]["jax"] == jax.__version__ and line["settings"]["num_tasks"] == 2
    before = ledger.read_bytes()
    # Its runs are gone, and are not missed.
    again = study("--tiny", f"--workdir={tmp_path}/other", f"--ledger={ledger}")
    assert again.returncode == 0, again.stderr
    assert ledger.read_bytes() == before and "seed" not in again.stdout.split("|")[0]
    assert again.stdout.strip() == ended.stdout[ended.stdout.index("\n| rule") :].strip()


@pytest.mark.slow
def test_a_packed_folder_is_enough_on_a_machine_without_the_readers(data_dir, tmp_path, capsys):
    model = models.VisionTransformer(1, 8, None, 8, 1, 2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]
    weights, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    pretrained.write_tensors(pretrained.export_params(params, "timm"), weights)
    prepared = {"dataset": "cifar100", "data_dir": str(data_dir), "pretrained": str(weights)}
    config = Config(**prepared, model="vit", patch_size=8, scenario="class_incremental")
    paper_regime.pack(config, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["images.npz", "weights.safetensors"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert capsys.readouterr().out == f"{folder}: {size / 2**20:.1f} MiB\n"
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("tensorflow_datasets", "grain", "sklearn"):
        (absent / f"{name}.py").write_text("raise ImportError('is not installed')")
    ended = study(
        "--preset=cifar100_10_vit_tiny_paper", f"--packed={folder}",
        f"--workdir={tmp_path / 'runs'}", "--minutes=0.0001",
        f"--ledger={tmp_path / 'ledger.jsonl'}", *MODEL, "--num_tasks=2", "--batch_size=4",
        "--lora_rank=2", "--epochs=1", "--epoch_repeats=1", "--image_size=0",
        "--classifiers=trained", "--commit=abc", PYTHONPATH=f"{absent}{os.pathsep}{ROOT}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    [line] = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert (line["rule"], line["commit"]) == ("frozen", "abc")
    assert str(tmp_path) not in json.dumps(line)
