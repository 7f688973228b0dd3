"""Time of an epoch with each augmentation over one without, and of a streamed over a resident one.

python -m experiments.benchmarks.augmentation

A ViT with adapters on random images. Everything that is compared runs in one process, in turns; the
ratio is that of the medians.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks.workloads import interleaved, random_data
from pm_jax.continual import Config
from pm_jax.continual.placement.data import DeviceData, HostData
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.training.partition import partition
from pm_jax.continual.training.task_program import Segment, TaskProgram
from pm_jax.data.augmentation import AUGMENTATIONS

flags.DEFINE_integer("image_size", 160, "Side in pixels that the model reads.")
flags.DEFINE_integer("stored_size", 160, "Side in pixels of the images in memory.")
flags.DEFINE_integer("repeats", 7, "Turns of each measurement.")
flags.DEFINE_integer("steps", 4, "Steps of an epoch.")
flags.DEFINE_integer("batch_size", 32, "Examples per step.")
flags.DEFINE_string("model", "vit_tiny_patch16", "Architecture.")


def epoch(
    config: Config, examples: int, stored_size: int, *, streamed: bool = False
) -> Callable[[], object]:
    """Make a call that trains one epoch of a task; if streamed, every batch is its own window."""
    shape = (stored_size, stored_size, 3)
    data, key = random_data(shape, examples), jax.random.key(0)
    model = config.network(10)
    params = model.init(key, jnp.zeros((1, *shape)))["params"]
    parts = partition(
        params, class_incremental=True, lora_pattern=config.kernel_pattern, rank=config.lora_rank
    )
    program = TaskProgram(config, model, parts, examples)
    state = list(program.begin(key, params, np.asarray(1, np.int32)))

    steps = -(-examples // config.batch_size)
    source: DeviceData | HostData = data
    if streamed:
        images = np.asarray(data.inputs)
        window_bytes = images[: config.batch_size].nbytes
        source = HostData(images, data._replace(inputs=None), window_bytes, devices_of(config))

    def run() -> object:
        pieces = program.batches.windows(
            source, lambda rest: program.order(key, rest, 1, 0).rows, 0, steps
        )
        for first, stop, part in pieces:
            segment = Segment.of(1, 0, first, stop, 1)
            *state[:], values = program.train(key, *state, params, part, segment)
            jax.block_until_ready(values)
        return values

    return run


def main(argv: Sequence[str]) -> None:
    """Print the ratios."""
    del argv
    values = flags.FLAGS
    config = Config(
        model=values.model,
        image_size=values.image_size,
        adapter="lora",
        scenario="class_incremental",
        batch_size=values.batch_size,
    )
    examples = values.steps * values.batch_size
    epochs = {
        name: epoch(dataclasses.replace(config, augmentation=name), examples, values.stored_size)
        for name in AUGMENTATIONS
    }
    epochs["streamed"] = epoch(config, examples, values.stored_size, streamed=True)
    seconds = interleaved(epochs, values.repeats)
    print(
        f"{values.model}, images of {values.stored_size} px read at {values.image_size} px, batch "
        f"{values.batch_size}; without augmentation {examples / seconds['none']:.1f} images/s"
    )
    for name in (*AUGMENTATIONS[1:], "streamed"):
        print(f"  {name:12s} / none {seconds[name] / seconds['none']:8.3f}")


if __name__ == "__main__":
    app.run(main)
