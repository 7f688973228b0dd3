"""Accuracy and loss of a model on the tasks of a stream, per example and in one compiled call."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax

from pm_jax.continual.placement.devices import Devices
from pm_jax.continual.placement.feed import Pass
from pm_jax.continual.training.task_program import DeviceData, logits_of
from pm_jax.losses import MASKED_LOGIT
from pm_jax.types import Array, Params


def _as_they_are(inputs: Array) -> Array:
    return inputs


class Scores(NamedTuple):
    """How well a model does on the tasks of a stream; float32 [T] each.

    Attributes:
        accuracy: over all classes seen.
        task_aware: accuracy over the task's own classes.
        loss: mean cross-entropy over the task's own classes, without perturbation.
    """

    accuracy: Array
    task_aware: Array
    loss: Array


def scores_fn(
    model: nn.Module,
    batch_size: int = 256,
    *,
    temperature: float = 1.0,
    transform: Callable[[Array], Array] = _as_they_are,
    devices: Devices | None = None,
) -> Pass:
    """Accuracy on the first tasks, over the classes seen and with the task known, and loss.

    Args:
        model: linen module.
        batch_size: examples at a time; accuracies do not depend on it, losses by rounding only.
        temperature: that the logits are divided by for the loss, as in training.
        transform: of the inputs.
        devices: that examples are divided among; the default one if `None`.

    Returns:
        A pass `scores(params, data, seen_mask, count) -> Scores`, with the argmax over `seen_mask`
        (bool [C]) for the first accuracy; 0 from task `count` (int32 scalar) on, which is not
        looked at.

    Example:
        >>> type(scores_fn(nn.Dense(2))).__name__
        'Pass'
    """
    devices = devices or Devices.of()
    batch_size = devices.multiple(batch_size)

    def begin(params: Params, data: DeviceData, seen_mask: Array, count: Array):
        del params, seen_mask
        rows, largest = data.positions.ravel(), data.positions.shape[1]
        tasks = data.positions.shape[0]
        correct = jnp.zeros((2, tasks), jnp.int32)
        return (correct, jnp.zeros(tasks)), rows, -(-count * largest // batch_size)

    def step(number, carry, rows, params: Params, data: DeviceData, seen_mask: Array, count):
        correct, losses = carry
        places = number * batch_size + jnp.arange(batch_size)
        largest = data.positions.shape[1]
        inside = places < count * largest
        task = jnp.where(inside, places // largest, 0)
        rows = rows[jnp.minimum(places, rows.shape[0] - 1)]
        labels = data.labels[rows]
        inputs = transform(data.take(devices, rows, places))
        logits = logits_of(model, params, inputs, jnp.ones_like(seen_mask))
        real = inside & (places % largest < data.sizes[task])
        own = data.class_masks[task]
        hits = [
            real & (jnp.argmax(jnp.where(mask, logits, -jnp.inf), axis=-1) == labels)
            for mask in (seen_mask[None, :], own)
        ]
        values = optax.softmax_cross_entropy_with_integer_labels(
            jnp.where(own, logits / temperature, MASKED_LOGIT), labels
        )
        return (
            correct.at[:, task].add(jnp.stack(hits).astype(jnp.int32)),
            losses.at[task].add(jnp.where(real, values, 0.0)),
        )

    def finish(carry, params: Params, data: DeviceData, seen_mask: Array, count) -> Scores:
        del params, seen_mask, count
        correct, losses = carry
        accuracy, task_aware = correct / data.sizes[None, :]
        return Scores(accuracy, task_aware, losses / data.sizes)

    return Pass(
        begin=begin, step=step, finish=finish, batch_size=lambda *_: batch_size, devices=devices
    )


def mean_loss_fn(
    model: nn.Module,
    batch_size: int = 256,
    *,
    temperature: float = 1.0,
    transform: Callable[[Array], Array] = _as_they_are,
    devices: Devices | None = None,
) -> Pass:
    """Mean cross-entropy on one task over its own classes, without perturbation.

    Args:
        model: linen module.
        batch_size: examples at a time; the result depends on it by rounding only.
        temperature: that the logits are divided by, as in the training loss.
        transform: of the inputs.
        devices: that examples are divided among; the default one if `None`.

    Returns:
        A pass `mean_loss(params, data, task) -> float32 scalar`, with `task` an int32 scalar.

    Example:
        >>> type(mean_loss_fn(nn.Dense(2))).__name__
        'Pass'
    """
    devices = devices or Devices.of()
    batch_size = devices.multiple(batch_size)

    def begin(params: Params, data: DeviceData, task: Array):
        del params
        batches = -(-data.sizes[task] // batch_size)
        return jnp.zeros((), jnp.float32), data.positions[task], batches

    def step(number, total, rows, params: Params, data: DeviceData, task: Array):
        places = number * batch_size + jnp.arange(batch_size)
        rows = rows[jnp.minimum(places, rows.shape[0] - 1)]
        inputs, mask = transform(data.take(devices, rows, places)), data.class_masks[task]
        logits = logits_of(model, params, inputs, mask, temperature)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[rows])
        return total + jnp.sum(jnp.where(places < data.sizes[task], values, 0.0))

    def finish(total, params: Params, data: DeviceData, task: Array) -> Array:
        del params
        return total / data.sizes[task]

    return Pass(
        begin=begin, step=step, finish=finish, batch_size=lambda *_: batch_size, devices=devices
    )
