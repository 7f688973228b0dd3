"""What the benchmarks count and say; that they run is tested here and in package_test.py."""

import dataclasses
import gc
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmarks import accelerator, many_tasks, peer
from pm_jax import classifiers, lora, trees
from pm_jax.continual import Config
from pm_jax.continual.training.logits import logits_of
from tests.small_runs import forget_programs

ROOT = pathlib.Path(__file__).parents[2]


def product_flops(jaxpr):
    """Two per multiplication in the matrix products and convolutions of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        total += sum(product_flops(getattr(v, "jaxpr", v)) for v in inner)
        size = equation.outvars[0].aval.size if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * size * int(np.prod([shape[axis] for axis in contracted]))
        elif equation.primitive.name == "conv_general_dilated":
            total += 2 * size * int(np.prod(equation.invars[1].aval.shape[:-1]))
    return total


def test_flops_of_a_step_are_those_of_its_program():
    config = dataclasses.replace(accelerator.TINY.config, depth=3, lora_rank=5)
    model = config.network(10)
    images = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"]
    adapters = jax.eval_shape(
        lambda key, p: lora.init(key, p, config.kernel_pattern, 5), jax.random.key(0), params
    )
    head = {path: leaf for path, leaf in trees.leaves_by_path(params).items() if "head/" in path}

    def loss(trainable, params, images):
        adapters, head = trainable
        with lora.branch(adapters):
            logits = logits_of(model, trees.replace(params, head), images, jnp.ones(10, bool))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(2, int)).sum()

    program = jax.make_jaxpr(jax.value_and_grad(loss))((adapters, head), params, images)
    assert product_flops(program.jaxpr) == 2 * accelerator.step_flops(config, 24)


def test_what_does_not_fit_the_budget_is_skipped_and_a_failure_costs_its_rows_only(capsys):
    table = accelerator.Table(100.0)
    table.stage(["too long"], 1000, lambda: pytest.fail("was run"))
    table.stage(["a", "b"], 0, lambda: [1 / 0])
    table.stage(["ours / peer"], 0, lambda: [2.5])
    assert table.rows == {
        "too long": "skipped: out of time",
        "a": "failed: ZeroDivisionError: division by zero",
        "b": "failed: ZeroDivisionError: division by zero",
        "ours / peer": 2.5,
    }
    assert capsys.readouterr().out.splitlines()[-1].endswith("2.500  (goal 2)")


def test_a_peer_that_hangs_costs_its_time_limit_only(monkeypatch, tmp_path):
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o700)
    monkeypatch.setattr(peer, "missing_package", lambda: "")
    monkeypatch.setattr(accelerator.sys, "executable", str(hangs))
    found = accelerator.peer_rate(accelerator.TINY, 0.0, compiled=True)
    assert found == "not measured: no result after 1 s"


@pytest.mark.slow
def test_accelerator_runs_small(tmp_path):
    path = tmp_path / "table.json"
    command = [
        *(sys.executable, "-m", "experiments.benchmarks.accelerator", "--tiny"),
        *("--budget_minutes=60", f"--json={path}"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(path.read_text())
    assert [line.split("  ")[0] for line in ended.stdout.splitlines() if line[0] != " "] == [
        name for name in rows if name[0] != " "
    ]
    reasons = {name: value for name, value in rows.items() if isinstance(value, str)}
    assert not [value for value in reasons.values() if value.startswith(("failed", "skipped"))]
    if not importlib.util.find_spec("torch"):
        eager = reasons["transformers + peft, images/s"]
        assert eager == "not measured: torch is not installed"
    phases = [value for name, value in rows.items() if name.startswith("  of it")]
    assert 0 < sum(phases) < rows["whole run, s"]


@pytest.mark.slow
def test_classifiers_are_measured_small():
    sizes = {"width": 8, "examples": 300, "classes": 5, "random_features": 40}
    flags = [f"--benchmark_{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "experiments.benchmarks.classifiers", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    named = {line.split()[0] for line in lines if line}
    assert named >= {*classifiers.REGISTRY, "drift", "all", "ridge,"}
    assert float(lines[-1].split()[-1]) > 50  # MB


@pytest.mark.slow
def test_nothing_but_records_grows_with_the_tasks(tmp_path):
    forget_programs()
    gc.collect()  # what other tests have left on the device
    config = Config(num_tasks=8, epochs=1, first_task_epochs=1, hidden_sizes=(512,), batch_size=128)
    rows = many_tasks.measured(config, tmp_path)
    assert len(rows) == 8 and rows[0]["compilations"] > 5
    assert sum(row["compilations"] for row in rows[2:]) == 0
    for name in ("device MB", "state MB"):
        assert len({row[name] for row in rows[2:]}) == 1 and rows[2][name] > 0
    # Stored compressed: of equal size but for how well the numbers and records compress.
    sizes = [row["checkpoint MB"] for row in rows[2:]]
    assert max(sizes) / min(sizes) < 1.1 and min(sizes) > 0.2 * rows[2]["state MB"]
    assert all(row["resident MB"] > row["device MB"] for row in rows)


def test_trends_are_those_of_a_known_line_with_its_error():
    noise = (1.0, -1.0, -1.0, 1.0)  # orthogonal to the line
    rows = [{"MB": 50.0}] * 3 + [{"MB": 7 + 2.0 * t + noise[t]} for t in range(4)]
    (found,) = many_tasks.trends(rows).values()
    # Residual variance 4 / 2, by the sum of squares 5 of the tasks.
    np.testing.assert_allclose(found, (10.0, 2.0, np.sqrt(2 / 5)), rtol=1e-12)
