"""Optimiser of a task: an optax transformation, learning rates per group, a schedule by progress.

The schedule is a function of the fraction of the task that is done, an array, so that tasks of
different lengths share one compiled step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pm_jax.continual.config import Config
from pm_jax.continual.partition import Trainable
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
        return update * jnp.broadcast_to(class_mask.astype(update.dtype), update.shape)

    return Trainable(
        adapters=jax.tree.map(lambda u: u * body_rate, updates.adapters),
        direct={
            path: u * (head_rate if path.startswith("head/") else body_rate)
            for path, u in updates.direct.items()
        },
        head=jax.tree.map(lambda u: own_columns(u) * head_rate, updates.head),
    )
