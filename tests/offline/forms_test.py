"""The forms that models come in and leave in: shards, folders, `.npz`, Orbax; types; recipes."""

import json
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from orbax import checkpoint as orbax
from safetensors.numpy import load_file, save_file

from pm_jax.offline import pieces, tensor_files
from tests.binaries import call, refused

SHAPES = {
    "embed.weight": (30, 4),
    "layer.weight": (4, 6),
    "layer.bias": (6,),
    "head.weight": (3, 4),
}
BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", BLOCK)


def tensors(seed, dtype=np.float32, **instead):
    rng = np.random.default_rng(seed)
    whole = {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}
    return {name: x for name, x in (whole | instead).items() if x is not None}


def folder_of(path, content, shards=1, **config):
    """A folder as transformers writes it."""
    path.mkdir()
    names = list(content)
    parts = [names[n::shards] for n in range(shards)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in zip(files, parts, strict=True):
        save_file({name: content[name] for name in part}, path / file, {"format": "pt"})
    config = {"model_type": "bert", "torch_dtype": "float32", **config}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text('{"words": []}')
    (path / "README.md").write_text("the base's card")
    return path


def loaded(folder):
    """All tensors of a folder, by its index as transformers reads it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(places.values())}
    assert sorted(places) == sorted(name for file in files.values() for name in file)
    return {name: files[file][name] for name, file in places.items()}


def merge(base, models, output, *more):
    call("merge", f"--base={base}", f"--models={','.join(map(str, models))}",
         f"--output={output}", *more)  # fmt: skip


def mean(*models):
    return {n: np.mean([m[n].astype(np.float64) for m in models], axis=0) for n in models[0]}


def assert_close(found, wanted, dtype=np.float32, atol=1e-6):
    assert set(found) == set(wanted)
    for name, leaf in wanted.items():
        assert found[name].dtype == dtype and found[name].shape == leaf.shape
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=atol, err_msg=name)


def test_shards_merge_into_shards_as_those_of_the_base(tmp_path, monkeypatch):
    read, sizes = tensor_files.TensorFile.read, []
    monkeypatch.setattr(
        tensor_files.TensorFile,
        "read",
        lambda self, name, first, stop: sizes.append(stop - first) or read(self, name, first, stop),
    )
    models = [tensors(seed) for seed in range(3)]
    base = folder_of(tmp_path / "base", models[0], shards=3)
    # One of them is sharded in another way, another is a single file.
    first = folder_of(tmp_path / "first", models[1], shards=2)
    save_file(models[2], tmp_path / "second.safetensors")
    merge(base, [first, tmp_path / "second.safetensors"], tmp_path / "out")
    out = tmp_path / "out"
    assert_close(loaded(out), mean(*models[1:]))
    assert max(sizes) <= BLOCK
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    beside = ["README.md", "config.json", "tokenizer.json", "model.safetensors.index.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*beside, *names])
    for name in names:
        assert set(load_file(out / name)) == set(load_file(base / name))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    numbers = sum(leaf.size for leaf in models[0].values())
    assert index["metadata"] == {"total_parameters": numbers, "total_size": 4 * numbers}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    with safetensors.safe_open(out / names[2], "numpy") as file:
        sources = json.loads(file.metadata()["made_from"])
        assert file.metadata()["format"] == "pt"
    assert len(sources["base"]["sha256"]) == 3 and len(sources["models"][0]["sha256"]) == 2


def test_shards_of_a_chosen_size_and_a_type_that_the_config_says_too(tmp_path):
    models = [tensors(1), tensors(2)]
    base = folder_of(tmp_path / "base", models[0], text_config={"dtype": "float32"})
    merge(base, [base, folder_of(tmp_path / "b", models[1])], tmp_path / "out",
          "--dtype=bfloat16", "--shard_size=0.3KB")  # fmt: skip
    assert_close(loaded(tmp_path / "out"), mean(*models), jnp.bfloat16, atol=2e-2)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_the_output_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    models = [tensors(seed) for seed in range(2)]
    base = folder_of(tmp_path / "base", models[0], shards=2)
    out = tmp_path / "out"
    merge(base, [base], out)
    assert "equal those of base" in capsys.readouterr().out
    (out / "note").write_text("of an older merge")
    before = sorted(tmp_path.iterdir())
    other = folder_of(tmp_path / "other", models[1])
    read = tensor_files.TensorFile.read

    def failing(self, name, first, stop):
        if name == "layer.bias":
            raise KeyboardInterrupt
        return read(self, name, first, stop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensor_files.TensorFile, "read", failing)
        merge(base, [other], out, "--overwrite")
    assert sorted(tmp_path.iterdir()) == sorted([*before, other])
    assert_close(loaded(out), models[0])
    merge(base, [other], out, "--overwrite")
    assert_close(loaded(out), models[1])
    assert not (out / "note").exists() and sorted(tmp_path.iterdir()) == sorted([*before, other])
    onto = refused(capsys, "merge", f"--base={base}", f"--models={out}", f"--output={tmp_path}",
                   "--overwrite")  # fmt: skip
    assert "no merge has written" in onto


def test_a_recipe_says_everything_and_comes_back_out(tmp_path, monkeypatch):
    models = [tensors(seed) for seed in range(4)]
    for name, content in zip("base a b c".split(), models, strict=True):
        folder_of(tmp_path / name, content)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.toml").write_text(
        'base = "base"\nmodels = ["a", "b"]\nrule = "task_arithmetic"\nweights = [1, "1/2"]\n'
        'output = "nowhere"\nleave = ["head.*"]\nrule_settings = {scale = 0.5}\n'
        '[settings]\n"layer.*" = {scale = 1}\n'
    )
    call("merge", "--recipe=merge.toml", "--output=out")
    wanted = {
        name: x + (1 if name.startswith("layer") else 0.5)
        * ((models[1][name] - x) + (models[2][name] - x) / 2)
        for name, x in models[0].items()
    }  # fmt: skip
    wanted["head.weight"] = models[0]["head.weight"]
    assert_close(loaded(tmp_path / "out"), wanted)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        recipe = file.metadata()["recipe"]
    assert f"```toml\n{recipe}```" in (tmp_path / "out" / "README.md").read_text()
    assert tomllib.loads(recipe) == {
        "base": "base", "models": ["a", "b"], "weights": [1.0, 0.5], "rule": "task_arithmetic",
        "rule_settings": "scale=0.5", "settings": ["layer.*:scale=1"], "leave": ["head.*"],
        "seed": 0,
    }  # fmt: skip
    (tmp_path / "again.toml").write_text(recipe)
    call("merge", "--recipe=again.toml", "--output=again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, leaf in loaded(tmp_path / "out").items():
        assert again[name].tobytes() == leaf.tobytes()
    call("merge", "--recipe=again.toml", "--output=c.safetensors", "--models=c", "--weights=1")
    assert_close(
        {"layer.bias": load_file(tmp_path / "c.safetensors")["layer.bias"]},
        {"layer.bias": models[3]["layer.bias"]},
    )


def test_what_leave_matches_stays_the_bases_and_may_differ(tmp_path, capsys):
    other = tensors(1, **{"head.weight": np.ones((5, 4), np.float32), "extra.x": np.ones(2)})
    lacking = tensors(2, **{"head.weight": None})
    paths = [folder_of(tmp_path / name, x) for name, x in
             (("base", tensors(0)), ("a", other), ("b", lacking))]  # fmt: skip
    given = (paths[0], paths[1:], tmp_path / "out.safetensors")
    line = refused(capsys, "merge", f"--base={paths[0]}", f"--models={paths[1]},{paths[2]}",
                   f"--output={given[2]}")  # fmt: skip
    assert "also has extra.x, head.weight is [5, 4], not [3, 4]" in line
    merge(*given, "--leave=head.*", "--leave=extra.*")
    found = load_file(given[2])
    assert found["head.weight"].tobytes() == tensors(0)["head.weight"].tobytes()
    np.testing.assert_allclose(
        found["layer.bias"], (other["layer.bias"] + lacking["layer.bias"]) / 2, atol=1e-6
    )
    said = capsys.readouterr().out
    assert "left as the base's, as leave says: head.weight" in said
    assert "left out, as the base has none and leave says so: extra.x" in said


@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize("rule", ["averaging", "dare"])
def test_tied_tensors_merge_once_and_stay_tied(where, rule, tmp_path, capsys):
    """One writer stores a tied head once, another twice; drawn entries are the same for both."""
    contents = [tensors(seed) for seed in range(3)]
    twice = [x | {"lm_head.weight": x["embed.weight"]} for x in contents]
    base = folder_of(tmp_path / "base", (twice if where == "base" else contents)[0])
    models = [folder_of(tmp_path / "a", twice[1]), folder_of(tmp_path / "b", contents[2])]
    merge(base, models, tmp_path / "out.safetensors", f"--rule={rule}")
    found, said = load_file(tmp_path / "out.safetensors"), capsys.readouterr().out
    assert ("lm_head.weight" in found) == (where == "base")
    if where == "base":
        assert found["lm_head.weight"].tobytes() == found["embed.weight"].tobytes()
        assert "tied, so merged once: lm_head.weight with embed.weight" in said
    else:
        assert "which the base does not have: lm_head.weight" in said
    if rule == "averaging":
        np.testing.assert_allclose(
            found["embed.weight"], mean(*contents[1:])["embed.weight"], atol=1e-6
        )


def test_a_head_that_is_not_tied_in_a_model_is_refused(tmp_path, capsys):
    base = folder_of(tmp_path / "base", tensors(0))
    other = tensors(1, **{"lm_head.weight": np.ones((30, 4), np.float32)})
    line = refused(capsys, "merge", f"--base={base}", f"--output={tmp_path / 'out'}",
                   f"--models={folder_of(tmp_path / 'a', other)}")  # fmt: skip
    assert "also has lm_head.weight; give files of one architecture, or leave" in line


def test_the_report_names_what_the_output_equals_and_configs_that_differ(tmp_path, capsys):
    contents = [tensors(seed) for seed in range(2)]
    base = folder_of(tmp_path / "base", contents[0], num_heads=2)
    same = folder_of(tmp_path / "same", contents[0], num_heads=4, id2label={"0": "a"})
    other = folder_of(tmp_path / "other", contents[1], num_heads=2)

    def said(models, *more):
        merge(base, models, tmp_path / "out.safetensors", "--overwrite", *more)
        return capsys.readouterr().out

    whole = said([same])
    assert re.search(r"equal those of base=\S*base, models=\S*same bit for bit", whole)
    assert "same: its config has num_heads=4, not 2; the output has the base's" in whole
    assert re.search(r"equal those of models=\S*other bit", said([other]))
    assert re.search(r"equal those of models=\S*other bit", said([same, other], "--weights=0,1"))
    quiet = said([same, other])
    assert "equal those of" not in quiet and "id2label" not in quiet
    # In another type nothing is the same bit for bit.
    assert "equal those" not in said([same], "--dtype=float64")


def test_npz_merges_with_others_and_comes_out_as_npz(tmp_path):
    models = [tensors(seed, jnp.bfloat16 if seed == 2 else np.float32) for seed in range(3)]
    models[0]["step"] = np.asarray(7)
    for model in models[1:]:
        model["step"] = np.asarray(9)
    models[1]["layer.weight"] = np.asfortranarray(models[1]["layer.weight"])
    np.savez_compressed(tmp_path / "base.npz", **models[0])
    np.savez(tmp_path / "a.npz", **models[1])
    np.savez(tmp_path / "b.npz", **models[2])
    merge(tmp_path / "base.npz", [tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "out.npz")
    merge(tmp_path / "base.npz", [tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "out")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as archive:
        found = dict(archive)
    assert found.pop("step") == 7
    in_folder = loaded(tmp_path / "out")
    assert all(in_folder[name].tobytes() == leaf.tobytes() for name, leaf in found.items())
    assert_close(found, {n: x for n, x in mean(*models[1:]).items() if n != "step"})
    np.savez(tmp_path / "half.npz", **models[2])
    merge(tmp_path / "half.npz", [tmp_path / "b.npz"], tmp_path / "half_out.npz")
    with np.load(tmp_path / "half_out.npz") as archive:
        assert archive["layer.bias"].tobytes() == models[2]["layer.bias"].tobytes()


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)


def test_an_nnx_state_merges_and_can_be_restored_into_the_module(tmp_path):
    modules = [Layers(nnx.Rngs(seed)) for seed in range(3)]
    paths = [tmp_path / f"nnx{n}" for n in range(3)]
    for path, module in zip(paths, modules, strict=True):
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.state(module))
    # The third is one of the steps of a manager, which has a newer one.
    with orbax.CheckpointManager(tmp_path / "manager") as manager:
        for step, module in ((10, modules[2]), (20, modules[0])):
            manager.save(step, args=orbax.args.StandardSave(nnx.state(module)))
    merge(paths[0], [paths[1], f"{tmp_path / 'manager'}@10"], tmp_path / "out")
    state = nnx.state(modules[0])
    with orbax.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out", jax.eval_shape(lambda: state))
    nnx.update(modules[0], restored)
    for path in ("hidden", "norm"):
        found, one, other = (getattr(module, path) for module in modules)
        for name in ("kernel", "bias") if path == "hidden" else ("scale", "bias", "mean"):
            wanted = (getattr(one, name)[...] + getattr(other, name)[...]) / 2
            np.testing.assert_allclose(getattr(found, name)[...], wanted, atol=1e-6)
    merge(
        paths[0],
        [tmp_path / "manager"],
        tmp_path / "out.safetensors",
        "--settings=hidden/kernel:power=1",
    )
    found = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(found["norm/scale"], modules[0].norm.scale[...] * 0 + 1)
    assert "hidden/kernel" in found


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_tree_of_an_orbax_folder_comes_back_with_what_does_not_merge(tmp_path):
    def saved(name, seed):
        tree = {
            "w": [jnp.full(3, float(seed)), np.full(2, seed, np.float32)],
            "key": jax.random.key(seed), "none": None, "step": np.int64(2**60 + seed),
        }  # fmt: skip
        with orbax.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
        return tmp_path / name

    paths = [saved(f"model{seed}", seed) for seed in range(3)]
    merge(paths[0], paths[1:], tmp_path / "out", "--rule=linear", "--weights=0.25,0.75")
    with orbax.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out")
        made = checkpointer.metadata(tmp_path / "out").item_metadata.custom_metadata
    assert [leaf.tolist() for leaf in found["w"]] == [[1.75] * 3, [1.75] * 2]
    assert isinstance(found["w"][0], jax.Array) and isinstance(found["w"][1], np.ndarray)
    assert int(found["step"]) == 2**60 and found["none"] is None
    assert jax.random.key_data(found["key"]).tolist() == [0, 0]
    assert 'rule = "linear"' in made["recipe"]
