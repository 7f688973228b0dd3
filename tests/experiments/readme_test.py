"""README: its length, its links, and its code and commands, which run on small data."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from tests import bad_files
from tests.binaries import call

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMALL_RUN = ["--num_tasks=2", "--epochs=1", "--hidden_sizes=4", "--noreport"]
SMALL_MODEL = ["--model=vit", "--pretrained=", "--depth=1", "--width=16", "--num_heads=2"]


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands():
    """The programs of experiments/ that README calls, each with its arguments, in its order."""
    text = "\n".join(blocks("bash") + blocks("")).replace("\\\n", " ")
    found = re.findall(r"python -m experiments\.(\w+)([^\n]*)", text)
    return [(binary, *shlex.split(arguments)) for binary, arguments in found]


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 180
    in_code = False
    for line in lines:
        in_code ^= line.startswith("```")
        # The first command is one line, and the table below it is as wide as it is printed.
        assert len(line) < 120 or in_code, line


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_first_command_is_the_gates():
    gate = (ROOT / ".ci" / "run").read_text()
    install, run = blocks("bash")[0].split(" && ")[2:]
    assert install.split()[:2] == ["pip", "install"] and install.split()[-2:] == ["-e", "'.[test]'"]
    assert " ".join(install.split()[-2:]) in gate
    assert run.split()[:3] == ["python", "-m", "experiments.train"]
    assert blocks("bash")[1].split(" && ")[1].removesuffix("\n").removeprefix("python") in gate


def test_its_loop_is_a_loop():
    """A task's merge lies between its two models, at the coefficient that the rule says."""
    [code] = blocks("python")
    inputs = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    labels = np.arange(16).reshape(2, 8) % 3

    def logits_fn(params, inputs):
        return inputs @ params["kernel"]

    def loss_fn(params, batch):
        logits = logits_fn(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    names = {
        "jax": jax,
        "key": jax.random.key(0),
        "logits_fn": logits_fn,
        "loss_fn": loss_fn,
        "params": {"kernel": jnp.zeros((4, 3))},
        "tasks": [[(x, y)] for x, y in zip(inputs, labels, strict=True)],
    }
    step = "params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients); trained = params"
    before = "start = state.start"
    code = code.replace("...  # your optimiser", step)
    exec(code.replace("        gradients", f"        {before}\n        gradients"), names)
    alpha, start, trained, merged = (
        names["info"].alpha,
        *(names[name]["kernel"] for name in ("start", "trained", "params")),
    )
    assert 0 < alpha < 1
    np.testing.assert_allclose(merged, start + alpha * (trained - start), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_its_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad_files.photos(tmp_path)
    tensors = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for number, name in enumerate(("base", "a", "b")):
        moved = {key: value + number for key, value in tensors.items()}
        safetensors.numpy.save_file(moved, f"{name}.safetensors")
    first, tour, photos, compare, merge, inspect, seeds = commands()
    call(*first, *SMALL_RUN)
    call(*seeds, "--dry_run")
    call(*tour, "--dry_run")
    call(*photos, *SMALL_MODEL, "--num_tasks=2", "--dry_run")
    call(*compare, "--dry_run")
    call(*merge)
    merged = safetensors.numpy.load_file("merged.safetensors")["kernel"]
    np.testing.assert_allclose(merged, tensors["kernel"] + 1.5, rtol=1e-6)
    capsys.readouterr()
    call(*inspect)
    assert "runs/digits" in capsys.readouterr().out
