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

import pytest
from absl import flags

from experiments import flags as experiment_flags
from experiments import train
from pm_jax import rules
from pm_jax.continual import inspection
from pm_jax.continual.workdir import held

ROOT = pathlib.Path(__file__).parent.parent
TINY = [
    *("--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8", "--noreport"),
]


def run(*arguments):
    """Parse and run as `app.run` would."""
    flags.FLAGS.unparse_flags()
    train.main(experiment_flags.parse(["train", *map(str, arguments)]))


def refused(capsys, *arguments, code=2):
    """The single line of a run that ends with a code."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == code
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and text.endswith(lines[0] + "\n"), text
    assert "Traceback" not in text
    return lines[0]


def results(workdir, seed=0):
    return json.loads((workdir / f"seed_{seed}" / "results.json").read_text())


def test_default_is_perturb_and_merge_and_a_sequential_baseline(tmp_path, capsys):
    run(f"--workdir={tmp_path}", "--seeds=0,1", *TINY, "--baseline_learning_rate=0.01",
        "--baseline_epochs=2")  # fmt: skip
    table = capsys.readouterr().out.splitlines()[-3:]
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
    run(f"--workdir={tmp_path}", "--rule=averaging", *TINY, "--report")
    report = tmp_path / "report.html"
    *_, line, heading, _ = capsys.readouterr().out.splitlines()
    assert line == f"report: {report}" and heading.startswith("rule ") and report.exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(f"--workdir={tmp_path}", "--rule=averaging", *TINY, "--report")
    assert "report: skipped, matplotlib is not installed; pip" in capsys.readouterr().out


def test_results_hold_what_is_promised(tmp_path):
    run(f"--workdir={tmp_path}", "--rule=perturb_and_merge", *TINY)
    assert not (tmp_path / "baseline").exists()
    found = results(tmp_path)
    assert set(found) == {
        *("config", "seed", "accuracy_matrix", "final_average_accuracy"),
        *("average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
        *("learning_accuracy", "task_aware", "merges", "manifest", "environment", "seconds"),
        *("rule_state_bytes", "mean_regret_loss", "mean_regret_accuracy"),
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


def test_what_does_not_apply_is_null(tmp_path):
    run(f"--workdir={tmp_path}", "--rule=averaging", "--scenario=class_incremental", *TINY)
    found = results(tmp_path)
    assert found["forward_transfer"] is None
    assert found["accuracy_matrix"][0][1] is None
    assert found["merges"][1]["denominator"] is None and found["merges"][1]["alpha"] == 0.5


def test_a_finished_run_says_so_and_other_settings_are_refused(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", "--rule=averaging", *TINY]
    run(*arguments)
    before = (tmp_path / "seed_0" / "results.json").read_bytes()
    capsys.readouterr()
    run(*arguments)
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "seed_0" / "results.json").read_bytes() == before
    line = refused(capsys, *arguments, "--learning_rate=0.5", "--batch_size=16")
    assert f"--workdir={tmp_path}" in line
    assert "batch_size=32, not 16" in line and "learning_rate=0.003, not 0.5" in line
    run(*arguments, "--seeds=0,1", "--checkpoint_every=3", "--data_dir=/elsewhere",
        "--resident_mb=0.1")  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"] == [0, 1]


def test_dry_run_prints_settings_counts_and_patterns_and_writes_nothing(tmp_path, capsys):
    run(
        "--dry_run", f"--workdir={tmp_path}/x", "--model=vit", "--adapter=lora", "--lora_rank=3",
        "--width=16", "--depth=2", "--scenario=class_incremental",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "rule=perturb_and_merge" in text and "lora_rank=3" in text
    assert "blocks_1/attn/value/kernel" in text
    assert "(adapters 384)" in text  # 4 kernels, rank 3, 16 + 16
    assert "merging: 1024" in text  # 4 kernels of 16 x 16
    assert not (tmp_path / "x").exists()


def test_tensorboard_events_are_written_when_asked_for(tmp_path, capsys, monkeypatch):
    run(f"--workdir={tmp_path}", "--rule=averaging", "--tensorboard", *TINY)
    assert len(list((tmp_path / "seed_0").glob("events.out.tfevents.*"))) == 1
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    other = tmp_path / "other"
    line = refused(capsys, f"--workdir={other}", "--rule=averaging", "--tensorboard", *TINY)
    assert "--tensorboard=True: needs tensorboardX" in line and not other.exists()


@pytest.fixture
def preset(tmp_path, monkeypatch):
    (tmp_path / "mine.flags").write_text("# a comment\n--epochs=2\n--rule=averaging\n")
    monkeypatch.setattr(experiment_flags, "PRESETS", tmp_path)


@pytest.mark.parametrize("spelling", [["--preset=mine"], ["--preset", "mine"]])
def test_flags_override_a_preset_wherever_they_stand(preset, capsys, spelling):
    run("--dry_run", "--epochs=5", *spelling)
    assert "epochs=5\n" in capsys.readouterr().out
    run("--dry_run", *spelling)
    text = capsys.readouterr().out
    assert "\nepochs=2\n" in text and "rule=averaging" in text


REFUSED = {
    "unknown rule": (["--rule=nonsense"], f"--rule=nonsense: .*{', '.join(rules.REGISTRY)}"),
    "rule setting": (["--rule_settings=clop=1"], "--rule_settings=clop=1: .*clip=true, .* default"),
    "unknown baseline": (["--baseline=x"], "--baseline=x: must be one of"),
    "no domains": (["--dataset=mnist"], "--scenario=domain_incremental: dataset=mnist has no dom"),
    "baseline rate": (
        ["--baseline_learning_rate=0"],
        r"--baseline_learning_rate=0\.0: must be above 0",
    ),
    "unknown dataset": (
        ["--dataset=mnists", "--scenario=class_incremental"],
        "--dataset=mnists: is not in the catalogue",
    ),
    "unprepared dataset": (
        ["--dataset=imagenet_r", "--scenario=class_incremental", "--data_dir=/nonexistent"],
        "--dataset=imagenet_r: .*prepare it with: tfds build imagenet_r",
    ),
    "no archive": (
        ["--dataset=none.npz", "--scenario=class_incremental"],
        "--dataset=none.npz: there is no such file",
    ),
    "weights of an mlp": (["--pretrained=x.npz"], "--pretrained=x.npz: is for a transformer"),
    "missing weights": (
        ["--pretrained=none.npz", "--model=vit"],
        "--pretrained=none.npz: there is no such file",
    ),
    "unknown perturbation": (["--perturbation=x"], "--perturbation=x: must be one of symmetric"),
    "unknown preset": (["--preset=x"], "--preset=x: must be one of"),
    "unknown scenario": (["--scenario=x"], "--scenario=x: must be one of domain_incremental"),
    "unknown flag": (["--nonsense=1"], "nonsense.*--help"),
    "missing flagfile": (["--flagfile=/nonexistent"], "/nonexistent.*readable"),
    "no number": (["--epochs=many"], "--epochs=many.*--help"),
    "no tuple": (["--hidden_sizes=a,b"], "--hidden_sizes=a,b.*whole numbers"),
    "stray word": (["stray"], "stray.*--name=value"),
    "epsilon zero": (["--epsilon=0"], r"--epsilon=0\.0: must lie in \(0, 1\]"),
    "epsilon large": (["--epsilon=1.5"], r"--epsilon=1\.5: must lie"),
    "probabilities": (["--probabilities=0.5,0.4,0.4"], "--probabilities=.*sum to 1"),
    "two probabilities": (["--probabilities=1/2,1/2"], "--probabilities=.*3 are needed"),
    "no tasks": (["--num_tasks=0"], "--num_tasks=0: must be at least 1"),
    "too many tasks": (
        ["--scenario=class_incremental", "--num_tasks=11"],
        r"--num_tasks=11: .*choose 1\.\.10 tasks",
    ),
    "empty task": (
        ["--scenario=class_incremental", "--num_tasks=4", "--base_classes=8"],
        r"--num_tasks=4: 2 classes are left",
    ),
    "single class": (
        ["--scenario=class_incremental", "--num_tasks=6"],
        "--num_tasks=6: leaves a task with one class.*fewer tasks",
    ),
    "rank zero": (["--adapter=lora", "--lora_rank=0"], "--lora_rank=0: must be at least 1"),
    "rank too large": (["--adapter=lora", "--lora_rank=65"], r"--lora_rank=65: .*1\.\.64"),
    "pattern": (
        ["--adapter=lora", "--lora_pattern=hiden.*"],
        "--lora_pattern='hiden.*': .*nearest are",
    ),
    "no regular expression": (
        ["--adapter=lora", "--lora_pattern=("],
        r"--lora_pattern='\(': not a regular expression",
    ),
    "patch": (["--model=vit", "--patch_size=3"], "--image_size=0: patch_size=3 must divide"),
    "heads": (["--model=vit", "--num_heads=5"], "--num_heads=5: must divide width=64"),
    "per example": (["--perturb_per=example"], "--perturb_per=example: needs adapter=lora"),
    "no workdir": ([], "--workdir=: needs a directory"),
    "negative seed": (["--seeds=-1"], "--seeds="),
    "no seeds": (["--seeds="], "--seeds="),
    "checkpoint cadence": (["--checkpoint_every=-1"], "--checkpoint_every=-1: must not"),
    "no checkpoint kept": (["--keep_checkpoints=0"], "--keep_checkpoints=0: must be at least 1"),
    "learning rate": (["--learning_rate=0"], r"--learning_rate=0\.0: must be above 0"),
    "temperature": (["--temperature=0"], r"--temperature=0\.0: must be above 0"),
    "milestones": (["--milestones=0.8,0.5"], r"--milestones=\(0\.8, 0\.5\): .*rising order"),
    "accumulation": (["--accumulation_steps=0"], "--accumulation_steps=0: must be at least 1"),
    "augmentation": (["--augmentation=x"], "--augmentation=x: must be one of none, flip, crop"),
    "crop": (["--crop_scale=0.5,0.2"], r"--crop_scale=\(0\.5, 0\.2\): .*rising order"),
    "magnitude": (["--randaugment_magnitude=11"], r"--randaugment_magnitude=11\.0: .*\[0, 10\]"),
    "evaluation view": (["--evaluation_resize=0.9"], "--evaluation_resize=0.9: must be at least 1"),
    "validation": (["--validation_fraction=1"], r"--validation_fraction=1\.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_that_names_flag_value_and_remedy(case, capsys):
    arguments, pattern = REFUSED[case]
    assert re.search(pattern, refused(capsys, *arguments))


def test_a_work_directory_that_cannot_be_used_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refused(capsys, f"--workdir={tmp_path / 'file'}", *TINY)
    below = f"--workdir={tmp_path / 'file' / 'below'}"
    assert "--workdir=" in refused(capsys, below, *TINY)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert "is not empty" in refused(capsys, f"--workdir={other}", *TINY)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    assert "damaged" in refused(capsys, f"--workdir={damaged}", *TINY)


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_work_directory_that_another_process_runs_in_is_refused(tmp_path, capsys):
    with held(tmp_path):
        line = refused(capsys, f"--workdir={tmp_path}", *TINY)
    assert line == (
        f"error: --workdir={tmp_path}: another process runs in it; wait for its end or choose "
        "another directory"
    )
    assert not (tmp_path / "seed_0").exists()


def test_a_work_directory_that_cannot_be_written_is_refused(capsys):
    """In /proc not even root may create a directory."""
    line = refused(capsys, "--workdir=/proc/pm_jax", *TINY)
    assert "--workdir=/proc/pm_jax: cannot be written" in line and "choose another" in line


def test_divergence_ends_with_one_line_and_a_damaged_checkpoint_with_a_warning(tmp_path, capsys):
    tiny = [f"--workdir={tmp_path / 'a'}", "--rule=averaging", *TINY]
    line = refused(capsys, *tiny, "--optimizer=sgd", "--learning_rate=1e38", code=1)
    assert "task 1, step" in line and "learning_rate" in line
    whole = [f"--workdir={tmp_path / 'b'}", "--rule=averaging", *TINY]
    run(*whole)
    (tmp_path / "b" / "seed_0" / "results.json").unlink()
    checkpoints = tmp_path / "b" / "seed_0" / "checkpoints"
    newest = max(checkpoints.glob("[0-9]*"), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    run(*whole)
    warning, *_ = capsys.readouterr().err.splitlines()
    assert f"warning: checkpoint {newest.name} is damaged" in warning
    assert results(tmp_path / "b")["final_average_accuracy"] > 0


def command(*arguments):
    return [sys.executable, "-m", "experiments.train", *map(str, arguments)]


def test_the_process_exits_with_code_2_and_one_line():
    ended = subprocess.run(command("--rule=nonsense"), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("error: --rule=nonsense: must be one of")
    assert len(ended.stderr.splitlines()) == 1


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
    assert b"%|" in shown and b"images/s" in shown and b"task 2 of 2" in shown


def _read_until_closed(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's word for a terminal that nobody holds any more
        return b""


def test_a_killed_process_resumes_to_the_same_results(tmp_path):
    arguments = ["--rule=perturb_and_merge", *TINY, "--num_tasks=3", "--checkpoint_every=5"]
    run(f"--workdir={tmp_path / 'straight'}", *arguments)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(f"--workdir={killed}", *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stderr:  # the end of a task is as good a moment as any
            if "task 1 of 3" in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "seed_0" / "results.json").exists()
    assert inspection.inspect(killed).damaged == []
    run(f"--workdir={killed}", *arguments)
    one, two = (results(tmp_path / name) for name in ("straight", "killed"))
    for found in (one, two):
        del found["seconds"]
    assert one == two
