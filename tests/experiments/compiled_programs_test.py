"""The folder of compiled programs: a second start compiles nothing, and no damage stops a run."""

import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import jax
import pytest

from experiments import compiled_programs
from tests.small_runs import comparable

ROOT = pathlib.Path(__file__).parents[2]
COUNTING = """
import collections, json, runpy, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
sys.argv = ["experiments.train", *sys.argv[1:]]
try:
    runpy.run_module("experiments.train", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(json.dumps(counts))
"""
FLAGS = [
    *("--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8,4"),
    *("--noreport", "--baseline="),
]


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings about the folder, which are as before after the test."""
    names = ["jax_compilation_cache_dir", compiled_programs.SHORTEST]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder():
    return jax.config.jax_compilation_cache_dir


def test_the_flag_wins_over_the_variable_and_that_over_the_default(
    settings, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled_programs.keep_in(None)
    assert folder() == str(tmp_path / "cache/pm_jax/compiled")
    jax.config.update("jax_compilation_cache_dir", "of the variable")
    compiled_programs.keep_in(None)
    assert folder() == "of the variable"
    compiled_programs.keep_in(str(tmp_path / "of the flag"))
    assert folder() == str(tmp_path / "of the flag")
    compiled_programs.keep_in("")
    assert folder() is None
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["cache", "of the flag"] and capsys.readouterr().err == ""


def test_a_place_that_cannot_be_written_is_one_line(settings, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    compiled_programs.keep_in(str(tmp_path / "file" / "compiled"))
    assert folder() is None
    assert capsys.readouterr().err == (
        f"warning: --compilation_cache={tmp_path}/file/compiled: cannot be written (Not a "
        "directory); all is compiled anew\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody_of_this_name/cache")
    compiled_programs.keep_in(None)
    assert folder() is None and len(capsys.readouterr().err.splitlines()) == 1


def test_programs_that_were_used_longest_ago_are_deleted(tmp_path):
    for age, name in enumerate(("new", "old", "older", "oldest")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(b"12345")
        os.utime(path, (time.time() - 1000 * age,) * 2)
    (tmp_path / "another file").write_bytes(b"1" * 100)
    os.utime(tmp_path / "oldest-cache")  # is used again
    compiled_programs._delete_oldest(tmp_path, most_bytes=12)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["another file", "new-cache", "oldest-cache"]


def test_troubles_while_it_is_used_are_one_line(settings, tmp_path, capsys):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    for name in ("jit_train-1-cache", "jit_train_more-1-cache"):
        (tmp_path / name).write_text("")
    compiled_programs._say_troubles_once.cache_clear()
    with warnings.catch_warnings():
        compiled_programs._say_troubles_once()
        for doing in ("reading", "writing"):
            warnings.warn(
                f"Error {doing} persistent compilation cache entry for 'jit_train': error: Error "
                "-3 while decompressing\ndata",
                stacklevel=1,
            )
    assert capsys.readouterr().err == (
        f"warning: --compilation_cache={tmp_path}: an entry cannot be read (jit_train: error: "
        "Error -3 while decompressing data); what is missing is compiled anew\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["jit_train_more-1-cache"]


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_damage_costs_one_line(tmp_path):
    places = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": None}
    compiled = tmp_path / "pm_jax" / "compiled"

    def run(name):
        # The order of sets is another one in each process.
        given = {**os.environ, **places, "PYTHONHASHSEED": str(len(name))}
        given.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
        ended = subprocess.run(
            [sys.executable, "-c", COUNTING, f"--workdir={tmp_path / name}", *FLAGS],
            cwd=ROOT, capture_output=True, text=True,
            env={key: value for key, value in given.items() if value is not None},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        content = json.loads((tmp_path / name / "seed_0" / "results.json").read_text())
        # Without the lines about tasks, and those that say what goes on.
        told = [x for x in ended.stderr.splitlines() if "task " not in x and x[:1] != "["]
        return json.loads(ended.stdout.splitlines()[-1]), comparable(content), told

    counts, wanted, told = run("cold")
    assert counts["cache_misses"] > 10 and told == []
    counts, results, told = run("second")
    assert "cache_misses" not in counts and results == wanted and told == []
    assert counts["cache_hits"] == counts["compile_requests_use_cache"] > 10
    damaged = sorted(compiled.glob("*-cache"))
    for entry in damaged:
        entry.write_bytes(entry.read_bytes()[:-20])
    counts, results, told = run("after damage")
    assert counts["cache_misses"] >= len(damaged) and results == wanted
    assert len(told) == 1 and "an entry cannot be read" in told[0], told
