"""Files that once broke the report, found by fuzzing. What else results.json can have wrong is in
damaged_files_test.py.
"""

import dataclasses
import io
import json

import numpy as np
import pytest

from pm_jax.continual import Config
from pm_jax.continual.merging import landscape
from tests.binaries import call, refused
from tests.continual.damaged_files_test import RESULTS

pytest.importorskip("matplotlib")


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def epoch(**changes):
    line = {"step": 1, "event": "epoch", "task": 1, "epoch": 1, "loss": 0.5} | changes
    return json.dumps(line).encode()


@pytest.fixture
def workdir(tmp_path):
    seed = tmp_path / "seed_0"
    seed.mkdir()
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    (seed / "results.json").write_text(json.dumps(RESULTS))
    (seed / "metrics.jsonl").write_bytes(epoch())
    scores = np.full((2, 3, 3, 2), np.nan)
    landscape.write(seed / "landscape.npz", 2, {"landscape": scores})
    return tmp_path


DAMAGES = {
    "config.json": (
        "take another directory",
        [b"\xff{", b"[" * 100_000, b'{"rule": []}', b'{"rule": "x", "dataset": []}'],
    ),
    "seed_0/results.json": ("move it away to have it written again", [b"{"]),
    "seed_0/metrics.jsonl": (
        "move it away for a report without the training loss",
        [
            *(b"", b"[]", b"[" * 100_000, b"{}", b"\xff", b'{"step": 1', epoch(step=None)),
            *(epoch(step=0), epoch(epoch=0), epoch(task=[]), epoch(loss=None)),
        ],
    ),
    "seed_0/landscape.npz": (
        "move it away for a report without it",
        [
            b"PK",
            archive(alphas=np.zeros(2)),
            archive(alphas=np.zeros(2), loss=np.ones(3), merged_loss=np.ones(3)),
            archive(loss=np.full((2, 2, 2), "x")),
            archive(loss=np.asarray([{}], object)),
            archive(loss=np.ones((2, 2, 2), np.complex64)),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_one_line_and_leaves_no_report(workdir, name, capsys):
    call("report", f"--workdir={workdir}")  # whole, it is read
    (workdir / "report.html").unlink()
    remedy, contents = DAMAGES[name]
    for content in contents:
        (workdir / name).write_bytes(content)
        line = refused(capsys, "report", f"--workdir={workdir}")
        assert line.startswith(f"error: --workdir={workdir}: ")
        assert line.endswith(f"{name} is damaged; {remedy}")
        assert not [*workdir.glob("report*")]
