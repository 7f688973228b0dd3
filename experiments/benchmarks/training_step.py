r"""Ratios of a training step and of measuring curvature, on a ViT with adapters and on the MLP.

python -m experiments.benchmarks.training_step
python -m experiments.benchmarks.training_step --model=vit_base_patch16 --image_size=224 \
    --vit_examples=16 --batch_size=8 --repeats=3

Everything that is compared runs in one process, in turns; the ratio is that of the medians.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from experiments.benchmarks.workloads import VIT, Workload, interleaved, random_data
from pm_jax import lora
from pm_jax.continual import Config
from pm_jax.continual.training.logits import logits_of

flags.DEFINE_enum(
    "model", "vit", ["vit", "vit_tiny_patch16", "vit_base_patch16"], "vit is a ViT-Ti/16."
)
flags.DEFINE_integer("image_size", 96, "Side of the ViT's images in pixels.")
flags.DEFINE_integer("repeats", 11, "Turns of each measurement.")
flags.DEFINE_integer("vit_examples", 128, "Examples of the ViT's task.")
flags.DEFINE_integer("depth", 12, "Blocks of the ViT, with model=vit.")
flags.DEFINE_integer("batch_size", 32, "Images of the ViT's step.")
flags.DEFINE_float("curvature_memory_mb", 0.0, "As for a run.")


def ratios(config: Config, shape: tuple[int, ...], examples: int, repeats: int) -> dict[str, float]:
    """Compare a perturbed with a plain epoch, and the Fisher with two plain epochs, of one task."""
    work = Workload(config, shape, examples)
    seconds = interleaved(
        {"plain": work.epoch("none"), "perturbed": work.epoch(), "fisher": work.fisher}, repeats
    )
    return {
        "perturbed / plain epoch": seconds["perturbed"] / seconds["plain"],
        "Fisher / two plain epochs": seconds["fisher"] / (2 * seconds["plain"]),
        "plain epoch, ms": 1000 * seconds["plain"],
    }


def adapter_forms(config: Config, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Time the gradient in the adapters: through a branch, and through folded weights."""
    data, key = random_data(shape, config.batch_size), jax.random.key(0)
    model = config.network(10)
    params = model.init(key, jnp.zeros((1, *shape)))["params"]
    adapters = lora.init(key, params, config.kernel_pattern, config.lora_rank)
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
    names = ("model", "depth", "batch_size", "curvature_memory_mb")
    vit = dataclasses.replace(VIT, **{name: getattr(values, name) for name in names})
    shape = (values.image_size, values.image_size, 3)
    tables = {
        f"{vit.model}, {shape[0]} px, LoRA rank 10 on key and value, batch {vit.batch_size}": {
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
