import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pm_jax import lora, losses, perturbation, trees
from pm_jax.continual import Learner
from pm_jax.continual.merging.programs import StreamShape, programs_of
from pm_jax.continual.placement.data import DeviceData
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.training import hooks, task_program
from pm_jax.continual.training.logits import logits_of
from pm_jax.continual.training.partition import Trainable, partition, trained_params
from pm_jax.continual.training.steps import TaskSteps, segments
from pm_jax.data import TaskIndices
from pm_jax.rules import TrainingHook
from pm_jax.types import Batch
from tests.small_runs import BY_CLASS, QUIET, SMALL, VIT, leaves_equal, segment, slow

# Padding.


def trained_task(config, extra_padding, stop=1000):
    learner = Learner(config, seed=0, options=QUIET)
    index = np.pad(learner.stream.train.positions, ((0, 0), (0, extra_padding)))
    data = DeviceData.of(
        devices_of(config), learner.stream, TaskIndices(index, learner.stream.train.sizes)
    )
    shape = learner.stream.inputs.shape[1:]
    run = programs_of(config, StreamShape(10, shape, index.shape[1], 10))
    task = int(np.argmin(learner.stream.train.sizes))
    state = run.training.first.begin(learner.key, learner.params, np.asarray(task, np.int32))
    before = jax.tree.map(np.asarray, state)
    *state, values = run.training.first.train(
        learner.key, *state, learner.params, data, segment(task, 0, 0, stop, 1)
    )
    steps = -(-int(learner.stream.train.sizes[task]) // config.batch_size)
    return before, jax.tree.map(np.asarray, tuple(state)), np.asarray(values), steps


@pytest.mark.slow
def test_padding_changes_neither_parameters_nor_optimizer_state():
    _, plain, values, steps = trained_task(BY_CLASS, 0)
    _, padded, more_values, _ = trained_task(BY_CLASS, 300)
    assert leaves_equal(plain, padded)
    assert np.array_equal(values[:steps], more_values[:steps])
    assert not more_values[steps:].any()


def test_a_step_on_padding_alone_is_no_step():
    learner = Learner(BY_CLASS, seed=0, options=QUIET)
    run, task = learner.programs, int(np.argmin(learner.stream.train.sizes))
    steps = -(-int(learner.stream.train.sizes[task]) // BY_CLASS.batch_size)
    assert steps * BY_CLASS.batch_size < learner.stream.train.sizes.max()  # there is one
    state = run.training.first.begin(learner.key, learner.params, np.asarray(task, np.int32))
    before = jax.tree.map(np.array, state)
    *state, values = run.training.first.train(
        learner.key, *state, learner.params, learner.training_data,
        segment(task, 0, steps, steps + 1, 1),
    )  # fmt: skip
    assert leaves_equal(before, tuple(state)) and not np.asarray(values).any()


def test_an_epoch_sees_every_example_once():
    learner = Learner(BY_CLASS, seed=0, options=QUIET)
    count = learner.stream.train.sizes
    for task in range(3):
        order = learner.training_data.shuffled(jax.random.key(task), jnp.asarray(task))
        assert int(order.weights.sum()) == order.weights[: count[task]].sum() == count[task]
        seen = np.asarray(order.rows)[: count[task]]
        assert sorted(seen) == sorted(learner.stream.train.rows()[task])
        assert seen.tolist() != learner.stream.train.rows()[task].tolist()


def test_an_epoch_in_pieces_equals_the_epoch_whole():
    learner = Learner(SMALL, seed=0, options=QUIET)
    run, task = learner.programs, np.asarray(1, np.int32)
    ends = []
    for cuts in ([0, 18], [0, 5, 6, 18]):
        state = run.training.later.begin(learner.key, learner.params, task)
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            *state, _ = run.training.later.train(
                learner.key,
                *state,
                learner.params,
                learner.training_data,
                segment(1, 0, low, high, 1),
            )
        ends.append(state)
    assert leaves_equal(*ends)


def test_steps_are_counted_from_the_first_task_to_the_last():
    steps = TaskSteps((3, 2), (2, 1))
    assert (steps.bounds, steps.total, steps.of_task(0)) == ((0, 6, 8), 8, 6)
    assert [steps.task_at(step) for step in (0, 5, 6, 7)] == [0, 0, 1, 1]


def test_a_hook_refreshes_between_epochs_and_not_at_the_end():
    hook = TrainingHook(refresh=lambda state, key, moving: (moving, moving))
    assert [step for step in range(1, 7) if hooks.refreshes(hook, step, 2, 3)] == [2, 4]


def test_segments_lead_through_the_task_from_any_step():
    for first in range(0, 30):
        pieces = segments(first, 30, 10, 7)
        steps = [e * 10 + s for e, low, high in pieces for s in range(low, high)]
        assert steps == list(range(first, 30))
        assert all(0 <= low < high <= 10 for _, low, high in pieces)


# Accumulation.


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        slow({"optimizer": "sgd", "learning_rate": 0.05, "perturbation": "none"}),
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "clip_norm": 0.5},
        slow({"optimizer": "sgd", "perturbation": "gaussian", "schedule": "milestones"}),
    ],
    ids=["sgd", "adamw", "gaussian"],
)
def test_accumulated_steps_are_one_step_on_the_larger_batch(settings):
    """Also where the last update of an epoch has fewer steps, and its last step fewer examples."""
    whole = dataclasses.replace(BY_CLASS, batch_size=80, **settings)
    parts = dataclasses.replace(whole, batch_size=16, accumulation_steps=5)
    ends = []
    for config in (whole, parts):
        learner = Learner(config, seed=0, options=QUIET)
        run, count = learner.programs, int(learner.stream.train.sizes[1])
        state = run.training.later.begin(learner.key, learner.params, np.asarray(1, np.int32))
        if config is parts:
            steps = -(-count // 16)
            assert steps % 5 and count % 16  # both are incomplete at the end
        for epoch in range(2):
            *state, _ = run.training.later.train(
                learner.key,
                *state,
                learner.params,
                learner.training_data,
                segment(1, epoch, 0, 99, 2),
            )
        ends.append(state)
    for wanted, got in zip(*(jax.tree.leaves(end[0]) for end in ends), strict=True):
        # Adam divides by the root of small second moments: rounding grows where they vanish.
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-6)
    assert int(ends[1][1].gradient_step) == 2 * -(-count // 80)
    assert int(ends[1][1].mini_step) == 0


def test_epoch_repeats_are_epochs():
    config = dataclasses.replace(SMALL, epochs=2, first_task_epochs=3, epoch_repeats=4)
    same = dataclasses.replace(SMALL, epochs=8, first_task_epochs=12)
    assert [config.epochs_of(task) for task in range(3)] == [12, 8, 8]
    assert [same.epochs_of(task) for task in range(3)] == [12, 8, 8]


# What trains, and on which loss.


@pytest.mark.slow
def test_training_loss_is_the_perturbed_loss_of_the_library():
    learner = Learner(SMALL, seed=0, options=QUIET)
    model, start = SMALL.network(10), learner.params
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), start)
    rows = jnp.arange(20)
    batch = Batch(learner.training_data.inputs[rows], learner.training_data.labels[rows])
    mask = jnp.ones(10, bool)

    def plain(leaves, batch):
        logits = logits_of(model, trees.replace(start, leaves), batch.inputs, mask)
        return losses.mean(lambda _, b: optax.softmax_cross_entropy_with_integer_labels(
            logits, b.labels))(None, batch)  # fmt: skip

    for law in (perturbation.symmetric(), perturbation.antithetic(), perturbation.none(),
                perturbation.gaussian(0.5, 1.0)):  # fmt: skip
        for seed in range(3):
            key = jax.random.key(seed)
            trainable = Trainable({}, trees.leaves_by_path(moved), {})
            got, _ = task_program.training_loss(model, law)(key, trainable, start, batch, mask)
            wanted = perturbation.perturbed(plain, law)(
                key, trees.leaves_by_path(moved), trees.leaves_by_path(start), batch
            )
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("per_example", [slow(False), True])
def test_training_loss_with_adapters_is_the_loss_at_the_displaced_dense_weights(per_example):
    learner = Learner(VIT, seed=0, options=QUIET)
    model, start = VIT.network(10), learner.params
    part = partition(start, class_incremental=True, lora_pattern=VIT.kernel_pattern, rank=2)
    adapters = {
        path: adapter._replace(b=0.3 * jnp.ones_like(adapter.b))
        for path, adapter in lora.init(jax.random.key(0), start, VIT.kernel_pattern, 2).items()
    }
    trainable = Trainable(adapters, {}, trees.select(start, part.head))
    rows, mask = jnp.arange(6), jnp.ones(10, bool)
    batch = Batch(learner.training_data.inputs[rows], learner.training_data.labels[rows])
    law, key = perturbation.symmetric(0.5), jax.random.key(4)
    loss = task_program.training_loss(model, law, examples=6 if per_example else None)
    got, _ = loss(key, trainable, start, batch, mask)
    steps = law.draws(jax.random.split(key)[0], (6,) if per_example else ())[0][0]
    steps = np.broadcast_to(np.asarray(steps), 6)
    assert len(set(steps.tolist())) > 1 or not per_example
    values = []
    for row, step in zip(rows, steps, strict=True):
        params = lora.fold(start, adapters, 1 + float(step))
        logits = logits_of(model, params, learner.training_data.inputs[row][None], mask)
        values.append(optax.softmax_cross_entropy_with_integer_labels(
            logits, learner.training_data.labels[row][None])[0])  # fmt: skip
    np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)


def test_trained_params_fold_adapters_and_keep_the_rest():
    start = {"fc": {"kernel": jnp.ones((2, 2))}, "head": {"bias": jnp.zeros(2)}}
    adapters = {"fc/kernel": lora.Adapter(jnp.ones((2, 1)), jnp.full((1, 2), 0.5))}
    got = trained_params(start, Trainable(adapters, {}, {"head/bias": jnp.ones(2)}))
    assert got["fc"]["kernel"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert got["head"]["bias"].tolist() == [1.0, 1.0]
