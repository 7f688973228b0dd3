"""What the benchmarks count and say; that they run is tested here and in package_test.py."""

import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmarks import accelerator, accelerator_parts, kernels, many_tasks, peer
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
    config = dataclasses.replace(accelerator_parts.TINY.config, depth=3, lora_rank=5)
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
    assert product_flops(program.jaxpr) == 2 * accelerator_parts.step_flops(config, 24)


def test_rows_that_fail_cost_no_others_and_parts_that_do_not_fit_are_skipped(capsys, monkeypatch):
    monkeypatch.setitem(accelerator_parts.SIZES, "broken", None)
    rows = dict(accelerator_parts.run("broken"))
    assert rows.pop("peak device memory, GB, whole run").startswith("not measured: ")
    assert list(rows) == ["whole run, s", *(name for name in rows if name.startswith("  of it"))]
    assert {value[:23] for value in rows.values()} == {"failed: AttributeError:"}
    found = accelerator.measure(["step", "run"], "tiny", 0, "").rows
    skipped = dict.fromkeys(("part step, s", "part run, s"), "skipped: out of time")
    assert found == {"device": "cpu", "jax": jax.__version__} | skipped
    table = accelerator.Table()
    table.add("ours / peer", 2.5)
    table.add("merge, ms", float("nan"))
    assert table.rows == {"ours / peer": 2.5, "merge, ms": "not measured"}
    assert capsys.readouterr().out.splitlines()[-2].endswith("2.500  (goal 1.6)")


def _one_row_and_then(what):
    yield "first", 1.0
    os._exit(3) if what == "death" else time.sleep(1000)


@pytest.mark.slow
def test_a_part_that_hangs_or_dies_costs_its_own_rows_only():
    rows = [*accelerator.measured_apart(_one_row_and_then, ("death",), 60)]
    assert rows == [("first", 1.0), ("  _one_row_and_then", "failed: its process has ended")]
    # By now the server of processes has started, so that the first row comes soon.
    rows = [*accelerator.measured_apart(_one_row_and_then, ("sleep",), 6)]
    assert rows == [("first", 1.0), ("  _one_row_and_then", "given up after 6 s")]


def trace(*planes):
    """A profiler's trace: planes of lines of events, each with a name and milliseconds."""
    number, text = 0, ""
    for plane, lines in planes:
        events, names = "", ""
        for line, kernels_of_line in lines.items():
            events += f'lines {{ name: "{line}" '
            for name, milliseconds in kernels_of_line:
                number += 1
                duration = round(milliseconds * 1e9)
                events += f"events {{ metadata_id: {number} duration_ps: {duration} }} "
                names += (
                    f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}'
                )
            events += "} "
        text += f'planes {{ name: "{plane}" {events} {names} }}\n'
    data = jax.profiler.ProfileData
    return data.from_serialized_xspace(data.text_proto_to_serialized_xspace(text))


def test_kernels_of_a_trace_are_those_of_its_streams_by_name_without_numbers():
    profile = trace(
        ("/host:CPU", {"Stream": [("launch", 50.0)]}),
        (
            "/device:GPU:0",
            {
                "Stream #13(Compute)": [("loop_add_fusion_3", 1.0), ("gemm_64x4", 6.0)],
                "Stream #14(Compute)": [("loop_add_fusion.12", 2.0), ("loop_add_fusion", 1.0)],
                "XLA Modules": [("jit_train", 10.0)],
            },
        ),
    )
    found = kernels.kernels_of(profile)
    assert found == [("gemm_64x4", 1, 6.0, 60.0), ("loop_add_fusion", 3, 4.0, 40.0)]
    assert kernels.as_text(found).splitlines() == [
        "milliseconds  share, %  calls  kernel",
        "       6.000      60.0      1  gemm_64x4",
        "       4.000      40.0      3  loop_add_fusion",
    ]


def test_kernels_are_measured_on_this_machine(tmp_path):
    product = jax.jit(lambda x: jnp.sin(x @ x))
    x = jnp.ones((500, 500))
    product(x)
    milliseconds = kernels.write(lambda: product(x), tmp_path / "kernels.txt")
    rows = [line.split() for line in (tmp_path / "kernels.txt").read_text().splitlines()[1:]]
    assert 0 < milliseconds and sum(float(row[1]) for row in rows) == pytest.approx(100, abs=1)
    assert sum(float(row[0]) for row in rows) == pytest.approx(milliseconds, abs=0.01)
    assert any("dot" in row[-1] or "fusion" in row[-1] for row in rows)


def test_a_peer_that_hangs_costs_its_time_limit_only(monkeypatch, tmp_path):
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o700)
    monkeypatch.setattr(peer, "missing_package", lambda: "")
    monkeypatch.setattr(accelerator_parts.sys, "executable", str(hangs))
    found = accelerator_parts.peer_rate(accelerator_parts.TINY, 0.0, compiled=True)
    assert found == "not measured: no result after 1 s"


@pytest.mark.slow
def test_accelerator_runs_small(tmp_path):
    path, profile = tmp_path / "table.json", tmp_path / "kernels.txt"
    command = [
        *(sys.executable, "-m", "experiments.benchmarks.accelerator", "--tiny"),
        *("--budget_minutes=60", f"--json={path}", f"--profile={profile}"),
    ]
    # It needs none of these, and may run where they are not installed.
    for name in ("tensorflow_datasets", "grain", "sklearn"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('is not installed')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(path.read_text())
    assert [line.split("  ")[0] for line in ended.stdout.splitlines() if line[0] != " "] == [
        name for name in rows if name[0] != " "
    ]
    assert {f"part {name}, s" for name in accelerator.LIMITS} < rows.keys()
    assert {*accelerator.GOALS, "kernels of an epoch, ms"} < rows.keys()
    reasons = {name: value for name, value in rows.items() if isinstance(value, str)}
    bad = ("failed", "skipped", "given up")
    assert not [value for value in reasons.values() if value.startswith(bad)]
    if not importlib.util.find_spec("torch"):
        eager = reasons["transformers + peft, images/s"]
        assert eager == "not measured: torch is not installed"
    names = ("training", "curvature", "merging", "evaluation")
    phases = [rows[f"  of it {name}, s"] for name in names]
    assert 0 < sum(phases) < rows["whole run, s"]
    assert len(profile.read_text().splitlines()) > 2


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
