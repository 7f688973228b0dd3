"""A run in two processes of this machine, ended and killed on its way, against a run in one."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pm_jax.continual import Learner
from pm_jax.continual.report import inspection
from pm_jax.weights.pretrained import read_tensors
from tests import howto_pages
from tests.small_runs import QUIET, SMALL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Matrices are divided between the processes, and inputs streamed to each by itself.
FLAGS = [
    *("--num_tasks=2", "--epochs=1", "--first_task_epochs=2", "--hidden_sizes=16", "--baseline="),
    *("--batch_size=64", "--checkpoint_every=5", "--fsdp=2", "--keep_task_models"),
    *("--resident_mb=0.02", "--noreport"),
]


def started(workdir):
    """Both processes, at a port that is free."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    section = howto_pages.sections(howto_pages.HOWTOS)["Several devices and hosts"]
    _, (_, *typed) = howto_pages.commands(section)
    command = [sys.executable, "-m", "experiments.train", *typed, f"--workdir={workdir}", *FLAGS]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    own = [f"--coordinator_address=localhost:{port}"]
    return [
        subprocess.Popen(
            [*command, *own, f"--process_index={index}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip


def lines_until(process, words):
    """Read what a process says up to a line with these words."""
    assert any(words in line for line in iter(process.stderr.readline, ""))


def test_two_processes_train_as_one_does_and_outlive_a_signal_and_a_killed_one(tmp_path):
    """A request to end is one for all processes, as a killed one is the end of all."""
    workdir = tmp_path / "run"
    both = started(workdir)
    lines_until(both[0], "task 1 of 2")
    both[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=60)[1].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [143, 143]
    assert told[0] == told[1] and told[0].startswith("error: ended by SIGTERM at step ")

    first, second = started(workdir)
    lines_until(first, "going on from step")
    lines_until(first, "task 2 of 2")
    second.kill()  # who watches over the second one, which ends with it
    *_, last = first.communicate(timeout=60)[1].splitlines()
    second.communicate()
    assert first.returncode == 1 and second.returncode == -signal.SIGKILL
    assert "error: another process of the run is gone" in last
    assert last.endswith("start all of them again, they go on from the newest checkpoint")

    again = started(workdir)
    (table, told), (nothing, _) = (process.communicate(timeout=120) for process in again)
    assert [process.returncode for process in again] == [0, 0], told
    assert "going on from step" in told and "final accuracy" in table
    assert "final accuracy" not in nothing
    found = json.loads((workdir / "seed_0/results.json").read_text())
    wanted = Learner(dataclasses.replace(SMALL, num_tasks=2), 0, options=QUIET)
    results = wanted.run()
    sizes = wanted.stream.test.sizes[None, :]
    right = [
        np.round(np.asarray(each["accuracy_matrix"], float) * sizes)[np.tril_indices(2)]
        for each in (found, results)
    ]
    assert np.abs(right[0] - right[1]).max() <= 2
    for a, b in zip(found["merges"], results["merges"], strict=True):
        np.testing.assert_allclose(a["alpha"], b["alpha"], rtol=1e-4)  # after Adam's steps
    log = (workdir / "seed_0/metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, log) if line["event"] == "epoch"]
    assert steps == sorted(set(steps)) and steps[-1] == wanted.total_steps
    kept = read_tensors(workdir / "seed_0/task_models/task_2.safetensors")
    shapes = {path: np.shape(leaf) for path, leaf in kept.items()}
    assert shapes["hidden_0/kernel"] == (64, 16)  # put together from both
    assert not inspection.inspect(workdir).damaged
