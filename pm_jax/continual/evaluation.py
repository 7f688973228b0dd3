"""Accuracy and loss of a model on the tasks of a stream, per example and in one compiled call."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pm_jax.continual.training import DeviceData, logits_of
from pm_jax.types import Array, Params


def _as_they_are(inputs: Array) -> Array:
    return inputs


def accuracy_fn(
    model: nn.Module,
    batch_size: int = 256,
    *,
    transform: Callable[[Array], Array] = _as_they_are,
) -> Callable[..., Array]:
    """Accuracy on the first tasks, over the classes seen and with the task known.

    Args:
        model: linen module.
        batch_size: examples at a time; the result does not depend on it.
        transform: of the inputs.

    Returns:
        Jitted `accuracy(params, data, seen_mask, count) -> float32 [2, T]`: first with the argmax
        over `seen_mask` (bool [C]), then over the task's own classes; 0 from task `count` (int32
        scalar) on, which is not looked at.

    Example:
        >>> accuracy_fn(nn.Dense(2))
        <PjitFunction of <function accuracy_fn.<locals>.accuracy at ...>>
    """

    @jax.jit
    def accuracy(params: Params, data: DeviceData, seen_mask: Array, count: Array) -> Array:
        tasks, largest = data.positions.shape
        total = count * largest

        def step(number, correct):
            position = number * batch_size + jnp.arange(batch_size)
            inside = position < total
            task = jnp.where(inside, position // largest, 0)
            place = position % largest
            rows = data.positions[task, place]
            labels = data.labels[rows]
            inputs = transform(data.inputs[rows])
            logits = logits_of(model, params, inputs, jnp.ones_like(seen_mask))
            real = inside & (place < data.sizes[task])
            hits = [
                real & (jnp.argmax(jnp.where(mask, logits, -jnp.inf), axis=-1) == labels)
                for mask in (seen_mask[None, :], data.class_masks[task])
            ]
            return correct.at[:, task].add(jnp.stack(hits).astype(jnp.int32))

        start = jnp.zeros((2, tasks), jnp.int32)
        correct = jax.lax.fori_loop(0, -(-total // batch_size), step, start)
        return correct / data.sizes[None, :]

    return accuracy


def mean_loss_fn(
    model: nn.Module,
    batch_size: int = 256,
    *,
    temperature: float = 1.0,
    transform: Callable[[Array], Array] = _as_they_are,
) -> Callable[..., Array]:
    """Mean cross-entropy on one task over its own classes, without perturbation.

    Args:
        model: linen module.
        batch_size: examples at a time; the result depends on it by rounding only.
        temperature: that the logits are divided by, as in the training loss.
        transform: of the inputs.

    Returns:
        Jitted `mean_loss(params, data, task) -> float32 scalar`, with `task` an int32 scalar.

    Example:
        >>> mean_loss_fn(nn.Dense(2))
        <PjitFunction of <function mean_loss_fn.<locals>.mean_loss at ...>>
    """

    @jax.jit
    def mean_loss(params: Params, data: DeviceData, task: Array) -> Array:
        count, largest = data.sizes[task], data.positions.shape[1]

        def step(number, total):
            place = number * batch_size + jnp.arange(batch_size)
            rows = data.positions[task, jnp.minimum(place, largest - 1)]
            inputs, mask = transform(data.inputs[rows]), data.class_masks[task]
            logits = logits_of(model, params, inputs, mask, temperature)
            values = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[rows])
            return total + jnp.sum(jnp.where(place < count, values, 0.0))

        batches = -(-count // batch_size)
        return jax.lax.fori_loop(0, batches, step, jnp.zeros((), jnp.float32)) / count

    return mean_loss
