"""Ratios of a training step and of measuring curvature, on a ViT with adapters and on the MLP.

python -m experiments.benchmarks.training_step

Everything that is compared runs in one process, in turns; the ratio is that of the medians.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments.benchmarks.interleaved import interleaved, random_data
from pm_jax import lora, rules
from pm_jax.continual import Config
from pm_jax.continual.evidence import dense_layers_of, evidence_fn
from pm_jax.continual.partition import partition, trained_params
from pm_jax.continual.training import Segment, logits_of, task_program

flags.DEFINE_integer("image_size", 96, "Side of the ViT's images in pixels.")
flags.DEFINE_integer("repeats", 11, "Turns of each measurement.")
flags.DEFINE_integer("vit_examples", 128, "Examples of the ViT's task.")
flags.DEFINE_integer("depth", 12, "Blocks of the ViT.")

VIT = Config(
    model="vit",
    patch_size=16,
    width=192,
    num_heads=3,
    adapter="lora",
    scenario="class_incremental",
)


def ratios(config: Config, shape: tuple[int, ...], examples: int, repeats: int) -> dict[str, float]:
    """Perturbed over plain epoch, and Fisher over two plain epochs, of one task."""
    data, key = random_data(config, shape, examples), jax.random.key(0)
    model = config.network(10)
    params = model.init(key, jnp.zeros((1, *shape)))["params"]
    pattern = config.kernel_pattern() if config.adapter == "lora" else None
    parts = partition(
        params, class_incremental=pattern is not None, lora_pattern=pattern, rank=config.lora_rank
    )
    task = np.asarray(1, np.int32)
    segment = Segment.of(1, 0, 0, 1_000_000, 1)

    def epoch(perturbation: str) -> Callable[[], object]:
        settings = dataclasses.replace(config, perturbation=perturbation)
        program = task_program(settings, model, parts, examples)
        state = list(program.begin(key, params, task))

        def run():
            *state[:], values = program.train(key, *state, params, data, segment)
            return values

        return run

    trainable, _ = task_program(config, model, parts, examples).begin(key, params, task)
    trained = trained_params(params, trainable)
    layers = dense_layers_of(model, jnp.zeros((1, *shape)))
    measure = evidence_fn(config, model, rules.perturb_and_merge(), parts.merging, layers)
    seconds = interleaved(
        {
            "plain": epoch("none"),
            "perturbed": epoch("symmetric"),
            "fisher": lambda: measure(key, trained, params, data, task),
        },
        repeats,
    )
    return {
        "perturbed / plain epoch": seconds["perturbed"] / seconds["plain"],
        "Fisher / two plain epochs": seconds["fisher"] / (2 * seconds["plain"]),
        "plain epoch, ms": 1000 * seconds["plain"],
    }


def adapter_forms(config: Config, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Gradient of one batch's loss in the adapters: as a branch, and through folded weights."""
    data, key = random_data(config, shape, config.batch_size), jax.random.key(0)
    model = config.network(10)
    params = model.init(key, jnp.zeros((1, *shape)))["params"]
    adapters = lora.init(key, params, config.kernel_pattern(), config.lora_rank)
    mask = jnp.ones(10, bool)

    def loss(params, data):
        logits = logits_of(model, params, data.inputs, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()

    @jax.jit
    @jax.grad
    def branched(adapters, params, data):
        with lora.branch(adapters, 1.5):
            return loss(params, data)

    @jax.jit
    @jax.grad
    def folded(adapters, params, data):
        return loss(lora.fold(params, adapters, 1.5), data)

    seconds = interleaved(
        {
            "branch": lambda: branched(adapters, params, data),
            "fold": lambda: folded(adapters, params, data),
        },
        repeats,
    )
    return {
        "branch / fold gradient": seconds["branch"] / seconds["fold"],
        "branch, images/s": config.batch_size / seconds["branch"],
    }


def main(argv: Sequence[str]) -> None:
    """Print the ratios."""
    del argv
    values = flags.FLAGS
    vit = dataclasses.replace(VIT, depth=values.depth)
    shape = (values.image_size, values.image_size, 3)
    tables = {
        f"ViT, {values.image_size} px, LoRA rank 10 on key and value, batch 32": {
            **adapter_forms(vit, shape, values.repeats),
            **ratios(vit, shape, values.vit_examples, values.repeats),
        },
        "MLP of the default run, all parameters, 1,146 examples": ratios(
            Config(), (8, 8, 1), 1146, 5 * values.repeats
        ),
    }
    for title, table in tables.items():
        print(title)
        for name, value in table.items():
            print(f"  {name:28s}{value:10.3f}")


if __name__ == "__main__":
    app.run(main)
