"""A network with batch norm and dropout as one's own model, by the binary, killed and resumed."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from pm_jax.weights.pretrained import read_tensors
from tests.binaries import call
from tests.small_runs import comparable

ROOT = pathlib.Path(__file__).parents[2]
SHORT = (
    "--model=tests.own_models:convolution", "--model_settings=dropout=0.1", "--epochs=3",
    "--first_task_epochs=2", "--num_tasks=2", "--checkpoint_every=4", "--baseline=", "--noreport",
    "--keep_task_models",
)  # fmt: skip
DIGITS = ("--rotation_step=60", "--train_per_class=20")
BY_CLASS = ("--scenario=class_incremental", "--batch_size=16", "--curvature_examples=32")


def colours(path):
    """Images of ten colours, a class each, in an archive."""
    rng = np.random.default_rng(0)
    shades = rng.integers(200, size=(10, 1, 1, 1, 3))

    def images(count):
        noise = rng.integers(56, size=(10, count, 8, 8, 3))
        return {"x": (shades + noise).astype(np.uint8).reshape(-1, 8, 8, 3),
                "y": np.repeat(np.arange(10), count)}  # fmt: skip

    parts = {"train": images(20), "test": images(2)}
    np.savez(path, **{f"{k}_{name}": v for name, part in parts.items() for k, v in part.items()})
    return path


def finished(workdir, arguments):
    call("train", f"--workdir={workdir}", *arguments)
    return comparable(json.loads((workdir / "seed_0" / "results.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["domains", "classes"])
def test_a_network_with_state_is_killed_and_goes_on_to_the_same_bits(tasks, tmp_path, capsys):
    arguments = DIGITS
    if tasks == "classes":
        arguments = (f"--dataset={colours(tmp_path / 'colours.npz')}", *BY_CLASS)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    wanted = finished(straight, [*SHORT, *arguments])
    command = [sys.executable, "-m", "experiments.train", f"--workdir={killed}", *SHORT, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    checkpoints, last = killed / "seed_0" / "checkpoints", time.monotonic() + 300
    # Any checkpoint will do: some kills come in the first task and some later.
    while not [*checkpoints.glob("[0-9]*[0-9]")] and time.monotonic() < last:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not (killed / "seed_0" / "results.json").exists()
    capsys.readouterr()
    assert finished(killed, [*SHORT, *arguments]) == wanted
    assert "going on from step" in capsys.readouterr().err
    for name in ("task_2", "rest_2"):
        one, other = (
            read_tensors(run / "seed_0" / "task_models" / f"{name}.safetensors")
            for run in (straight, killed)
        )
        assert set(one) == set(other)
        assert all(np.array_equal(one[path], other[path]) for path in one)
    # The state is there, beside the parameters.
    assert any("batch_stats" in path for path in one)
