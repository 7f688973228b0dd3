import dataclasses
import json

import numpy as np
import pytest

from pm_jax import rules
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual import learner as learner_module
from pm_jax.continual.storage.provenance import configuration_hash
from pm_jax.continual.storage.reuse import SharedTraining
from pm_jax.types import InvalidInput
from tests.small_runs import BY_CLASS, QUIET, SMALL, comparable, forget_programs, leaves_equal

pytestmark = pytest.mark.slow

LORA = dataclasses.replace(BY_CLASS, adapter="lora", lora_rank=2)


@pytest.fixture
def inference_only(monkeypatch):
    """The name of a rule that starts each task from the trained model and merges into another."""
    rule = rules.averaging()._replace(needs=rules.Requirements(next_task_from="trained"))
    monkeypatch.setitem(rules.REGISTRY, "averaging", lambda: rule)
    forget_programs()
    yield "averaging"
    forget_programs()


@pytest.fixture
def trained_tasks(monkeypatch):
    """The tasks that learners train, in order."""
    tasks = []
    original = learner_module.Learner.train_task

    def counted(self, task, *arguments):
        tasks.append(task)
        return original(self, task, *arguments)

    monkeypatch.setattr(learner_module.Learner, "train_task", counted)
    return tasks


def log_of(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
            for line in lines]  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, LORA], ids=["domain", "class, lora"])
def test_rules_that_share_training_give_the_numbers_of_runs_that_do_not(
    config, inference_only, trained_tasks, tmp_path
):
    options = RunOptions(quiet=True, shared=tmp_path / "shared")
    tasks = config.num_tasks
    # From scratch the first merge changes nothing, so every rule starts two tasks alike.
    expected = {
        "sequential": list(range(tasks)),
        inference_only: [],
        "perturb_and_merge": list(range(2, tasks)),
    }
    for rule, trained in expected.items():
        own = dataclasses.replace(config, rule=rule)
        alone = Learner(own, 0, tmp_path / rule / "alone", QUIET)
        wanted = alone.run()
        trained_tasks.clear()
        together = Learner(own, 0, tmp_path / rule / "together", options)
        found = together.run()
        assert trained_tasks == trained
        assert comparable(found) == comparable(wanted)
        assert leaves_equal(together.params, alone.params)
        assert log_of(tmp_path / rule / "together") == log_of(tmp_path / rule / "alone")
        assert found["seconds"]["train"] > 0


def test_a_trajectory_begun_by_one_rule_is_continued_by_another(
    inference_only, trained_tasks, tmp_path
):
    options = RunOptions(quiet=True, shared=tmp_path)
    for rule, trained in (("perturb_and_merge", [0, 1, 2]), ("sequential", [2])):
        trained_tasks.clear()
        Learner(dataclasses.replace(SMALL, rule=rule), 0, options=options).run()
        assert trained_tasks == trained
    assert sorted(path.name for path in (tmp_path / "seed_0").glob("*.safetensors")) == [
        f"task_{task}.safetensors" for task in (1, 2, 3)
    ]


def test_a_training_killed_on_its_way_is_shared_whole_when_it_is_finished(
    inference_only, trained_tasks, tmp_path, monkeypatch
):
    saves = learner_module.Checkpoints.save
    sequential = dataclasses.replace(SMALL, rule="sequential")
    options = RunOptions(checkpoint_every=5, quiet=True, shared=tmp_path / "shared")

    def learner(config, name):
        return Learner(config, 0, tmp_path / name, options)

    def dying_save(self, step, tree):
        saves(self, step, tree)
        if "trainable" in tree:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner_module.Checkpoints, "save", dying_save)
    with pytest.raises(KeyboardInterrupt):
        learner(sequential, "first").run()
    assert not (tmp_path / "shared").exists()
    monkeypatch.setattr(learner_module.Checkpoints, "save", saves)
    wanted = learner(sequential, "first").run()
    trained_tasks.clear()
    found = learner(sequential, "second").run()
    assert trained_tasks == [] and comparable(found) == comparable(wanted)
    assert log_of(tmp_path / "second") == log_of(tmp_path / "first")


def test_a_damaged_file_is_named(tmp_path):
    shared = SharedTraining(tmp_path)
    params = {"w": np.ones(100, np.float32)}
    shared.keep(0, params, params, [])
    path = tmp_path / "task_1.safetensors"
    content = path.read_bytes()
    for damaged in (content[:100], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match=r"task_1\.safetensors: cannot be .*move it away"):
            shared.find(0, params)
    path.write_bytes(content)
    assert leaves_equal(shared.find(0, params)[0], params)


def test_the_hash_of_a_configuration_is_of_what_a_run_computes():
    assert configuration_hash(Config(data_dir="x")) == configuration_hash(Config())
    assert configuration_hash(Config(epochs=2)) != configuration_hash(Config(epochs=3))
