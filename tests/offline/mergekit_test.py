"""Rules under mergekit's names against their formulas in float64; PEFT and transformers agree."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pm_jax.offline import pieces
from tests.binaries import call

SHAPES = {"a.weight": (30, 40), "b.weight": (7, 3, 2), "bias": (200,)}
WEIGHTS = np.asarray([0.5, 0.2, 0.3])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 1 << 10)


@pytest.fixture
def models(tmp_path):
    """A base, and models near it, in float64 and in files of float32."""
    made = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        near = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        if made:
            near = {name: made[0][name] + 0.1 * leaf for name, leaf in near.items()}
        near = {name: leaf.astype(np.float32) for name, leaf in near.items()}
        save_file(near, tmp_path / f"{seed}.safetensors")
        made.append({name: leaf.astype(np.float64) for name, leaf in near.items()})
    return made


def merged(folder, *more, seeds=(1, 2, 3)):
    paths = ",".join(str(folder / f"{seed}.safetensors") for seed in seeds)
    output = folder / "out.safetensors"
    call("merge", f"--base={folder / '0.safetensors'}", f"--models={paths}", f"--output={output}",
         "--overwrite", *more)  # fmt: skip
    return load_file(output)


def displaced(models, name):
    return np.stack([model[name] - models[0][name] for model in models[1:]])


def weighted(values):
    return WEIGHTS.reshape(-1, *[1] * (values.ndim - 1)) * values


def linear(models, name):
    return np.sum(weighted(np.stack([model[name] for model in models[1:]])), axis=0)


def task_arithmetic(models, name):
    return models[0][name] + 0.7 * np.sum(weighted(displaced(models, name)), axis=0)


def ties(models, name):
    steps = displaced(models, name)
    for step in steps:
        kept = int(0.3 * step.size)
        step[np.abs(step) < np.sort(np.abs(step), axis=None)[-kept]] = 0
    steps = weighted(steps)
    agreeing = np.sign(steps) == np.where(steps.sum(axis=0) >= 0, 1, -1)
    shares = weighted(agreeing.astype(np.float64)).sum(axis=0)
    return models[0][name] + (steps * agreeing).sum(axis=0) / np.where(shares > 0, shares, 1)


FORMULAS = {
    "linear": (linear, ""),
    "task_arithmetic": (task_arithmetic, "scale=0.7"),
    "ties": (ties, "density=0.3,trim=tensor,scale=1"),
}


@pytest.mark.parametrize("rule", FORMULAS)
def test_weighted_rules_agree_with_float64(rule, models, tmp_path):
    formula, settings = FORMULAS[rule]
    given = [f"--rule={rule}", f"--rule_settings={settings}", "--weights=1/2,0.2,0.3"]
    found = merged(tmp_path, *given)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], formula(models, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scales", [(1e-21, 1e-24), (1e18, 1.0), (1e25, 1e25)])
def test_slerp_of_numbers_whose_squares_are_none_of_float32(scales, models, tmp_path):
    for seed, scale in zip((1, 2), scales, strict=True):
        models[seed] = {name: scale * leaf for name, leaf in models[seed].items()}
        tensors = {name: leaf.astype(np.float32) for name, leaf in models[seed].items()}
        save_file(tensors, tmp_path / f"{seed}.safetensors")
    found = merged(tmp_path, "--rule=slerp", seeds=(1, 2))
    for name in SHAPES:
        low, high = models[1][name], models[2][name]
        angle = np.arccos(np.sum(low * high) / np.linalg.norm(low) / np.linalg.norm(high))
        wanted = np.sin(0.5 * angle) / np.sin(angle) * (low + high)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6 * max(scales) * 4)


def test_slerp_agrees_with_float64(models, tmp_path):
    found = merged(tmp_path, "--rule=slerp", "--rule_settings=t=0.3", seeds=(1, 2))
    for name in SHAPES:
        low, high = models[1][name], models[2][name]
        cosine = np.sum(low * high) / np.linalg.norm(low) / np.linalg.norm(high)
        angle = np.arccos(cosine)
        assert abs(cosine) < 0.9995
        wanted = (np.sin(0.7 * angle) * low + np.sin(0.3 * angle) * high) / np.sin(angle)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)


def test_dare_keeps_a_share_of_the_entries_and_their_sum_in_the_mean(models, tmp_path):
    """As mergekit's dare_linear: entries are w tau / density or 0, independently by model."""
    settings = "on=task_arithmetic,density=0.25,scale=1"
    found = merged(tmp_path, "--rule=dare", f"--rule_settings={settings}", "--weights=2", seeds=[1])
    shares = []
    for name in SHAPES:
        step, wanted = found[name] - models[0][name], 2 / 0.25 * (models[1][name] - models[0][name])
        dropped = np.abs(step) < 1e-6
        np.testing.assert_allclose(step[~dropped], wanted[~dropped], atol=1e-5)
        shares += (~dropped).reshape(-1).tolist()
    # The standard deviation of the mean of 1442 draws is 0.011.
    assert np.mean(shares) == pytest.approx(0.25, abs=0.04)
    steps = [
        merged(tmp_path, "--rule=dare", f"--rule_settings={settings}", f"--seed={seed}")["a.weight"]
        for seed in range(6)
    ]
    wanted = models[0]["a.weight"] + displaced(models, "a.weight").sum(axis=0)
    error = np.mean(steps, axis=0) - wanted
    # Each of three entries of 0.1 has the variance (1 / 0.25 - 1) 0.01, a mean of six a sixth.
    assert np.sqrt(np.mean(error**2)) == pytest.approx(np.sqrt(3 * 3 * 0.01 / 6), rel=0.1)


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_transformers_loads_a_merged_folder_of_shards(dtype, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    theirs = []
    for seed, name in enumerate(("base", "first", "second")):
        torch.manual_seed(seed)
        theirs.append(transformers.BertForSequenceClassification(config).eval())
        theirs[-1].save_pretrained(tmp_path / name, max_shard_size="10KB" if seed != 1 else "1GB")
    call("merge", f"--base={tmp_path / 'base'}", f"--models={tmp_path / 'first'},"
         f"{tmp_path / 'second'}", f"--output={tmp_path / 'out'}", "--rule=linear",
         "--weights=0.25,0.75", f"--dtype={dtype}", "--shard_size=4KB")  # fmt: skip
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 2
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert found.dtype == (torch.bfloat16 if dtype else torch.float32)
    first, second = (dict(model.named_parameters()) for model in theirs[1:])
    with torch.no_grad():
        for name, leaf in theirs[0].named_parameters():
            leaf.copy_(0.25 * first[name] + 0.75 * second[name])
        ids = torch.arange(20).reshape(2, 10)
        wanted = (theirs[0].bfloat16() if dtype else theirs[0])(ids).logits.float().numpy()
        np.testing.assert_allclose(
            found(ids).logits.float().numpy(), wanted, atol=2e-2 if dtype else 1e-5
        )
