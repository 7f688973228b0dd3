"""Cost of a checkpoint for the training that goes on beside it, for a model of 20 M parameters.

python -m experiments.benchmarks.checkpoint_saves --steps=100

Some training steps run in one process, in turns: without a checkpoint, with one that is written
meanwhile, and with one that they wait for. The second time includes the writing that is left when
the steps are done.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from experiments import flags as experiment_flags
from experiments.benchmarks.workloads import Workload, interleaved
from pm_jax import lora, trees
from pm_jax.continual import Config
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.continual.training.task_program import Segment

experiment_flags.define_tuple("hidden_sizes", (4400, 4400), "Widths of the MLP.")
flags.DEFINE_integer("batch_size", 256, "Images of a step.")
flags.DEFINE_integer("steps", 100, "Between two checkpoints.")
flags.DEFINE_integer("repeats", 5, "Turns of each measurement.")


def table(config: Config, steps: int, repeats: int, directory: Path) -> dict[str, float]:
    """Time some training steps with and without a checkpoint, in seconds, and their ratios."""
    work = Workload(config, (8, 8, 1), steps * config.batch_size)
    program, segment = work.run.training.later, Segment.of(1, 0, 0, steps, 1)
    state = list(program.begin(work.key, work.params, work.task))
    rule = config.merge_rule.init(trees.select(work.params, work.run.merging))
    number, blocked = 0, []

    def train():
        *state[:], losses = program.train(work.key, *state, work.params, work.data, segment)
        return jax.block_until_ready(losses)

    def saved():
        # The state of the model is empty, and a run does not save an empty one.
        trainable, optimizer, *_ = state
        return {
            "params": work.params,
            "rule": rule,
            "trainable": trainable,
            "optimizer": optimizer,
        }

    def with_checkpoint(checkpoints):
        nonlocal number
        number += 1
        clock = time.perf_counter()
        checkpoints.save(number, saved())
        blocked.append(time.perf_counter() - clock)
        train()
        checkpoints.finish()

    with (
        Checkpoints(directory / "beside", keep=1, asynchronous=True) as beside,
        Checkpoints(directory / "before", keep=1) as before,
    ):
        seconds = interleaved(
            {
                "none": train,
                "beside": lambda: with_checkpoint(beside),
                "before": lambda: with_checkpoint(before),
            },
            repeats,
        )
    waits = np.median(np.reshape(blocked, (-1, 2)), axis=0)  # in turns: beside, before
    return {
        "parameters, millions": lora.count(work.params) / 1e6,
        "checkpoint, MB": sum(leaf.nbytes for leaf in jax.tree.leaves(saved())) / 1e6,
        "one step, ms": 1000 * seconds["none"] / steps,
        f"{steps} steps, asynchronous / no checkpoint": seconds["beside"] / seconds["none"],
        f"{steps} steps, synchronous / no checkpoint": seconds["before"] / seconds["none"],
        "asynchronous, steps wait for, ms": 1000 * float(waits[0]),
        "synchronous, steps wait for, ms": 1000 * float(waits[1]),
    }


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    del argv
    values = flags.FLAGS
    config = Config(hidden_sizes=values.hidden_sizes, batch_size=values.batch_size)
    print(f"{jax.devices()[0].device_kind}, MLP of {values.hidden_sizes}, Adam")
    with tempfile.TemporaryDirectory() as directory:
        for name, value in table(config, values.steps, values.repeats, Path(directory)).items():
            print(f"  {name:50s}{value:10.3f}")


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
