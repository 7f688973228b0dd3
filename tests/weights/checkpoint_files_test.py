"""Which files a path names: folders of transformers, shards, Orbax, and what is refused."""

import json
import re

import pytest

from pm_jax.types import InvalidInput
from pm_jax.weights import checkpoint_files


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def sharded(folder, shards=2, name="model", **weight_map):
    names = [f"{name}-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    touched(folder, *names)
    weight_map = weight_map or {f"w{n}": shard for n, shard in enumerate(names)}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{name}.safetensors.index.json").write_text(index)
    return folder


def names(found):
    return [path.name for path in found.tensors]


def test_a_folder_of_transformers_is_its_model_with_what_lies_beside(tmp_path):
    small = ("config.json", "tokenizer.json", "merges.txt", "LICENSE", "1_Pooling/config.json")
    others = ("README.md", "training_args.bin", "model.onnx", "onnx/config.json")
    folder = touched(tmp_path, "model.safetensors", "model.fp16.safetensors", *small, *others)
    found = checkpoint_files.find("base", folder)
    assert (found.kind, names(found)) == ("safetensors", ["model.safetensors"])
    beside = {str(path.relative_to(folder)) for path in found.beside}
    assert beside == set(small) and found.config == folder / "config.json"


def test_shards_are_found_by_their_index(tmp_path):
    folder = touched(sharded(tmp_path), "config.json", "consolidated.safetensors")
    for path in (folder, folder / "model.safetensors.index.json"):
        found = checkpoint_files.find("base", path)
        assert names(found) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        assert found.shard_of == dict(zip(["w0", "w1"], found.tensors, strict=True))
        assert [path.name for path in found.beside] == ["config.json"]


@pytest.mark.parametrize(
    ("made", "asked", "wanted"),
    [
        (["_METADATA", "d/0"], "", ""),
        (["params/_METADATA", "data/metadata", "_CHECKPOINT_METADATA"], "", "params"),
        (["9/default/_METADATA", "10/default/_METADATA"], "", "10/default"),
        (["9/default/_METADATA", "10/default/_METADATA"], "@9", "9/default"),
        (["step_008/_METADATA", "step_020/_METADATA", "step_020.tmp/_METADATA"], "", "step_020"),
    ],
)
def test_a_tree_of_orbax_is_the_newest_step_or_the_one_that_is_named(made, asked, wanted, tmp_path):
    folder = touched(tmp_path / "saved", *made)
    found = checkpoint_files.find("base", f"{folder}{asked}")
    assert found == checkpoint_files.CheckpointFiles("orbax", (folder / wanted,))


REFUSED = {
    "a pickle": (["pytorch_model.bin"], "pytorch_model.bin is a pickle, .*convert it in PyTorch"),
    "nothing": (["config.json"], "holds no model"),
    "another kind": (["model.gguf"], "holds model.gguf and no .safetensors; convert"),
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], "is an adapter of PEFT"),
    "two models": (["a.safetensors", "b.safetensors"], "several models, a.safetensors, b.safe"),
    "no index": (["model-00001-of-00002.safetensors"], "holds shards and no model.safetensors.ind"),
    "two trees": (["4/a/_METADATA", "4/b/_METADATA"], "4 holds several trees, a, b; give .*4/a"),
    "an index of nothing": (["model.safetensors.index.json"], "cannot be read .*get it anew"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_refused_with_the_remedy(case, tmp_path):
    made, pattern = REFUSED[case]
    with pytest.raises(InvalidInput, match=rf"^base={re.escape(str(tmp_path))}: .*{pattern}"):
        checkpoint_files.find("base", touched(tmp_path, *made))


def test_shards_that_are_missing_or_lie_elsewhere_are_refused(tmp_path):
    lacking = sharded(tmp_path / "lacking", a="model-00001-of-00002.safetensors", b="gone")
    with pytest.raises(InvalidInput, match="lacks gone, which model.safetensors.index.json names"):
        checkpoint_files.find("base", lacking)
    outside = sharded(tmp_path / "outside", a="../lacking/gone")
    with pytest.raises(InvalidInput, match="names ../lacking/gone, outside of the folder"):
        checkpoint_files.find("base", outside)
    with pytest.raises(InvalidInput, match="is one shard of a model; give its folder, "):
        checkpoint_files.find("base", sharded(tmp_path / "s") / "model-00001-of-00002.safetensors")
    both = touched(sharded(tmp_path / "both"), "model.safetensors")
    with pytest.raises(InvalidInput, match="holds both model.safetensors and model.safe.*give one"):
        checkpoint_files.find("base", both)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("google/vit", "hf download google/vit --local-dir=FOLDER, and give the folder"),
        ("https://huggingface.co/google/vit", "hf download google/vit --local"),
        ("nothing", "nothing is downloaded; give a file or folder that is there"),
        ("x/y.safetensors", "there is no such file$"),
        (__file__, "must be a .safetensors or .npz file, or a folder"),
    ],
)
def test_what_is_not_on_this_disk_is_not_downloaded(path, pattern):
    with pytest.raises(InvalidInput, match=pattern):
        checkpoint_files.find("base", path)


def test_shards_must_hold_what_their_index_says(tmp_path):
    found = checkpoint_files.find("base", sharded(tmp_path))
    first, second = found.tensors
    checkpoint_files.check_shards("base", tmp_path, found, {first: ["w0"], second: ["w1"]})
    for content, pattern in (
        (
            {first: ["w0", "w1"], second: ["w1"]},
            "w1 is in two shards, model-00001.* and model-00002",
        ),
        ({first: ["w0"], second: []}, "w1 is in no shard, not in model-00002"),
        ({first: ["w0"], second: ["w1", "w2"]}, "w2 is in model-00002.*, not in the index"),
        ({first: ["w1"], second: ["w0"]}, "w0 is in model-00002.*, not in model-00001"),
    ):
        with pytest.raises(InvalidInput, match=pattern):
            checkpoint_files.check_shards("base", tmp_path, found, content)
