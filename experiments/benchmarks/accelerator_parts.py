"""The parts of `experiments.benchmarks.accelerator`: generators of rows, and what they measure."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import kernels, peer
from experiments.benchmarks.workloads import Workload, interleaved
from pm_jax.continual import Config, RunOptions
from pm_jax.continual.learner import Learner
from pm_jax.continual.merging.programs import StreamShape, programs_of
from pm_jax.data.stream import LabelledArrays, TaskStream, class_incremental
from pm_jax.weights import pretrained

Row = tuple[str, float | str]
"""A name, and a number or the reason why there is none."""
MATRIX, RATE = "bfloat16 matrix rate, TFLOP/s", "LoRA-P&M epoch, images/s"
SHARE, PEAK = "share of the matrix rate, %", "peak device memory, GB"
FISHER, WHOLE_RUN = "Fisher of 24 kernels / epoch", "whole run, s"
RATE_BESIDE = "  of the epoch beside it, images/s"


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
    # Architectures and image sizes whose epochs are measured besides, by name.
    others: Mapping[str, tuple[str, int]]


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
    others={"ViT-Ti/16": ("vit_tiny_patch16", 160), "ViT-S/16": ("vit_small_patch16", 224)},
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
    others=dict.fromkeys(FULL.others, ("vit", 16)),
)


SIZES = {"full": FULL, "tiny": TINY}
"""The sizes by name: a process is told the name, as settings with their rule are no message."""


def step(size: str, profile: str = "") -> Iterator[Row]:
    """Measure the epoch of training; write its kernels to a file if one is named."""
    sizes = SIZES[size]
    config, repeats = sizes.config, sizes.repeats
    found = dict(_tried([MATRIX], lambda: [matrix_rate(sizes.matrix_side, repeats) / 1e12]))
    yield from found.items()
    matrix = number(found, MATRIX)
    work = _workload(config, sizes.image_size, sizes)
    perturbed = work.epoch()

    def base() -> list[float | str]:
        rate, share, compilation = _epoch(work, perturbed, sizes.image_size, sizes, matrix)
        return [rate, share, peak_memory(), compilation]

    def ratio() -> list[float]:
        seconds = interleaved({"perturbed": perturbed, "plain": work.epoch("none")}, repeats)
        return [seconds["perturbed"] / seconds["plain"]]

    yield from _tried([RATE, SHARE, PEAK, "compilation of the epoch, s"], base)
    if profile:
        yield from _tried(
            ["kernels of an epoch, ms"], lambda: [kernels.write(perturbed, Path(profile))]
        )
    yield from _tried(["perturbed / plain epoch"], ratio)
    for name, (model, side) in sizes.others.items():

        def other(model=model, side=side) -> Sequence[float]:
            work = _workload(dataclasses.replace(config, model=model), side, sizes)
            return _epoch(work, work.epoch(), side, sizes, matrix)[:2]

        yield from _tried([f"{name}, {side} px, images/s", f"  {name}, {SHARE}"], other)


def fisher(size: str) -> Iterator[Row]:
    """Measure curvature and evaluation beside the epoch, and the merge."""
    sizes = SIZES[size]
    work = _workload(sizes.config, sizes.image_size, sizes)
    images = len(work.data.labels)

    def rows() -> list[float]:
        calls = {"fisher": work.fisher, "merge": work.merging(), "accuracy": work.accuracy}
        seconds = interleaved({"epoch": work.epoch(), **calls}, sizes.repeats)
        rates = (2 * images / seconds["accuracy"], images / seconds["epoch"])
        return [seconds["fisher"] / seconds["epoch"], 1000 * seconds["merge"], *rates]

    yield from _tried([FISHER, "merge, ms", "evaluation, images/s", RATE_BESIDE], rows)


def run(size: str) -> Iterator[Row]:
    """Time a whole run."""
    phases = [f"  of it {name}, s" for name in ("training", "curvature", "merging", "evaluation")]
    yield from _tried([WHOLE_RUN, *phases], lambda: run_seconds(SIZES[size]))
    yield from _tried([f"{PEAK}, whole run"], lambda: [peak_memory()])


def number(rows: Mapping[str, float | str], name: str) -> float:
    """Return the value of a row, NaN if there is no number."""
    value = rows.get(name)
    return value if isinstance(value, float) else math.nan


def _tried(names: Sequence[str], measure: Callable[[], Sequence[float | str]]) -> Iterator[Row]:
    try:
        values = measure()
    # Rows that fail, for lack of memory say, must not cost the others.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:100]
        values = [f"failed: {type(error).__name__}: {reason}"] * len(names)
    yield from zip(names, values, strict=True)


def _workload(config: Config, image_size: int, sizes: Sizes) -> Workload:
    return Workload(config, (image_size, image_size, 3), config.batch_size * sizes.steps)


def _epoch(
    work: Workload, epoch: Callable[[], object], image_size: int, sizes: Sizes, matrix: float
) -> tuple[float, float, float]:
    """Measure an epoch: images/s, share of the matrix rate in percent, seconds of compilation."""
    images = len(work.data.labels)
    clock = time.perf_counter()
    jax.block_until_ready(epoch())
    first = time.perf_counter() - clock
    seconds = interleaved({"epoch": epoch}, sizes.repeats)["epoch"]
    flops = step_flops(work.config, image_size) * images / seconds
    return images / seconds, 100 * flops / (1e12 * matrix), first - seconds


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
