"""Tasks that move nothing that merges: they train the classifier's columns, or nothing at all."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from pm_jax import trees
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual.run import describe, run_seeds
from pm_jax.continual.storage import reuse
from pm_jax.continual.training.steps import TaskSteps
from pm_jax.weights import pretrained
from tests.small_runs import (
    BY_CLASS,
    QUIET,
    SMALL,
    VIT,
    comparable,
    leaves_equal,
    slow,
    straight_and_killed,
)

FROZEN = dataclasses.replace(BY_CLASS, rule="frozen", perturbation="none", epochs=3)
FIRST_SESSION = dataclasses.replace(FROZEN, rule="first_session")
DISCRIMINANT = dataclasses.replace(FROZEN, classifiers=("discriminant",))
BY_DOMAIN = dataclasses.replace(SMALL, rule="frozen", perturbation="none")


def lines_of(directory, event="epoch"):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def run_with_models(learner):
    """Results of a run, and its merged model after every task."""
    models, merge_task = [], learner.merge_task

    def spy(task, finished):
        figures = merge_task(task, finished)
        models.append(jax.tree.map(np.asarray, trees.leaves_by_path(learner.params)))
        return figures

    learner.merge_task = spy
    return learner.run(), models


def test_tasks_that_cannot_move_train_the_columns_of_their_classes_alone(tmp_path):
    learner = Learner(FROZEN, 0, tmp_path, QUIET)
    results, models = run_with_models(learner)
    assert [merge["alpha"] for merge in results["merges"]] == [0, 0, 0]
    masks = learner.stream.class_masks
    for task in (1, 2):
        before, after = models[task - 1], models[task]
        for path, leaf in after.items():
            same = np.isclose(leaf, before[path], rtol=0, atol=0)
            if path.startswith("head/"):
                # Hidden units that are never active leave their rows as they are.
                assert same[..., ~masks[task]].all() and not same[..., masks[task]].all()
            else:
                assert same.all()
    assert {line["task"] for line in lines_of(tmp_path)} == {1, 2, 3}


@pytest.mark.slow
def test_columns_train_as_a_linear_model_of_the_features_does():
    """The same steps by hand: logistic regression on features that stay, under Adam."""
    import optax

    config = dataclasses.replace(FROZEN, num_tasks=2)
    learner = Learner(config, 0, options=QUIET)
    _, models = run_with_models(learner)
    first, second = models
    mask = learner.stream.class_masks[1]
    data, program = learner.training_data, learner.programs.training.columns

    def features(inputs):
        x = inputs.reshape(len(inputs), -1) / np.float32(127.5) - 1
        return np.maximum(x @ first["hidden_0/kernel"] + first["hidden_0/bias"], 0)

    def loss(head, x, labels, weights):
        logits = jax.numpy.where(mask, x @ head["head/kernel"] + head["head/bias"][None], -1e30)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (weights * each).sum() / weights.sum()

    head = {path: first[path] for path in ("head/kernel", "head/bias")}
    optimizer = optax.adam(config.learning_rate)
    state, gradient_of = optimizer.init(head), jax.jit(jax.grad(loss))
    for step in range(learner.steps.of_task(1)):
        epoch, position = divmod(step, learner.steps.per_epoch[1])
        order = program.order(learner.key, data, 1, epoch)
        batch = program.batches.at(data, order, position, lambda x: x)
        weights = np.ones(len(batch.labels)) if batch.weights is None else batch.weights
        x = features(np.asarray(batch.inputs))
        gradient = gradient_of(head, x, np.asarray(batch.labels), np.asarray(weights))
        updates, state = optimizer.update(gradient, state, head)
        head = optax.apply_updates(head, updates)
    for path, wanted in head.items():
        moved = second[path][..., mask] - first[path][..., mask]
        np.testing.assert_allclose(moved, (wanted - first[path])[..., mask], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", [DISCRIMINANT, BY_DOMAIN], ids=["discriminant", "domains"])
def test_where_no_trained_column_predicts_nothing_is_trained(config, tmp_path):
    learner = Learner(config, 0, tmp_path, QUIET)
    results, models = run_with_models(learner)
    # From scratch the first task is the pre-training.
    assert {line["task"] for line in lines_of(tmp_path)} == {1}
    of_epochs = [line["seconds"] for line in lines_of(tmp_path)]
    np.testing.assert_allclose(results["seconds"]["train"], sum(of_epochs), rtol=1e-6)
    kept = [p for p in models[0] if config is BY_DOMAIN or not p.startswith("head/")]
    for later in models[1:]:
        assert leaves_equal(trees.select(later, tuple(kept)), trees.select(models[0], tuple(kept)))
    # A step each, at which the end of a task is saved.
    first = learner.steps.of_task(0)
    assert learner.steps.bounds == (0, first, first + 1, first + 2)
    assert [line["step"] for line in lines_of(tmp_path, "merge")] == [first, first + 1, first + 2]
    if config is DISCRIMINANT:
        final = results["accuracy_matrix"][-1]
        assert min(final) > 0.5  # all classes are predicted, which are never trained together


def test_the_first_session_is_that_of_sequential_training_and_the_rest_is_frozen(tmp_path):
    sequential = dataclasses.replace(FROZEN, rule="sequential")
    (_, wanted), (results, models) = (
        run_with_models(Learner(config, 0, options=QUIET)) for config in (sequential, FIRST_SESSION)
    )
    assert leaves_equal(models[0], wanted[0])
    assert [merge["alpha"] for merge in results["merges"]] == [1, 0, 0]
    body = tuple(path for path in models[0] if not path.startswith("head/"))
    assert leaves_equal(trees.select(models[2], body), trees.select(models[0], body))
    # From scratch nothing is left to be adapted after the pre-training.
    found = Learner(FROZEN, 0, options=QUIET).run()
    np.testing.assert_array_equal(found["accuracy_matrix"], results["accuracy_matrix"])


def pretrained_vit(tmp_path, **changes):
    blank = np.ones((1, 8, 8, 3), np.float32)
    params = jax.jit(VIT.network(10).init)(jax.random.key(5), blank)["params"]
    weights = tmp_path / "weights.safetensors"
    pretrained.write_tensors(pretrained.export_params(params, "timm"), weights)
    changes = {"rule": "first_session", "perturbation": "none", "num_tasks": 3, **changes}
    return dataclasses.replace(VIT, pretrained=str(weights), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("rule, moving", [("frozen", 0), ("first_session", 1)])
def test_a_pretrained_model_moves_in_the_first_session_only(rule, moving, tmp_path):
    config = pretrained_vit(tmp_path, rule=rule)
    trains = [line.split(": ")[1] for line in describe(config).splitlines()
              if line.startswith("training in")]  # fmt: skip
    # Two adapters of 16 x 2 twice, and a head of 16 x 10 + 10.
    assert trains == [["170", "298"][moving], "170 (adapters 128)"]
    learner = Learner(config, 0, tmp_path / "run", QUIET)
    start = jax.tree.map(np.asarray, trees.leaves_by_path(learner.params))
    _, models = run_with_models(learner)
    body = tuple(path for path in start if not path.startswith("head/"))
    moved = not leaves_equal(trees.select(models[0], body), trees.select(start, body))
    assert moved == bool(moving)
    assert leaves_equal(trees.select(models[2], body), trees.select(models[0], body))
    without = describe(dataclasses.replace(config, classifiers=("discriminant",)))
    assert "training in a later task: 0 (adapters 128)" in without


@pytest.mark.slow
def test_a_shared_classifier_that_is_never_trained_is_said(tmp_path, capsys):
    config = pretrained_vit(tmp_path, rule="frozen", scenario="domain_incremental")
    results = Learner(config, 0, options=RunOptions()).run()
    assert "rule=frozen trains nothing, not even the classifier" in capsys.readouterr().err
    assert results["seconds"]["train"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [FIRST_SESSION, DISCRIMINANT], ids=["within a task", "between tasks"]
)
def test_a_run_killed_in_a_task_that_does_not_move_goes_on_to_the_same_end(
    config, tmp_path, monkeypatch
):
    def dies(learner, step, tree):
        first, second = learner.steps.bounds[1:3]
        return first < step < second if config is FIRST_SESSION else step == second

    straight, wanted, again, found = straight_and_killed(config, tmp_path, monkeypatch, 2, dies)
    assert comparable(found) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
    merges = [lines_of(tmp_path / name, "merge") for name in ("straight", "killed")]
    assert [line["step"] for line in merges[0]] == [line["step"] for line in merges[1]]
    # A finished run trains nothing more.
    assert comparable(again.run()) == comparable(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["frozen", "first_session"])
def test_models_that_have_moved_are_not_taken_over_and_still_ones_not_shared(rule, tmp_path):
    config = dataclasses.replace(FROZEN, rule=rule)
    sequential = dataclasses.replace(config, rule="sequential")
    wanted = Learner(config, 0, options=QUIET).run()
    shared = RunOptions(quiet=True, shared=tmp_path / "shared")
    # In either order: what one rule has kept there must not change the other.
    for number, configs in enumerate([(sequential, config), (config, sequential)]):
        options = dataclasses.replace(shared, shared=tmp_path / f"shared_{number}")
        alone = {c.rule: Learner(c, 0, options=QUIET).run() for c in configs}
        for one in configs:
            directory = tmp_path / str(number) / one.rule
            assert comparable(Learner(one, 0, directory, options).run()) == comparable(
                alone[one.rule]
            )
    run_seeds(sequential, [0], tmp_path / "source", RunOptions(quiet=True, keep_task_models=True))
    branch = dataclasses.replace(config, branch_from=str(tmp_path / "source"), from_task=2)
    assert comparable(Learner(branch, 0, tmp_path / "branch", QUIET).run()) == comparable(wanted)


@pytest.mark.slow
def test_the_models_of_still_tasks_are_kept_like_others(tmp_path):
    options = RunOptions(quiet=True, keep_task_models=True)
    Learner(FROZEN, 0, tmp_path, options).run()
    first, last = (reuse.read_task_model(tmp_path, task) for task in (1, 3))
    assert np.array_equal(first["hidden_0/kernel"], last["hidden_0/kernel"])
    assert not np.array_equal(first["head/kernel"], last["head/kernel"])


class Normalised(nn.Module):
    """An MLP whose batch norm and dropout tell training from evaluation."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="hidden_0")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["trained", "discriminant"])
def test_the_state_of_a_model_stays_with_its_parameters(classifier):
    config = dataclasses.replace(
        FROZEN, classifiers=(classifier,), hidden_sizes=Config.hidden_sizes, epochs=9
    )
    learner = Learner(config, 0, options=QUIET, model=Normalised())
    states, merge_task = [], learner.merge_task

    def spy(task, finished):
        figures = merge_task(task, finished)
        states.append(jax.tree.map(np.asarray, learner.model_state))
        return figures

    learner.merge_task = spy
    results = learner.run()
    assert len(jax.tree.leaves(states[0])) == 2
    assert leaves_equal(states[1], states[0]) and leaves_equal(states[2], states[0])
    assert (np.diag(results["task_aware"]["accuracy_matrix"]) > 0.45).all()


def test_steps_of_tasks_that_train_nothing_by_hand():
    sizes = np.asarray([100, 70, 10])
    assert TaskSteps.of(DISCRIMINANT, sizes) == TaskSteps((2, 1, 1), (2, 1, 1))
    assert TaskSteps.of(FROZEN, sizes) == TaskSteps((2, 2, 1), (2, 3, 3))


@pytest.mark.parametrize("landscape", [{"landscape_points": 3}, slow({"plane_points": 3})])
def test_landscapes_of_tasks_that_do_not_move_are_flat(landscape):
    results = Learner(dataclasses.replace(FROZEN, **landscape), 0, options=QUIET).run()
    regrets = [merge.get("regret_loss", 0) for merge in results["merges"][1:]]
    assert np.isfinite(regrets).all() and not any(regrets)
