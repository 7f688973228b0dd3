"""The bounds that need the data of all tasks: the oracle's line search and joint training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules
from pm_jax.continual import Learner
from pm_jax.continual.training.logits import normalized
from pm_jax.rules import Evidence, objectives
from pm_jax.types import Batch, InvalidInput
from tests.small_runs import BY_CLASS, QUIET, SMALL, VIT, comparable, with_functions

LOGITS = jax.tree_util.Partial(lambda leaves, inputs: inputs @ leaves["kernel"])
CLASSES = 6


def random_objectives(tasks, seen):
    """Of tasks with two classes each, and the same as NumPy arrays."""
    rng = np.random.default_rng(0)
    found, arrays = [], []
    for task in range(tasks):
        inputs = rng.normal(size=(2, 5, 4)).astype(np.float32)
        labels = rng.integers(2 * task, 2 * task + 2, size=(2, 5))
        weights = np.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.float32)
        classes = np.isin(np.arange(CLASSES), [2 * task, 2 * task + 1])
        old = np.arange(CLASSES) < 2 * task
        batch = Batch(*map(jnp.asarray, (inputs, labels, weights)))
        found.append(objectives.Objective(LOGITS, batch, jnp.asarray(classes), jnp.asarray(old)))
        real = weights > 0
        arrays.append((inputs[real].astype(np.float64), labels[real], classes))
    return objectives.stack(found, jnp.arange(tasks) < seen), arrays[:seen]


def losses_and_accuracies(arrays, kernel):
    """Of each task: the loss over its own classes, the accuracy over those of all tasks given."""
    seen = np.any([classes for _, _, classes in arrays], axis=0)
    found = []
    for inputs, labels, classes in arrays:
        logits = inputs @ kernel
        own = np.where(classes, logits, -np.inf)
        likelihood = own[np.arange(len(labels)), labels] - np.log(np.exp(own).sum(axis=1))
        hits = np.where(seen, logits, -np.inf).argmax(axis=1) == labels
        found.append((-likelihood.mean(), hits.mean()))
    return np.asarray(found).T


@pytest.mark.parametrize("criterion", ("loss", "accuracy"))
@pytest.mark.parametrize("seen", [2, 3])
def test_the_oracle_finds_the_best_point_of_the_grid(criterion, seen):
    rng = np.random.default_rng(1)
    previous, trained = (rng.normal(size=(4, CLASSES)).astype(np.float32) for _ in range(2))
    stacked, arrays = random_objectives(3, seen)
    grid = np.linspace(0, 1, 101)
    values = []
    for alpha in grid:
        loss, accuracy = losses_and_accuracies(arrays, previous + alpha * (trained - previous))
        values.append((-accuracy.mean() if criterion == "accuracy" else 0, loss.sum()))
    best = min(range(len(grid)), key=lambda place: tuple(np.round(values[place], 9)))
    rule = rules.make("oracle", f"criterion={criterion},points=101")
    state = rule.init({"kernel": jnp.asarray(previous)})._replace(tasks=jnp.asarray(1, jnp.int32))
    merged, state, info = rule.update(
        state,
        previous={"kernel": jnp.asarray(previous)},
        trained={"kernel": jnp.asarray(trained)},
        evidence=Evidence(all_objectives=stacked),
    )
    assert 0 < best < 100  # or the test would show little
    np.testing.assert_allclose(info.alpha, grid[best], rtol=1e-6)
    np.testing.assert_allclose(info.figures["total_loss"], values[best][1], rtol=1e-5)
    wanted = previous + grid[best] * (trained - previous)
    np.testing.assert_allclose(merged["kernel"], wanted, rtol=1e-5, atol=1e-6)
    assert int(state.tasks) == 2


def test_settings_of_the_oracle_out_of_range_are_refused():
    with pytest.raises(ValueError, match="criterion=luck: must be one of loss, accuracy"):
        rules.make("oracle", "criterion=luck")
    with pytest.raises(ValueError, match="points=1: must be at least 2"):
        rules.make("oracle", "points=1")
    rule = rules.make("oracle")
    model = {"w": jnp.ones(1)}
    with pytest.raises(ValueError, match="evidence.all_objectives=None"):
        rule.update(rule.init(model), previous=model, trained=model, evidence=Evidence())


def test_exact_curvature_is_the_formula_with_dense_gauss_newton_matrices():
    rng = np.random.default_rng(2)
    models = [{"kernel": rng.normal(size=(4, CLASSES)).astype(np.float32)} for _ in range(4)]
    rule = rules.make("exact_curvature", "clip=false", max_tasks=3)
    previous = models[0]
    state = rule.init(previous)
    for task in range(3):
        stacked, arrays = random_objectives(3, task + 1)
        delta = models[task + 1]["kernel"].astype(np.float64) - previous["kernel"]
        numerator = denominator = 0.0
        for (inputs, _, classes), star in zip(arrays, models[1:], strict=False):
            logits = np.where(classes, inputs @ star["kernel"].astype(np.float64), -np.inf)
            p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            inner = np.einsum("nc,cd->ncd", p, np.eye(CLASSES)) - np.einsum("nc,nd->ncd", p, p)
            matrix = np.einsum("ni,ncd,nj->icjd", inputs, inner, inputs) / len(inputs)
            offset = star["kernel"].astype(np.float64) - previous["kernel"]
            numerator += np.einsum("ic,icjd,jd", offset, matrix, delta)
            own = np.einsum("ic,icjd,jd", delta, matrix, delta)
            denominator += own
        alpha = 1.0 if task == 0 else numerator / denominator
        previous, state, info = rule.update(
            state, previous=previous, trained=models[task + 1],
            evidence=Evidence(all_objectives=stacked),
        )  # fmt: skip
        np.testing.assert_allclose(info.alpha, alpha, rtol=1e-5)
        change = (1 - alpha) ** 2 * own / 2
        np.testing.assert_allclose(info.predicted_loss_change, change, rtol=1e-4, atol=1e-9)
    stacked, _ = random_objectives(3, 3)
    *_, info = rule.update(
        state, previous=previous, trained=models[1], evidence=Evidence(all_objectives=stacked)
    )
    assert np.isnan(info.alpha)  # there is no room for a fourth
    with pytest.raises(ValueError, match="evidence.all_objectives=None: exact_curvature looks"):
        rule.update(state, previous=previous, trained=models[1], evidence=Evidence())


@pytest.mark.slow
def test_a_run_with_exact_curvature_of_all_tasks_is_that_rule():
    config = dataclasses.replace(BY_CLASS, curvature="exact_all", num_tasks=2)
    by_name = dataclasses.replace(config, curvature="identity", rule="exact_curvature")
    found, wanted = (Learner(each, 0, options=QUIET).run() for each in (config, by_name))
    assert comparable(found) == comparable(wanted) and 0 < found["merges"][1]["alpha"] < 1
    with pytest.raises(InvalidInput, match="curvature=exact_all: rule=cofima takes curvature"):
        dataclasses.replace(config, rule="cofima", perturbation="none")


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_in_a_run_the_oracle_sees_all_tasks_so_far(streamed):
    """Whatever the merged model of two tasks is, both tasks' losses on the examples are summed."""
    if streamed:
        pytest.importorskip("grain")
    config = dataclasses.replace(
        BY_CLASS, rule="oracle", num_tasks=2, merge_examples=10_000, first_task_epochs=1,
        resident_mb=0.02 if streamed else BY_CLASS.resident_mb,
    )  # fmt: skip
    learner = Learner(config, 0, options=QUIET)
    run, seen = learner.programs, []

    def merge(state, previous, trained, evidence):
        weights = evidence.all_objectives.batches.weights
        seen.append((weights.sum(axis=(1, 2)) > 0).tolist())
        return run.merge(state, previous, trained, evidence)

    learner = with_functions(learner, merge=merge)
    merges = learner.run()["merges"]
    assert seen == [[True, False], [True, True]]
    stream, total = learner.stream, 0.0
    for rows, mask in zip(stream.train.rows(), stream.class_masks, strict=True):
        model = config.network(stream.num_classes)
        logits = model.apply({"params": learner.params}, normalized(stream.inputs[rows]))
        own = jnp.where(mask, logits, -jnp.inf)
        total -= float(jax.nn.log_softmax(own)[np.arange(len(rows)), stream.labels[rows]].mean())
    assert merges[0]["alpha"] == 1 and 0 <= merges[1]["alpha"] <= 1
    np.testing.assert_allclose(merges[1]["total_loss"], total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, BY_CLASS, VIT], ids=["domain", "class", "lora"])
def test_joint_training_is_one_task_evaluated_on_all(config):
    learner = Learner(dataclasses.replace(config, rule="joint"), 0, options=QUIET)
    found, stream = learner.run(), learner.stream
    examples = int(stream.train.sizes.sum())
    assert learner.total_steps == -(-examples // config.batch_size) * config.epochs_of(0)
    matrix = np.asarray(found["accuracy_matrix"], np.float64)
    assert np.isnan(matrix[:-1]).all() and np.isfinite(matrix[-1]).all()
    assert found["final_average_accuracy"] == pytest.approx(matrix[-1].mean())
    assert np.isnan(found["forgetting"]) and np.isnan(found["learning_accuracy"])
    assert len(matrix) == config.num_tasks
    # Of all classes at once, which no task of a class-incremental stream is trained on.
    model = config.network(stream.num_classes)
    rows = stream.validation.rows() if config.evaluate_on == "validation" else stream.test.rows()
    for task, row in enumerate(rows):
        logits = model.apply({"params": learner.params}, normalized(stream.inputs[row]))
        hits = np.mean(np.asarray(logits.argmax(axis=-1)) == stream.labels[row])
        assert matrix[-1, task] == pytest.approx(hits, abs=1e-6)
    sequential = Learner(dataclasses.replace(config, rule="sequential"), 0, options=QUIET).run()
    if config != VIT:
        assert found["final_average_accuracy"] > sequential["final_average_accuracy"]


def test_tasks_together_are_the_same_examples():
    stream = BY_CLASS.task_stream(0)
    together = stream.together()
    for name in ("train", "validation", "test"):
        rows, = getattr(together, name).rows()  # fmt: skip
        assert sorted(rows) == sorted(np.concatenate(getattr(stream, name).rows()))
    assert together.class_masks.tolist() == [[True] * 10]
