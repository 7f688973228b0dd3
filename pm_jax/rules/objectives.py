"""The current task's loss as a merge rule sees it: a function of the leaves that merge."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pm_jax import losses, trees
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, Params


class Objective(NamedTuple):
    """A model with some examples of the current task, a pytree that passes through jit.

    Attributes:
        logits: `logits(leaves, inputs) -> float32 [N, C]` over all classes, a
            `jax.tree_util.Partial` of a fixed function.
        batches: `Batch` whose leaves are [B, N, ...].
        classes: bool [C], true for the current task's classes.
        old_classes: bool [C], true for those of the tasks before; none at the first task.
        temperature: divisor of the logits in the training loss.
    """

    logits: Callable[..., Array]
    batches: Batch
    classes: Array
    old_classes: Array
    temperature: Array | float = 1.0

    def batch(self, number: Array | int) -> Batch:
        """One of the batches; the number wraps around."""
        index = number % self.batches.labels.shape[0]
        return jax.tree.map(lambda leaf: leaf[index], self.batches)

    def loss(self, leaves: Params, batch: Batch) -> tuple[Array, Array]:
        """Mean cross-entropy over the current task's classes, and the logits [N, C].

        The loss is that of training, at its temperature; the logits are not divided by it.
        """
        logits = self.logits(leaves, batch.inputs)
        values = optax.softmax_cross_entropy_with_integer_labels(
            losses.mask_logits(logits / self.temperature, self.classes), batch.labels
        )
        return weighted_mean(values, batch), logits

    def task(self, number: Array | int) -> "Objective":
        """One of the objectives that were stacked."""
        batches = jax.tree.map(lambda leaf: leaf[number], self.batches)
        classes, old_classes = self.classes[number], self.old_classes[number]
        return self._replace(batches=batches, classes=classes, old_classes=old_classes)

    def old_log_probabilities(self, logits: Array, temperature: float) -> Array:
        """Log-probabilities among the old classes, [N, C]; hugely negative for the others."""
        return jax.nn.log_softmax(losses.mask_logits(logits, self.old_classes) / temperature)

    def mean_over_batches(self, figures: Callable[[Array], Array]) -> Array:
        """Mean of `figures(number of a batch)`, in which a batch weighs as much as its examples."""
        weights = jnp.sum(stacked_weights(self.batches), axis=1)
        # lax.map keeps the activations of one batch at a time; vmap would keep all of them.
        values = jax.lax.map(figures, jnp.arange(weights.shape[0]))
        total = jnp.tensordot(weights, values, 1, precision="highest")
        return total / jnp.maximum(jnp.sum(weights), 1.0)

    @in_full_precision
    def gradient_norm(self, leaves: Params) -> Array:
        """Norm of the gradient of a batch's loss by the leaves, its mean over the batches."""

        def norm_on(number: Array) -> Array:
            return trees.norm(jax.grad(self.loss, has_aux=True)(leaves, self.batch(number))[0])

        return self.mean_over_batches(norm_on)


def weighted_mean(values: Array, batch: Batch) -> Array:
    """Mean of values [N] by the batch's weights, 0 for a batch of padding."""
    weights = losses.weights_of(batch)
    # The bound keeps a batch of padding, whose weights are all 0, from dividing by 0.
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1.0)


def stacked_weights(batches: Batch) -> Array:
    """Weights of the examples of stacked batches, [..., N]: ones where none are given."""
    # `losses.weights_of` is for one batch: it would take a second axis for one of tokens.
    return jnp.ones(batches.labels.shape) if batches.weights is None else batches.weights


def stack(objectives: Sequence[Objective], seen: Array) -> Objective:
    """Objectives of one model on T tasks as one with a leading axis T, to loop over when compiled.

    The examples of the tasks that are not `seen` (bool [T]) get weight 0.
    """
    parts = [(one.batches, one.classes, one.old_classes) for one in objectives]
    batches, classes, old_classes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    # Weights instead of fewer tasks: the shapes stay, and so does the compiled function.
    batches = batches._replace(weights=stacked_weights(batches) * seen[:, None, None])
    return objectives[0]._replace(batches=batches, classes=classes, old_classes=old_classes)


def map_tasks(figures: Callable[[Array], Array], seen: Array) -> Array:
    """`figures(number)` of every task that is seen (bool [T]), stacked; 0 for the others."""
    # lax.map and not vmap, which would turn `cond` into computing the figures of every task.
    nothing = jnp.zeros_like(jax.eval_shape(figures, jnp.int32(0)))
    return jax.lax.map(
        lambda number: jax.lax.cond(seen[number], figures, lambda _: nothing, number),
        jnp.arange(seen.shape[0]),
    )
