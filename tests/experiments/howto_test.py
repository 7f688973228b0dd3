"""The how-tos of pm_jax/README.md: their code and their commands run as they stand there."""

import json
import re
import shutil
import sys
import types

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import flags
from flax import nnx
from safetensors.numpy import load_file, save_file

import pm_jax
from experiments import flags as experiment_flags
from experiments import merge
from pm_jax import classifiers, data, rules, trees
from pm_jax.continual import learner as learner_module
from pm_jax.continual.report import advice
from pm_jax.curvature import Curvature, Quadratic
from pm_jax.integrations import linen
from tests import contract_test, howto_pages
from tests.binaries import call, refused
from tests.classifiers import contract_test as classifier_contract
from tests.small_runs import Killed

SECTIONS = howto_pages.sections(howto_pages.HOWTOS)
LINES, COLUMNS = 45, 120
PAGES = [howto_pages.HOWTOS, howto_pages.IMAGES, howto_pages.MERGING]
TINY = ["--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8",
        "--train_per_class=20"]  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """Runs blocks of a section, with names of the user's, and gives all names back."""

    def run(title, *numbers, **names):
        module = types.ModuleType("howto")
        # Dataclasses look the module of their class up.
        monkeypatch.setitem(sys.modules, "howto", module)
        vars(module).update(names)
        found = howto_pages.blocks(SECTIONS[title], "python")
        for number in numbers or range(len(found)):
            exec(compile(found[number], f"{title}, block {number}", "exec"), vars(module))
        return module

    return run


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """The directory where a user starts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(title):
    return howto_pages.commands(SECTIONS[title])


# The pages.


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_fits_a_screen_and_has_something_to_run(title):
    text = SECTIONS[title]
    assert text.count("\n") < LINES
    assert howto_pages.blocks(text, "python") or howto_pages.blocks(text, "bash")
    long = [line for line in text.splitlines() if len(line) > COLUMNS and line[0] != "|"]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in howto_pages.anchors(target), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_flags_that_there_are(page):
    for binary, *arguments in howto_pages.commands(page.read_text()):
        typed = [binary, *arguments]
        if binary == "merge":
            values = flags.FlagValues()
            merge.define_flags(values)
            assert experiment_flags.parse(typed, values) == typed[:1]
            continue
        flags.FLAGS.unparse_flags()
        rest = experiment_flags.parse(typed, positional=int(binary == "inspect"))
        assert rest == (typed if binary == "inspect" else typed[:1])


def test_the_presets_that_are_named_are_there():
    named = re.findall(r"`(\w+_\w+)`", SECTIONS["The paper's settings"])
    assert len(named) > 8
    assert all((experiment_flags.PRESETS / f"{name}.flags").exists() for name in named)


def test_the_warnings_that_are_explained_are_those_of_reports():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", SECTIONS["Read the report"], re.MULTILINE)
    explained = dict(rows[1:])
    assert list(explained) == [heading for heading, _, _ in advice.TEXTS.values()]
    for remedy in explained.values():
        flags.FLAGS.unparse_flags()
        typed = re.findall("--[a-z_]+=[^ `]+", remedy)
        assert typed and experiment_flags.parse(["train", *typed]) == ["train"]


# One's own loop.


class Network(nn.Module):
    """Batch norm right after a layer, so that its statistics are easily had by hand."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(16, name="first")(images.reshape(len(images), -1) / 16.0)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(10, name="head")(x)


class Module(nnx.Module):
    """The same in nnx."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, images):
        x = self.norm(self.first(images.reshape(len(images), -1) / 16.0))
        return self.head(self.dropout(nnx.relu(x)))


def turned_digits():
    """Two tasks, lists of batches of 64."""
    digits = data.load_digits()
    return [
        [(task.train_inputs[n : n + 64], task.train_labels[n : n + 64]) for n in range(0, 640, 64)]
        for task in (digits, data.rotated(digits, 60))
    ]


def mean_of_first_layer(batches, kernel, bias):
    return np.mean([x.reshape(64, -1) / 16.0 @ kernel + bias for x, _ in batches], axis=(0, 1))


@pytest.mark.slow
def test_batch_norm_and_dropout(ran):
    tasks, model = turned_digits(), Network()
    start = model.init(jax.random.key(0), tasks[0][0][0], False)
    found = ran(
        "BatchNorm and Dropout", jax=jax, optax=optax, pm_jax=pm_jax, linen=linen, model=model,
        optimizer=optax.adam(3e-3), tasks=tasks, key=jax.random.key(1), **start,
    )  # fmt: skip
    assert found.memory.tasks == 2 and 0 < found.info.alpha < 1
    # The statistics are those of the merged model.
    layer = jax.device_get(found.params["first"])
    wanted = mean_of_first_layer(tasks[1], layer["kernel"], layer["bias"])
    np.testing.assert_allclose(found.batch_stats["norm"]["mean"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_nnx(ran, capsys):
    def loss_fn(model, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    tasks, model = turned_digits(), Module(nnx.Rngs(0))
    found = ran(
        "nnx", jax=jax, nnx=nnx, optax=optax, pm_jax=pm_jax, model=model, loss_fn=loss_fn,
        tasks=tasks, key=jax.random.key(1),
    )  # fmt: skip
    first, second = map(float, re.findall(r"went (\S+) of the way", capsys.readouterr().out))
    assert first == 1 and 0 < second < 1
    kernel, bias = np.asarray(model.first.kernel), np.asarray(model.first.bias)
    np.testing.assert_array_equal(kernel, found.memory.start["first"]["kernel"])
    wanted = mean_of_first_layer(tasks[1], kernel, bias)
    np.testing.assert_allclose(model.norm.mean, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_kronecker_factors_in_ones_own_loop(ran):
    model = nn.Sequential([nn.Dense(2)])
    inputs = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), inputs)["params"]

    def logits_fn(params, inputs):
        return model.apply({"params": params}, inputs)

    found = ran(
        "Your own training loop", pm_jax=pm_jax, rules=rules, trees=trees, params=params,
        logits_fn=logits_fn,
    )  # fmt: skip
    assert found.kernels == ("layers_0/kernel",)
    state = found.merger.init(params)
    trained = jax.tree.map(lambda leaf: leaf + 1.0, params)
    _, state, _ = found.merger.finish_task(state, trained, (inputs, np.arange(8) % 2))
    curvature = state.rule.memory.curvature
    assert isinstance(curvature, pm_jax.kronecker.Kronecker) and curvature.trace() > 0


def linear(params, inputs):
    return inputs @ params["w"]


def task(seed):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(24, 3)).astype(np.float32)
    return [(inputs[n : n + 8], generator.integers(2, size=8)) for n in (0, 8, 16)]


@pytest.mark.slow
def test_a_saved_memory_goes_on(ran, tmp_path):
    merger = pm_jax.merger(rules.perturb_and_merge(), pm_jax.fisher_exact(linear))
    params = {"w": jnp.zeros((3, 2))}
    merged, memory, _ = merger.finish_task(merger.init(params), {"w": jnp.ones((3, 2))}, task(0))
    names = {"ocp": ocp, "folder": tmp_path, "merger": merger}
    title = "Go on after a crash, also on another machine"
    ran(title, 0, params=merged, memory=memory, **names)
    saved = ran(title, 1, params=params, **names).saved
    assert jax.tree.structure(saved["memory"]) == jax.tree.structure(memory)
    for one, other in zip(jax.tree.leaves(saved), jax.tree.leaves((memory, merged)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_error_bars_in_ones_own_loop(ran, capsys):
    names = {
        "pm_jax": pm_jax, "logits_fn": linear, "params": {"w": jnp.zeros((3, 2))},
        "tasks": [task(0), task(1)],
        "train": lambda start, batches: {"w": start["w"] + float(batches[0][0][0, 0])},
    }  # fmt: skip
    info = ran("Error bars and trust", **names).info
    assert 0 < info.standard_error < 1 and 0 < info.figures["jackknife_error"] < 1
    assert capsys.readouterr().out.count("over the examples of all tasks") == 2


# Without a loop.


@pytest.mark.slow
def test_ones_own_model_and_data(at_work, monkeypatch):
    title = "Your own model and data, without a loop"
    [code] = howto_pages.blocks(SECTIONS[title], "python")
    (at_work / "my_code.py").write_text(code)
    monkeypatch.syspath_prepend(at_work)
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    [command] = commands(title)
    call(*command, "--epochs=1", "--first_task_epochs=1", "--noreport", "--baseline=")
    results = json.loads((at_work / "runs/mine/seed_0/results.json").read_text())
    assert results["accuracy_matrix"][0][0] > 0.5 and len(results["accuracy_matrix"]) == 3
    import my_code

    learner = learner_module.Learner(
        learner_module.Config(num_tasks=3), 0, model=my_code.Network(10), stream=my_code.tasks()
    )
    assert learner.params["head"]["kernel"].shape == (64, 10)


@pytest.mark.slow
def test_a_crashed_run_goes_on_at_another_place(at_work, monkeypatch, capsys):
    run, inspect = commands("Go on after a crash, also on another machine")
    saves = learner_module.Checkpoints.save

    def save_and_die(self, step, tree):
        saves(self, step, tree)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(learner_module.Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            call(*run, *TINY, "--baseline=")
    shutil.copytree("runs", at_work / "elsewhere" / "runs")
    monkeypatch.chdir(at_work / "elsewhere")
    elsewhere = [*run, *TINY, "--noreport", "--baseline="]
    assert "epochs=1, not 2" in refused(capsys, *elsewhere, "--epochs=2")
    call(*elsewhere, "--checkpoint_every=0", "--resident_mb=1")
    assert "going on from step" in capsys.readouterr().err
    assert call(*inspect) == 0


def test_all_devices_of_the_machine(capsys):
    wide, _ = commands("Several devices and hosts")
    call(*wide, *TINY, "--dry_run")
    assert "merging:" in capsys.readouterr().out


def test_files_merge(at_work):
    names = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.weight")
    # Tensors that are equal everywhere would be tied, and merge once.
    signs = dict(zip(names, (1, -1), strict=True))
    models = [{name: np.full((2, 2), value * sign, np.float32) for name, sign in signs.items()}
              for value in (1, 2, 5)]  # fmt: skip
    for path, tensors in zip(("base", "a", "b"), models, strict=True):
        save_file(tensors, f"{path}.safetensors")
    [command] = commands("Merge files")
    call(*command)
    attention, other = (load_file("merged.safetensors")[name] for name in names)
    np.testing.assert_allclose(attention, 1 + 0.3 * (1 + 4), rtol=1e-6)
    np.testing.assert_allclose(other, -1 - 0.4 * (1 + 4), rtol=1e-6)


@pytest.mark.slow
def test_rules_are_compared_on_validation_data_and_then_shown_on_test_data(
    at_work, monkeypatch, capsys
):
    choose, show = commands("Choose a rule on validation data")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # plots take a while
    fewer = [*TINY, "--seeds=0", "--rules=frozen,averaging"]
    call(*choose, *fewer)
    chosen = capsys.readouterr().out
    monkeypatch.setattr(learner_module.Learner, "train_task", None)
    call(*show, *fewer)
    shown = capsys.readouterr().out
    for text, split in ((chosen, "validation"), (shown, "test")):
        assert "to the best" in text and f"on {split} data" in text
    assert chosen.splitlines()[-2:] != shown.splitlines()[-2:]


@pytest.mark.slow
def test_doubts_are_measured_and_the_report_is_written_again(at_work, capsys):
    pytest.importorskip("matplotlib")
    [train] = commands("Error bars and trust")
    call(*train, *TINY, "--seeds=1", "--baseline=", "--noreport", "--landscape_points=3")
    [report] = commands("Read the report")
    workdir = at_work / "runs" / "sure"
    workdir.rename(at_work / "runs" / "digits")
    call(*report)
    assert (at_work / "runs/digits/report.html").exists()
    merge = json.loads((at_work / "runs/digits/seed_1/results.json").read_text())["merges"][1]
    assert merge["standard_error"] > 0 and merge["regret_accuracy"] >= 0


# What is added.


def test_a_rule_that_is_added_keeps_the_contract(ran, monkeypatch):
    slowing = ran("Add a rule").slowing
    monkeypatch.setitem(rules.REGISTRY, "slowing", slowing)
    for law in (
        contract_test.test_grammar,
        contract_test.test_state_is_a_pytree_of_arrays_of_fixed_shapes,
        contract_test.test_jit_equals_eager,
        contract_test.test_one_compilation_for_the_stream,
    ):
        law("slowing")
    contract_test.test_the_first_task_returns_the_trained_model("slowing", jnp.float32)
    models = [{"w": jnp.full(1, value)} for value in (2.0, 4.0, 9.0)]
    merged, _ = contract_test.run(rules.make("slowing", "speed=1"), models, {"w": jnp.zeros(1)},
                                  evidence=lambda *_: None)  # fmt: skip
    np.testing.assert_allclose(merged[-1]["w"], 5.0)  # the mean
    with pytest.raises(ValueError, match=r"speed=-1\.0: must be at least 0"):
        rules.make("slowing", "speed=-1")


def test_a_classifier_that_is_added_keeps_the_contract(ran, monkeypatch):
    cosine = ran("Add a classifier").cosine
    monkeypatch.setitem(classifiers.REGISTRY, "cosine", cosine)
    classifier_contract.test_grammar("cosine")
    classifier_contract.test_columns_are_read_where_the_classifier_says_so("cosine")
    features, labels = classifier_contract.examples()
    state = classifier_contract.state_of(cosine().statistics, features, labels)
    means = np.asarray(state.means)[list(classifier_contract.SEEN)]
    angles = features @ means.T / np.linalg.norm(means, axis=1)
    found = np.argmax(cosine().fit(state, None, None)(features), axis=1)
    np.testing.assert_array_equal(found, np.take(classifier_contract.SEEN, angles.argmax(1)))


@pytest.mark.slow
def test_a_curvature_that_is_added_weighs_tasks_by_its_number(ran):
    found = ran(
        "Add a curvature", flax=flax, jax=jax, jnp=jnp, pm_jax=pm_jax, rules=rules,
        Curvature=Curvature, Quadratic=Quadratic, logits_fn=linear,
    )  # fmt: skip
    memory = found.merger.init({"w": jnp.zeros((3, 2))})
    numbers = []
    for seed, value in enumerate((1.0, 3.0)):
        trained = {"w": jnp.full((3, 2), value).at[0, 0].add(1.0)}
        fisher = pm_jax.measure_all(pm_jax.fisher_exact(linear), trained, task(seed))
        numbers.append(fisher.quadratic.trace())
        _, memory, info = found.merger.finish_task(memory, trained, task(seed))
    np.testing.assert_allclose(info.alpha, numbers[1] / sum(numbers), rtol=1e-5)
    assert np.isnan(info.standard_error)
