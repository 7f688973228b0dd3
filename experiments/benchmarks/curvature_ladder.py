r"""Time of every kind of curvature on a ViT with adapters, in forward passes, and memory kept.

python -m experiments.benchmarks.curvature_ladder
python -m experiments.benchmarks.curvature_ladder --model=vit_base_patch16 --image_size=224 \
    --vit_examples=128 --repeats=1

A forward pass is the evaluation of the same examples, in batches of 256 for two such tasks: give
a multiple of 128. Everything that is compared runs in one process, in turns; ratios are those of
the medians.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags

from experiments.benchmarks.workloads import VIT, Workload, interleaved
from pm_jax import trees
from pm_jax.continual import Config

KINDS: dict[str, dict[str, Any]] = {
    "identity": {},
    "fisher_empirical": {},
    "fisher_exact": {"curvature_samples": 1},
    "kronecker": {"curvature_samples": 1},
    "low_rank": {},
    "input_moment": {},
    "exact_current": {"stored_curvature": "identity"},
}
"""Kinds of curvature, with further settings; exact_current is measured with nothing stored."""

flags.DEFINE_enum(
    "model", "vit_tiny_patch16", ["vit", "vit_tiny_patch16", "vit_base_patch16"], "Architecture."
)
flags.DEFINE_integer("image_size", 160, "Side of the images in pixels.")
flags.DEFINE_integer("depth", 12, "Blocks, with model=vit.")
flags.DEFINE_integer("repeats", 3, "Turns of each measurement.")
flags.DEFINE_integer("vit_examples", 128, "Examples of the task.")
flags.DEFINE_integer("curvature_rank", 16, "Rank of low_rank.")
flags.DEFINE_multi_enum("kind", list(KINDS), list(KINDS), "Kinds to time.")


def ladder(
    config: Config, kinds: Sequence[str], shape: tuple[int, ...], examples: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Measure each kind: seconds, forward passes, and MB that one task leaves behind."""
    plain = Workload(config, shape, examples)
    calls: dict[str, Callable[[], object]] = {"evaluation of two tasks": plain.accuracy}
    kept = {}
    for kind in kinds:
        settings = dataclasses.replace(config, curvature=kind, **KINDS[kind])
        work = Workload(settings, shape, examples)
        calls[kind] = work.fisher
        leaves = trees.select(work.params, work.run.merging)
        memory = jax.eval_shape(work.config.merge_rule.init, leaves).memory
        kept[kind] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory)) / 1e6
    seconds = interleaved(calls, repeats)
    forward = seconds.pop("evaluation of two tasks") / 2
    return {
        kind: {
            "seconds": value,
            "forward passes": value / forward,
            "memory after 2 tasks, MB": kept[kind],
        }
        for kind, value in seconds.items()
    }


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    del argv
    values = flags.FLAGS
    config = dataclasses.replace(
        VIT,
        num_tasks=2,
        **{name: getattr(values, name) for name in ("model", "depth", "curvature_rank")},
    )
    shape = (values.image_size, values.image_size, 3)
    table = ladder(config, values.kind, shape, values.vit_examples, values.repeats)
    print(f"{config.model}, {shape[0]} px, LoRA on key and value, {values.vit_examples} examples")
    for kind, row in table.items():
        cells = (f"{name} {value:9.2f}" for name, value in row.items())
        print(f"  {kind:18s}" + "   ".join(cells))


if __name__ == "__main__":
    app.run(main)
