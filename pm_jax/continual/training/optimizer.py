"""Optimiser of a task: an optax transformation, learning rates per group, a schedule by progress.

The schedule is a function of the fraction of the task that is done, an array, so that tasks of
different lengths share one compiled step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.partition import Trainable
from pm_jax.types import Array

SCHEDULE_RESOLUTION = 10_000


def transformation(config: Config) -> optax.GradientTransformation:
    """The optimiser with learning rate 1: `scaled` applies rates and schedule to its updates.

    Args:
        config: settings.

    Returns:
        An optax gradient transformation.

    Example:
        >>> updates, _ = (opt := transformation(Config(optimizer="sgd"))).update(
        ...     jnp.ones(1), opt.init(jnp.ones(1)))
        >>> updates.tolist()
        [-1.0]
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.optimizer == "sgd":
        return optax.chain(clip, optax.sgd(1.0, momentum=0.9))
    return optax.chain(clip, optax.adamw(1.0, weight_decay=config.weight_decay))


def accumulated(
    config: Config,
    inner: optax.GradientTransformation,
    position: Array | int = 0,
    count: Array | int = 1,
) -> tuple[optax.GradientTransformation, Array | float]:
    """The optimiser of one step of an epoch, which updates when its accumulation is complete.

    An accumulation ends after `config.accumulation_steps` steps, and with the epoch. Each example
    in it weighs the same, so that updates are those of one batch of all its examples.

    Args:
        config: settings.
        inner: the optimiser of an update.
        position: of the step within the epoch, int32 scalar.
        count: examples of the task, int32 scalar.

    Returns:
        A transformation, and the factor of the gradient of the step's mean loss. The state does not
        depend on position and count.

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
    own = jnp.minimum(count - position * size, size)
    number = -(-examples // size)
    wrapped = optax.MultiSteps(inner, lambda _: number)
    return wrapped.gradient_transformation(), own * number / examples


def schedule(config: Config) -> Callable[[Array | float], Array]:
    """Factor of the learning rate over a task.

    Args:
        config: settings.

    Returns:
        A function from progress in [0, 1) to a factor in [0, 1].

    Example:
        >>> round(float(schedule(Config(schedule="linear"))(0.25)), 4)
        0.75
    """
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


def scaled(config: Config, updates: Trainable, factor: Array, class_mask: Array) -> Trainable:
    """Updates times learning rates, zero in head columns of classes outside the mask.

    Those columns have no gradient, but weight decay would move them.

    Args:
        config: settings, with the rates of the classifier and of all else.
        updates: of the optimiser.
        factor: of the schedule, scalar.
        class_mask: bool [C].

    Returns:
        Updates to add to the parameters.

    Example:
        >>> updates = Trainable({}, {}, {"head/bias": jnp.ones(2)})
        >>> scaled(Config(head_learning_rate=0.5), updates, 1.0, jnp.asarray([1, 0])).head
        {'head/bias': Array([0.5, 0. ], dtype=float32)}
    """
    body_rate = config.learning_rate * factor
    head_rate = (config.head_learning_rate or config.learning_rate) * factor

    def own_columns(update: Array) -> Array:
        # Not by a product: what overflows in another task's column stays there.
        return jnp.where(jnp.broadcast_to(class_mask, update.shape), update, 0)

    return Trainable(
        adapters=jax.tree.map(lambda u: u * body_rate, updates.adapters),
        direct={
            path: u * (head_rate if path.startswith("head/") else body_rate)
            for path, u in updates.direct.items()
        },
        head=jax.tree.map(lambda u: own_columns(u) * head_rate, updates.head),
    )
