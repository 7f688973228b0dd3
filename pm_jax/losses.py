"""Losses per example, their masks and their padding.

An example has one label, or is a sequence with a label for each of its T tokens (labels [N, T],
logits [N, T, C]). The loss of a sequence is the *sum* over its tokens, each times its weight where
the weights are [N, T]; a token of weight 0 is padding, and its label may be any number. Everything
else counts examples: a mean is over sequences, and a sequence whose tokens all have weight 0 is
padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pm_jax.types import Array, Batch, LogitsFn, LossesFn, Params, PyTree

MASKED_LOGIT = -1e30
"""Finite, so that a masked class has probability 0 and no gradient is NaN."""


def mask_logits(logits: Array, class_mask: Array) -> Array:
    """Logits [N, C] in float32, -1e30 for the classes that a mask [C], bool or 0/1, leaves out."""
    return jnp.where(class_mask[None, :] > 0, logits.astype(jnp.float32), MASKED_LOGIT)


def with_state(function: Callable[..., Any], model_state: PyTree) -> Callable[..., Any]:
    """A `LogitsFn` or `LossesFn` that no longer takes the model's state, as if it had none.

    Args:
        function: takes the state as its third argument, or takes none.
        model_state: the state, any pytree; `None` leaves the function as it is.

    Example:
        >>> with_state(lambda w, x, state: w * x + state, 1.0)(2.0, 3.0)
        7.0
    """
    if model_state is None:
        return function
    # A new tree for every call: variables of nnx may only change in the trace that made them.
    return lambda params, inputs: function(params, inputs, jax.tree.map(lambda x: x, model_state))


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The `LossesFn` that `cross_entropy` makes; two of them for one model are equal.

    Attributes:
        logits_fn: the model.
    """

    logits_fn: LogitsFn

    def __call__(self, params: Params, batch: Batch, /, model_state: PyTree = None) -> Array:
        """Losses [N]."""
        logits = with_state(self.logits_fn, model_state)(params, batch.inputs)
        labels, weights = batch.labels, batch.weights
        if labels.ndim == 1:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        weights = token_weights(batch)
        # The label of padding, often -100, is no class, and its loss would be NaN.
        labels = jnp.where(weights > 0, labels, 0)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(weights * values, axis=1)


def cross_entropy(logits_fn: LogitsFn) -> LossesFn:
    """Softmax cross-entropy of a model, one value per example; for a sequence the sum over tokens.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`, or [N, T, C] for labels [N, T]; with a
            third argument for the state of a model that has one.

    Returns:
        `losses_fn(params, batch) -> [N]`, or `losses_fn(params, batch, model_state)`.

    Example:
        >>> losses = cross_entropy(lambda w, x: x @ w)
        >>> batch = Batch(jnp.ones((1, 2)), jnp.zeros(1, int))
        >>> round(float(losses(jnp.zeros((2, 2)), batch)[0]), 4)  # log 2
        0.6931
        >>> tokens = Batch(jnp.ones((1, 3, 2)), jnp.zeros((1, 3), int), jnp.asarray([[1., 1., 0.]]))
        >>> round(float(losses(jnp.zeros((2, 2)), tokens)[0]), 4)  # 2 log 2
        1.3863
    """
    return CrossEntropy(logits_fn)


def weights_of(batch: Batch) -> Array:
    """Weights of N examples, float [N]: ones where none are given.

    With weights [N, T] of tokens, an example counts 1 if one of its tokens has weight.

    Example:
        >>> tokens = jnp.asarray([[1.0, 0.5], [0.0, 0.0]])
        >>> weights_of(Batch(jnp.ones((2, 2)), jnp.zeros((2, 2), int), tokens)).tolist()
        [1.0, 0.0]
    """
    if batch.weights is None:
        return jnp.ones(batch.labels.shape[:1], jnp.float32)
    if batch.weights.ndim == 1:
        return batch.weights
    return jnp.any(batch.weights > 0, axis=1).astype(batch.weights.dtype)


def token_weights(batch: Batch) -> Array:
    """Weights within the examples, in the labels' shape: of tokens where these have some, or ones.

    The weight of an example as a whole, `weights_of`, is not part of them.
    """
    if batch.weights is None or batch.weights.ndim == 1:
        return jnp.ones(batch.labels.shape, jnp.float32)
    return batch.weights


def with_weighted_gradients(logits: Array, batch: Batch) -> Array:
    """Logits [N, T, C] whose gradients are times the root of their tokens' weights; or as they are.

    Squares of such gradients have the weights that the tokens have in the loss.

    Example:
        >>> batch = Batch(jnp.ones((1, 2)), jnp.zeros((1, 2), int), jnp.asarray([[4.0, 0.0]]))
        >>> jax.grad(lambda x: with_weighted_gradients(x, batch).sum())(
        ...     jnp.ones((1, 2, 1))).tolist()
        [[[2.0], [0.0]]]
    """
    if batch.weights is None or batch.weights.ndim == 1:
        return logits
    roots = jnp.sqrt(batch.weights)[..., None].astype(logits.dtype)
    fixed = jax.lax.stop_gradient(logits)
    # The values stay those of the logits, since the difference is 0.
    return fixed + roots * (logits - fixed)


def with_weights(batch: Batch) -> Batch:
    """The batch with the weights that it has, or ones [N]."""
    return batch._replace(weights=weights_of(batch)) if batch.weights is None else batch


def weighted(batch: Batch, factors: Any) -> Batch:
    """The batch with its weights, [N] or [N, T], times a factor [N] for every example."""
    weights = with_weights(batch).weights
    assert weights is not None
    return batch._replace(weights=weights * factors.reshape(-1, *[1] * (weights.ndim - 1)))


def mean(losses_fn: LossesFn) -> Callable[..., Array]:
    """Weighted mean of per-example losses, 0 for a batch of padding.

    Args:
        losses_fn: `losses_fn(params, batch) -> [N]`, or with the model's state as third argument.

    Returns:
        `loss_fn(params, batch) -> scalar`, or `loss_fn(params, batch, model_state)`.

    Example:
        >>> loss = mean(lambda w, batch: w * batch.inputs)
        >>> batch = Batch(jnp.asarray([1.0, 5.0]), jnp.zeros(2, int), jnp.asarray([1.0, 0.0]))
        >>> float(loss(2.0, batch))
        2.0
    """

    def loss_fn(params: Params, batch: Batch, model_state: PyTree = None) -> Array:
        weights = weights_of(batch)
        values = with_state(losses_fn, model_state)(params, batch)
        # At least 1 in the divisor: a batch of padding has the loss 0, not NaN.
        return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1.0)

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
        with_weights(examples),
    )
    padded = weighted(padded, index < count)
    return jax.tree.map(lambda leaf: leaf.reshape(number, batch_size, *leaf.shape[1:]), padded)
