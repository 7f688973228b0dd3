r"""How long `Merger.finish_task` takes, against an epoch of one's own loop over the same examples.

python -m experiments.benchmarks.finish_task
python -m experiments.benchmarks.finish_task --model=vit --image_size=96 --examples=64

The epoch is that of an ordinary loop: one jitted step of the perturbed loss a batch, all
parameters of the CNN and LoRA on key and value of the ViT-Ti. Both run in one process, in turns.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import pm_jax
from experiments.benchmarks.compilations import compilations
from experiments.benchmarks.workloads import interleaved, random_data
from pm_jax import lora, models, rules, trees
from pm_jax.types import Array, PyTree

flags.DEFINE_enum("model", "all", ["all", "cnn", "vit"], "What is trained and merged.")
flags.DEFINE_integer("examples", 256, "Examples of the task.")
flags.DEFINE_integer("batch_size", 32, "Examples of a step.")
flags.DEFINE_integer("image_size", 64, "Side of the ViT's images in pixels, a multiple of 16.")
flags.DEFINE_integer("depth", 12, "Blocks of the ViT.")
flags.DEFINE_integer("repeats", 5, "Turns.")

KEY_AND_VALUE = ".*/attn/(key|value)/kernel"


class CNN(nn.Module):
    """A convolutional network with batch statistics."""

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Logits of images [N, H, W, channels]."""
        x = images
        for width in (32, 64):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Task:
    """One epoch of a loop over a task, and the end of the task; both go on from the last call."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        logits_fn: Callable[..., Any],
        folded: Callable[[PyTree, PyTree], PyTree],
        moving: PyTree,
        params: PyTree,
        model_state: PyTree,
        batches: list[tuple[Array, Array]],
    ):
        measure = pm_jax.fisher_exact(logits_fn, num_samples=1)
        self._merger = pm_jax.merger(rules.perturb_and_merge(), measure)
        self._memory = self._merger.init(params)
        self._folded, self._batches, self._model_state = folded, batches, model_state
        optimizer = optax.adam(1e-3)
        self._moving, self._state = moving, optimizer.init(moving)
        loss = pm_jax.perturbed(loss_fn, pm_jax.perturbation.symmetric())

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def step(key: Array, moving: PyTree, state: PyTree, batch: PyTree) -> PyTree:
            gradients = jax.grad(loss, argnums=1)(key, moving, params, batch, model_state)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(moving, updates), state

        self._step = step

    def epoch(self) -> PyTree:
        """Train for an epoch."""
        for number, batch in enumerate(self._batches):
            self._moving, self._state = self._step(
                jax.random.key(number), self._moving, self._state, batch
            )
        return self._moving

    def finish(self) -> PyTree:
        """Measure and merge."""
        trained = self._folded(self._memory.start, self._moving)
        params, self._memory, _ = self._merger.finish_task(
            self._memory,
            trained,
            self._batches,
            jax.random.key(0),
            model_state=self._model_state,
            batch_size=len(self._batches[0][1]),
        )
        return params


def cnn_task(batches: list[tuple[Array, Array]]) -> Task:
    """Make the task of the CNN, all of whose parameters train."""
    model = CNN()
    variables = model.init(jax.random.key(0), batches[0][0], True)
    params = trees.leaves_by_path(variables["params"])

    def logits_fn(params: PyTree, images: Array, batch_stats: PyTree) -> Any:
        whole = trees.replace(variables["params"], params)
        return model.apply({"params": whole, "batch_stats": batch_stats}, images, False)

    def loss_fn(params: PyTree, batch: PyTree, batch_stats: PyTree) -> Array:
        collections = {"params": trees.replace(variables["params"], params)}
        logits, _ = model.apply(
            {**collections, "batch_stats": batch_stats}, batch[0], True, mutable=["batch_stats"]
        )
        return _mean_loss(logits, batch[1])

    def folded(start: PyTree, moving: PyTree) -> PyTree:
        del start
        return jax.tree.map(jnp.copy, moving)

    state = variables["batch_stats"]
    moving = jax.tree.map(jnp.copy, params)
    return Task(loss_fn, logits_fn, folded, moving, params, state, batches)


def vit_task(batches: list[tuple[Array, Array]], depth: int) -> Task:
    """Make the task of a ViT-Ti/16 with adapters; only the adapted kernels merge."""
    model: Any = models.VisionTransformer(10, patch_size=16, width=192, depth=depth, num_heads=3)
    params = model.init(jax.random.key(0), batches[0][0])["params"]
    kernels = trees.select(params, KEY_AND_VALUE)

    def logits_fn(kernels: PyTree, images: Array, params: PyTree) -> Array:
        return model.apply({"params": trees.replace(params, kernels)}, images)

    def loss_fn(moving: PyTree, batch: PyTree, params: PyTree) -> Array:
        whole = trees.replace(params, lora.dense_leaves(moving))
        with lora.branch(moving):
            logits = model.apply({"params": whole}, batch[0])
        return _mean_loss(logits, batch[1])

    adapters = lora.init(jax.random.key(1), params, KEY_AND_VALUE, 10)
    return Task(loss_fn, logits_fn, jax.jit(lora.fold), adapters, kernels, params, batches)


def _mean_loss(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(argv: Sequence[str]) -> None:
    """Print the ratios."""
    del argv
    values = flags.FLAGS
    for name, shape, make in (
        ("cnn", (32, 32, 3), cnn_task),
        ("vit", (values.image_size,) * 2 + (3,), functools.partial(vit_task, depth=values.depth)),
    ):
        if values.model not in ("all", name):
            continue
        data = random_data(shape, values.examples)
        images = data.inputs.astype(jnp.float32) / 127.5 - 1  # type: ignore[union-attr]
        batches = [
            (
                images[first : first + values.batch_size],
                data.labels[first : first + values.batch_size],
            )
            for first in range(0, values.examples, values.batch_size)
        ]
        task = make(batches)
        task.epoch(), task.finish()
        with compilations() as events:
            seconds = interleaved({"epoch": task.epoch, "finish": task.finish}, values.repeats)
        print(f"{name}, {values.examples} examples of {shape}, batch {values.batch_size}")
        print(f"  finish_task / epoch {seconds['finish'] / seconds['epoch']:10.3f}")
        print(f"  epoch, ms           {1000 * seconds['epoch']:10.1f}")
        print(f"  compilations after the first task: {len(events)}")


if __name__ == "__main__":
    app.run(main)
