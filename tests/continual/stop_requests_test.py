"""A run that is asked to end saves where it is, and goes on from there as if nothing had been."""

import json
import signal

import pytest

from pm_jax.continual import Learner, RunOptions, interruption
from pm_jax.continual import learner as learner_module
from pm_jax.continual.interruption import Interrupted, StopRequests
from tests.binaries import call
from tests.experiments.train_test import TINY
from tests.small_runs import QUIET, SMALL, comparable, leaves_equal, with_functions


def asked_to_end(learner, call):
    """The learner, whose program is sent SIGTERM at a call of its training."""
    train, calls = learner.programs.training.later.train, []

    def watched(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return train(*arguments)

    return with_functions(learner, train=watched)


@pytest.mark.slow
@pytest.mark.parametrize("call", [3, 12])
def test_a_request_ends_a_run_within_a_task_and_it_goes_on_to_the_same_numbers(
    tmp_path, call, monkeypatch
):
    monkeypatch.setattr(interruption, "SECONDS", 0.0)  # one step at a time
    straight = Learner(SMALL, 0, tmp_path / "straight", QUIET)
    wanted = straight.run()
    with StopRequests() as stop, pytest.raises(Interrupted) as caught:
        asked_to_end(
            Learner(SMALL, 0, tmp_path / "ended", RunOptions(quiet=True, stop=stop)), call
        ).run()
    assert caught.value.signal_number == signal.SIGTERM
    saved = max(int(p.name) for p in (tmp_path / "ended" / "checkpoints").iterdir() if p.is_dir())
    assert saved == call and saved not in straight.steps.bounds
    assert str(caught.value) == (
        f"ended by SIGTERM at step {saved} of {straight.total_steps}; the same command goes on "
        "from there"
    )
    again = Learner(SMALL, 0, tmp_path / "ended", QUIET)
    assert comparable(again.run()) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
    lines = [json.loads(x) for x in (tmp_path / "ended" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "epoch"]
    assert saved in steps and steps == sorted(set(steps))


def test_steps_are_cut_into_pieces_only_while_requests_are_noted(monkeypatch):
    monkeypatch.setattr(interruption, "SECONDS", float("inf"))
    requests, before = StopRequests(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of xdist has another
    assert list(requests.cut([(2, 9, "data")])) == [(2, 9, "data")]
    with requests:
        pieces = list(requests.cut([(0, 4, "a"), (4, 9, "b")]))
        assert pieces == [(0, 1, "a"), (1, 3, "a"), (3, 4, "a"), (4, 8, "b"), (8, 9, "b")]
        found = []
        for piece in requests.cut([(0, 100, "a"), (100, 200, "b")]):
            found.append(piece)
            signal.raise_signal(signal.SIGINT)
        assert len(found) == 1
        with pytest.raises(KeyboardInterrupt):  # the second one
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.slow
def test_the_binary_says_so_and_ends_with_the_signals_code(tmp_path, capsys, monkeypatch):
    saves = learner_module.Checkpoints.save

    def asked(self, step, tree):
        saves(self, step, tree)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(learner_module.Checkpoints, "save", asked)
    with pytest.raises(SystemExit) as caught:
        call("train", f"--workdir={tmp_path}", *TINY)
    assert caught.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ended by SIGINT at step ")
    assert not (tmp_path / "seed_0" / "results.json").exists()
    monkeypatch.setattr(learner_module.Checkpoints, "save", saves)
    call("train", f"--workdir={tmp_path}", *TINY)
    assert (tmp_path / "seed_0" / "results.json").exists()
