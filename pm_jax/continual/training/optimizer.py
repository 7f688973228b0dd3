"""Optimiser of a task: an optax transformation, learning rates per group, and a schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.partition import Trainable
from pm_jax.types import Array

# Schedules count steps; here they count ten-thousandths of a task, so that tasks of different
# lengths share one compiled step.
SCHEDULE_RESOLUTION = 10_000


def transformation(config: Config) -> optax.GradientTransformation:
    """Make the optimiser with learning rate 1; `scaled` applies rates and schedule afterwards."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.optimizer == "sgd":
        return optax.chain(clip, optax.sgd(1.0, momentum=0.9))
    return optax.chain(clip, optax.adamw(1.0, weight_decay=config.weight_decay))


def accumulated(
    config: Config, inner: optax.GradientTransformation, position: Array | int, count: Array | int
) -> tuple[optax.GradientTransformation, Array | float]:
    """Make the optimiser of the step at a position of an epoch, for a task of `count` examples.

    It updates with every `config.accumulation_steps`-th step and at the end of the epoch. With it
    comes the factor of the step's gradient by which all accumulated examples weigh the same. The
    optimiser's state has the same form at all positions.

    Example:
        >>> config = Config(batch_size=2, accumulation_steps=2)
        >>> [float(accumulated(config, optax.sgd(1.0), step, 7)[1]) for step in range(4)]
        [1.0, 1.0, 1.3333333730697632, 0.6666666865348816]
    """
    steps, size = config.accumulation_steps, config.batch_size
    if steps == 1:
        return inner, 1.0
    first = position - position % steps
    examples = jnp.minimum(count - first * size, steps * size)
    examples_of_step = jnp.minimum(count - position * size, size)
    number = -(-examples // size)
    # MultiSteps averages the gradients of its steps, the last of which may have fewer examples.
    wrapped = optax.MultiSteps(inner, lambda _: number)
    return wrapped.gradient_transformation(), examples_of_step * number / examples


def schedule(config: Config) -> Callable[[Array | float], Array]:
    """Make the function from progress in [0, 1) to a factor of the learning rate in [0, 1]."""
    warmup = round(config.warmup_fraction * SCHEDULE_RESOLUTION)
    rest = SCHEDULE_RESOLUTION - warmup
    course: optax.Schedule = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "milestones": optax.piecewise_constant_schedule(
            1.0, {round(at * SCHEDULE_RESOLUTION) - warmup: 0.1 for at in config.milestones}
        ),
    }[config.schedule]
    if warmup:
        rise = optax.linear_schedule(0.0, 1.0, warmup)
        course = optax.join_schedules([rise, course], [warmup])
    return lambda progress: jnp.asarray(course(progress * SCHEDULE_RESOLUTION), jnp.float32)


def scaled(
    config: Config,
    updates: Trainable,
    factor: Array,
    class_mask: Array,
    classifier: str = "head",
) -> Trainable:
    """Multiply updates by learning rates; head columns of classes outside the mask [C] become 0."""
    body_rate = config.learning_rate * factor
    head_rate = (config.head_learning_rate or config.learning_rate) * factor

    def columns_of_task(update: Array) -> Array:
        # Other columns have no gradient, but weight decay would move them. A product with the mask
        # would make NaN of an infinite entry.
        return jnp.where(jnp.broadcast_to(class_mask, update.shape), update, 0)

    return Trainable(
        adapters=jax.tree.map(lambda u: u * body_rate, updates.adapters),
        # A shared head trains among the direct leaves, at the classifier's rate all the same.
        direct={
            path: u * (head_rate if path.startswith(f"{classifier}/") else body_rate)
            for path, u in updates.direct.items()
        },
        head=jax.tree.map(lambda u: columns_of_task(u) * head_rate, updates.head),
    )
