"""What results say in a sentence, and how long a run still takes."""

import io
import json
import time

import pytest

from pm_jax import rules
from pm_jax.continual.report import sentences
from pm_jax.continual.report.results import summarize
from pm_jax.continual.storage import progress


def summary(accuracies, forgetting, seeds=None):
    """The parts of a summary that the sentences are made of."""
    figures = {"final_average_accuracy": accuracies, "forgetting": forgetting}
    return {
        "seeds": list(range(len(accuracies))) if seeds is None else seeds,
        **{name: {"values": values} for name, values in figures.items()},
    }


BASELINE = "sequential (baseline, learning_rate=0.0003, epochs=1)"
# Differences .08, .10, .12: their standard error is .02 / sqrt(3).
GOOD, POOR = summary([0.78, 0.8, 0.8], [0.09] * 3), summary([0.7, 0.7, 0.68], [0.2, 0.2, 0.17])


@pytest.mark.parametrize(
    ("summaries", "sentence"),
    [
        (
            {"perturb_and_merge": GOOD, BASELINE: POOR},
            "Perturb-and-Merge forgets 9.0 points, sequential training 19.0; merging is worth "
            "10.0 +- 1.2 points of final accuracy over 3 seeds (standard error, paired by seed).",
        ),
        (
            {"averaging": POOR, "ties+keep=0.1": GOOD},
            "Averaging forgets 19.0 points, TIES 9.0; averaging costs 10.0 +- 1.2 points of final "
            "accuracy over TIES over 3 seeds (standard error, paired by seed).",
        ),
        (
            {"ties": summary([0.5, 0.7], [None, None]), BASELINE: summary([0.6, 0.6], [0.1, 0.1])},
            "Whether merging is worth anything is not clear: +0.0 +- 10.0 points of final accuracy "
            "over 2 seeds (standard error, paired by seed).",
        ),
        (
            {"perturb_and_merge": GOOD, BASELINE: summary([0.9], [0.0], [1])},
            "Perturb-and-Merge forgets 9.0 points, sequential training 0.0; merging costs 10.0 "
            "points of final accuracy with one seed, which may be luck: run more, as "
            "--seeds=0,1,2.",
        ),
        (
            {"sequential": GOOD, BASELINE: POOR},
            "Sequential training forgets 9.0 points, its baseline 19.0; sequential training is "
            "worth 10.0 +- 1.2 points of final accuracy over its baseline over 3 seeds (standard "
            "error, paired by seed).",
        ),
        ({"perturb_and_merge": GOOD}, ""),
        ({"perturb_and_merge": GOOD, BASELINE: summary([0.9], [0.0], [7])}, ""),
    ],
)
def test_the_gain_is_one_sentence_that_is_paired_and_honest(summaries, sentence):
    assert sentences.gain(summaries) == sentence


def test_every_rule_has_a_name_in_words():
    assert sentences.NAMES.keys() == rules.REGISTRY.keys()


def content(seed, final, alphas, seconds=10.0):
    """A results.json of two tasks."""
    figures = {"final_average_accuracy": final, "forgetting": 0.1}
    return {
        "seed": seed,
        "accuracy_matrix": [[final, None], [final, final]],
        **figures,
        "task_aware": figures,
        "merges": [{"alpha": alpha} for alpha in (1.0, *alphas)][:2],
        "seconds": {"train": 1.0, "this_process": seconds},
        "rule_state_bytes": 1,
        "manifest": {"tasks": []},
        "environment": {"python": "3", "device": "cpu", "devices": 1, "packages": {}},
    }


def test_the_sentences_take_the_summaries_of_runs():
    rows = {
        label: summarize([content(seed, final + seed / 100, [0.2 + seed / 10]) for seed in (0, 1)])
        for label, final in (("perturb_and_merge", 0.8), (BASELINE, 0.7))
    }
    assert "merging is worth 10.0 +- 0.0 points" in sentences.gain(rows)
    run = rows["perturb_and_merge"]
    assert run["final_average_accuracy"]["values"] == [0.8, 0.81]
    assert run["alpha"] == pytest.approx([0.2, 0.3])
    assert "only 20 to 30 % of the way" in sentences.method(rows)
    assert "went 20 to 120 % of" in sentences.method(
        {"perturb_and_merge": {**run, "alpha": [0.2, 1.2]}}
    )
    assert sentences.method({"averaging": run}) == ""
    nothing = summarize([content(0, 0.8, [None])])
    assert nothing["alpha"] is None and sentences.method({"perturb_and_merge": nothing}) == ""


def test_a_duration_is_told_by_finished_runs_and_not_guessed(tmp_path):
    directories = [tmp_path, tmp_path / "baseline"]
    assert "not known before" in sentences.duration(directories, [0, 1])
    assert "not known before" in sentences.duration([], [0, 1])
    for number, directory in enumerate(directories):
        (directory / "seed_0").mkdir(parents=True)
        path = directory / "seed_0" / "results.json"
        path.write_text(json.dumps(content(0, 0.5, [0.5], seconds=40.0 + 20 * number)))
    assert sentences.duration(directories, [0, 1, 2]) == (
        "duration: about 3 min for the 4 of 6 runs that are left, at 50 s a run as the finished "
        "ones took"
    )
    assert "all of 2 are finished" in sentences.duration(directories, [0])


def test_the_time_left_is_that_of_steps_and_of_the_ends_of_tasks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = progress.Pace()
    pace.trained(1, 9.0)
    assert pace.left(100, 3) is None
    # The first step of training and the first end of a task compile.
    for steps, seconds, between in ((1, 9.0, 8.0), (10, 2.0, 2.0), (5, 1.0, 3.0)):
        pace.trained(steps, seconds)
        now[0] += between
        pace.ended()
    assert pace.left(100, 3) == pytest.approx(100 * 0.2 + 3 * 2)


def test_a_pipe_has_a_line_now_and_then_and_a_notebook_none(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with progress.waiting("reading data"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    monkeypatch.setattr("sys.__stderr__", pipe)
    with progress.waiting("reading data"):
        while pipe.getvalue().count("\n") < 2:
            time.sleep(0.01)
    assert set(pipe.getvalue().splitlines()) == {"[00:00] reading data"}
    with progress.waiting("reading data", quiet=True):
        time.sleep(0.05)
    assert pipe.getvalue().count("\n") == 2
