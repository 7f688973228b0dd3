"""A branch takes over what another run has trained, and nothing else."""

import dataclasses

import numpy as np
import pytest

from pm_jax.continual import Learner, RunOptions
from pm_jax.continual.report.results import read_results
from pm_jax.continual.run import run_seeds
from pm_jax.continual.storage import reuse
from pm_jax.types import InvalidInput
from tests.small_runs import BY_CLASS, QUIET, SMALL, VIT, comparable

pytestmark = pytest.mark.slow

KINDS = {"domain": SMALL, "class": BY_CLASS, "lora": VIT}


@pytest.fixture(scope="module", params=list(KINDS))
def source(request, tmp_path_factory):
    """A finished run with the models of its tasks."""
    workdir = tmp_path_factory.mktemp(request.param)
    config = KINDS[request.param]
    run_seeds(config, [0], workdir, RunOptions(quiet=True, keep_task_models=True))
    return config, workdir


def branched(config, workdir, **changes):
    last = config.num_tasks - 1
    return dataclasses.replace(config, branch_from=str(workdir), from_task=last, **changes)


def test_a_branch_of_the_same_settings_is_the_same_run(source, tmp_path, monkeypatch):
    config, workdir = source
    trained = []
    train_task = Learner.train_task
    monkeypatch.setattr(
        Learner, "train_task", lambda self, task, *x: trained.append(task) or train_task(
            self, task, *x
        )
    )  # fmt: skip
    run_seeds(branched(config, workdir), [0], tmp_path, QUIET)
    assert trained == [config.num_tasks - 1]
    wanted, found = (read_results(d / "seed_0" / "results.json") for d in (workdir, tmp_path))
    assert found["config"]["branch_from"] == str(workdir) and found["config"]["from_task"] > 0
    for results in (wanted, found):
        del results["config"], results["environment"]
    assert comparable(found) == comparable(wanted)


def test_another_rule_merges_the_same_models_anew(source, tmp_path):
    config, workdir = source
    branch = branched(config, workdir, rule="averaging", perturbation="none")
    learner = Learner(branch, 0, options=QUIET)
    merges = []
    merge = learner.merging.merge
    learner.merging.merge = lambda task, state, found, *rest: (
        merges.append(found.trained) or merge(task, state, found, *rest)
    )
    results = learner.run()
    np.testing.assert_allclose(
        [each["alpha"] for each in results["merges"]], 1 / np.arange(1, config.num_tasks + 1),
        rtol=1e-6,
    )  # fmt: skip
    for task in range(1, config.num_tasks):
        kept = reuse.read_task_model(workdir / "seed_0", task)
        assert set(learner.programs.merging) <= set(kept)
        for path, leaf in kept.items():
            node = merges[task - 1]
            for part in path.split("/"):
                node = node[part]
            np.testing.assert_array_equal(node, leaf)


BAD = {
    "from_task=0: with branch_from": {"branch_from": "x"},
    "from_task=2: with branch_from": {"from_task": 2},
    "from_task=4: with branch_from from 1 to num_tasks=3": {"branch_from": "x", "from_task": 4},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_do_not_go_together_are_refused(message):
    with pytest.raises(InvalidInput, match=message):
        dataclasses.replace(SMALL, **BAD[message])


def test_what_cannot_be_branched_is_refused_before_anything_is_written(source, tmp_path):
    config, workdir = source
    cases = {
        "branch_from=.*: is a run with epochs=1, not 2; a branch may": {"epochs": 2},
        "branch_from=.*: rule=became has to be there in training": {
            "rule": "became", "perturbation": "none",
        },
        "branch_from=.*: config.json cannot be read": {"branch_from": str(tmp_path / "none")},
    }  # fmt: skip
    for message, changes in cases.items():
        with pytest.raises(InvalidInput, match=f"^{message}"):
            given = {"from_task": config.num_tasks - 1, "branch_from": str(workdir), **changes}
            run_seeds(dataclasses.replace(config, **given), [0], tmp_path / "run", QUIET)
    with pytest.raises(InvalidInput, match="seed_1 in .* has no model of task 1"):
        run_seeds(branched(config, workdir), [1], tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()
