"""`experiments.inspect`, in-process, and the manifests that it reads."""

import json
import os
import re
import shutil
import subprocess

import hypothesis
import pytest
from hypothesis import strategies

from pm_jax.continual import Config, RunOptions
from pm_jax.continual import learner as learner_module
from pm_jax.continual.report import inspection
from pm_jax.continual.run import run_seeds
from pm_jax.continual.storage import manifest, provenance
from pm_jax.types import InvalidInput
from tests.binaries import call
from tests.small_runs import QUIET, Killed, slow

TINY = ["--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=4"]
TINY_CONFIG = Config(
    num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(4,), rule="averaging",
    perturbation="none", landscape_points=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with everything that one writes, but for TensorBoard's files."""
    pytest.importorskip("matplotlib")
    workdir = tmp_path_factory.mktemp("runs") / "a run, möglichst"
    arguments = ["--rule=averaging", "--perturbation=none", "--baseline=sequential"]
    call(
        "train",
        f"--workdir={workdir}",
        *arguments,
        "--keep_task_models",
        "--checkpoint_every=20",
        "--landscape_points=2",
        *TINY,
    )
    return workdir


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    pytest.importorskip("matplotlib")
    workdir = tmp_path_factory.mktemp("compared")
    call("compare", f"--workdir={workdir}", "--rules=averaging,sequential", *TINY)
    return workdir


@pytest.fixture(params=["trained", "compared"])
def workdir(request):
    return request.getfixturevalue(request.param)


def files_of(workdir):
    return sorted(path for path in workdir.rglob("*") if path.is_file())


def named(workdir):
    """The names in the lines of what is damaged."""
    lines = inspection.inspect(workdir).damaged
    assert all(re.fullmatch("damaged: .+ (is|has) [^;]+; .+", line) for line in lines), lines
    return [re.match(r"damaged: (.+?) (is|has) ", line)[1] for line in lines]


@pytest.mark.slow
def test_what_is_whole_is_said_to_be_and_every_file_is_covered(workdir, capsys):
    found = inspection.inspect(workdir)
    assert found.damaged == [] and found.unlisted == []
    manifests = [path for path in files_of(workdir) if path.name == manifest.FILE]
    assert found.intact == len(files_of(workdir)) - len(manifests) > 50
    assert call("inspect", workdir) == 0
    assert capsys.readouterr().out.endswith(f"{found.intact} files are as they were saved, none "
                                            "damaged\n")  # fmt: skip


def flipped(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "which,damage",
    [
        ("trained", flipped),
        slow("compared", flipped),
        slow("trained", cut_short),
        slow("trained", os.remove),
    ],
)
def test_damage_of_any_file_is_found_and_no_other_file_is_named(which, damage, request):
    workdir = request.getfixturevalue(which)
    for path in files_of(workdir):
        content = path.read_bytes()
        damage(path)
        assert named(workdir) == [path.relative_to(workdir).as_posix()]
        path.write_bytes(content)
    assert named(workdir) == []


def test_what_is_damaged_is_a_line_with_a_remedy_and_code_1(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    flipped(workdir / "seed_0/results.json")
    flipped(workdir / "baseline/config.json")
    (workdir / "report.html").unlink()
    shutil.rmtree(workdir / "seed_0/task_models")
    (workdir / "seed_0/metrics.csv").unlink()
    (workdir / "seed_0/metrics.csv").mkdir()
    (workdir / "seed_0/checkpoints/manifest.json").write_text("[" * 100_000)
    assert call("inspect", workdir) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("damaged: ")] == [
        "damaged: baseline/config.json has other bytes than were saved; put back a copy, or run "
        "the command in another directory",
        "damaged: report.html is missing; the same command writes it anew",
        "damaged: seed_0/checkpoints/manifest.json is damaged; the same command goes on from the "
        "newest that is whole; where the run is finished, once seed_0/results.json is moved away",
        "damaged: seed_0/metrics.csv is no file any more; put back a copy; no result depends on it",
        "damaged: seed_0/results.json has other bytes than were saved; without "
        "seed_0/results.json the same command goes on from the newest checkpoint and writes it "
        "anew",
        "damaged: seed_0/task_models is missing; put back a copy, or move seed_0 away and run the "
        "same command again",
    ]
    assert lines[-1].endswith("files are as they were saved, 6 damaged")
    assert "final accuracy cannot be read" in lines[1]
    assert any(line.startswith(f"{workdir}/baseline: settings unknown") for line in lines)


def test_what_a_directory_holds_is_printed(trained, compared, capsys):
    call("inspect", trained)
    first, seed, origin, second, *_ = capsys.readouterr().out.splitlines()
    flags_given = "--num_tasks=2 --hidden_sizes=4 --epochs=1 --first_task_epochs=1"
    assert first.startswith(f"{trained}: averaging on digits {flags_given} --perturbation=none")
    assert second.startswith(f"{trained / 'baseline'}: sequential on digits ")
    results = json.loads((trained / "seed_0/results.json").read_text())
    accuracy = f"{100 * results['final_average_accuracy']:.1f}"
    assert seed == (
        f"  seed 0: finished, 72 steps; final test accuracy {accuracy}; checkpoints 56, 72"
    )
    for name, version in results["environment"]["packages"].items():
        assert f"{name} {version}" in origin
    revision = provenance.git_revision()
    assert (f"revision {revision}" in origin) if revision else ("revision" not in origin)
    config = json.loads((trained / "config.json").read_text())
    assert provenance.configuration_hash(Config(**config))[:12] in origin
    call("inspect", compared)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{compared}: comparison of averaging, sequential"
    assert len([line for line in lines if "seed 0: finished" in line]) == 2
    assert any(re.match(rf"{compared}/sequential +\d+\.\d ", line) for line in lines)


@pytest.mark.slow
def test_a_kill_at_no_moment_leaves_what_looks_damaged(tmp_path, monkeypatch):
    """Looks before every change of a name, in a run that is killed and goes on."""
    found, looking = [], []

    def look():
        if looking:  # at what looking itself does, or from another thread
            return
        looking.append(True)
        try:
            found.append(inspection.inspect(tmp_path))
        except InvalidInput:  # no run yet
            assert not (tmp_path / "seed_0").exists()
        looking.clear()

    def watched(change):
        def watching(*arguments, **named):
            look()
            return change(*arguments, **named)

        return watching

    for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    saves, killed = learner_module.Checkpoints.save, []

    def dying_save(self, step, tree):
        saves(self, step, tree)
        if step == 56 and not killed:
            killed.append(step)
            raise Killed

    monkeypatch.setattr(learner_module.Checkpoints, "save", dying_save)

    def run():
        options = RunOptions(checkpoint_every=20, quiet=True, keep_task_models=True)
        run_seeds(TINY_CONFIG, [0], tmp_path, options)

    with pytest.raises(Killed):
        run()
    between = inspection.inspect(tmp_path)
    assert "seed 0: at step 56 of 72; checkpoints 36, 56" in between.text()
    run()
    manifest.uncover(tmp_path / "seed_0", "results.json")
    (tmp_path / "seed_0/results.json").unlink()  # has the run go on from its end
    run()
    look()
    assert len(found) > 100
    assert [line for each in found for line in each.damaged] == []
    assert found[-1].unlisted == []
    seen = {re.match(r"unlisted: (\S+) ", line)[1] for each in found for line in each.unlisted}
    assert {"seed_0/metrics.jsonl", "seed_0/checkpoints/deleted_20", "config.json"} <= seen


def test_a_run_that_is_killed_while_it_claims_its_directory_can_be_begun_again(tmp_path):
    manifest.uncover(tmp_path, "config.json")
    (tmp_path / "config.json.tmp").write_text("{")
    run_seeds(TINY_CONFIG, [0], tmp_path, QUIET)
    found = inspection.inspect(tmp_path)
    assert not found.damaged
    # That of the next write was renamed.
    assert not found.unlisted


def test_what_was_written_last_before_a_kill_is_covered_by_the_next_call(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    manifest.uncover(workdir, "config.json")
    manifest.uncover(workdir / "seed_0", "results.json", "landscape.npz")
    assert len(inspection.inspect(workdir).unlisted) == 3
    config = Config(**json.loads((workdir / "config.json").read_text()))
    run_seeds(config, [0], workdir, QUIET)
    found = inspection.inspect(workdir)
    assert not found.damaged and not found.unlisted


def test_another_call_of_a_finished_run_makes_nothing_damaged_whole(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for name in ("config.json", "seed_0/results.json"):
        (workdir / name).write_text((workdir / name).read_text() + "\n")  # reads as before
    config = Config(**json.loads((workdir / "config.json").read_text()))
    run_seeds(config, [0], workdir, QUIET)
    assert named(workdir) == ["config.json", "seed_0/results.json"]


def test_a_file_that_a_run_rewrites_meanwhile_is_not_damaged(trained, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    compare_with = manifest.damage

    def slow(directory, files):
        if directory == workdir:
            with manifest.covering(workdir, "summary.json"):
                (workdir / "summary.json").write_text("{}")
        return compare_with(directory, files)

    monkeypatch.setattr(manifest, "damage", slow)
    assert inspection.inspect(workdir).damaged == []


def test_what_no_manifest_speaks_of_is_named_by_its_folder(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    checkpoints = workdir / "seed_0/checkpoints"
    shutil.copytree(checkpoints / "72", checkpoints / "73.orbax-checkpoint-tmp")
    shutil.copytree(checkpoints / "72", checkpoints / "damaged_71")
    shutil.copytree(checkpoints / "72", checkpoints / "74")
    (workdir / os.fsdecode(b"notes\n\xff.txt")).write_text("")
    assert call("inspect", workdir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is in no manifest; ") for line in lines if line[:8] == "unlisted"] == [
        ["unlisted: notes??.txt", inspection.UNLISTED[".*"]],
        ["unlisted: seed_0/checkpoints/73.orbax-checkpoint-tmp", "left by a process that "
         "was killed; no part of a run"],
        ["unlisted: seed_0/checkpoints/74", inspection.UNLISTED[".*"]],
        ["unlisted: seed_0/checkpoints/damaged_71", "set aside as damaged; may be deleted"],
    ]  # fmt: skip


def test_a_damaged_manifest_is_kept_by_another_name_and_said_to_be(tmp_path, capsys):
    for count in (1, 2):
        (tmp_path / manifest.FILE).write_text("{}")
        manifest.note(tmp_path, seed=0)
        line = capsys.readouterr().err
        name = ["damaged_manifest.json", "damaged_manifest.json_2"][count - 1]
        assert line.startswith(f"warning: {tmp_path}/manifest.json is damaged; kept as {name}, ")
        assert (tmp_path / name).read_text() == "{}"
    assert manifest.read(tmp_path).about == {"seed": 0}


def test_of_several_processes_only_the_first_touches_a_manifest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(manifest.processes, "is_first", lambda: False)
    (tmp_path / manifest.FILE).write_text("{}")
    manifest.note(tmp_path, seed=0)
    manifest.uncover(tmp_path, "results.json")
    assert [path.name for path in tmp_path.iterdir()] == [manifest.FILE]
    assert (tmp_path / manifest.FILE).read_text() == "{}"
    assert not capsys.readouterr().err


def test_any_bit_of_a_manifest_counts(trained):
    content = (trained / "manifest.json").read_bytes()
    assert manifest.Manifest.of(content).content() == content
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            with pytest.raises(manifest.DamagedManifest):
                manifest.Manifest.of(bytes(changed))


json_values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
    max_leaves=8,
)


@pytest.mark.slow
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(json_values)
def test_a_manifest_of_anything_else_is_damaged(value):
    for content in (json.dumps(value), json.dumps({"files": value, "about": {}, "sha256": ""})):
        with pytest.raises(manifest.DamagedManifest):
            manifest.Manifest.of(content.encode())


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x"])
def test_a_manifest_speaks_of_its_own_directory_only(name):
    entry = {"bytes": 0, "sha256": ""}
    assert manifest.Manifest.of(manifest.Manifest({"x": entry}).content()).files == {"x": entry}
    with pytest.raises(manifest.DamagedManifest):
        manifest.Manifest.of(manifest.Manifest({name: entry}).content())


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_revision_is_that_of_the_checkout_that_the_package_is_part_of(tmp_path, monkeypatch):
    def git(*arguments):
        author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    revision_of = provenance.git_revision.__wrapped__
    package, installed = tmp_path / "package", tmp_path / "env/package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert revision_of(package) is None
    git("init", "-q")
    assert revision_of(package) is None
    git("add", "package")
    git("commit", "-q", "-m", "first")
    assert revision_of(package) == git("rev-parse", "HEAD")
    assert revision_of(installed) is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert revision_of(package)
    monkeypatch.delenv("GIT_DIR")
    (package / "__init__.py").write_text("x = 1")
    assert revision_of(package) == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert revision_of(package) is None
