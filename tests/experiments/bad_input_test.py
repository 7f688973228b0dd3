"""Wrong inputs of every program, and the one line that each ends with: the rows of mistakes.md."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from pm_jax.continual import Config, Learner
from pm_jax.continual.report import inspection
from pm_jax.continual.storage.workdir import locked
from tests import bad_files, faults
from tests.binaries import call
from tests.small_runs import QUIET, comparable

ROOT = pathlib.Path(__file__).parents[2]


class Row(NamedTuple):
    """What is typed, and the line that answers."""

    binary: str
    typed: str
    answer: str


def read_mistakes():
    """The rows of every section of mistakes.md, in the order of the sections."""
    sections, binary, in_block = [[]], "", False
    for line in pathlib.Path(__file__).with_name("mistakes.md").read_text().splitlines():
        if line.startswith("## "):
            sections.append([])
        elif line.startswith("### "):
            binary = line[4:].split(":")[0]
        elif line.startswith("```"):
            in_block = not in_block
        elif in_block and line.startswith("    "):
            row = sections[-1].pop()
            sections[-1].append(row._replace(answer=f"{row.answer} {line.strip()}".strip()))
        elif in_block:
            sections[-1].append(Row(binary, line, ""))
    return sections


ABBREVIATIONS, REFUSED, REFUSED_BY_A_PROCESS, DURING, FAULTS, ACCEPTED = read_mistakes()
SHORT = {row.typed.strip("{}"): row.answer for row in ABBREVIATIONS}


def each_row_of(rows):
    return pytest.mark.parametrize("row", rows, ids=[f"{row.binary} {row.typed}" for row in rows])


class Told(NamedTuple):
    """A row with its files made."""

    arguments: list[str]
    answer: re.Pattern


def told(row, folder, finished):
    typed = row.typed.replace("(no arguments)", "")
    if row.binary in ("train", "compare") and "--workdir" not in typed:
        typed = f"--workdir={{new}} {typed}"
    while any(f"{{{name}}}" in typed for name in SHORT):
        for name, stands_for in SHORT.items():
            typed = typed.replace(f"{{{name}}}", stands_for)
    paths = {"new": folder / "new", "finished": finished}
    for name in re.findall(r"{(\w+)}", typed):
        if name == "link_to_finished":
            paths[name] = folder / name
            paths[name].symlink_to(finished)
        elif name not in paths:
            paths[name] = getattr(bad_files, name)(folder)
    arguments = shlex.split(
        typed.format(**{name: shlex.quote(str(path)) for name, path in paths.items()})
    )
    answer = re.sub(r"{(\w+)}", lambda found: str(paths[found[1]]), row.answer)
    pattern = ".*".join(map(re.escape, answer.split("...")))
    return Told(arguments, re.compile(f"error: {pattern}"))


def ended(capsys, row, arguments):
    """Exit code and the lines on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(row.binary, *arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return caught.value.code, err.splitlines()


def content(folder):
    """Everything below a folder: bytes of files, targets of links."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path] = path.readlink()
        else:
            found[path] = None if path.is_dir() else path.read_bytes()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a run, möglichst 好"
    call("train", f"--workdir={workdir}", "--noreport", *SHORT["tiny"].split())
    return workdir


def results(workdir):
    return comparable(json.loads((workdir / "seed_0" / "results.json").read_text()))


@each_row_of(REFUSED)
def test_what_is_wrong_is_one_line_before_anything_is_done(
    row, finished, tmp_path, capsys, monkeypatch
):
    def made(self, *_, **__):
        raise AssertionError("a learner is made")

    if "tokenizer" in row.typed or "zero_shot" in row.typed:
        pytest.importorskip("tokenizers")
    arguments, answer = told(row, tmp_path, finished)
    before = content(tmp_path) | content(finished)
    monkeypatch.setattr(Learner, "__init__", made)
    code, lines = ended(capsys, row, arguments)
    assert len(lines) == 1 and answer.fullmatch(lines[0]), (lines, answer.pattern)
    assert code == 2
    assert content(tmp_path) | content(finished) == before
    if "{finished}" in row.typed:
        assert call("inspect", finished) == 0


def test_the_finished_run_of_the_tables_is_one_that_can_be_gone_on_with(finished):
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads((finished / "config.json").read_text()).items()
    }
    learner = Learner(Config(**config), 0, finished / "seed_0", QUIET)
    assert learner.finished_params()["head"]["bias"].shape == (10,)


@pytest.mark.slow
@each_row_of(REFUSED_BY_A_PROCESS)
def test_a_process_ends_so_too(row, tmp_path):
    arguments, answer = told(row._replace(binary=""), tmp_path, None)
    before = content(tmp_path)
    command = [sys.executable, "-m", f"experiments.{row.binary}", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    # A slow machine also says what goes on.
    lines = [line for line in process.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and answer.fullmatch(lines[0]), process.stderr
    assert content(tmp_path) == before


@each_row_of(DURING)
def test_what_shows_later_is_one_line_and_code_1(row, finished, tmp_path, capsys):
    arguments, answer = told(row, tmp_path, finished)
    code, lines = ended(capsys, row, arguments)
    assert code == 1 and answer.fullmatch(lines[-1]), (lines, answer.pattern)
    assert sum(line.startswith("error: ") for line in lines) == 1
    workdir = next(path.parent for path in tmp_path.rglob("*config.json"))
    assert not inspection.inspect(workdir).damaged and not [*tmp_path.rglob("results.json")]


@each_row_of(FAULTS)
def test_a_run_survives_what_a_machine_does(row, finished, tmp_path, capsys, monkeypatch):
    tiny = row._replace(typed="{tiny} --noreport --checkpoint_every=20")
    arguments, answer = told(tiny._replace(answer=row.answer), tmp_path, finished)
    with monkeypatch.context() as patch:
        getattr(faults, row.typed.replace(" ", "_"))(patch)
        code, lines = ended(capsys, tiny, arguments)
    assert code == 1 and answer.fullmatch(lines[-1]), (lines, answer.pattern)
    assert sum(line.startswith("error: ") for line in lines) == 1
    if (tmp_path / "new" / "config.json").exists():
        assert not inspection.inspect(tmp_path / "new").damaged
    call("train", *arguments)
    assert results(tmp_path / "new") == results(finished)
    assert not inspection.inspect(tmp_path / "new").damaged


@pytest.mark.slow
def test_a_disk_that_is_really_full(finished, tmp_path):
    """One of 200 kB in memory, which takes a namespace of its own and the right to mount."""
    answer = (
        "--workdir={new}: cannot be written or read (...No space left on device...); make room "
        "there; the same command goes on from what was saved"
    )
    arguments, pattern = told(
        Row("train", "{tiny} --noreport --checkpoint_every=20", answer), tmp_path, finished
    )
    disk = tmp_path / "new"
    disk.mkdir()
    script = (
        'mount -t tmpfs -o size=200k tmpfs "$0" || exit 99; "$@"; code=$?; '
        'cp -R "$0" "$0.kept"; exit $code'
    )
    command = ["unshare", "-m", "sh", "-c", script, str(disk), sys.executable]
    try:
        process = subprocess.run(
            [*command, "-m", "experiments.train", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if process.returncode == 99 or process.stderr.startswith("unshare: "):
        pytest.skip("needs the right to mount")
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert pattern.fullmatch(process.stderr.splitlines()[-1]), process.stderr
    kept = tmp_path / "new.kept"
    assert not inspection.inspect(kept).damaged and not [*kept.rglob("results.json")]
    call("train", f"--workdir={kept}", *arguments[1:])
    assert results(kept) == results(finished)


def test_a_merge_on_a_full_disk_leaves_nothing_and_can_be_repeated(tmp_path, capsys, monkeypatch):
    answer = "--output={nothing}.safetensors: cannot be written (No space left on device); ..."
    row = Row("merge", "{two} {output}", answer)
    arguments, pattern = told(row, tmp_path, None)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        faults.the_disk_is_full_when_the_merged_model_is_written(patch)
        code, (line,) = ended(capsys, row, arguments)
    assert code == 1 and pattern.fullmatch(line) and content(tmp_path) == before
    call("merge", *arguments)
    assert (tmp_path / "nothing.safetensors").exists()


def test_a_work_directory_that_another_process_runs_in(finished, tmp_path, capsys):
    answer = "--workdir={finished}: another process runs in it; wait for its end or choose ..."
    row = Row("train", "{tiny} --noreport --workdir={finished}", answer)
    arguments, pattern = told(row, tmp_path, finished)
    before = content(finished)
    with locked(finished):
        code, (line,) = ended(capsys, row, arguments)
    assert code == 2 and pattern.fullmatch(line) and content(finished) == before
    call("train", *arguments)
    assert "already finished" in capsys.readouterr().out


def test_clocks_that_are_set_back_change_no_result(finished, tmp_path, monkeypatch):
    start, readings = time.time(), []

    def earlier():
        readings.append(1)
        return start - 1000.0 * len(readings)

    arguments = [f"--workdir={tmp_path}", "--noreport", *SHORT["tiny"].split()]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", earlier)
        patch.setattr(time, "perf_counter", earlier)
        call("train", *arguments)
    assert len(readings) > 10 and results(tmp_path) == results(finished)
    seconds = json.loads((tmp_path / "seed_0" / "results.json").read_text())["seconds"]
    assert set(seconds.values()) == {0.0}
    lines = (tmp_path / "seed_0" / "metrics.jsonl").read_text().splitlines()
    epochs = [line for line in map(json.loads, lines) if line["event"] == "epoch"]
    assert [line["images_per_second"] for line in epochs] == [None] * 2
    assert not inspection.inspect(tmp_path).damaged


@each_row_of(ACCEPTED)
def test_what_looks_odd_and_is_right_is_accepted(row, finished, tmp_path, capsys):
    if "tokenizer" in row.typed:
        pytest.importorskip("tokenizers")
    arguments, _ = told(row, tmp_path, finished)
    arguments += ["--noreport"] if row.binary == "train" else []
    assert not call(row.binary, *arguments)
    assert "error" not in capsys.readouterr().err
    if "{tiny}" in row.typed:
        (workdir,) = (each[10:] for each in arguments if each.startswith("--workdir="))
        assert results(pathlib.Path(workdir)) == results(finished)
