"""Offline merging: arithmetic against NumPy in float64, streaming, and what is refused."""

import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from orbax import checkpoint as orbax
from safetensors.numpy import load_file, save_file

from pm_jax import rules, trees
from pm_jax.continual import Learner, RunOptions
from pm_jax.continual.run import run_seeds
from pm_jax.curvature import DiagonalQuadratic
from pm_jax.offline import pieces, requests, tensor_files
from pm_jax.rules import Evidence, MergeRule, Requirements
from tests import small_runs
from tests.binaries import call, refused
from tests.small_runs import QUIET

SHAPES = {"blocks.0.attn.qkv": (40, 75), "blocks.0.mlp": (7, 3, 2), "scale": (), "empty": (0, 4)}
BLOCK = 1000
PARTS = ("per=tensor", "per=block", "per=module", "per=.*attn", "normalize=trace",
         "per=tensor,normalize=trace")  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", BLOCK)


def tensors(seed, dtype=np.float32, positive=False):
    rng = np.random.default_rng(seed)

    def values(shape):
        drawn = rng.normal(size=shape)
        return np.asarray(abs(drawn) if positive else drawn, dtype)

    return {name: values(shape) for name, shape in SHAPES.items()}


def written(folder, name, content):
    path = folder / f"{name}.safetensors"
    save_file(content, path, {"format": "pt"})
    return path


def arguments_of(folder, models, *more, base=None, output="out", fishers=()):
    """Arguments of a merge of models that are written here."""
    base = written(folder, "base", tensors(0) if base is None else base)
    paths = [written(folder, f"m{n}", content) for n, content in enumerate(models)]
    evidence = [written(folder, f"f{n}", content) for n, content in enumerate(fishers)]
    given = [f"--base={base}", f"--models={','.join(map(str, paths))}"]
    given += [f"--fishers={','.join(map(str, evidence))}"] if fishers else []
    return [*given, f"--output={folder / output}.safetensors", *more]


def merged(folder, *arguments, **options):
    call("merge", *arguments_of(folder, *arguments, **options))
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("count", [2, 10])
def test_averaging_agrees_with_float64(count, tmp_path):
    models = [tensors(1 + n) for n in range(count)]
    found = merged(tmp_path, models)
    assert set(found) == set(SHAPES)
    for name in SHAPES:
        wanted = np.mean([model[name].astype(np.float64) for model in models], axis=0)
        assert found[name].dtype == np.float32 and found[name].shape == SHAPES[name]
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
def test_the_average_of_copies_is_the_model_bit_for_bit(dtype, tmp_path):
    model = tensors(1, dtype)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    model["blocks.0.mlp"].reshape(-1)[:4] = [-0.0, tiny, -3 * tiny, 1 / 3]
    found = merged(tmp_path, [model] * 5, base=tensors(0, dtype))
    assert all(found[name].tobytes() == model[name].tobytes() for name in SHAPES)


def test_float64_is_merged_in_float64(tmp_path):
    models = [tensors(1, np.float64), tensors(2, np.float64)]
    found = merged(tmp_path, models, base=tensors(0, np.float64))
    wanted = (models[0]["scale"] + models[1]["scale"]) / 2
    np.testing.assert_allclose(found["scale"], wanted, rtol=1e-15)


def in_memory(rule, base, models, fishers):
    """The rule over whole models, as in training."""
    state, previous, update = rule.init(base), base, jax.jit(rule.update)
    for task, (trained, fisher) in enumerate(zip(models, fishers, strict=True)):
        key = jax.random.fold_in(jax.random.key(0), task)
        evidence = Evidence(quadratic=DiagonalQuadratic.at(trained, fisher), key=key)
        params, state, _ = update(state, previous=previous, trained=trained, evidence=evidence)
        previous = params if rule.needs.next_task_from == "merged" else trained
    return params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, "") for name in sorted(rules.REGISTRY)),
        *(("ties", "trim=tensor"), ("ties", "keep=0.71"), ("averaging", "power=0.3")),
        *(("perturb_and_merge", s) for s in PARTS),
        *(("opcm", "threshold=0.9"), ("null_space", "rank=3,pattern=.*qkv")),
    ],
)
def test_every_rule_merges_in_pieces_as_in_memory(name, settings, tmp_path, capsys):
    """And so its `scope` is true; a rule that cannot work on files is refused."""
    rule = rules.make(name, settings, max_tasks=3)
    models = [tensors(1 + n) for n in range(3)]
    fishers = [tensors(11 + n, positive=True) for n in range(3)]
    given = {"fishers": fishers} if rule.needs.evidence & requests.OF_FISHERS else {}
    if rule.needs.moving_tasks is not None:
        line = refused(capsys, "merge", *arguments_of(tmp_path, models, f"--rule={name}"))
        assert re.search(f"--rule={name}: keeps the (base|first model) as it is", line)
        return
    # The names of these tensors do not say which side of a matrix is which.
    layout = ["--layout=flax"] if rule.needs.parts else []
    if rule.needs.analysis_only:
        line = refused(capsys, "merge", *arguments_of(tmp_path, models, f"--rule={name}"))
        assert re.search(f"--rule={name}: .* all", line)
        return
    if rule.needs.evidence - requests.OF_FISHERS - {"key"} or name == "regmean":
        line = refused(capsys, "merge", *arguments_of(tmp_path, models, f"--rule={name}", **given))
        assert re.search(f"--rule={name}: needs .* from training", line)
        return
    chosen = [f"--rule={name}", f"--rule_settings={settings}", *layout]
    found = merged(tmp_path, models, *chosen, **given)
    assert {key: value.shape for key, value in found.items()} == SHAPES
    if "key" in rule.needs.evidence and rule.needs.scope != "model":
        return  # draws block by block, from other keys
    wanted = in_memory(rule, tensors(0), models, fishers)
    for tensor in SHAPES:
        np.testing.assert_allclose(found[tensor], wanted[tensor], rtol=1e-5, atol=1e-6)


def moving(*, step: float = 0.5, start: str = "trained") -> MergeRule:
    """A rule that reads the model that training started from, and draws."""

    def update(state, *, previous, trained, evidence):
        noise = trees.gaussian_like(evidence.key, trained)
        merged = jax.tree.map(lambda n, x: n + x, trees.lerp(previous, trained, step), noise)
        return merged, state, None

    needs = Requirements(frozenset({"key"}), start, "element")
    return MergeRule(lambda params: (), update, needs)


def without_noise(monkeypatch):
    monkeypatch.setattr(
        trees, "gaussian_like", lambda key, tree: jax.tree.map(jnp.zeros_like, tree)
    )


def test_the_next_task_starts_where_the_rule_says(tmp_path, monkeypatch):
    monkeypatch.setitem(rules.REGISTRY, "moving", moving)
    without_noise(monkeypatch)
    first, second = tensors(1)["scale"], tensors(2)["scale"]
    starts = {"trained": first, "merged": (tensors(0)["scale"] + first) / 2}
    for name, start in starts.items():
        found = merged(
            *(tmp_path, [tensors(1), tensors(2)], "--rule=moving", "--overwrite"),
            f"--rule_settings=start={name}",
        )
        np.testing.assert_allclose(found["scale"], (start + second) / 2, atol=1e-6)


def test_settings_of_a_pattern_go_before_those_of_the_rule(tmp_path, monkeypatch):
    monkeypatch.setitem(rules.REGISTRY, "moving", moving)
    without_noise(monkeypatch)
    found = merged(
        *(tmp_path, [tensors(1)], "--rule=moving", "--rule_settings=step=0.5,start=merged"),
        *("--settings=(?:.*attn.*):step=1/4", "--settings=blocks.*:step=0.1"),
    )
    steps = {"blocks.0.attn.qkv": 0.25, "blocks.0.mlp": 0.1, "scale": 0.5}
    for name, step in steps.items():
        wanted = (1 - step) * tensors(0)[name] + step * tensors(1)[name].astype(np.float64)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)


def test_what_is_random_repeats_with_the_seed_and_differs_by_block(tmp_path, monkeypatch):
    monkeypatch.setitem(rules.REGISTRY, "moving", moving)
    same = [tensors(0)]
    draws = [
        merged(tmp_path, same, "--rule=moving", f"--seed={seed}", "--overwrite")[
            "blocks.0.attn.qkv"
        ].reshape(-1)
        - tensors(0)["blocks.0.attn.qkv"].reshape(-1)
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(draws[0], draws[1]) and abs(draws[0].std() - 1) < 0.1
    for other in (draws[0][BLOCK : 2 * BLOCK], draws[2][:BLOCK]):
        assert abs(np.corrcoef(draws[0][:BLOCK], other)[0, 1]) < 0.2


@pytest.fixture
def read_sizes(monkeypatch):
    """Numbers of elements that are read at once."""
    read, sizes = tensor_files.TensorFile.read, []
    monkeypatch.setattr(
        tensor_files.TensorFile,
        "read",
        lambda self, name, first, stop: sizes.append(stop - first) or read(self, name, first, stop),
    )
    return sizes


def test_every_element_is_read_once_a_block_at_a_time(tmp_path, read_sizes):
    merged(tmp_path, [tensors(1), tensors(2)])
    assert max(read_sizes) == BLOCK and sum(read_sizes) == 3 * (3000 + 42 + 1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("slerp", ""), ("ties", "trim=tensor"), ("ties", ""), ("dare", "on=ties")),
        *(("perturb_and_merge", s) for s in ("", "per=tensor", "per=module", "normalize=trace")),
    ],
)
def test_a_rule_whose_elements_meet_in_sums_reads_blocks(name, settings, tmp_path, read_sizes):
    needs = [tensors(seed, positive=True) for seed in (11, 12)]
    chosen = [f"--rule={name}", f"--rule_settings={settings}"]
    fishers = needs if name == "perturb_and_merge" else []
    merged(tmp_path, [tensors(1), tensors(2)], *chosen, fishers=fishers)
    assert max(read_sizes) == BLOCK


def test_a_rule_that_says_it_meets_in_sums_and_takes_none_is_refused(tmp_path, monkeypatch, capsys):
    def mistaken() -> MergeRule:
        def update(state, *, previous, trained, evidence):
            return trained - jnp.mean(trained), state, None

        needs = Requirements(scope="tensor", meets_in_sums=True)
        return MergeRule(lambda params: (), update, needs)

    monkeypatch.setitem(rules.REGISTRY, "mistaken", mistaken)
    line = refused(capsys, "merge", *arguments_of(tmp_path, [tensors(1)], "--rule=mistaken"))
    assert "says meets_in_sums, and its update takes no sum" in line


def test_the_fisher_of_the_second_of_tied_tensors_is_said_to_be_left_out(tmp_path, capsys):
    base, *models = ({"w": tensors(n)["blocks.0.mlp"]} for n in range(3))
    for model in (base, *models):
        model["tied"] = model["w"]
    fishers = [{"w": abs(model["w"]), "tied": abs(model["w"]) + 1} for model in models]
    chosen = ["--rule=fisher_averaging"]
    merged(tmp_path, models, *chosen, base=base, fishers=fishers)
    assert "of tied tensors the Fisher of the one that merges counts" in capsys.readouterr().out


def test_coefficients_are_said_and_so_is_a_fisher_that_gives_none(tmp_path, capsys):
    models, fisher = [tensors(n) for n in (1, 2, 3)], tensors(11, positive=True)
    nothing = {name: np.zeros_like(leaf) for name, leaf in fisher.items()}
    chosen, given = ["--rule=perturb_and_merge"], {"fishers": [fisher] * 3}
    merged(tmp_path, models, *chosen, **given)
    second, third = (str(tmp_path / f"m{n}.safetensors") for n in (1, 2))
    # With one Fisher for all, the merge is their mean.
    said = capsys.readouterr().out
    assert f"merge coefficients: {second} 0.5, {third} 0.333\n" in said and "give no" not in said
    given["fishers"] = [nothing, {**nothing, "scale": fisher["scale"]}, fisher]
    settings = [f"--output={tmp_path / 'again.safetensors'}", "--rule_settings=per=tensor"]
    merged(tmp_path, models, *chosen, *settings, **given)
    said = capsys.readouterr().out
    assert f"merge coefficients: {second} 0.5 to 1, {third} " in said
    assert f"{second}: the Fishers give no coefficient for 2 of 3 groups of tensors" in said
    assert "so it is 1/2" in said and f"{third}: the" not in said


def test_tensors_of_one_setting_share_their_sums(tmp_path):
    """And those of another have their own, in float64 beside float32."""
    base, *models = (tensors(n) for n in range(3))
    for model in (base, *models):
        model["scale"] = model["scale"].astype(np.float64)
    setting = "--settings=blocks.0.mlp|scale:keep=0.5"
    found = merged(tmp_path, models, "--rule=ties", setting, base=base)
    for names, keep in ((["blocks.0.attn.qkv", "empty"], 0.2), (["blocks.0.mlp", "scale"], 0.5)):
        with jax.enable_x64(True):
            part = [{name: model[name] for name in names} for model in (base, *models)]
            wanted = in_memory(rules.ties(keep=keep), part[0], part[1:], part[1:])
        for name in names:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_whole_numbers_stay_the_bases_and_mixed_types_become_its_type(tmp_path, capsys):
    base = {"ids": np.arange(3), "w": np.zeros(3, np.float16), "v": np.ones(2, np.float32)}
    models = [
        {"ids": np.arange(3) + n, "w": np.full(3, n, jnp.bfloat16), "v": base["v"]}
        for n in (1, 2)
    ]  # fmt: skip
    found = merged(tmp_path, models, base=base)
    assert found["ids"].tolist() == [0, 1, 2] and found["ids"].dtype == np.int64
    assert found["w"].tolist() == [1.5] * 3 and found["w"].dtype == np.float16
    said = capsys.readouterr().out
    assert "left as the base's: ids" in said and "written in the base's: w" in said


@pytest.mark.parametrize("name", ["averaging", "ties", "random_mix"])
def test_whole_numbers_of_every_type_are_the_bases_to_the_bit(name, tmp_path, capsys):
    limits = {
        kind: np.asarray([np.iinfo(kind).min, np.iinfo(kind).max - 1], kind)
        for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    }
    base = {**limits, "mask": np.asarray([True, False]), "w": np.zeros(3, np.float32)}
    models = [
        {**{kind: leaf ^ leaf.dtype.type(n) for kind, leaf in base.items() if kind != "w"},
         "w": np.full(3, n, np.float32)}
        for n in (1, 2)
    ]  # fmt: skip
    found = merged(tmp_path, models, f"--rule={name}", base=base)
    for kind in set(base) - {"w"}:
        assert found[kind].dtype == base[kind].dtype
        assert found[kind].tobytes() == base[kind].tobytes() != models[0][kind].tobytes()
    assert found["w"].any()
    said = re.search("left as the base's: (.*) and 3 more", capsys.readouterr().out)
    assert said and set(said[1].split(", ")) < set(base) - {"w"}


def test_keys_in_an_orbax_folder_stay_the_bases_and_text_is_refused_by_name(tmp_path, capsys):
    def saved(folder, seed, **more):
        with orbax.PyTreeCheckpointer() as checkpointer:
            tree = {"w": jnp.full(3, float(seed)), "key": jax.random.key(seed), "none": None}
            checkpointer.save(tmp_path / folder, {**tree, "step": np.int64(2**60 + seed), **more})
        return tmp_path / folder

    paths = [saved(f"model{seed}", seed) for seed in range(3)]
    output = tmp_path / "out.safetensors"
    given = [f"--models={paths[1]},{paths[2]}", f"--output={output}"]
    call("merge", f"--base={paths[0]}", *given)
    found = load_file(output)
    assert found["w"].tolist() == [1.5] * 3 and int(found["step"]) == 2**60
    assert found["key"].tolist() == jax.random.key_data(jax.random.key(0)).tolist()
    assert "left as the base's: key, step" in capsys.readouterr().out
    line = refused(capsys, "merge", f"--base={saved('text', 0, name='vit')}", *given, "--overwrite")
    assert re.search("--base=.*text: name is text, which safetensors does not hold; save", line)
    complex_one = saved("complex", 0, c=np.ones(2, np.complex64))
    line = refused(capsys, "merge", f"--base={complex_one}", *given, "--overwrite")
    assert re.search("--base=.*complex: c is complex64, which safetensors does not hold", line)


def test_metadata_says_how_the_file_was_made(tmp_path):
    merged(tmp_path, [tensors(1), tensors(2)])
    with safetensors.safe_open(tmp_path / "out.safetensors", "numpy") as file:
        found = file.metadata()
    assert found["format"] == "pt" and found["rule"] == "averaging"
    assert found["made_by"].startswith("pm_jax ")
    sources = json.loads(found["made_from"])
    assert [model["name"] for model in sources["models"]] == ["m0.safetensors", "m1.safetensors"]
    digest = hashlib.sha256((tmp_path / "base.safetensors").read_bytes()).hexdigest()
    assert sources["base"]["sha256"] == digest and str(tmp_path) not in str(found)


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    arguments = arguments_of(tmp_path, [tensors(1)])
    before = sorted(tmp_path.iterdir())
    read = tensor_files.TensorFile.read

    def failing(self, name, first, stop):
        if name == "scale":
            raise KeyboardInterrupt
        return read(self, name, first, stop)

    monkeypatch.setattr(tensor_files.TensorFile, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        call("merge", *arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_is_kept_unless_told_and_never_an_input(tmp_path, capsys):
    arguments = arguments_of(tmp_path, [tensors(1), tensors(2)])
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    assert re.search("--output=.*: exists", refused(capsys, "merge", *arguments))
    assert output.read_bytes() == b"old"
    call("merge", *arguments, "--overwrite")
    assert set(load_file(output)) == set(SHAPES)
    onto = [*arguments, f"--output={tmp_path / 'm1.safetensors'}", "--overwrite"]
    assert "is one of the inputs" in refused(capsys, "merge", *onto)


@pytest.mark.slow
def test_the_task_models_of_a_run_merge_to_the_model_of_the_run(tmp_path, capsys):
    config = dataclasses.replace(small_runs.BY_CLASS, rule="averaging")
    run_seeds(config, [0], tmp_path / "run", RunOptions(quiet=True, keep_task_models=True))
    seed = tmp_path / "run" / "seed_0"
    call("merge", f"--run={seed}", f"--output={tmp_path / 'out.safetensors'}")
    found = load_file(tmp_path / "out.safetensors")
    params = trees.leaves_by_path(Learner(config, 0, seed, QUIET).finished_params())
    assert set(params) - set(found) == {"head/kernel", "head/bias"}
    for name in found:
        np.testing.assert_allclose(found[name], params[name], rtol=1e-5, atol=1e-7)
    theta_0 = load_file(seed / "task_models" / "theta_0.safetensors")
    first = load_file(seed / "task_models" / "task_1.safetensors")
    assert all(np.array_equal(theta_0[name], first[name]) for name in theta_0)  # from scratch
    both = refused(capsys, "merge", f"--run={seed}", "--base=b.safetensors")
    assert re.search("--run=.*: stands for base and models", both)
    (tmp_path / "other").mkdir()
    none = refused(
        capsys, "merge", f"--run={tmp_path / 'other'}", f"--output={tmp_path / 'x.safetensors'}"
    )
    assert re.search("--run=.*other: holds no task models; .*keep_task_models", none)


def test_orbax_and_safetensors_merge_alike(tmp_path, capsys):
    models = [tensors(1), tensors(2, jnp.bfloat16)]
    wanted = merged(tmp_path, models)
    for model in models:
        del model["empty"]  # Orbax does not take it
    with orbax.StandardCheckpointer() as checkpointer:
        for number, model in enumerate(models):
            checkpointer.save(tmp_path / f"orbax{number}", {"blocks": model, "step": np.asarray(3)})
            written(
                tmp_path,
                f"n{number}",
                {f"blocks/{k}": v for k, v in model.items()} | {"step": np.asarray(3)},
            )
    for base in ("orbax0", "n0.safetensors"):
        call(
            "merge",
            f"--base={tmp_path / base}",
            f"--output={tmp_path / 'o.safetensors'}",
            "--overwrite",
            f"--models={tmp_path / 'orbax0'},{tmp_path / 'n1.safetensors'}",
        )
        found = load_file(tmp_path / "o.safetensors")
        assert set(found) == {"step", *(f"blocks/{name}" for name in models[0])}
        for name in models[0]:
            assert np.array_equal(found[f"blocks/{name}"], wanted[name])
    given = [f"--models={tmp_path / 'orbax0'}", f"--output={tmp_path / 'x.safetensors'}"]
    before = sorted(tmp_path.iterdir())
    (tmp_path / "orbax1" / "_METADATA").unlink()
    line = refused(capsys, "merge", f"--base={tmp_path / 'orbax1'}", *given)
    assert re.search("--base=.*orbax1: cannot be read as a checkpoint of Orbax", line)
    line = refused(capsys, "merge", f"--base={tmp_path / 'base.safetensors'}", *given)
    assert re.search("--models=.*orbax0: does not hold .*lacks blocks.0.attn.qkv", line)
    assert sorted(tmp_path.iterdir()) == before


def changed(**tensor):
    return {**tensors(1), **tensor}


BAD = {
    "names": (
        {"models": [{"scale": np.ones((), np.float32), "z": np.ones(1)}]},
        r"--models=.*m0\S*: .*lacks \S*qkv, lacks \S*mlp, lacks empty, also has z; give",
    ),
    "kind": ({"models": [changed(scale=np.asarray(1))]}, "scale is I64, not F32"),
    "type": (
        {"models": [changed(scale=np.asarray(1, jnp.float8_e4m3fn))]},
        "scale is of type F8_E4M3; convert",
    ),
    "range": (
        {"base": tensors(0, np.float16), "models": [changed(scale=np.asarray(1e6))]},
        "--rule=averaging: takes scale out of the range of float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    """Tensors that do not go together; all else is in mistakes.md."""
    options, pattern = BAD[case]
    arguments = arguments_of(tmp_path, **{"models": [tensors(1)], **options})
    before = sorted(tmp_path.iterdir())
    line = refused(capsys, "merge", *arguments)
    assert re.search(pattern, line), line
    assert sorted(tmp_path.iterdir()) == before
