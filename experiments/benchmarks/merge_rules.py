"""Time and memory of one merge by every rule that looks at the models only, at ViT-B/16's size.

python -m experiments.benchmarks.merge_rules
python -m experiments.benchmarks.merge_rules --benchmark_rules=opcm,null_space+learned_rank=64

Merging the third of three models of random numbers, by the compiled update of the rule, as in a
run. Memory is what the compiled program needs beyond the two models, the evidence and the state
that it is given, counted in models. Processor time is of all threads, and tells more than the wall
time where other jobs run.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from pm_jax import lapack, rules
from pm_jax.continual import Config
from pm_jax.continual.training.initial_model import parameter_shapes
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.rules import Evidence, MergeRule
from pm_jax.types import Params

flags.DEFINE_string("benchmark_model", "vit_base_patch16", "Model whose parameters are merged.")
flags.DEFINE_list(
    "benchmark_rules",
    [],
    "Rules, each with a setting after it as rule+name=value; all that need no more than models by "
    "default.",
)

GIVEN = frozenset({"quadratic", "curvature_error", "key"})
TASKS = 3


def without_training(rule: MergeRule) -> bool:
    """Tell whether a rule needs nothing but two models and a number of curvature an entry."""
    needs = rule.needs
    by_entry = not needs.curvatures or "diagonal" in needs.curvatures
    return by_entry and needs.evidence <= GIVEN and not needs.hook and not needs.analysis_only


class Figures(NamedTuple):
    """Figures of the last merge of a rule: seconds, and bytes."""

    wall: float
    processor: float
    memory: float
    state: float


def measure(rule: MergeRule, shapes: Params) -> Figures:
    """Measure the last of some merges."""

    def model(number: int, positive: bool = False) -> Params:
        leaves, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(number), len(leaves))
        values = [
            jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, map(jnp.abs, values) if positive else values)

    def evidence(trained: Params, task: int) -> Evidence:
        quadratic = None
        if "quadratic" in rule.needs.evidence:
            quadratic = DiagonalQuadratic.at(trained, model(100 + task, positive=True))
        return Evidence(quadratic, jnp.zeros(()), jax.random.key(task))

    @rules.jit_merge
    def merge(state, previous, trained, given):
        merged, state, info = rule.update(state, previous=previous, trained=trained, evidence=given)
        # As a run merges, which makes nothing of the comparison.
        return state, merged, info.without_comparison()

    previous = model(0)
    state = rule.init(jax.tree.map(jnp.copy, previous))
    wall = processor = nbytes = 0.0
    for task in range(TASKS):
        trained = model(task + 1)
        given = jax.block_until_ready(evidence(trained, task))
        if not task:
            program = merge.lower(state, previous, trained, given).compile()
            sizes: Any = program.memory_analysis()
            nbytes = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
            nbytes -= sizes.alias_size_in_bytes
        clock, computing = time.perf_counter(), time.process_time()
        with lapack.one_thread():
            state, previous, _ = jax.block_until_ready(merge(state, previous, trained, given))
        wall, processor = time.perf_counter() - clock, time.process_time() - computing
    of_state = float(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    return Figures(wall, processor, nbytes, of_state)


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    del argv
    size = 32 if flags.FLAGS.benchmark_model == "vit_tiny_patch16" else 224
    config = Config(model=flags.FLAGS.benchmark_model, image_size=size)
    shapes = parameter_shapes(config, 100, (size, size, 3))
    whole = float(sum(4 * leaf.size for leaf in jax.tree.leaves(shapes)))
    print(f"{config.model}, {whole / 1e6:.0f} MB, on {jax.devices()[0].device_kind}")
    print(
        f"{'rule':28}  {'seconds':>7}  {'processor':>9}  {'memory, models':>14}  "
        f"{'state, models':>13}"
    )
    for label in flags.FLAGS.benchmark_rules or rules.REGISTRY:
        name, _, settings = label.partition("+")
        rule = rules.make(name, settings, max_tasks=TASKS)
        if without_training(rule):
            found = measure(rule, shapes)
            print(
                f"{label:28}  {found.wall:7.2f}  {found.processor:9.2f}  "
                f"{found.memory / whole:14.2f}  {found.state / whole:13.2f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
