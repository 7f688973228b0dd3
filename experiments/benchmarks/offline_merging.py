"""Peak memory and time of merging a model in files, against twice its largest tensor.

Then those of the whole command that merges two adapters of a ViT-B with 24 targets: exactly, cut to
a rank, and by a rule that looks at dense displacements.

python -m experiments.benchmarks.offline_merging
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from pm_jax.offline.pieces import BLOCK
from pm_jax.offline.tensor_files import Entry, writing
from pm_jax.weights.peft_adapter import PREFIX, PeftAdapter, write_adapter

flags.DEFINE_list("models", ["2", "10"], "Numbers of models to merge.")
flags.DEFINE_integer("depth", 10, "Blocks of the transformer; ten are 286 MB.")
flags.DEFINE_integer("vocabulary", 0, "Rows of a table of embeddings; 0 for none.")
flags.DEFINE_integer("adapter_depth", 12, "Blocks of the ViT that adapters are of.")
flags.DEFINE_list(
    "adapter_settings", ["--rank=0", "--rank=8", "--rule=magmax"], "Flags of merges of adapters."
)
flags.DEFINE_string("rule", "averaging", "Merge rule.")
flags.DEFINE_string("rule_settings", "", "Settings of the rule.")
flags.DEFINE_bool("fishers", False, "Give the models as their Fishers too, for a rule with some.")

WIDTH = 768
SMALL = {"fc.weight": (100, 100)}


def transformer(depth: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """List names and shapes of a transformer; ten blocks have 286 MB in float32."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (WIDTH, 3, 16, 16),
        "pos_embed": (1, 197, WIDTH),
    }
    if vocabulary:
        shapes["embeddings.weight"] = (vocabulary, WIDTH)
    for block in range(depth):
        shapes |= {
            f"blocks.{block}.norm1.weight": (WIDTH,),
            f"blocks.{block}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{block}.attn.qkv.bias": (3 * WIDTH,),
            f"blocks.{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc1.bias": (4 * WIDTH,),
            f"blocks.{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        }
    return shapes


def write_models(folder: Path, shapes: Mapping[str, tuple[int, ...]], count: int) -> list[Path]:
    """Write a base and some models of random numbers from 0 to 1; return their paths."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    ends = np.cumsum(sizes).tolist()
    entries = {
        name: Entry("F32", shape, 4 * (end - size), 4 * end)
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }
    # Tensor by tensor: a new process counts the memory of its parent as its own peak.
    paths = [folder / f"{number}.safetensors" for number in range(count + 1)]
    for seed, path in enumerate(paths):
        rng = np.random.default_rng(seed)
        with writing(path, entries, {}, overwrite=True) as file:
            for size in sizes:
                file.write(rng.random(size, np.float32).data)
    return paths


def write_adapters(folder: Path, depth: int, ranks: Sequence[int]) -> list[Path]:
    """Write LoRA adapters of query and value of a ViT-B, as PEFT does; return their folders."""
    paths = []
    for rank in ranks:
        rng, tensors, modules = np.random.default_rng(rank), {}, []
        for block in range(depth):
            for name in ("query", "value"):
                module = f"vit.encoder.layer.{block}.attention.attention.{name}"
                modules.append(module)
                for letter, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank))):
                    tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = rng.standard_normal(
                        shape, np.float32
                    )
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": modules,
        }
        paths.append(folder / f"adapter_{rank}")
        write_adapter(PeftAdapter(config, tensors, {}), paths[-1])
    return paths


def measure(paths: Sequence[Path]) -> tuple[float, float, float]:
    """Run a process that merges a base and models; return seconds, processor seconds and MB."""
    values = flags.FLAGS
    return measure_command(
        f"--base={paths[0]}",
        f"--output={paths[0].with_name('merged.safetensors')}",
        f"--models={','.join(map(str, paths[1:]))}",
        *(f"--rule={values.rule}", f"--rule_settings={values.rule_settings}"),
        f"--fishers={','.join(map(str, paths[1:])) if values.fishers else ''}",
    )


def measure_command(*arguments: str) -> tuple[float, float, float]:
    """Run a merge in a process; return seconds, processor seconds and peak MB."""
    command = [sys.executable, "-m", "experiments.merge", "--overwrite", *arguments]
    clock = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: merging ended with code {process.returncode}")
    computing = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - clock, computing, usage.ru_maxrss * 1024 / 1e6


def main(argv: Sequence[str]) -> None:
    """Print the figures; the baseline is the same command on a model of a few kilobytes."""
    del argv
    counts = sorted(map(int, flags.FLAGS.models))
    shapes = transformer(flags.FLAGS.depth, flags.FLAGS.vocabulary)
    largest = 4 * max(map(math.prod, shapes.values()))
    print(f"largest tensor, MB                   {largest / 1e6:8.1f}")
    print(f"bound: twice it and a block, MB      {(2 * largest + 4 * BLOCK) / 1e6:8.1f}")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        small = write_models(folder, SMALL, counts[-1])
        bases = {count: measure(small[: count + 1]) for count in counts}
        paths = write_models(folder, shapes, counts[-1])
        for count in counts:
            figures = measure(paths[: count + 1])
            seconds, computing, megabytes = np.subtract(figures, bases[count])
            times = megabytes / (largest / 1e6)
            print(
                f"{count:2} models, peak above the baseline, MB {megabytes:7.1f} "
                f"({times:.1f} of the largest tensor)"
            )
            print(f"{count:2} models, baseline, MB                {bases[count][-1]:7.1f}")
            print(f"{count:2} models, s above the baseline        {seconds:7.1f}")
            print(f"{count:2} models, processor s above it        {computing:7.1f}")
        adapters = write_adapters(folder, flags.FLAGS.adapter_depth, (8, 16))
        models = f"--models={','.join(map(str, adapters))}"
        for setting in flags.FLAGS.adapter_settings:
            output = f"--output={folder / 'merged_adapter'}"
            seconds, computing, megabytes = measure_command(models, output, setting)
            print(
                f"adapters, {setting}: {seconds:.1f} s in all (mark 5), processor "
                f"{computing:.1f} s, peak {megabytes:.0f} MB"
            )


if __name__ == "__main__":
    app.run(main)
