import dataclasses
import json

import jax.numpy as jnp
import pytest

from pm_jax.continual import Learner, TrainingDiverged
from pm_jax.continual import learner as learner_module
from pm_jax.types import InvalidInput
from tests.small_runs import SMALL, VIT, Killed, comparable, leaves_equal

AUGMENTED = dataclasses.replace(SMALL, accumulation_steps=3, augmentation="crop_flip")


@pytest.mark.parametrize("config", [SMALL, VIT, AUGMENTED], ids=["full", "lora", "augmented"])
def test_a_run_killed_within_and_between_tasks_ends_with_the_same_numbers(
    config, tmp_path, monkeypatch
):
    straight = Learner(config, 0, tmp_path / "straight", checkpoint_every=7, quiet=True)
    wanted = straight.run()
    assert straight._programs.later.train._cache_size() == 1
    saves = learner_module.Checkpoints.save
    survived = []

    def dying_save(self, step, tree):
        saves(self, step, tree)
        if step not in survived:
            survived.append(step)
            raise Killed

    monkeypatch.setattr(learner_module.Checkpoints, "save", dying_save)
    for _ in range(200):
        learner = Learner(config, 0, tmp_path / "killed", checkpoint_every=7, quiet=True)
        try:
            results = learner.run()
            break
        except Killed:
            continue
    bounds = set(straight._bounds)
    assert any(step in bounds for step in survived)
    assert any(step not in bounds for step in survived)
    assert comparable(results) == comparable(wanted)
    assert leaves_equal(learner.params, straight.params)
    for name in ("metrics.jsonl", "metrics.csv"):
        counts = [
            len((tmp_path / run / name).read_text().splitlines()) for run in ("straight", "killed")
        ]
        assert counts[0] == counts[1]
    steps = [
        [
            json.loads(line)["step"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("straight", "killed")
    ]
    assert steps[0] == steps[1]


def test_a_checkpoint_cut_short_is_named_and_nothing_is_deleted(tmp_path):
    Learner(SMALL, 0, tmp_path, quiet=True).run()
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: int(p.name))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match=f"checkpoint {newest.name} cannot be read"):
        Learner(SMALL, 0, tmp_path, quiet=True).run()
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    learner = Learner(SMALL, 0, tmp_path, quiet=True)
    train = learner._programs.later.train

    def poisoned(key, trainable, optimizer, start, data, piece):
        trainable, optimizer, values = train(key, trainable, optimizer, start, data, piece)
        return trainable, optimizer, values.at[2].set(jnp.nan) if piece.task == 1 else values

    program = learner._programs.later._replace(train=poisoned)
    learner._programs = learner._merging._programs = learner._programs._replace(
        first=program, later=program
    )
    with pytest.raises(TrainingDiverged, match="task 2, step 3: the loss is nan"):
        learner.run()
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == [learner._bounds[1]]


def test_a_real_divergence_is_caught():
    config = dataclasses.replace(SMALL, optimizer="sgd", learning_rate=1e18)
    with pytest.raises(TrainingDiverged, match="task 1, step"):
        Learner(config, 0, quiet=True).run()
