import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules, trees
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual.merging import trust
from pm_jax.continual.run import describe
from pm_jax.continual.training.partition import partition
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from tests.small_runs import BY_CLASS, QUIET, SMALL, VIT, comparable, forget_programs, leaves_equal


@pytest.mark.parametrize("config", [SMALL, BY_CLASS, VIT], ids=["domain", "class", "lora"])
def test_every_function_compiles_once_for_the_whole_stream(config):
    forget_programs()
    learner = Learner(config, seed=3, options=RunOptions(quiet=True, checkpoint_every=2))
    assert len(set(learner.stream.train.sizes.tolist())) > 1 or config is not BY_CLASS
    learner.run()
    run = learner.programs
    for function in (
        run.training.first.begin,
        run.training.first.train,
        run.training.later.begin,
        run.training.later.train,
        run.evidence_pass.resident,
        run.merge,
        run.training.scores.resident,
        run.training.mean_loss.resident,
    ):
        assert function._cache_size() == 1
    assert (run.training.first is run.training.later) == (config.adapter == "full")


def test_seeds_share_the_compiled_functions():
    forget_programs()
    first, second = (Learner(SMALL, seed, options=QUIET) for seed in (0, 1))
    first.run()
    second.run()
    assert first.programs is second.programs
    assert first.programs.training.first.train._cache_size() == 1
    assert not leaves_equal(first.params, second.params)
    config = dataclasses.replace(SMALL, rule="sequential", perturbation="none", learning_rate=1e-3)
    baseline = Learner(config, 0, options=QUIET).programs.training
    assert baseline.scores is first.programs.training.scores
    assert baseline.first is not first.programs.training.first


@pytest.mark.slow
def test_head_columns_of_other_tasks_and_frozen_weights_do_not_move():
    learner = Learner(VIT, seed=0, options=QUIET)
    initial = jax.tree.map(np.asarray, learner.params)
    first_mask, second_mask = learner.stream.class_masks
    snapshots = []
    original = learner.merge_task

    def spy(task, found):
        info = original(task, found)
        snapshots.append(jax.tree.map(np.asarray, learner.params))
        return info

    learner.merge_task = spy
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
    params = Learner(SMALL, seed=0, options=QUIET).params
    assert "head/kernel" in partition(params, class_incremental=False).merging
    by_class = partition(params, class_incremental=True)
    assert "head/kernel" in by_class.head and "head/kernel" not in by_class.merging


def test_first_task_of_a_run_from_scratch_is_the_origin_and_later_merges_are_convex():
    results = Learner(SMALL, seed=0, options=QUIET).run()
    first, *later = results["merges"]
    assert first["alpha"] == 1.0 and first["predicted_loss_change"] == 0.0
    assert first["actual_loss_change"] == 0.0 and first["standard_error"] == 0.0
    for merge in later:
        assert 0 <= merge["alpha"] <= 1 and merge["standard_error"] > 0
        assert merge["degenerate"] == 0.0 and merge["denominator"] > 0


def test_with_the_identity_for_curvature_merging_is_averaging():
    results = Learner(dataclasses.replace(SMALL, curvature="identity"), seed=0, options=QUIET).run()
    alphas = [merge["alpha"] for merge in results["merges"]]
    np.testing.assert_allclose(alphas, [1 / t for t in range(1, len(alphas) + 1)], rtol=1e-5)


def test_class_incremental_matrix_has_no_figures_for_classes_not_seen():
    results = Learner(BY_CLASS, seed=0, options=QUIET).run()
    matrix = np.asarray(results["accuracy_matrix"])
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    assert np.isfinite(matrix[np.tril_indices(3)]).all()
    assert np.isnan(results["forward_transfer"])
    aware = np.asarray(results["task_aware"]["accuracy_matrix"])
    assert (aware[np.tril_indices(3)] >= matrix[np.tril_indices(3)]).all()


def test_same_seed_same_numbers_other_seed_other_numbers():
    one, two, other = (Learner(SMALL, s, options=QUIET).run() for s in (0, 0, 1))
    assert comparable(one) == comparable(two) != comparable(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"rule": "averaging", "perturbation": "none"},
        {"perturbation": "gaussian"},
        {"perturbation": "one_sided"},
        {"curvature": "fisher_exact", "curvature_samples": 1, "curvature_examples": 50},
        {"curvature": "exact_current", "curvature_examples": 50},
        {
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "schedule": "cosine",
            "warmup_fraction": 0.1,
            "clip_norm": 1.0,
        },
        {"schedule": "linear", "head_learning_rate": 1e-2},
        {"compute_dtype": "bfloat16"},
        {"compute_dtype": "bfloat16", "adapter": "lora", "lora_rank": 4},
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
    results = Learner(config, seed=0, options=QUIET).run()
    assert results["accuracy_matrix"][0][0] > 0.5  # chance is 10 to 33 %
    assert all(0 <= merge["alpha"] <= 1 for merge in results["merges"])


@pytest.mark.slow
def test_computation_in_bfloat16_keeps_float32_parameters_and_curvature():
    learner = Learner(dataclasses.replace(SMALL, compute_dtype="bfloat16"), seed=0, options=QUIET)
    logits = learner.config.network(10).apply({"params": learner.params}, jnp.ones((1, 8, 8, 1)))
    assert logits.dtype == jnp.bfloat16
    learner.run()
    for leaf in jax.tree.leaves((learner.params, learner.state.rule.memory)):
        assert leaf.dtype == jnp.float32


@pytest.mark.slow
def test_a_rule_that_merges_for_inference_only_keeps_training_from_the_trained_model(
    tmp_path, monkeypatch
):
    """The trained models are those of sequential training, the merged ones are their average."""
    plain = dataclasses.replace(SMALL, perturbation="none")
    trained = {}

    def models_of(learner, name):
        original = learner.merge_task

        def spy(task, found):
            trained.setdefault(name, []).append(jax.tree.map(np.asarray, found.trained))
            return original(task, found)

        learner.merge_task = spy
        learner.run()
        return trained[name]

    sequential = Learner(dataclasses.replace(plain, rule="sequential"), 0, options=QUIET)
    wanted = models_of(sequential, "sequential")
    rule = rules.averaging()._replace(needs=rules.Requirements(next_task_from="trained"))
    monkeypatch.setattr(Config, "merge_rule", rule)
    forget_programs()
    config = dataclasses.replace(plain, rule="averaging")
    learner = Learner(config, 0, tmp_path, QUIET)
    for got, want in zip(models_of(learner, "inference"), wanted, strict=True):
        assert leaves_equal(got, want)
    assert not leaves_equal(learner.params, wanted[-1])
    merged = learner.params
    again = Learner(config, 0, tmp_path, QUIET)
    again.run()  # restored from the last checkpoint
    assert leaves_equal(again.params, merged) and leaves_equal(
        again.state.start, learner.state.start
    )
    forget_programs()


@pytest.mark.slow
def test_a_run_from_pretrained_weights_starts_from_them_and_keeps_the_learned_head_apart(tmp_path):
    # Weights of photographs take three channels, which the digits are brought to.
    start = jax.jit(VIT.network(10).init)(jax.random.key(5), jnp.ones((1, 8, 8, 3)))["params"]
    weights = tmp_path / "weights.safetensors"
    pretrained.write_tensors(pretrained.export_params(start, "timm"), weights)
    config = dataclasses.replace(VIT, pretrained=str(weights), first_task_epochs=7)
    trains = [line.split(": ")[1].split()[0] for line in describe(config).splitlines()
              if line.startswith("training in")]  # fmt: skip
    assert trains == ["298", "298"]  # two adapters of 16 x 2 twice, and a head of 16 x 10 + 10
    forget_programs()
    learner = Learner(config, seed=0, options=QUIET)
    body = tuple(p for p in trees.leaves_by_path(learner.params) if not p.startswith("head/"))
    theta_0 = trees.select(start, body)
    assert leaves_equal(trees.select(learner.params, body), theta_0)
    assert not leaves_equal(learner.params["head"], start["head"])
    results = learner.run()
    run = learner.programs
    assert run.training.first is run.training.later and run.training.later.train._cache_size() == 1
    # The longer first task is for runs from scratch.
    assert learner.steps.bounds[1] == -(-int(learner.stream.train.sizes[0]) // config.batch_size)
    first = results["merges"][0]
    assert first["alpha"] == 1.0 and first["denominator"] > 0
    center = learner.state.rule.memory.center
    assert leaves_equal(center, {path: theta_0[path] for path in center})
    frozen = tuple(path for path in body if path not in center)
    assert leaves_equal(trees.select(learner.params, frozen), trees.select(theta_0, frozen))


@pytest.mark.slow
def test_an_untrusted_coefficient_is_moved_towards_averaging(tmp_path, capsys):
    """The merges of SMALL are far from what the diagonal predicts."""
    runs = {}
    for choice in ("off", "warn", "shrink"):
        config = dataclasses.replace(SMALL, trust=choice)
        learner = Learner(config, 0, tmp_path / choice)
        runs[choice] = learner.run()["merges"]
        warned = "-predicted the rise of the task's own loss by" in capsys.readouterr().err
        assert warned == (choice != "off")
    assert comparable({"merges": runs["off"]}) == comparable({"merges": runs["warn"]})
    plain, shrunk = (runs[choice][1] for choice in ("off", "shrink"))
    assert plain["alpha_raw"] == shrunk["alpha_raw"]
    share = trust.trusted_share(
        plain["alpha_raw"], plain["predicted_loss_change"], plain["actual_loss_change"]
    )
    assert 0 < share < 0.9 and abs(plain["alpha"] - 0.5) > 0.01
    wanted = 0.5 + share * (plain["alpha"] - 0.5)
    np.testing.assert_allclose(shrunk["alpha"], wanted, rtol=1e-5)
    assert shrunk["actual_loss_change"] != plain["actual_loss_change"]
    ratio = plain["actual_loss_change"] / plain["predicted_loss_change"]
    np.testing.assert_allclose(plain["loss_change_ratio"], ratio, rtol=1e-5)
    assert runs["shrink"][0]["alpha"] == 1
    with pytest.raises(InvalidInput, match="trust=shrink: rule=averaging .* no closed form"):
        dataclasses.replace(SMALL, trust="shrink", rule="averaging", perturbation="none")


def test_a_trusted_share_by_hand():
    share = trust.trusted_share
    assert share(0.5, 0.1, 0.29) == 1 and share(0.5, 0.1, 0.6) == pytest.approx(0.5)
    assert share(0.5, 0.6, 0.1) == pytest.approx(0.5)
    assert share(0.5, 0.1, -0.1) == 0 and share(0.5, 0.0, 0.1) == 0
    assert share(1.2, 0.1, 0.1) == 0 and share(-0.1, float("nan"), 0.1) == 0
    assert share(0.5, float("nan"), 0.1) == 1 and share(0.5, 1e-5, -9e-4) == 1
