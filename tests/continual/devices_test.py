"""The same numbers on one device and on several, which divide the examples of every step."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import curvature, trees
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual.placement.data import HostData
from pm_jax.continual.placement.devices import Devices, devices_of
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.continual.training.initial_model import starting_params
from pm_jax.continual.training.task_program import Segment
from pm_jax.curvature import measures
from pm_jax.types import Batch
from tests import own_models
from tests.small_runs import BY_CLASS, QUIET, SMALL, VIT, Killed, slow

MESHES = {"two": (2, 1), "eight": (8, 1), "divided": (8, 4)}
"""Devices, and how many of them hold one copy of the parameters."""
# Of a size at which what is left of the parameters' digits after a step is the gradient's.
STEP = {"optimizer": "sgd", "learning_rate": 2.0**20}
KINDS = {
    "mlp": dataclasses.replace(SMALL, **STEP),
    "vit": dataclasses.replace(VIT, **STEP, augmentation="crop_flip"),
    "moments": dataclasses.replace(SMALL, **STEP, rule="regmean"),
}


def on(config, mesh):
    devices, parts = MESHES.get(mesh, (1, 1))
    return dataclasses.replace(config, devices=devices, fsdp=parts)


def one_of_each(config):
    """Gradients of a step, curvature, and scores, from the same parameters and data."""
    learner, task = Learner(config, 0, options=QUIET), np.asarray(1, np.int32)
    run, key, data = learner.programs, learner.key, learner.training_data
    # Of another seed, so that adapters have a task vector to be perturbed along and merged.
    other = devices_of(config).place(starting_params(config, run.training.init(jax.random.key(1))))
    trainable, *state = run.training.later.begin(key, learner.params, task)
    trained, *_, values = run.training.later.train(
        key, jax.tree.map(jnp.copy, trainable), *state, learner.params, data,
        Segment.of(1, 0, 0, 1, 1),
    )  # fmt: skip
    gradients = jax.tree.map(lambda before, after: after - before, trainable, trained)
    evidence = run.evidence(data, key, other, learner.params, task)
    seen = learner.stream.class_masks.any(axis=0)
    scores = run.training.scores(learner.splits["test"], other, seen, np.asarray(2, np.int32))
    count = config.devices
    kernels = [leaf for leaf in jax.tree.leaves(other) if leaf.ndim == 2]
    assert all(len(leaf.sharding.device_set) == count for leaf in jax.tree.leaves(trained))
    assert all(leaf.sharding.is_fully_replicated == (config.fsdp == 1) for leaf in kernels)
    parts = [values[:1], gradients, evidence.quadratic, evidence.curvature_error, scores]
    return jax.tree.map(np.asarray, parts)


on_one_device = functools.cache(lambda kind: one_of_each(KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *(slow("mlp", "two"), slow("mlp", "eight"), ("mlp", "divided")),
        *(slow("vit", "divided"), slow("moments", "divided")),
    ],
)
def test_gradients_curvature_and_scores_are_those_of_one_device(kind, mesh):
    wanted, found = on_one_device(kind), one_of_each(on(KINDS[kind], mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Of the largest entry: sums over examples in another order cancel differently.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())
    assert (found[-1].accuracy == wanted[-1].accuracy).all()  # no example is left out


def examples_right(results, stream):
    matrix = np.asarray(results["accuracy_matrix"], float)
    return np.round(matrix * stream.test.sizes[None, :])


@pytest.mark.slow
def test_a_whole_stream_ends_alike_and_is_compiled_once():
    straight = Learner(BY_CLASS, 0, options=QUIET)
    wanted = examples_right(straight.run(), straight.stream)
    divided = Learner(on(BY_CLASS, "divided"), 0, options=QUIET)
    found = examples_right(divided.run(), divided.stream)
    seen = np.tril(np.ones_like(wanted)) > 0
    assert np.abs(found - wanted)[seen].max() <= 2
    for a, b in zip(*(jax.tree.leaves(each.params) for each in (divided, straight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5)  # after hundreds of Adam's steps
    run = divided.programs
    for function in (
        run.training.init_with_state,
        run.training.first.begin,
        run.training.first.train,
        run.training.later.train,
        run.training.trained,
        run.merge,
        run.evidence_pass.resident,
        run.training.scores.resident,
        run.training.mean_loss.resident,
    ):
        assert function._cache_size() == 1
    for leaf in jax.tree.leaves((divided.state.params, divided.state.rule)):
        assert leaf.sharding == devices_of(divided.config).sharding(leaf.shape)


CLASSIFIERS = dataclasses.replace(
    BY_CLASS,
    classifiers=("trained", "nearest_mean", "ridge:features=40:strength=2"),
    drift_correction="affine",
)


@pytest.mark.slow
@pytest.mark.parametrize("base", [SMALL, CLASSIFIERS], ids=["domain", "classifiers"])
def test_a_checkpoint_goes_from_eight_devices_to_one_to_two_and_back(base, tmp_path, monkeypatch):
    straight = Learner(base, 0, options=QUIET)
    wanted = examples_right(straight.run(), straight.stream)
    save, restore, saved = Checkpoints.save, Checkpoints.restore, {}
    ends_at_a_task = {"divided": False, "one": True, "two": False, "eight": None}

    def dying_save(self, step, tree):
        save(self, step, tree)
        saved[step] = jax.tree.map(np.array, tree)
        if (step in straight.steps.bounds) is ends_at_a_task[mesh]:
            raise Killed

    def checked_restore(self, step, like):
        found = restore(self, step, like)
        jax.tree.map(np.testing.assert_array_equal, found, saved[step])
        kernel = found["params"]["hidden_0"]["kernel"]
        assert len(kernel.sharding.device_set) == config.devices
        assert kernel.sharding.is_fully_replicated == (config.fsdp == 1)
        if statistics := found.get("statistics"):
            scatter = statistics["class_statistics_moved"].scatter
            assert scatter.sharding.is_fully_replicated == (config.fsdp == 1)
        return found

    monkeypatch.setattr(Checkpoints, "save", dying_save)
    monkeypatch.setattr(Checkpoints, "restore", checked_restore)
    for mesh in ("divided", "one", "two", "eight"):
        config = on(base, mesh)
        learner = Learner(config, 0, tmp_path, RunOptions(checkpoint_every=5, quiet=True))
        with contextlib.nullcontext() if mesh == "eight" else pytest.raises(Killed):
            results = learner.run()
    seen = np.tril(np.ones_like(wanted)) > 0
    assert np.abs(examples_right(results, straight.stream) - wanted)[seen].max() <= 2
    pairs = zip(*(jax.tree.leaves(x.state.statistics) for x in (learner, straight)), strict=True)
    for one, other in pairs:
        # Features of models that hundreds of Adam's steps have rounded apart.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


@pytest.mark.slow
def test_streamed_inputs_are_divided_as_resident_ones(monkeypatch):
    resident = Learner(on(BY_CLASS, "divided"), 0, options=QUIET)
    wanted = resident.run()
    config = dataclasses.replace(
        on(BY_CLASS, "divided"), resident_mb=0.012
    )  # windows of several steps
    streamed = Learner(config, 0, options=QUIET)
    assert isinstance(streamed.training_data, HostData)
    found = streamed.run()
    for name in ("accuracy_matrix", "merges"):
        for a, b in zip(*(jax.tree.leaves(x[name]) for x in (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["merged", "measured"])
def test_batch_statistics_are_those_of_one_device(choice):
    """Also of a last batch that is filled up, with dropout, and measured on all examples anew."""
    config = dataclasses.replace(
        SMALL, num_tasks=2, first_task_epochs=1, hidden_sizes=Config.hidden_sizes, batch_size=32,
        optimizer="sgd", learning_rate=0.1, model_state=choice, model="tests.own_models:resnet",
        model_settings="widths=8:,dropout=0.1", curvature="fisher_empirical",
    )  # fmt: skip
    tasks = [
        tuple(
            (inputs[:count], labels[:count])
            for (inputs, labels), count in zip(task, (78, 21), strict=True)
        )
        for task in own_models.digits()
    ]
    straight = Learner(config, 0, options=QUIET, stream=tasks)
    divided = Learner(on(config, "divided"), 0, options=QUIET, stream=tasks)
    wanted, found = straight.run(), divided.run()
    assert found["accuracy_matrix"] == wanted["accuracy_matrix"]
    np.testing.assert_allclose(found["merges"][1]["alpha"], wanted["merges"][1]["alpha"], rtol=1e-4)
    for part in ("params", "model_state"):
        one, other = (trees.leaves_by_path(getattr(x, part)) for x in (divided, straight))
        for path, leaf in one.items():
            assert len(leaf.sharding.device_set) == 8
            # Of the largest entry: sums over examples in another order cancel differently.
            scale = np.abs(other[path]).max()
            np.testing.assert_allclose(leaf, other[path], rtol=2e-5, atol=2e-5 * scale)


def test_every_device_has_as_many_examples():
    assert [Devices.of(8).multiple(examples) for examples in (1, 8, 100)] == [8, 8, 104]


def test_a_measure_of_divided_examples_is_that_of_all():
    devices, draw = Devices.of(8, 4), np.random.default_rng(0)
    examples = Batch(
        draw.normal(size=(24, 6)).astype(np.float32), draw.integers(0, 4, 24), np.ones(24)
    )
    params = {"kernel": draw.normal(size=(6, 4)).astype(np.float32)}
    direction = jax.tree.map(np.ones_like, params)
    measure = curvature.fisher_exact(lambda params, inputs: inputs @ params["kernel"])
    wanted = measures.measure_all(measure, params, examples, 24, direction)

    assert jax.jit(devices.spread)(examples.inputs).addressable_shards[0].data.shape == (3, 6)

    @jax.jit
    def found(params, examples, direction):
        examples = devices.spread(examples)
        return measures.measure_all(measure, params, examples, 24, direction)

    found = found(devices.place(params), examples, devices.place(direction))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
