"""Merging adapters of PEFT: displacements in float64, forms of the output, and what is refused."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pm_jax import registries, rules
from pm_jax.offline.adapted_files import AdaptedFile
from pm_jax.offline.adapters import LINEAR, coefficients
from pm_jax.offline.interpolation import OF_FILES
from pm_jax.offline.tensor_files import TensorFile
from pm_jax.rules import Evidence
from pm_jax.types import InvalidInput
from pm_jax.weights.peft_folder import PeftFolder, is_adapter, tensor_of
from tests.binaries import call, refused
from tests.small_runs import slow

SHAPES = {
    "model.layers.0.q_proj": (6, 8),
    "model.layers.1.q_proj": (6, 8),
    "model.layers.1.up": (10, 8),
    "model.conv": (4, 3, 2, 2),
}
TABLE = "model.embed"


class Made:
    """An adapter in a folder, and its displacements in float64."""

    def __init__(self, path, seed, ranks, alpha=4.0, rslora=False, table=0, **settings):
        rng = np.random.default_rng(seed)
        self.path, self.steps, tensors, first = path, {}, {}, next(iter(ranks.values()))
        alphas = settings.get("alpha_pattern", {})
        for module, rank in ranks.items():
            out, *inputs = SHAPES[module]
            a, b = rng.normal(size=(rank, math.prod(inputs))), rng.normal(size=(out, rank))
            scale = alphas.get(module, alpha) / (math.sqrt(rank) if rslora else rank)
            self.steps[module] = (scale * b @ a).reshape(SHAPES[module])
            name = f"base_model.model.{module}.lora_"
            window = (1,) * (len(inputs) - 1)
            tensors |= {f"{name}A.weight": a.reshape(rank, *inputs),
                        f"{name}B.weight": b.reshape(out, rank, *window)}  # fmt: skip
        if table:
            a, b = rng.normal(size=(first, 5)), rng.normal(size=(8, first))
            name = f"base_model.model.{TABLE}.lora_embedding_"
            tensors |= {f"{name}A": a, f"{name}B": b}
            self.steps[TABLE] = alpha / first * b @ a
        for name, tensor in settings.pop("saved", {}).items():
            tensors[f"base_model.model.{name}"] = tensor
        path.mkdir()
        save_file(
            {key: np.asarray(x, np.float32) for key, x in tensors.items()},
            path / "adapter_model.safetensors",
        )
        config = {
            "peft_type": "LORA", "r": first, "lora_alpha": alpha, "use_rslora": rslora,
            "rank_pattern": {m: r for m, r in ranks.items() if r != first},
            "base_model_name_or_path": "org/base", **settings,
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def two(tmp_path):
    """Adapters of other ranks, targets and scales."""
    names = list(SHAPES)
    return (
        Made(tmp_path / "one", 1, {names[0]: 2, names[1]: 3, names[3]: 2}, 6.0, table=1),
        Made(
            tmp_path / "two", 2, {names[1]: 4, names[2]: 2}, 4.0, rslora=True,
            alpha_pattern={names[2]: 7.0},
        ),
    )  # fmt: skip


def merged(tmp_path, *arguments, output="out"):
    call("merge", *arguments, f"--output={tmp_path / output}")
    return PeftFolder.open("models", tmp_path / output)


def models(*made):
    return f"--models={','.join(str(adapter.path) for adapter in made)}"


def mean(*made):
    return {
        module: sum(x.steps.get(module, 0) for x in made) / len(made)
        for x in made for module in x.steps
    }  # fmt: skip


def assert_moves(found, wanted, tolerance=1e-6):
    assert set(found.modules) == set(wanted)
    for module, step in wanted.items():
        scale = np.abs(step).max()
        np.testing.assert_allclose(found.displacement(module), step, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("form", ["out", "out.safetensors"])
def test_the_mean_of_adapters_has_the_mean_of_their_displacements(form, two, tmp_path, capsys):
    found = merged(tmp_path, models(*two), output=form)
    assert_moves(found, mean(*two))
    ranks = {module: factors.rank for module, factors in found.modules.items()}
    names = list(SHAPES)
    # 3 + 4 is more than a matrix of 6 rows needs.
    assert ranks == {names[0]: 2, names[1]: 6, names[2]: 2, names[3]: 2, TABLE: 2}
    assert all(factors.scale == 1 for factors in found.modules.values())
    assert found.config["target_modules"] == sorted(ranks) and found.config["r"] == 2
    assert found.config["rank_pattern"] == {f"^{names[1]}": 6} == found.config["alpha_pattern"]
    said = capsys.readouterr().out
    assert "merged the displacements of 2 adapters by averaging: 5 modules, ranks 2 to 6" in said
    assert ("PEFT loads a folder" in said) == form.endswith(".safetensors")


def test_settings_of_a_pattern_are_those_of_its_modules(two, tmp_path):
    found = merged(
        *(tmp_path, models(*two), "--rule=task_arithmetic", "--rule_settings=scale=1"),
        r"--settings=.*layers\.1.*:scale=0.5",
    )
    wanted = {
        name: (0.5 if "layers.1" in name else 1) * 2 * step for name, step in mean(*two).items()
    }
    assert_moves(found, wanted)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_smaller_rank_is_the_nearest_and_its_error_is_said(rank, two, tmp_path, capsys):
    found = merged(tmp_path, models(*two), f"--rank={rank}")
    missed = total = 0.0
    for module, step in mean(*two).items():
        values = np.linalg.svd(step.reshape(len(step), -1), compute_uv=False)
        got = found.displacement(module)
        assert found.modules[module].rank <= rank
        error = np.sum((got - step) ** 2)
        np.testing.assert_allclose(error, np.sum(values[rank:] ** 2), rtol=1e-4, atol=1e-9)
        missed, total = missed + error, total + np.sum(step**2)
    said = re.search("cut by SVD: (.*) of the norm", capsys.readouterr().out)
    np.testing.assert_allclose(float(said[1]), math.sqrt(missed / total), rtol=0.06)


@pytest.mark.parametrize("name", ["magmax", slow("ties"), slow("opcm")])
def test_a_rule_that_is_not_linear_merges_dense_displacements(name, tmp_path, capsys):
    modules = list(SHAPES)[:2]
    made = [
        Made(tmp_path / str(n), n, {module: 2 for module in modules[n : n + 2]}) for n in range(2)
    ]
    found = merged(tmp_path, models(*made), f"--rule={name}", "--rank=8")
    rule = rules.make(name, max_tasks=2)
    trees = [
        {m: jnp.asarray(x.steps.get(m, np.zeros(SHAPES[m])).T, jnp.float32) for m in modules}
        for x in made
    ]
    start = jax.tree.map(jnp.zeros_like, trees[0])
    state, previous, update = jax.jit(rule.init)(start), start, jax.jit(rule.update)
    for trained in trees:
        params, state, _ = update(state, previous=previous, trained=trained, evidence=Evidence())
        previous = params if rule.needs.next_task_from == "merged" else trained
    assert_moves(found, {m: np.asarray(step).T for m, step in params.items()}, 1e-5)
    assert "cut by SVD" in capsys.readouterr().out


def test_perturb_and_merge_weighs_displacements_by_fishers(tmp_path, capsys):
    """By its coefficient for two tasks, of the tensors that the adapters displace."""
    modules = list(SHAPES)[:2]
    made = [Made(tmp_path / str(n), n, {m: 2 for m in modules[n:2]}) for n in range(2)]
    fishers = [fisher(tmp_path / f"fisher_{n}.safetensors", n) for n in range(2)]
    found = merged(
        *(tmp_path, models(*made), "--rule=perturb_and_merge"),
        f"--fishers={','.join(str(path) for path, _ in fishers)}",
    )
    (first, second), (own, other) = ([x.steps for x in made], [x for _, x in fishers])
    delta = {m: second.get(m, 0) - first[m] for m in modules}
    along = [sum(np.sum(f[m] * delta[m] ** 2) for m in modules) for f in (own, other)]
    alpha = along[1] / sum(along)
    assert 0.1 < alpha < 0.9
    assert_moves(found, {m: first[m] + alpha * delta[m] for m in modules}, 1e-5)
    said = capsys.readouterr().out
    assert "cut by SVD" in said and f"merge coefficients: {made[1].path} {alpha:.3g}\n" in said


def test_adapters_that_name_a_module_in_two_ways_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "layers.0.q_proj", SHAPES["model.layers.0.q_proj"])
    for name in ("vision.q", "text.q"):
        monkeypatch.setitem(SHAPES, name, (4, 6))
    one, other = (
        Made(tmp_path / name, 1, {f"{prefix}layers.0.q_proj": 2})
        for name, prefix in (("one", "model."), ("other", ""))
    )
    output = f"--output={tmp_path / 'out'}"
    without = Made(tmp_path / "without", 1, {"model.layers.1.up": 2})
    # Whichever of the others has the other name.
    for made in ((one, other), (without, one, other)):
        line = refused(capsys, "merge", models(*made), output)
        assert "other: adapts layers.0.q_proj, which another adapter seems to call" in line
        assert "model.layers.0.q_proj; give" in line
    towers = Made(tmp_path / "towers", 1, {"vision.q": 2, "text.q": 2})
    save_file({"q.weight": np.ones((4, 6), np.float32)}, tmp_path / "fisher.safetensors")
    line = refused(
        capsys, "merge", models(towers), output, "--rule=fisher_averaging",
        f"--fishers={tmp_path / 'fisher.safetensors'}",
    )  # fmt: skip
    assert "has one q.weight for several modules" in line


def fisher(path, seed):
    """A Fisher file of a model whose tensors have a prefix less; also its entries by module."""
    rng = np.random.default_rng(seed)
    entries = {name: rng.uniform(size=shape) for name, shape in SHAPES.items()}
    tensors = {f"{name.removeprefix('model.')}.weight": x for name, x in entries.items()}
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, path)
    return path, entries


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("averaging", "", [0, 1 / 3, 1 / 3, 1 / 3]),
        ("linear", "model_weights=0.5:0.2:0.3", [0, 0.5, 0.2, 0.3]),
        ("coma", "step=0.5", [0, 0.25, 0.25, 0.5]),
        ("task_arithmetic", "scale=0.5", [-0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_a_linear_rule_has_coefficients(name, settings, wanted):
    assert name in LINEAR
    rule = registries.make("rule", {**rules.REGISTRY, **OF_FILES}, name, settings)
    np.testing.assert_allclose(coefficients(rule, 3), wanted, atol=1e-6)


def test_an_adapter_as_base_is_theta_0(two, tmp_path, capsys):
    found = merged(tmp_path, models(*two), f"--base={two[0].path}", "--rule=task_arithmetic")
    first, second = (adapter.steps for adapter in two)
    wanted = {
        module: 0.7 * first.get(module, 0) + 0.3 * second.get(module, 0)
        for module in first | second
    }
    assert_moves(found, wanted)
    assert "theta_0 is the adapter" in capsys.readouterr().out
    again = merged(tmp_path, models(*two), f"--base={two[0].path}", output="mean")
    assert_moves(again, mean(*two))


def base_tensors(dtype=np.float32):
    rng = np.random.default_rng(9)
    shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    shapes |= {f"{TABLE}.weight": (5, 8), "norm.weight": (8,), "head.weight": (2, 8)}
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_model_as_base_gets_the_displacement_and_keeps_the_rest(dtype, two, tmp_path, capsys):
    base = base_tensors(dtype)
    # As a model that was saved from inside of another one.
    stored = {name.removeprefix("model."): tensor for name, tensor in base.items()}
    save_file(stored, tmp_path / "base.safetensors")
    call("merge", models(*two), f"--base={tmp_path / 'base.safetensors'}",
         f"--output={tmp_path / 'out.safetensors'}")  # fmt: skip
    found = load_file(tmp_path / "out.safetensors")
    steps = mean(*two)
    for name, tensor in base.items():
        got = found[name.removeprefix("model.")]
        step = steps.get(name.removesuffix(".weight"))
        if step is None:
            assert got.tobytes() == tensor.tobytes()
            continue
        wanted = tensor.astype(np.float64) + (step.T if TABLE in name else step)
        assert got.dtype == dtype
        tolerance = 1e-6 if dtype == np.float32 else 2.0**-8
        np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)


def test_conv1d_of_gpt_2_is_stored_the_other_way_around(tmp_path):
    made = Made(tmp_path / "a", 1, {"model.layers.1.up": 2}, fan_in_fan_out=True)
    base = np.ones((8, 10), np.float32)
    save_file({"model.layers.1.up.weight": base}, tmp_path / "base.safetensors")
    call("merge", models(made), f"--base={tmp_path / 'base.safetensors'}",
         f"--output={tmp_path / 'out.safetensors'}")  # fmt: skip
    (got,) = load_file(tmp_path / "out.safetensors").values()
    wanted = base + made.steps["model.layers.1.up"].T
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_model_and_an_adapter_of_the_base_merge_into_a_model(two, tmp_path):
    base = base_tensors()
    save_file(base, tmp_path / "base.safetensors")
    save_file({k: x + 1 for k, x in base.items()}, tmp_path / "whole.safetensors")
    call("merge", f"--models={two[0].path},{tmp_path / 'whole.safetensors'}",
         f"--base={tmp_path / 'base.safetensors'}", f"--output={tmp_path / 'out.safetensors'}",
    )  # fmt: skip
    found = load_file(tmp_path / "out.safetensors")
    name = "model.layers.0.q_proj"
    wanted = base[f"{name}.weight"] + (two[0].steps[name] + 1) / 2
    np.testing.assert_allclose(found[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["norm.weight"], base["norm.weight"] + 0.5, rtol=1e-6)


def test_classifiers_beside_factors_merge_where_no_base_counts(tmp_path, capsys):
    module = next(iter(SHAPES))
    heads = [np.full((2, 8), n, np.float32) for n in (1, 3)]
    first, second = (
        Made(tmp_path / str(n), n, {module: 2}, saved={"head.weight": head, "norm.bias": head[0]},
             modules_to_save=["head", "norm"])
        for n, head in enumerate(heads)
    )  # fmt: skip
    found = merged(tmp_path, models(first, second))
    assert found.config["modules_to_save"] == ["head", "norm"]
    assert np.array_equal(found.saved_tensor("head.weight"), np.full((2, 8), 2))
    line = refused(capsys, "merge", models(first, second), "--rule=task_arithmetic",
                   f"--output={tmp_path / 'other'}")  # fmt: skip
    assert "head.weight of modules_to_save differs" in line
    alone = Made(tmp_path / "alone", 3, {module: 2})
    line = refused(capsys, "merge", models(first, alone, second), f"--output={tmp_path / 'other'}")
    assert "is not in all adapters" in line and not (tmp_path / "other").exists()


def test_an_output_that_is_there_is_replaced_only_if_it_may_be(two, tmp_path, capsys):
    merged(tmp_path, models(*two))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    again = [models(two[1]), f"--output={tmp_path / 'out'}"]
    assert "exists" in refused(capsys, "merge", *again)
    call("merge", *again, "--overwrite")
    assert_moves(PeftFolder.open("models", tmp_path / "out"), two[1].steps)
    assert (tmp_path / "out" / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]


def test_only_what_has_factors_is_an_adapter(two, tmp_path):
    save_file({"w": np.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    found = {path: is_adapter(path) for path in tmp_path.iterdir()}
    assert {path.name for path, is_one in found.items() if is_one} == {"one", "two"}
    assert is_adapter(two[0].path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("module", "names", "wanted"),
    [
        ("a.b.q", ["a.b.q.weight", "b.q.weight"], "a.b.q.weight"),
        ("model.a.q", ["a.q.weight", "a.k.weight"], "a.q.weight"),
        ("a.q", ["model.a.q.weight", "model.a.k.weight"], "model.a.q.weight"),
        ("a.q", ["x.a.q.weight", "y.a.q.weight"], None),
        ("a.q", ["weight", "b.q.weight"], None),
        (
            "vit.layers.3.attention.q_proj",
            ["vit.encoder.layer.3.attention.attention.query.weight"],
            "vit.encoder.layer.3.attention.attention.query.weight",
        ),
        (
            "layers.3.mlp.fc2",
            [
                "encoder.layer.3.output.dense.weight",
                "encoder.layer.3.attention.output.dense.weight",
            ],
            "encoder.layer.3.output.dense.weight",
        ),
    ],
)
def test_a_module_is_found_by_its_name_with_a_prefix_more_or_less(module, names, wanted):
    assert tensor_of(module, names) == wanted


def test_two_modules_are_never_one_tensor(tmp_path):
    made = Made(tmp_path / "a", 1, dict.fromkeys(list(SHAPES)[:2], 2))
    save_file({"q_proj.weight": np.ones((6, 8), np.float32)}, tmp_path / "base.safetensors")
    base = TensorFile.open("base", tmp_path / "base.safetensors")
    with pytest.raises(InvalidInput, match="adapts model.layers.*which the base does not have"):
        AdaptedFile.on(base, PeftFolder.open("models", made.path))
