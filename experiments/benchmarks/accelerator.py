"""The speed of LoRA-P&M on a GPU: one command, under 8 minutes, no network, no data.

python -m experiments.benchmarks.accelerator --json=table.json

Random uint8 images and random weights; needs jax, flax, optax, orbax and absl, and for the peer's
rows torch, transformers and peft. Rows are printed as they are measured, and skipped
once they no longer fit the budget. `--tiny` runs everything on any machine; its figures mean
nothing.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import peer
from experiments.benchmarks.workloads import Workload, interleaved
from pm_jax.continual import Config, RunOptions
from pm_jax.continual.learner import Learner
from pm_jax.continual.merging.programs import StreamShape, programs_of
from pm_jax.data.stream import LabelledArrays, TaskStream, class_incremental
from pm_jax.weights import pretrained

SHARE, EAGER, COMPILED = "share of the matrix rate, %", "ours / peer", "ours / compiled peer"
WHOLE_RUN = "whole run, s"
GOALS = {SHARE: "50", EAGER: "2", COMPILED: "2", WHOLE_RUN: "120"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of what is measured."""

    config: Config
    image_size: int
    steps: int
    repeats: int
    matrix_side: int
    classes: int
    # One more than is trained on: that one is held out.
    train_per_class: int
    test_per_class: int


# The size of ImageNet-R: 24,000 training images, 6,000 test images, 200 classes.
FULL = Sizes(
    Config(
        model="vit_base_patch16",
        adapter="lora",
        scenario="class_incremental",
        num_tasks=10,
        validation_fraction=0.005,
        compute_dtype="bfloat16",
        batch_size=256,
        epochs=10,
        learning_rate=1e-3,
        head_learning_rate=1e-2,
    ),
    *(224, 8, 5, 8192, 200, 121, 30),
)
TINY = Sizes(
    dataclasses.replace(
        FULL.config,
        model="vit",
        patch_size=8,
        width=32,
        depth=1,
        num_heads=2,
        num_tasks=2,
        batch_size=8,
        epochs=1,
    ),
    *(16, 2, 2, 128, 4, 9, 2),
)


class Table:
    """Rows by name, printed as soon as they are measured, within a budget of seconds from now on.

    A row is a number, or the reason why there is none.
    """

    def __init__(self, seconds: float):
        self.rows: dict[str, float | str] = {}
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds left."""
        return self._end - time.monotonic()

    def number(self, name: str) -> float:
        """Return the value of a row, NaN if there is no number."""
        value = self.rows.get(name)
        return value if isinstance(value, float) else math.nan

    def add(self, name: str, value: float | str) -> None:
        """Print and keep a row."""
        if isinstance(value, float) and math.isnan(value):
            value = "not measured"
        self.rows[name] = value
        shown = value if isinstance(value, str) else f"{value:,.3f}"
        goal = f"  (goal {GOALS[name]})" if name in GOALS else ""
        print(f"{name:44s}{shown:>16s}{goal}", flush=True)

    def stage(
        self, names: Sequence[str], seconds: float, measure: Callable[[], Sequence[float | str]]
    ) -> None:
        """Measure some rows together, if the seconds that they are expected to take are left."""
        if self.remaining() < seconds:
            values: Sequence[float | str] = ["skipped: out of time"] * len(names)
        else:
            try:
                values = measure()
            # One row that fails, for lack of memory say, must not cost the others.
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0][:100]
                values = [f"failed: {type(error).__name__}: {reason}"] * len(names)
        for name, value in zip(names, values, strict=True):
            self.add(name, value)


def step_flops(config: Config, image_size: int) -> float:
    """Count the floating-point operations per image of a step with LoRA, forward and backward.

    With T tokens, width D, L blocks, MLP ratio m, rank r, patches of p x p pixels and C classes:

    - forward, a block: dense layers 2 T (4 + 2 m) D^2, attention 4 T^2 D, two adapters 8 T D r;
      patches 2 (T - 1) 3 p^2 D; head 2 D C.
    - backward, a block: gradients of inputs only, as much as forward, for the frozen dense layers;
      twice the forward for attention and adapters, and for the head.
    - nothing trains below the first block's key and value: it needs no gradient of its normalised
      input (3 dense products, those through the adapters' A) or of its queries (2 T^2 D).

    Products of matrices only; norms, softmax, GELU and the optimiser are not counted.
    """
    vit, rank = config.network(10), config.lora_rank
    tokens, width = (image_size // vit.patch_size) ** 2 + 1, vit.width
    dense = 2 * tokens * (4 + 2 * vit.mlp_ratio) * width**2
    attention, adapters = 4 * tokens**2 * width, 8 * tokens * width * rank
    patches = 2 * (tokens - 1) * 3 * vit.patch_size**2 * width
    blocks = vit.depth * (2 * dense + 3 * attention + 3 * adapters)
    unneeded = 6 * tokens * width**2 + 2 * tokens**2 * width + 4 * tokens * width * rank
    return patches + blocks + 6 * width * vit.num_classes - unneeded


def matrix_rate(side: int, repeats: int) -> float:
    """Measure the operations/s of a chain of bfloat16 products of square matrices."""
    length = 16
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16) * side**-0.5

    @jax.jit
    def chain(matrix):
        return jax.lax.fori_loop(0, length, lambda _, x: matrix @ x, matrix)

    seconds = interleaved({"chain": lambda: chain(matrix)}, repeats)["chain"]
    return length * 2 * side**3 / seconds


def peer_rate(sizes: Sizes, seconds: float, *, compiled: bool) -> float | str:
    """Measure the images/s of transformers and peft in a process of its own, or say why not."""
    if name := peer.missing_package():
        return f"not measured: {name} is not installed"
    config = sizes.config
    fields = ("patch_size", "width", "depth", "num_heads", "compute_dtype")
    settings = {name: getattr(config, name) for name in fields}
    command = [
        *(sys.executable, "-m", "experiments.benchmarks.peer", "--only_peer"),
        *(f"--model={config.model}", f"--settings={json.dumps(settings)}"),
        *(f"--image_size={sizes.image_size}", f"--batch_size={config.batch_size}"),
        *(f"--steps={sizes.steps}", f"--repeats={sizes.repeats}", f"--compiled={compiled}"),
        f"--device={'cpu' if jax.default_backend() == 'cpu' else 'cuda'}",
    ]
    # A session of its own: then the workers of torch.compile can be killed with the process.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    seconds = max(seconds, 1.0)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"not measured: no result after {seconds:.0f} s"
    if process.returncode:
        return f"not measured: {(errors.strip().splitlines() or ['no message'])[-1][:100]}"
    return float(output.split()[-1])


def peak_memory() -> float | str:
    """Return the most device memory in use so far, in gigabytes."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in statistics:
        return "not measured: the device does not tell"
    return statistics["peak_bytes_in_use"] / 1e9


def run_seconds(sizes: Sizes) -> tuple[float, ...]:
    """Time a whole run through `Learner`, compilation included, and its phases."""
    rng, shape = np.random.default_rng(0), (sizes.image_size, sizes.image_size, 3)
    train, test = (
        (rng.integers(256, size=(count * sizes.classes, *shape), dtype=np.uint8), labels)
        for count in (sizes.train_per_class, sizes.test_per_class)
        for labels in [np.arange(count * sizes.classes) % sizes.classes]
    )
    arrays = LabelledArrays(*train, *test)

    class RandomImages(Config):
        def task_stream(self, seed: int) -> TaskStream:
            return class_incremental(
                arrays, self.num_tasks, seed, validation_fraction=self.validation_fraction
            )

    settings = dataclasses.asdict(sizes.config)
    params = programs_of(
        sizes.config, StreamShape(sizes.classes, shape, 1, sizes.classes)
    ).training.init(jax.random.key(0))
    heads = sizes.config.network(sizes.classes).num_heads
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "random.npz"
        tensors: dict[str, Any] = dict(pretrained.export_params(params, "augreg", num_heads=heads))
        np.savez(weights, **tensors)
        clock = time.perf_counter()
        config = RandomImages(**{**settings, "pretrained": str(weights)})
        results = Learner(config, seed=0, options=RunOptions(quiet=True)).run()
        seconds = time.perf_counter() - clock
    phases = ("train", "curvature", "merge", "evaluate")
    return seconds, *(results["seconds"][phase] for phase in phases)


def measure(sizes: Sizes, table: Table) -> None:
    """Fill the table, the most telling rows first."""
    config, repeats = sizes.config, sizes.repeats
    size = sizes.image_size
    table.add("device", jax.devices()[0].device_kind)
    table.add("jax", jax.__version__)
    eager, compiled = "transformers + peft, images/s", "the same with torch.compile, images/s"
    table.stage([eager], 20, lambda: [peer_rate(sizes, 75, compiled=False)])
    matrix, rate = "bfloat16 matrix rate, TFLOP/s", "LoRA-P&M epoch, images/s"
    table.stage([matrix], 10, lambda: [matrix_rate(sizes.matrix_side, repeats) / 1e12])
    images = config.batch_size * sizes.steps
    work = Workload(config, (size, size, 3), images)
    perturbed, plain = work.epoch(), work.epoch("none")
    flops = step_flops(config, size)

    def epoch() -> Sequence[float | str]:
        clock = time.perf_counter()
        jax.block_until_ready(perturbed())
        first = time.perf_counter() - clock
        seconds = interleaved({"epoch": perturbed}, repeats)["epoch"]
        share = 100 * flops * images / seconds / (1e12 * table.number(matrix))
        ratio = images / seconds / table.number(eager)
        return [first - seconds, images / seconds, share, ratio, peak_memory()]

    compilation = "compilation of the epoch, s"
    names = [compilation, rate, SHARE, EAGER, "peak device memory, GB"]
    table.stage(names, 60 if size > 100 else 0, epoch)
    seconds = images / table.number(rate)
    # If the epoch was not measured, the row is NaN, which compares as false: the run is tried.
    expected = table.number(compilation) + 3 * repeats * seconds

    def ratios() -> Sequence[float]:
        seconds = interleaved({"perturbed": perturbed, "plain": plain}, repeats)
        return [seconds["perturbed"] / seconds["plain"]]

    def rest() -> Sequence[float]:
        calls = {"fisher": work.fisher, "merge": work.merging(), "accuracy": work.accuracy}
        seconds = interleaved({"epoch": perturbed, **calls}, max(1, repeats // 2))
        evaluated = 2 * images / seconds["accuracy"]
        return [seconds["fisher"] / seconds["epoch"], 1000 * seconds["merge"], evaluated]

    table.stage(["perturbed / plain epoch"], expected, ratios)
    names = ["Fisher of 24 kernels / epoch", "merge, ms", "evaluation, images/s"]
    table.stage(names, 2 * expected, rest)
    trained = sizes.classes * (sizes.train_per_class - 1) * (config.epochs + 3)
    evaluated = sizes.classes * sizes.test_per_class * (config.num_tasks + 1)
    needed = (trained + 0.4 * evaluated) / table.number(rate) + 4 * table.number(compilation)
    phases = [f"  of it {name}, s" for name in ("training", "curvature", "merging", "evaluation")]
    table.stage([WHOLE_RUN, *phases], 1.2 * needed, lambda: run_seconds(sizes))
    table.stage(["peak device memory with the whole run, GB"], 0, lambda: [peak_memory()])
    jax.clear_caches()
    limit = min(150.0, table.remaining())
    table.stage([compiled], 30, lambda: [peer_rate(sizes, limit, compiled=True)])
    table.stage([COMPILED], -math.inf, lambda: [table.number(rate) / table.number(compiled)])


def main(argv: Sequence[str]) -> None:
    """Print the table, and write it if asked."""
    del argv
    # The peer's process needs memory of the same card, of which JAX takes most by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    values = flags.FLAGS
    if not values.tiny and jax.default_backend() == "cpu":
        print("error: jax sees no accelerator; use --tiny to try the program", file=sys.stderr)
        sys.exit(2)
    table = Table(60 * values.budget_minutes)
    measure(TINY if values.tiny else FULL, table)
    if values.json:
        Path(values.json).write_text(json.dumps(table.rows, indent=2) + "\n")


if __name__ == "__main__":
    flags.DEFINE_boolean("tiny", False, "Go through everything with tiny sizes, on any machine.")
    flags.DEFINE_float("budget_minutes", 8.0, "What does not fit is skipped.")
    flags.DEFINE_string("json", "", "File to write the table to as well.")
    app.run(main)
