"""The binary: in-process for speed, as a subprocess where a process is what is tested."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import termios

import jax
import pytest
from absl import flags

from experiments import flags as experiment_flags
from pm_jax.continual.report import inspection
from tests.binaries import call, refused

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    *("--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8", "--noreport"),
]


def results(workdir, seed=0):
    return json.loads((workdir / f"seed_{seed}" / "results.json").read_text())


def test_default_is_perturb_and_merge_and_a_sequential_baseline(tmp_path, capsys):
    call(
        "train",
        f"--workdir={tmp_path}",
        "--seeds=0,1",
        *TINY,
        "--baseline_learning_rate=0.01",
        "--baseline_epochs=2",
    )
    *_, gain, method = table = capsys.readouterr().out.splitlines()[-5:]
    assert gain.startswith("Perturb-and-Merge forgets ") and " over 2 seeds (" in gain
    assert method.startswith("After each later task Perturb-and-Merge went only ")
    assert table[0].startswith("rule") and "final accuracy" in table[0]
    assert table[1].startswith("perturb_and_merge")
    assert table[2].startswith("sequential (baseline, learning_rate=0.01, epochs=2)")
    assert re.search(r"\d+\.\d \+- \d+\.\d", table[1])
    summary = json.loads((tmp_path / "summary.json").read_text())
    accuracies = [results(tmp_path, seed)["final_average_accuracy"] for seed in (0, 1)]
    assert summary["seeds"] == [0, 1]
    figure = summary["final_average_accuracy"]
    assert figure["n"] == 2 and figure["mean"] == pytest.approx(sum(accuracies) / 2)
    assert figure["standard_deviation"] == pytest.approx(
        abs(accuracies[0] - accuracies[1]) / 2**0.5
    )
    baseline = results(tmp_path / "baseline")["config"]
    assert (baseline["rule"], baseline["perturbation"]) == ("sequential", "none")
    assert baseline["learning_rate"] == 0.01


def test_the_baseline_has_its_own_best_rate_only_where_that_was_chosen():
    def baseline(*arguments):
        flags.FLAGS.unparse_flags()
        experiment_flags.parse(["train", *arguments])
        return experiment_flags.baseline_from_flags(experiment_flags.config_from_flags())

    for arguments in (
        [],
        ["--curvature=fisher_empirical", "--epsilon=0.3", "--learning_rate=0.01"],
    ):
        own = baseline(*arguments)
        assert (own.learning_rate, own.epochs) == (3e-4, 1)
    for arguments in (["--num_tasks=3"], ["--batch_size=64"], ["--baseline=averaging"]):
        same = baseline(*arguments, "--epochs=7")
        assert (same.learning_rate, same.epochs) == (3e-3, 7)
    given = baseline("--baseline_learning_rate=0.5", "--baseline_epochs=4")
    assert (given.learning_rate, given.epochs) == (0.5, 4)
    assert baseline("--rule=averaging") is None and baseline("--baseline=") is None


def test_a_run_ends_with_its_report_and_the_table(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    call("train", f"--workdir={tmp_path}", "--rule=averaging", *TINY, "--report")
    report = tmp_path / "report.html"
    *_, line, heading, _ = capsys.readouterr().out.splitlines()
    assert line == f"report: {report}" and heading.startswith("rule ") and report.exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    call("train", f"--workdir={tmp_path}", "--rule=averaging", *TINY, "--report")
    assert "report: skipped, matplotlib is not installed; pip" in capsys.readouterr().out


def test_results_hold_what_is_promised(tmp_path):
    call("train", f"--workdir={tmp_path}", "--rule=perturb_and_merge", *TINY)
    assert not (tmp_path / "baseline").exists()
    found = results(tmp_path)
    assert set(found) == {
        *("config", "seed", "accuracy_matrix", "final_average_accuracy"),
        *("average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
        *("learning_accuracy", "task_aware", "merges", "manifest", "environment", "seconds"),
        *("rule_state_bytes", "mean_regret_loss", "mean_regret_accuracy"),
        *("evaluate_on", "classifiers", "scores", "class_accuracy"),
    }
    assert not (tmp_path / "report.html").exists()
    assert len(found["merges"]) == 2
    assert {
        *("alpha", "alpha_raw", "numerator", "denominator", "standard_error"),
        *("predicted_loss_change", "actual_loss_change"),
    } <= set(found["merges"][1])
    assert 0 <= found["final_average_accuracy"] <= 1
    assert found["config"]["num_tasks"] == 2 and found["seed"] == 0
    lines = [
        json.loads(line)
        for line in (tmp_path / "seed_0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["event"] for line in lines] == ["epoch", "merge", "evaluate"] * 2
    rows = list(csv.DictReader((tmp_path / "seed_0" / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(lines) and float(rows[1]["alpha"]) == 1.0
    text = (tmp_path / "seed_0" / "results.json").read_text()
    assert "NaN" not in text and str(tmp_path) not in text


@pytest.mark.slow
def test_what_does_not_apply_is_null(tmp_path):
    call(
        "train", f"--workdir={tmp_path}", "--rule=averaging", "--scenario=class_incremental", *TINY
    )
    found = results(tmp_path)
    assert found["forward_transfer"] is None
    assert found["accuracy_matrix"][0][1] is None
    assert found["merges"][1]["denominator"] is None and found["merges"][1]["alpha"] == 0.5


@pytest.mark.slow
def test_a_finished_run_says_so_and_more_seeds_are_added_to_it(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", "--rule=averaging", *TINY]
    call("train", *arguments)
    before = (tmp_path / "seed_0" / "results.json").read_bytes()
    capsys.readouterr()
    call("train", *arguments)
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "seed_0" / "results.json").read_bytes() == before
    call(
        "train",
        *arguments,
        "--seeds=0,1",
        "--checkpoint_every=3",
        "--data_dir=/elsewhere",
        "--resident_mb=0.1",
    )
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"] == [0, 1]


def test_dry_run_prints_settings_counts_and_patterns_and_writes_nothing(tmp_path, capsys):
    call(
        "train",
        "--dry_run",
        f"--workdir={tmp_path}/x",
        "--model=vit",
        "--adapter=lora",
        "--lora_rank=3",
        "--width=16",
        "--depth=2",
        "--scenario=class_incremental",
    )
    text = capsys.readouterr().out
    changes, settings = text.split("\nstream:\n")[0], text.split("\nstream:\n")[1]
    assert changes.startswith("differs from the defaults:\n") and "lora_rank=3 (default 10)" in text
    assert "rule=perturb_and_merge" not in changes and "rule=perturb_and_merge" in settings
    assert "probabilities=1/3,1/3,1/3 " in settings and "templates='a photo of a {}.'" in settings
    assert "blocks_1/attn/value/kernel" in text
    assert "(adapters 384)" in text  # 4 kernels, rank 3, 16 + 16
    assert "merging: 1024" in text  # 4 kernels of 16 x 16
    baseline = "baseline: perturbation=none, rule=sequential"
    assert f"\n{baseline}\n" in text  # The best settings of the default stream are not for a vit.
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("before", "after"), [(None, ""), ("--xla_x=1", "--xla_x=1 ")])
def test_deterministic_operations_are_asked_for_before_there_is_a_device(
    before, after, capsys, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", before or "")
    call("train", "--dry_run", *TINY)
    assert os.environ["XLA_FLAGS"] == (before or "")
    call("train", "--dry_run", "--deterministic", *TINY)
    assert os.environ["XLA_FLAGS"] == after + "--xla_gpu_deterministic_ops=true"


def test_tensorboard_events_are_written_when_asked_for(tmp_path, capsys, monkeypatch):
    call("train", f"--workdir={tmp_path}", "--rule=averaging", "--tensorboard", *TINY)
    assert len(list((tmp_path / "seed_0").glob("events.out.tfevents.*"))) == 1
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    other = tmp_path / "other"
    line = refused(
        capsys, "train", f"--workdir={other}", "--rule=averaging", "--tensorboard", *TINY
    )
    assert "--tensorboard=True: needs tensorboardX" in line and not other.exists()


@pytest.fixture
def preset(tmp_path, monkeypatch):
    (tmp_path / "mine.flags").write_text("# a comment\n--epochs=2\n--rule=averaging\n")
    monkeypatch.setattr(experiment_flags, "PRESETS", tmp_path)


@pytest.mark.parametrize("spelling", [["--preset=mine"], ["--preset", "mine"]])
def test_flags_override_a_preset_wherever_they_stand(preset, capsys, spelling):
    call("train", "--dry_run", "--epochs=5", *spelling)
    assert "\n  epochs=5 (default 3)\n" in capsys.readouterr().out
    call("train", "--dry_run", *spelling)
    text = capsys.readouterr().out
    assert "\n  epochs=2 (default 3)\n" in text and "  rule=averaging (default" in text


def test_a_binary_without_baselines_leaves_those_of_a_preset_out_and_says_so(preset, capsys):
    path = experiment_flags.PRESETS / "mine.flags"
    path.write_text(f"{path.read_text()}--baseline_epochs=3\n")
    values = flags.FlagValues()
    for name in ("preset", "epochs", "rule", "verbosity"):
        flags.DEFINE_string(name, None, "As experiments.compare has them.", flag_values=values)
    experiment_flags.parse(["compare", "--preset=mine"], values)
    assert values["epochs"].value == "2"
    told = "--preset=mine: without --baseline_epochs=3, for experiments.train only\n"
    assert capsys.readouterr().err == told
    call("train", "--dry_run", "--preset=mine")
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_with_a_warning(tmp_path, capsys):
    whole = [f"--workdir={tmp_path / 'b'}", "--rule=averaging", *TINY]
    call("train", *whole)
    (tmp_path / "b" / "seed_0" / "results.json").unlink()
    checkpoints = tmp_path / "b" / "seed_0" / "checkpoints"
    newest = max(checkpoints.glob("[0-9]*"), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    call("train", *whole)
    warning, *_ = capsys.readouterr().err.splitlines()
    assert f"warning: checkpoint {newest.name} is damaged" in warning
    assert results(tmp_path / "b")["final_average_accuracy"] > 0


def command(*arguments):
    return [sys.executable, "-m", "experiments.train", *map(str, arguments)]


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar(tmp_path):
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    with subprocess.Popen(
        command(f"--workdir={tmp_path}", "--rule=averaging", *TINY), cwd=ROOT, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read_until_closed(ours):
            shown += chunk
    assert process.returncode == 0
    assert shown.startswith(b"starting ...")
    phases = [b"reading data", b"compiling, training", b" training", b"merging", b"evaluating"]
    assert re.search(
        rb"%\|.*task 2 of 2: training, loss \d.*images/s(, \d+ s left)?; averaging", shown
    )
    assert [phase for phase in phases if phase not in shown] == []


def _read_until_closed(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's word for a terminal that nobody holds any more
        return b""


@pytest.mark.parametrize(
    "model,named", [("vit", True), ("mlp", False), ("tests.own_models:resnet", False)]
)
def test_too_little_memory_names_checkpointing_for_models_that_have_it(model, named, capsys):
    flags.FLAGS.unparse_flags()
    experiment_flags.parse(["train", f"--model={model}", "--batch_size=6"])
    with pytest.raises(SystemExit) as ended, experiment_flags.exits():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4000 bytes.")
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.count("\n") == 1
    assert ("set remat=blocks or resident_mb" in line) == named
    assert "batch_size than 6, with more accumulation_steps than 1" in line


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_results(tmp_path):
    arguments = ["--rule=perturb_and_merge", *TINY, "--num_tasks=3", "--checkpoint_every=5"]
    call("train", f"--workdir={tmp_path / 'straight'}", *arguments)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(f"--workdir={killed}", *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stderr:  # the end of a task is as good a moment as any
            if "task 1 of 3: alpha" in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "seed_0" / "results.json").exists()
    assert inspection.inspect(killed).damaged == []
    call("train", f"--workdir={killed}", *arguments)
    one, two = (results(tmp_path / name) for name in ("straight", "killed"))
    for found in (one, two):
        del found["seconds"]
    assert one == two
