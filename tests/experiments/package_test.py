import ast
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

import pm_jax
from experiments.benchmarks import peer
from tests.one_process import outputs

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = ("tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn", "absl.flags")


def test_import_loads_nothing_heavy():
    """Beyond what jax, flax, optax and chex load themselves."""
    script = (
        "import sys, jax, flax.linen, optax, chex; before = set(sys.modules); import pm_jax; "
        "print(*sorted(set(sys.modules) - before))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    loaded = ended.stdout.split()
    assert "pm_jax.rules" in loaded, ended.stderr
    assert [name for name in loaded if name.startswith(HEAVY)] == []
    # A part of jax that jax does not load by itself is as light as jax.
    assert all(name.startswith(("pm_jax", "jax.")) for name in loaded), loaded


def test_import_alone_loads_nothing_heavy():
    script = "import sys, pm_jax; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    loaded = set(ended.stdout.split())
    for name in ("tensorflow", "tensorflow_datasets", "orbax.checkpoint", "matplotlib", "sklearn"):
        assert name not in loaded


OF_EXTRAS = {
    *("tensorflow_datasets", "sklearn", "PIL", "tensorflow", "matplotlib", "grain", "tokenizers"),
    "tensorboardX",
}


def normalized(name):
    return re.sub("[-_.]+", "-", name).lower()


def required_by(distribution):
    """Names of a package and of all that it brings along, without its extras."""
    found, todo = {normalized(distribution.name)}, [(text, {""}) for text in distribution.requires]
    while todo:
        text, extras = todo.pop()
        requirement = Requirement(text)
        name, marker = normalized(requirement.name), requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if name not in found or requirement.extras:
            wanted = importlib.metadata.requires(name) or []
            todo.extend((text, {"", *requirement.extras}) for text in wanted)
        found.add(name)
    return found


@pytest.mark.slow
def test_the_wheel_works_with_the_packages_that_it_requires_alone(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target=wheel", f"-d{tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    [wheel] = tmp_path.glob(f"pm_jax-{pm_jax.__version__}-*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    [distribution] = importlib.metadata.distributions(path=[str(site)])
    required = required_by(distribution)
    absent = [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not required & set(map(normalized, owners))
    ]
    # Of the packages that it does not require, pm_jax imports those of its extras, when used.
    nodes = [
        node
        for source in (site / "pm_jax").rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
    ]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in names}
    assert imported & set(absent) == OF_EXTRAS & set(absent)
    # In front of the environment's packages, among which there may be the checkout.
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(site)!r}); "
        f"runpy.run_path({str(ROOT / 'tests' / 'wheel_check.py')!r}, run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-I", "-c", script, json.dumps(absent)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{site / 'pm_jax' / '__init__.py'}\n"


BENCHMARKS = {
    "training_step": (
        ["--repeats=1", "--depth=1", "--image_size=32", "--vit_examples=32"],
        "Fisher / two plain epochs",
    ),
    "main_job": (
        ["--repeats=1", "--train_flags=--num_tasks=1,--epochs=1,--hidden_sizes=4"],
        "peak resident MB",
    ),
    "merge_rules": (["--benchmark_model=vit_tiny_patch16", "--benchmark_rules=magmax"], "magmax"),
    "curvature_ladder": (
        [
            *("--model=vit", "--depth=1", "--image_size=32", "--vit_examples=4"),
            *("--repeats=1", "--curvature_rank=2", "--kind=low_rank"),
        ],
        "low_rank",
    ),
    "interruptions": (
        [
            *("--rounds=1", "--kills=1", "--seed=2"),
            "--train_flags=--num_tasks=2,--epochs=1,--hidden_sizes=4,--checkpoint_every=20,"
            "--noreport,--baseline=",
        ],
        "1 of 1 equal",
    ),
    "checkpoint_saves": (
        ["--hidden_sizes=8", "--batch_size=4", "--steps=2", "--repeats=1"],
        "2 steps, asynchronous / no checkpoint",
    ),
    "many_tasks": (
        ["--num_tasks=6", "--hidden_sizes=4", "--run_rules=magmax"],
        "compilations after task 3: 0",
    ),
    "image_folders": (
        ["--images=60", "--side=16", "--stored_size=8", "--repeats=1"],
        "folder / array_record",
    ),
    "offline_merging": (
        ["--depth=1", "--models=1", "--adapter_depth=1", "--adapter_settings=--rank=8"],
        "adapters, --rank=8: ",
    ),
    "finish_task": (
        ["--model=cnn", "--examples=4", "--batch_size=2", "--repeats=1"],
        "compilations after the first task: 0",
    ),
}
"""Arguments that make a benchmark short, and a part of what it prints."""


@pytest.mark.slow
def test_benchmarks_run_small():
    commands = [
        [f"experiments.benchmarks.{module}", *arguments]
        for module, (arguments, _) in BENCHMARKS.items()
    ]
    for (module, (_, expected)), printed in zip(
        BENCHMARKS.items(), outputs(*commands), strict=True
    ):
        assert expected in printed, (module, printed)


@pytest.mark.skipif(not peer.missing_package(), reason="the peer is installed")
def test_a_benchmark_without_the_peer_is_one_line():
    command = [sys.executable, "-m", "experiments.benchmarks.peer"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    line = f"error: {peer.missing_package()} is not installed; pip install 'pm_jax[benchmark]'\n"
    assert ended.stderr == line


@pytest.mark.slow
def test_the_grid_study_runs_small(tmp_path):
    command = [
        *(sys.executable, "-m", "experiments.studies.ablation", f"--workdir={tmp_path}"),
        *("--seeds=0", "--learning_rates=0.001", "--grid_epochs=1", "--arms=joint,sequential"),
        *("--num_tasks=2", "--first_task_epochs=1", "--hidden_sizes=4"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "sequential (learning_rate=0.001, epochs=1)" in ended.stdout


@pytest.mark.slow
def test_the_study_of_rules_and_classifiers_stops_in_time_and_goes_on(tmp_path):
    command = [
        *(sys.executable, "-m", "experiments.studies.rules_and_classifiers"),
        *(f"--workdir={tmp_path}", "--rules=frozen,sequential,averaging", "--seeds=0,1"),
        *("--learning_rates=0.001", "--leading=1", "--scenario=class_incremental"),
        "--classifiers=trained",
        *("--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=4"),
    ]

    def ended(*more):
        process = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
        assert process.returncode == 0, process.stderr
        return process.stdout

    # The first cell begins in any case, the second after more than 6 ms.
    assert "the same command goes on" in ended("--minutes=0.0001")
    first = (tmp_path / "ledger.jsonl").read_text()
    assert first.count("\n") == 1
    output = ended()
    lines = list(map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines()))
    # Three rules with the first seed, the leading one at another rate, three with the second seed.
    assert len(lines) == 7 and json.dumps(lines[0], sort_keys=True) + "\n" == first
    cells = [(line["rule"], line["seed"]) for line in lines]
    rules = ["frozen", "sequential", "averaging"]
    assert cells[:3] == [(rule, 0) for rule in rules] and cells[4:] == [(r, 1) for r in rules]
    [other_rate] = [line for line in lines if line["learning_rate"] == 0.001 and line["seed"] == 0]
    assert other_rate["rule"] in rules[1:]
    for line in lines:
        run = json.loads((tmp_path / line["results"] / "results.json").read_text())
        for split, figures in line["scores"]["trained"].items():
            of_run = run["scores"]["trained"][split]
            assert figures == {name: of_run[name] for name in figures} and len(figures) == 4
    assert not list(tmp_path.rglob("shared_training*"))
    tables = output[output.index("\n| rule (digits, test) ") :]
    assert ended("--tables") == tables and ended() == tables


@pytest.mark.slow
def test_the_map_of_where_merging_pays_runs_small(tmp_path):
    command = [
        *(sys.executable, "-m", "experiments.studies.merging_map", f"--workdir={tmp_path}"),
        *("--learning_rates=0.001", "--map_epochs=1", "--temperatures=1", "--rules=averaging"),
        *("--num_tasks=2", "--first_task_epochs=1", "--hidden_sizes=4"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    gains = {}
    for rule in ("sequential", "averaging"):
        path = tmp_path / "epochs_1_rate_0.001_temp_1" / rule / "summary.json"
        gains[rule] = 100 * json.loads(path.read_text())["final_average_accuracy"]["mean"]
    head, gain = f"| {gains['sequential']:.1f} |", gains["averaging"] - gains["sequential"]
    assert f"| 0.001 | 1 {head} {gain:+.1f} |" in ended.stdout
