"""Rules that look at matrices, in files: layouts, both passes, and the run's own models."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pm_jax import rules, trees
from pm_jax.continual import Learner, RunOptions
from pm_jax.continual.run import run_seeds
from pm_jax.offline import pieces, tensor_files
from tests import small_runs
from tests.binaries import call, refused
from tests.offline.merge_test import in_memory, merged, written
from tests.small_runs import QUIET, slow

FLAX = {
    "fc1/kernel": (6, 9),
    "fc1/bias": (9,),
    "attn/kernel": (6, 2, 4),
    "attn/bias": (2, 4),
    "conv/kernel": (3, 3, 2, 5),
    "conv/bias": (5,),
    "layers/kernel": (2, 5, 4),
    "layers/bias": (2, 4),
    "tokens/embedding": (7, 6),
    "norm/scale": (6,),
}
BOTH = [("opcm", ""), ("null_space", "rank=2")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 16)


def model(seed, dtype=np.float32, shapes=FLAX):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def as_torch(content):
    """The same layers under PyTorch's names, in its layout."""
    layers = ("fc1", "conv", "tokens", "norm")
    found = {}
    for name, leaf in content.items():
        layer, _, kind = name.partition("/")
        if layer in layers:
            theirs = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(kind, kind)
            turned = {2: (1, 0), 4: (3, 2, 0, 1)}.get(leaf.ndim) if kind == "kernel" else None
            module = "word_embeddings" if layer == "tokens" else layer
            found[f"model.{module}.{theirs}"] = leaf.transpose(turned) if turned else leaf
    return {name: np.ascontiguousarray(leaf) for name, leaf in found.items()}


@pytest.mark.parametrize("name, settings", BOTH)
@pytest.mark.parametrize("dtype", [np.float32, slow(np.float64)])
def test_files_of_flax_merge_as_in_memory(name, settings, dtype, tmp_path, capsys):
    base, *models = (model(seed, dtype) for seed in range(4))
    chosen = [f"--rule={name}", f"--rule_settings={settings}"]
    found = merged(tmp_path, models, *chosen, base=base)
    said = capsys.readouterr().out
    wanted = in_memory(
        rules.make(name, settings),
        *({path: jnp.asarray(x) for path, x in base.items()}, models, models),
    )
    for path, leaf in wanted.items():
        assert found[path].dtype == dtype
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=2e-5, err_msg=path)
    assert "attn/kernel, conv/kernel, fc1/kernel" in said
    assert ("read as [in, out], flax's layout" in said) == (name == "null_space")
    assert re.search("as other tensors than matrices: .*tokens/embedding", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["base.safetensors", *(f"m{n}.safetensors" for n in range(3)), "out.safetensors"]
    )


@pytest.mark.parametrize("name, settings", BOTH)
def test_files_of_torch_merge_as_those_of_flax(name, settings, tmp_path, capsys):
    base, *models = (model(seed) for seed in range(4))
    # PyTorch orders the inputs of a convolution in another way, which permutes rows.
    chosen = [f"--rule={name}", f"--rule_settings={settings}"]
    kept = [n for n in FLAX if n.split("/")[0] in ("fc1", "conv", "tokens", "norm")]
    ours = merged(
        tmp_path, [{n: m[n] for n in kept} for m in models], *chosen,
        base={n: base[n] for n in kept},
    )  # fmt: skip
    (tmp_path / "torch").mkdir()
    theirs = merged(tmp_path / "torch", [as_torch(m) for m in models], *chosen, base=as_torch(base))
    said = capsys.readouterr().out
    for path, leaf in as_torch(ours).items():
        np.testing.assert_allclose(theirs[path], leaf, rtol=1e-5, atol=2e-5, err_msg=path)
    assert ("read as [out, in], torch's layout: " in said) == (name == "null_space")
    # Read from the wrong side, the filter is another one: only what has sides is told them.
    wrong = merged(
        tmp_path / "torch", [as_torch(m) for m in models], *chosen, "--layout=flax",
        "--overwrite", base=as_torch(base),
    )["model.fc1.weight"]  # fmt: skip
    close = np.allclose(wrong, theirs["model.fc1.weight"], atol=1e-4)
    # Without the convolution among the matrices OPCM has another length.
    assert not close


def test_a_name_that_does_not_tell_the_side_is_refused_where_it_matters(tmp_path, capsys):
    shapes = {"w": (4, 5)}
    base, *models = (model(seed, shapes=shapes) for seed in range(3))
    paths = [written(tmp_path, f"m{n}", content) for n, content in enumerate([base, *models])]
    given = [f"--base={paths[0]}", f"--models={paths[1]},{paths[2]}"]
    given += [f"--output={tmp_path / 'out.safetensors'}", "--overwrite"]
    line = refused(capsys, "merge", *given, "--rule=null_space")
    assert re.search(r"--layout=: w of shape \[4, 5\] is named neither kernel", line)
    found = {}
    for layout in ("flax", "torch"):
        call("merge", *given, "--rule=null_space", "--rule_settings=rank=1", f"--layout={layout}")
        found[layout] = load_file(tmp_path / "out.safetensors")["w"]
        assert f"read as {'[in, out]' if layout == 'flax' else '[out, in]'}" in (
            capsys.readouterr().out
        )
    assert not np.allclose(found["flax"], found["torch"], atol=1e-3)
    for layout in ("", "flax", "torch"):
        call("merge", *given, "--rule=opcm", f"--layout={layout}")
        found[layout] = load_file(tmp_path / "out.safetensors")["w"]
    for layout in ("flax", "torch"):
        np.testing.assert_allclose(found[layout], found[""], atol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_opcm_of_files_keeps_lengths_over_all_tensors(count, tmp_path):
    base, *models = (model(seed) for seed in range(count + 1))
    found = merged(tmp_path, models, "--rule=opcm", base=base)

    def length(content):
        return np.sqrt(sum(((content[n] - base[n]).astype(np.float64) ** 2).sum() for n in base))

    mean = np.mean([length(content) for content in models])
    assert length(found) == pytest.approx(mean, rel=1e-5)


def test_no_more_than_a_tensor_is_read_at_once(tmp_path, monkeypatch):
    read, sizes = tensor_files.TensorFile.read, []
    monkeypatch.setattr(
        tensor_files.TensorFile,
        "read",
        lambda self, name, first, stop: sizes.append(stop - first) or read(self, name, first, stop),
    )
    base, *models = (model(seed) for seed in range(3))
    merged(tmp_path, models, "--rule=opcm", base=base)
    total = sum(leaf.size for leaf in base.values())
    # Three files once and theta_0 with each of them; then theta_0 and the displacement.
    assert max(sizes) == 3 * 3 * 2 * 5 and sum(sizes) == (2 * 3 + 2) * total


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, settings",
    [
        *BOTH,
        ("null_space", "rank=2,pattern=hidden.*kernel"),
        ("slao", ""),
        ("averaging", "power=0.3"),
    ],
)
def test_the_models_of_a_run_merge_to_the_model_of_the_run(name, settings, tmp_path):
    config = dataclasses.replace(
        small_runs.BY_CLASS, rule=name, rule_settings=settings, perturbation="none",
        learning_rate=1e-2,
    )  # fmt: skip
    run_seeds(config, [0], tmp_path / "run", RunOptions(quiet=True, keep_task_models=True))
    seed = tmp_path / "run" / "seed_0"
    output = tmp_path / "out.safetensors"
    chosen = [f"--rule={name}", f"--rule_settings={settings}"]
    call("merge", f"--run={seed}", f"--output={output}", *chosen)
    found = load_file(output)
    params = trees.leaves_by_path(Learner(config, 0, seed, QUIET).finished_params())
    theta_0 = load_file(seed / "task_models" / "theta_0.safetensors")
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, params[path], rtol=1e-5, atol=1e-6, err_msg=path)
    moved = {path for path, leaf in found.items() if np.abs(leaf - theta_0[path]).max() > 1e-3}
    assert "hidden_0/kernel" in moved and ("hidden_0/bias" in moved) == (name != "null_space")
