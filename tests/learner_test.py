import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pm_jax import curvature, lora, losses, perturbation, rules, trees
from pm_jax.continual import Config, Learner, TrainingDiverged, training
from pm_jax.continual import learner as learner_module
from pm_jax.continual.evaluation import accuracy_fn, mean_loss_fn
from pm_jax.continual.partition import Trainable, partition, trained_params
from pm_jax.continual.programs import programs
from pm_jax.continual.training import DeviceData, Segment, segments
from pm_jax.data import TaskIndices
from pm_jax.types import Batch, InvalidInput

SMALL = Config(
    num_tasks=3, epochs=1, first_task_epochs=2, hidden_sizes=(16,), batch_size=64,
    learning_rate=3e-3,
)  # fmt: skip
BY_CLASS = dataclasses.replace(SMALL, scenario="class_incremental")
VIT = dataclasses.replace(
    BY_CLASS, model="vit", patch_size=4, width=16, depth=1, num_heads=2, adapter="lora",
    lora_rank=2, weight_decay=0.1, num_tasks=2,
)  # fmt: skip


def comparable(results):
    return json.dumps({k: v for k, v in results.items() if k != "seconds"}, sort_keys=True)


def leaves_equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def segment(*values):
    return Segment.of(*values)


# One compilation.


@pytest.mark.parametrize("config", [SMALL, BY_CLASS, VIT], ids=["domain", "class", "lora"])
def test_every_function_compiles_once_for_the_whole_stream(config):
    programs.cache_clear()
    learner = Learner(config, seed=3, quiet=True, checkpoint_every=2)
    assert len(set(learner.stream.train.sizes.tolist())) > 1 or config is not BY_CLASS
    learner.run()
    run = learner._programs
    for function in (
        run.first.begin, run.first.train, run.later.begin, run.later.train, run.measure, run.merge,
        run.accuracy, run.mean_loss,
    ):  # fmt: skip
        assert function._cache_size() == 1
    assert (run.first is run.later) == (config.adapter == "full")


def test_seeds_share_the_compiled_functions():
    programs.cache_clear()
    first, second = (Learner(SMALL, seed, quiet=True) for seed in (0, 1))
    first.run()
    second.run()
    assert first._programs is second._programs
    assert first._programs.first.train._cache_size() == 1
    assert not leaves_equal(first.params, second.params)


# Padding.


def trained_task(config, extra_padding, stop=1000):
    learner = Learner(config, seed=0, quiet=True)
    index = np.pad(learner.stream.train.positions, ((0, 0), (0, extra_padding)))
    data = DeviceData.of(learner.stream, TaskIndices(index, learner.stream.train.sizes))
    shape = learner.stream.inputs.shape[1:]
    run = programs(config, learner.stream.num_classes, shape, index.shape[1])
    task = int(np.argmin(learner.stream.train.sizes))
    trainable, optimizer = run.first.begin(learner._key, learner.params, np.asarray(task, np.int32))
    before = jax.tree.map(np.asarray, (trainable, optimizer))
    trainable, optimizer, values = run.first.train(
        learner._key, trainable, optimizer, learner.params, data, segment(task, 0, 0, stop, 1)
    )
    steps = -(-int(learner.stream.train.sizes[task]) // config.batch_size)
    return before, jax.tree.map(np.asarray, (trainable, optimizer)), np.asarray(values), steps


def test_padding_changes_neither_parameters_nor_optimizer_state():
    _, plain, values, steps = trained_task(BY_CLASS, 0)
    _, padded, more_values, _ = trained_task(BY_CLASS, 300)
    assert leaves_equal(plain, padded)
    assert np.array_equal(values[:steps], more_values[:steps])
    assert not more_values[steps:].any()


def test_a_step_on_padding_alone_is_no_step():
    learner = Learner(BY_CLASS, seed=0, quiet=True)
    run, task = learner._programs, int(np.argmin(learner.stream.train.sizes))
    steps = -(-int(learner.stream.train.sizes[task]) // BY_CLASS.batch_size)
    assert steps * BY_CLASS.batch_size < learner.stream.train.sizes.max()  # there is one
    trainable, optimizer = run.first.begin(learner._key, learner.params, np.asarray(task, np.int32))
    before = jax.tree.map(np.array, (trainable, optimizer))
    trainable, optimizer, values = run.first.train(
        learner._key, trainable, optimizer, learner.params, learner._train,
        segment(task, 0, steps, steps + 1, 1),
    )  # fmt: skip
    assert leaves_equal(before, (trainable, optimizer)) and not np.asarray(values).any()


def test_an_epoch_sees_every_example_once():
    learner = Learner(BY_CLASS, seed=0, quiet=True)
    count = learner.stream.train.sizes
    for task in range(3):
        batches = training._epoch_batches(
            jax.random.key(task), learner._train, jnp.asarray(task), 40, BY_CLASS.batch_size
        )
        seen = np.asarray(batches).ravel()[: count[task]]
        assert sorted(seen) == sorted(learner.stream.train.rows()[task])
        assert seen.tolist() != learner.stream.train.rows()[task].tolist()


def test_an_epoch_in_pieces_equals_the_epoch_whole():
    learner = Learner(SMALL, seed=0, quiet=True)
    run, task = learner._programs, np.asarray(1, np.int32)
    ends = []
    for cuts in ([0, 18], [0, 5, 6, 18]):
        state = run.later.begin(learner._key, learner.params, task)
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            *state, _ = run.later.train(
                learner._key, *state, learner.params, learner._train, segment(1, 0, low, high, 1)
            )
        ends.append(state)
    assert leaves_equal(*ends)


def test_segments_lead_through_the_task_from_any_step():
    for first in range(0, 30):
        pieces = segments(first, 30, 10, 7)
        steps = [e * 10 + s for e, low, high in pieces for s in range(low, high)]
        assert steps == list(range(first, 30))
        assert all(0 <= low < high <= 10 for _, low, high in pieces)


# What trains, and on which loss.


def test_training_loss_is_the_perturbed_loss_of_the_library():
    learner = Learner(SMALL, seed=0, quiet=True)
    model, start = SMALL.network(10), learner.params
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), start)
    rows = jnp.arange(20)
    batch = Batch(learner._train.inputs[rows], learner._train.labels[rows])
    mask = jnp.ones(10, bool)

    def plain(leaves, batch):
        logits = training.logits_of(model, trees.replace(start, leaves), batch.inputs, mask)
        return losses.mean(lambda _, b: optax.softmax_cross_entropy_with_integer_labels(
            logits, b.labels))(None, batch)  # fmt: skip

    for law in (perturbation.symmetric(), perturbation.antithetic(), perturbation.none(),
                perturbation.gaussian(0.5, 1.0)):  # fmt: skip
        for seed in range(3):
            key = jax.random.key(seed)
            trainable = Trainable({}, trees.leaves_by_path(moved), {})
            got = training.training_loss(model, law, trainable, start, batch, mask, key)
            wanted = perturbation.perturbed(plain, law)(
                key, trees.leaves_by_path(moved), trees.leaves_by_path(start), batch
            )
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
def test_training_loss_with_adapters_is_the_loss_at_the_displaced_dense_weights(per_example):
    learner = Learner(VIT, seed=0, quiet=True)
    model, start = VIT.network(10), learner.params
    part = partition(start, class_incremental=True, lora_pattern=VIT.kernel_pattern(), rank=2)
    adapters = {
        path: adapter._replace(b=0.3 * jnp.ones_like(adapter.b))
        for path, adapter in lora.init(jax.random.key(0), start, VIT.kernel_pattern(), 2).items()
    }
    trainable = Trainable(adapters, {}, trees.select(start, part.head))
    rows, mask = jnp.arange(6), jnp.ones(10, bool)
    batch = Batch(learner._train.inputs[rows], learner._train.labels[rows])
    law, key = perturbation.symmetric(0.5), jax.random.key(4)
    got = training.training_loss(
        model, law, trainable, start, batch, mask, key, per_example=per_example
    )
    steps = law.draws(jax.random.split(key)[0], (6,) if per_example else ())[0][0]
    steps = np.broadcast_to(np.asarray(steps), 6)
    assert len(set(steps.tolist())) > 1 or not per_example
    values = []
    for row, step in zip(rows, steps, strict=True):
        params = lora.fold(start, adapters, 1 + float(step))
        logits = training.logits_of(model, params, learner._train.inputs[row][None], mask)
        values.append(optax.softmax_cross_entropy_with_integer_labels(
            logits, learner._train.labels[row][None])[0])  # fmt: skip
    np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)


def test_head_columns_of_other_tasks_and_frozen_weights_do_not_move():
    learner = Learner(VIT, seed=0, quiet=True)
    initial = jax.tree.map(np.asarray, learner.params)
    first_mask, second_mask = learner.stream.class_masks
    snapshots = []
    original = learner._merge_task

    def spy(task, start, trained):
        info = original(task, start, trained)
        snapshots.append(jax.tree.map(np.asarray, learner.params))
        return info

    learner._merge_task = spy
    learner.run()
    one, two = snapshots
    kernel = lambda params: params["head"]["kernel"]  # noqa: E731
    assert np.array_equal(kernel(one)[:, second_mask], kernel(initial)[:, second_mask])
    assert not np.array_equal(kernel(one)[:, first_mask], kernel(initial)[:, first_mask])
    # Weight decay is on: without the mask it would move the old columns.
    assert np.array_equal(kernel(two)[:, first_mask], kernel(one)[:, first_mask])
    assert not np.array_equal(kernel(two)[:, second_mask], kernel(one)[:, second_mask])
    changed = {
        path
        for path, leaf in trees.leaves_by_path(two).items()
        if not np.array_equal(leaf, trees.leaves_by_path(one)[path])
    }
    assert changed == {
        "head/kernel", "head/bias", "blocks_0/attn/key/kernel", "blocks_0/attn/value/kernel",
    }  # fmt: skip


def test_domain_incremental_head_merges_and_class_incremental_head_does_not():
    params = Learner(SMALL, seed=0, quiet=True).params
    assert "head/kernel" in partition(params, class_incremental=False).merging
    by_class = partition(params, class_incremental=True)
    assert "head/kernel" in by_class.head and "head/kernel" not in by_class.merging


# Evidence, evaluation, merge.


@pytest.mark.parametrize("config", [SMALL, BY_CLASS, VIT], ids=["domain", "class", "lora"])
def test_evidence_is_the_fisher_of_the_tasks_own_loss_over_dense_weights(config):
    config = dataclasses.replace(config, curvature_memory_mb=0.05)
    learner = Learner(config, seed=0, quiet=True)
    run, stream = learner._programs, learner.stream
    previous = learner.params
    trained = jax.tree.map(lambda x: x + 0.01 * jnp.ones_like(x), previous)
    task = 1
    got = run.measure(learner._key, trained, previous, learner._train, np.asarray(task, np.int32))
    rows = stream.train.rows()[task]
    leaves = trees.select(trained, run.merging)
    model, mask = config.network(10), jnp.asarray(stream.class_masks[task])

    def logits_fn(leaves, inputs):
        return training.logits_of(model, trees.replace(trained, leaves), inputs, mask)

    direct = curvature.measure_all(
        curvature.fisher_empirical(losses.cross_entropy(logits_fn)),
        leaves,
        Batch(jnp.asarray(stream.inputs[rows]), jnp.asarray(stream.labels[rows])),
        50,
        jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), leaves),
    )
    for a, b in zip(jax.tree.leaves(got.quadratic.diagonal),
                    jax.tree.leaves(direct.quadratic.diagonal), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    np.testing.assert_allclose(got.curvature_error, direct.standard_error, rtol=1e-4)


def test_accuracy_and_loss_do_not_depend_on_the_batch_size_and_count_every_example():
    learner = Learner(BY_CLASS, seed=0, quiet=True)
    model, stream = BY_CLASS.network(10), learner.stream
    seen = stream.class_masks[:2].any(axis=0)
    found = [
        np.asarray(accuracy_fn(model, size)(learner.params, learner._held_out, seen))
        for size in (1, 7, 256)
    ]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])
    for task, rows in enumerate(stream.test.rows()):
        logits = np.array(training.logits_of(
            model, learner.params, jnp.asarray(stream.inputs[rows]), jnp.ones(10)))  # fmt: skip
        for row, mask in enumerate((seen, stream.class_masks[task])):
            guess = np.where(mask, logits, -np.inf).argmax(axis=1)
            wanted = np.mean(guess == stream.labels[rows])
            np.testing.assert_allclose(found[0][row, task], wanted, rtol=1e-6)
    losses_found = [
        float(mean_loss_fn(model, size)(learner.params, learner._train, np.asarray(1, np.int32)))
        for size in (1, 50, 1000)
    ]
    np.testing.assert_allclose(losses_found, losses_found[0], rtol=1e-5)


def test_first_task_of_a_run_from_scratch_is_the_origin_and_later_merges_are_convex():
    results = Learner(SMALL, seed=0, quiet=True).run()
    first, *later = results["merges"]
    assert first["alpha"] == 1.0 and first["predicted_loss_change"] == 0.0
    assert first["actual_loss_change"] == 0.0 and first["standard_error"] == 0.0
    for merge in later:
        assert 0 <= merge["alpha"] <= 1 and merge["standard_error"] > 0
        assert merge["degenerate"] == 0.0 and merge["denominator"] > 0


def test_class_incremental_matrix_has_no_figures_for_classes_not_seen():
    results = Learner(BY_CLASS, seed=0, quiet=True).run()
    matrix = np.asarray(results["accuracy_matrix"])
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    assert np.isfinite(matrix[np.tril_indices(3)]).all()
    assert np.isnan(results["forward_transfer"])
    aware = np.asarray(results["task_aware"]["accuracy_matrix"])
    assert (aware[np.tril_indices(3)] >= matrix[np.tril_indices(3)]).all()


def test_same_seed_same_numbers_other_seed_other_numbers():
    one, two, other = (Learner(SMALL, s, quiet=True).run() for s in (0, 0, 1))
    assert comparable(one) == comparable(two) != comparable(other)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "averaging", "perturbation": "none"},
        {"perturbation": "gaussian"},
        {"perturbation": "one_sided"},
        {"curvature": "fisher_exact", "curvature_samples": 1, "curvature_examples": 50},
        {
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "schedule": "cosine",
            "warmup_fraction": 0.1,
            "clip_norm": 1.0,
        },
        {"schedule": "linear", "head_learning_rate": 1e-2},
        {
            "adapter": "lora",
            "lora_rank": 4,
            "perturb_per": "example",
            "scenario": "class_incremental",
        },
        {"adapter": "lora", "lora_rank": 4, "perturbation": "gaussian"},
        {"adapter": "lora", "lora_rank": 4, "scenario": "class_incremental", "base_classes": 4},
    ],
)
def test_other_settings_run_and_learn(change):
    config = dataclasses.replace(SMALL, **change, epochs=2, first_task_epochs=4)
    results = Learner(config, seed=0, quiet=True).run()
    assert results["accuracy_matrix"][0][0] > 0.5  # chance is 10 to 33 %
    assert all(0 <= merge["alpha"] <= 1 for merge in results["merges"])


def test_a_rule_that_merges_for_inference_only_keeps_training_from_the_trained_model(
    tmp_path, monkeypatch
):
    """The trained models are those of sequential training, the merged ones are their average."""
    plain = dataclasses.replace(SMALL, perturbation="none")
    trained = {}

    def models_of(learner, name):
        original = learner._merge_task

        def spy(task, start, params):
            trained.setdefault(name, []).append(jax.tree.map(np.asarray, params))
            return original(task, start, params)

        learner._merge_task = spy
        learner.run()
        return trained[name]

    sequential = Learner(dataclasses.replace(plain, rule="sequential"), 0, quiet=True)
    wanted = models_of(sequential, "sequential")
    rule = rules.averaging()._replace(next_task_from="trained")
    monkeypatch.setattr(Config, "merge_rule", lambda self: rule)
    programs.cache_clear()
    config = dataclasses.replace(plain, rule="averaging")
    learner = Learner(config, 0, tmp_path, quiet=True)
    for got, want in zip(models_of(learner, "inference"), wanted, strict=True):
        assert leaves_equal(got, want)
    assert not leaves_equal(learner.params, wanted[-1])
    merged = learner.params
    again = Learner(config, 0, tmp_path, quiet=True)
    again.run()  # restored from the last checkpoint
    assert leaves_equal(again.params, merged) and leaves_equal(again._start, learner._start)
    programs.cache_clear()


# Interruption.


class Killed(BaseException):
    pass


@pytest.mark.parametrize("config", [SMALL, VIT], ids=["full", "lora"])
def test_a_run_killed_within_and_between_tasks_ends_with_the_same_numbers(
    config, tmp_path, monkeypatch
):
    straight = Learner(config, 0, tmp_path / "straight", checkpoint_every=7, quiet=True)
    wanted = straight.run()
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
    learner._programs = learner._programs._replace(first=program, later=program)
    with pytest.raises(TrainingDiverged, match="task 2, step 3: the loss is nan"):
        learner.run()
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == [learner._bounds[1]]


def test_a_real_divergence_is_caught():
    config = dataclasses.replace(SMALL, optimizer="sgd", learning_rate=1e18)
    with pytest.raises(TrainingDiverged, match="task 1, step"):
        Learner(config, 0, quiet=True).run()


def test_trained_params_fold_adapters_and_keep_the_rest():
    start = {"fc": {"kernel": jnp.ones((2, 2))}, "head": {"bias": jnp.zeros(2)}}
    adapters = {"fc/kernel": lora.Adapter(jnp.ones((2, 1)), jnp.full((1, 2), 0.5))}
    got = trained_params(start, Trainable(adapters, {}, {"head/bias": jnp.ones(2)}))
    assert got["fc"]["kernel"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert got["head"]["bias"].tolist() == [1.0, 1.0]
