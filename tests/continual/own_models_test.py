"""Models of one's own in a run: their state, their data, and the programs that they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pm_jax
from pm_jax import losses, trees
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual.training import own_model
from pm_jax.integrations import linen
from pm_jax.types import Batch, InvalidInput
from tests import own_models
from tests.small_runs import (
    BY_CLASS,
    QUIET,
    SMALL,
    comparable,
    leaves_equal,
    slow,
    straight_and_killed,
)

OWN = "tests.own_models"
TWO = dataclasses.replace(SMALL, num_tasks=2, hidden_sizes=Config.hidden_sizes)
STATEFUL = dataclasses.replace(
    TWO, model=f"{OWN}:convolution", model_settings="dropout=0.1", rotation_step=60.0,
    first_task_epochs=1,
)  # fmt: skip


@pytest.mark.slow
def test_a_model_of_ones_own_has_the_numbers_of_the_same_built_in_one():
    wanted = Learner(dataclasses.replace(TWO, hidden_sizes=(16,)), 0, options=QUIET)
    results = wanted.run()
    named = dataclasses.replace(TWO, model=f"{OWN}:plain", model_settings="width=16")
    for learner in (
        Learner(named, 0, options=QUIET),
        Learner(TWO, 0, options=QUIET, model=own_models.Plain(10, 16)),
    ):
        assert comparable(learner.run()) == comparable(results)
        assert leaves_equal(learner.params, wanted.params)
        assert learner.model_state == {}


@pytest.mark.slow
def test_two_models_in_one_process_give_their_own_numbers():
    small, large, again = (
        Learner(TWO, 0, options=QUIET, model=own_models.Plain(10, width)) for width in (2, 16, 2)
    )
    assert small.programs is again.programs and small.programs is not large.programs
    narrow, wide = small.run()["accuracy_matrix"], large.run()["accuracy_matrix"]
    assert small.params["hidden_0"]["kernel"].shape == (64, 2)
    assert large.params["hidden_0"]["kernel"].shape == (64, 16)
    assert wide[1][0] > narrow[1][0] + 0.2


def test_a_subclass_of_the_settings_may_make_the_network():
    """As in notebooks: the same settings, and another model."""

    class Mine(Config):
        def network(self, num_classes):
            return own_models.Plain(num_classes, width)

    settings, width = Mine(num_tasks=2, epochs=1, first_task_epochs=1), 2
    narrow = Learner(settings, 0, options=QUIET).params["hidden_0"]["kernel"]
    width = 5
    wide = Learner(settings, 0, options=QUIET).params["hidden_0"]["kernel"]
    assert (narrow.shape, wide.shape) == ((64, 2), (64, 5))


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"rule": "became", "perturbation": "none"},
            "rule=became: reads the inputs",
        ),
        ({"curvature": "kronecker"}, "curvature=kronecker: reads the inputs"),
    ],
)
@pytest.mark.parametrize("make", [own_models.network, own_models.functions])
def test_what_reads_the_inputs_of_layers_is_for_linen_models(make, change, message):
    config = dataclasses.replace(TWO, **change)
    wanted = f"^{message} of linen Dense layers, and model=.* is no linen module"
    with pytest.raises(InvalidInput, match=wanted):
        Learner(config, 0, options=QUIET, model=make(10))


def test_layers_of_models_with_state_are_found():
    model = linen.model(own_models.ResNet(10, (4,)))
    assert own_model.layers_by_example(model, jnp.ones((1, 8, 8, 1))) == ("head",)
    model = linen.model(own_models.Scanned(10))
    assert own_model.layers_by_example(model, jnp.ones((1, 8, 8, 1))) == ("stem", "head")


def merges_of(learner):
    """Run; returns what was trained, the state before and after each merge, and its figures."""
    seen, merge_task = [], learner.merge_task

    def watched(task, finished):
        before = learner.state
        figures = merge_task(task, finished)
        seen.append((finished, before, learner.state, figures))
        return figures

    learner.merge_task = watched
    learner.run()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("choice", [slow("trained"), "merged", slow("measured")])
def test_the_state_at_a_merge_is_what_the_setting_says(choice):
    learner = Learner(dataclasses.replace(STATEFUL, model_state=choice), 0, options=QUIET)
    initial = jax.tree.map(np.asarray, learner.model_state)
    _, (finished, before, after, figures) = merges_of(learner)
    assert 0 < figures["alpha"] < 1
    trained = finished.model_state
    assert not leaves_equal(trained, initial) and not leaves_equal(trained, before.model_state)
    if choice == "trained":
        assert leaves_equal(after.model_state, trained)
    elif choice == "merged":
        wanted = trees.lerp(before.model_state, trained, figures["alpha"])
        for got, want in zip(*map(jax.tree.leaves, (after.model_state, wanted)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)
    else:
        # Batches of another order and make-up, and none of them padded.
        rows = learner.stream.train.rows()[1]
        rows = rows[: len(rows) // STATEFUL.batch_size * STATEFUL.batch_size]
        images = jnp.asarray(learner.stream.inputs[rows], jnp.float32) / 127.5 - 1
        module = own_models.Convolution(10)
        found = linen.recalibrate_batch_statistics(
            lambda variables, x: module.apply(variables, x, True, mutable=["batch_stats"]),
            {"params": after.params, **trained},
            images.reshape(-1, STATEFUL.batch_size, *images.shape[1:]),
        )
        pairs = zip(*map(jax.tree.leaves, (after.model_state, {"batch_stats":
                    found["batch_stats"]})), strict=True)  # fmt: skip
        for got, want in pairs:
            np.testing.assert_allclose(got, want, rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_evaluation_and_curvature_are_at_the_running_statistics():
    config = dataclasses.replace(STATEFUL, curvature="fisher_empirical", model_settings="")
    learner = Learner(config, 0, options=QUIET)
    _, (finished, _, _, _) = merges_of(learner)
    module, state = own_models.Convolution(10), finished.model_state
    stream = learner.stream

    def logits_fn(params, inputs):
        return module.apply({"params": params, **state}, inputs / 127.5 - 1.0)

    found = learner.programs.evidence(
        learner.training_data, learner.key, finished.trained, finished.start,
        np.asarray(1, np.int32), state,
    )  # fmt: skip
    rows = stream.train.rows()[1]
    examples = Batch(jnp.asarray(stream.inputs[rows], jnp.float32), stream.labels[rows])
    measure = pm_jax.fisher_empirical(losses.cross_entropy(logits_fn))
    wanted = pm_jax.measure_all(measure, finished.trained, examples, 128)
    diagonal = trees.leaves_by_path(wanted.quadratic.diagonal)
    assert set(diagonal) == set(found.quadratic.diagonal)
    for path, got in found.quadratic.diagonal.items():
        scale = float(jnp.abs(diagonal[path]).max())
        np.testing.assert_allclose(got, diagonal[path], rtol=1e-4, atol=1e-5 * scale)
    # Accuracies of the merged model are those of its own state, by hand.
    rows = stream.test.rows()[0]
    images = jnp.asarray(stream.inputs[rows], jnp.float32) / 127.5 - 1
    logits = module.apply({"params": learner.params, **learner.model_state}, images)
    right = float(jnp.mean(jnp.argmax(logits, axis=1) == stream.labels[rows]))
    np.testing.assert_allclose(learner.accuracy(2)[0, 0, 0, 0], right, rtol=1e-6)


def test_padding_of_a_batch_does_not_reach_the_statistics():
    """The last batch of an epoch is filled up with examples of the task, of no weight."""
    learner = Learner(STATEFUL, 0, options=QUIET)
    order = learner.programs.training.later.order(
        learner.key, learner.training_data, np.asarray(1, np.int32), np.asarray(0, np.int32)
    )
    rows, count = np.asarray(order.rows), int(order.length)
    assert len(rows) % STATEFUL.batch_size == 0 and count < len(rows)
    assert np.array_equal(rows[count:], rows[: len(rows) - count])
    assert set(rows.tolist()) == set(learner.stream.train.rows()[1].tolist())
    assert np.asarray(order.weights).sum() == count


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"rule": "averaging", "perturbation": "none"},
        {
            "model_state": "merged",
            "perturbation": "antithetic",
            "curvature": "exact_current",
            "accumulation_steps": 2,
        },
        {"model_state": "measured", "landscape_points": 3, "plane_points": 2, "trust": "shrink"},
        {"scenario": "class_incremental", "classifiers": ("discriminant",)},
        {"curvature": "kronecker"},
        {"rule": "trm", "perturbation": "none"},
        {"rule": "became", "perturbation": "none"},
        {"rule": "joint", "perturbation": "none"},
        {"adapter": "lora", "lora_pattern": "Conv_0/kernel", "lora_rank": 2},
        {"resident_mb": 0.1},
    ],
)
def test_other_settings_run_with_a_model_that_has_state(change):
    config = dataclasses.replace(STATEFUL, **change)
    learner = Learner(config, 0, options=QUIET)
    results = learner.run()
    # Chance is a tenth, and so few filters and steps learn little more.
    assert np.nanmax(results["accuracy_matrix"]) > 0.15
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learner.model_state))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model,inside", [("convolution", True), ("network", False), ("functions", True)]
)
def test_a_killed_run_ends_with_the_bits_of_one_that_ran_through(
    model, inside, tmp_path, monkeypatch
):
    config = dataclasses.replace(STATEFUL, model=f"{OWN}:{model}", model_state="merged")
    settings = "dropout=0.1" if model == "convolution" else ""
    config = dataclasses.replace(config, model_settings=settings)

    def dies(learner, step, tree):
        return ("trainable" in tree) == inside and step > learner.steps.bounds[1] - inside

    straight, wanted, again, found = straight_and_killed(config, tmp_path, monkeypatch, 5, dies)
    assert comparable(found) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
    assert leaves_equal(again.model_state, straight.model_state)
    assert jax.tree.leaves(again.model_state)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_by_its_leaf(tmp_path):
    Learner(TWO, 0, tmp_path, QUIET, model=own_models.Plain(10, 16)).run()
    message = (
        r"checkpoint \d+ is of another model: params/head/kernel is \(16, 10\) there and \(8, 10\) "
        "in the present one; use another workdir"
    )
    with pytest.raises(InvalidInput, match=message):
        Learner(TWO, 0, tmp_path, QUIET, model=own_models.Plain(10, 8)).run()


@pytest.mark.slow
def test_training_of_a_model_with_state_is_shared_and_branched_off_from(tmp_path):
    options = RunOptions(quiet=True, keep_task_models=True)
    plain = dataclasses.replace(STATEFUL, perturbation="none")
    source = Learner(plain, 0, tmp_path / "source" / "seed_0", options)
    wanted = source.run()
    from pm_jax.continual.storage.workdir import CONFIG_FILE, write_json

    write_json(tmp_path / "source" / CONFIG_FILE, dataclasses.asdict(plain))
    branch = dataclasses.replace(plain, branch_from=str(tmp_path / "source"), from_task=2)
    branched = Learner(branch, 0, options=QUIET)
    assert comparable(branched.run()) == comparable(wanted)
    assert leaves_equal(branched.model_state, source.model_state)
    shared = RunOptions(quiet=True, shared=tmp_path / "shared")
    for _ in range(2):
        learner = Learner(plain, 0, options=shared)
        assert comparable(learner.run()) == comparable(wanted)
        assert leaves_equal(learner.model_state, source.model_state)


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["network", "scanned", "functions"])
def test_other_kinds_of_models_run(factory):
    config = dataclasses.replace(TWO, model=f"{OWN}:{factory}")
    learner = Learner(config, 0, options=QUIET)
    results = learner.run()
    assert results["accuracy_matrix"][0][0] > 0.3
    if factory == "functions":
        assert int(learner.model_state["calls"]) == learner.total_steps


@pytest.mark.slow
def test_models_of_class_incremental_streams_keep_the_columns_of_other_tasks():
    config = dataclasses.replace(BY_CLASS, num_tasks=2, hidden_sizes=Config.hidden_sizes)
    model = linen.model(own_models.ResNet(10, (4,), head="top"), "top")
    learner = Learner(config, 0, options=QUIET, model=model)
    (_, _, first, _), (_, _, second, _) = merges_of(learner)
    mask, (one, two) = (
        learner.stream.class_masks[0],
        (state.params["top"]["kernel"] for state in (first, second)),
    )
    assert np.array_equal(one[:, mask], two[:, mask]) and not np.array_equal(one, two)
    assert "top/kernel" not in learner.programs.merging


@pytest.mark.slow
@pytest.mark.parametrize(
    "factory,pattern,adapted",
    [
        ("resnet", "Residual_0/Conv_[01]/kernel", (3, 3)),
        ("network", "layers/.*/kernel", (64,)),
        ("scanned", "layers/.*/kernel", (2, 8)),
    ],
)
def test_adapters_on_the_layers_of_ones_own_model(factory, pattern, adapted):
    config = dataclasses.replace(
        TWO, model=f"{OWN}:{factory}", adapter="lora", lora_rank=2, lora_pattern=pattern
    )
    if factory == "resnet":
        config = dataclasses.replace(config, model_settings="widths=4:")
    learner = Learner(config, 0, options=QUIET)
    _, (finished, _, _, figures) = merges_of(learner)
    assert finished.adapters and 0 <= figures["alpha"] <= 1
    for path, adapter in finished.adapters.items():
        assert adapter.a.shape[: len(adapted)] == adapted and adapter.a.shape[-1] == 2
        kernel = trees.leaves_by_path(finished.trained)[path]
        assert not np.array_equal(kernel, trees.leaves_by_path(finished.start)[path])
    # Frozen kernels stay, and the others moved by the product of their adapter.
    moved = trees.select(finished.start, tuple(finished.adapters))
    wanted = pm_jax.lora.fold(moved, finished.adapters)
    for path, kernel in trees.select(finished.trained, tuple(wanted)).items():
        np.testing.assert_allclose(kernel, wanted[path], rtol=1e-5, atol=1e-6)
