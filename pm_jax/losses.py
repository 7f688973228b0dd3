"""Losses per example, their masks and their padding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pm_jax.types import Array, Batch, LogitsFn, LossesFn, Params, PyTree

MASKED_LOGIT = -1e30
"""Finite, so that a masked class has probability 0 and no gradient is NaN."""


def mask_logits(logits: Array, class_mask: Array) -> Array:
    """Logits [N, C] in float32, -1e30 for the classes that a mask [C], bool or 0/1, leaves out."""
    return jnp.where(class_mask[None, :] > 0, logits.astype(jnp.float32), MASKED_LOGIT)


def cross_entropy(logits_fn: LogitsFn) -> LossesFn:
    """Softmax cross-entropy of a model, one value per example.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.

    Returns:
        `losses_fn(params, batch) -> [N]`.

    Example:
        >>> losses = cross_entropy(lambda w, x: x @ w)
        >>> batch = Batch(jnp.ones((1, 2)), jnp.zeros(1, int))
        >>> round(float(losses(jnp.zeros((2, 2)), batch)[0]), 4)  # log 2
        0.6931
    """

    def losses_fn(params: Params, batch: Batch) -> Array:
        logits = logits_fn(params, batch.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

    return losses_fn


def weights_of(batch: Batch) -> Array:
    """Weights of a batch in the labels' shape, ones where none are given."""
    if batch.weights is None:
        return jnp.ones(batch.labels.shape, jnp.float32)
    return batch.weights


def mean(losses_fn: LossesFn) -> Callable[[Params, Batch], Array]:
    """Weighted mean of per-example losses, 0 for a batch of padding.

    Args:
        losses_fn: `losses_fn(params, batch) -> [N]`.

    Returns:
        `loss_fn(params, batch) -> scalar`.

    Example:
        >>> loss = mean(lambda w, batch: w * batch.inputs)
        >>> batch = Batch(jnp.asarray([1.0, 5.0]), jnp.zeros(2, int), jnp.asarray([1.0, 0.0]))
        >>> float(loss(2.0, batch))
        2.0
    """

    def loss_fn(params: Params, batch: Batch) -> Array:
        weights = weights_of(batch)
        # At least 1 in the divisor: a batch of padding has the loss 0, not NaN.
        return jnp.sum(weights * losses_fn(params, batch)) / jnp.maximum(jnp.sum(weights), 1.0)

    return loss_fn


def in_batches(examples: Batch, batch_size: int) -> Batch:
    """Examples cut into batches of one size, the last one padded with weight 0.

    Args:
        examples: N examples.
        batch_size: B, at least 1.

    Returns:
        A `Batch` with leaves [ceil(N / B), B, ...], to scan over.

    Raises:
        ValueError: no examples, or a batch size below 1.

    Example:
        >>> in_batches(Batch(jnp.ones((3, 5)), jnp.zeros(3, int)), 2).weights.tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """
    count = examples.labels.shape[0]
    if count < 1 or batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it and the {count} examples must be at least 1")
    # Rounded up: `//` rounds down, also below 0.
    number = -(-count // batch_size)
    index = jnp.arange(number * batch_size)
    # Padding repeats an example, on which a model computes nothing unusual.
    padded: PyTree = jax.tree.map(
        lambda leaf: leaf[jnp.where(index < count, index, 0)],
        examples._replace(weights=weights_of(examples)),
    )
    padded = padded._replace(weights=padded.weights * (index < count))
    return jax.tree.map(lambda leaf: leaf.reshape(number, batch_size, *leaf.shape[1:]), padded)
