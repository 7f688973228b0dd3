"""The current task's loss as a merge rule sees it: a function of the leaves that merge.

A rule that optimises while it merges is given an `Objective`: a pytree with the model inside, which
passes through jit like any evidence.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pm_jax import losses, trees
from pm_jax.types import Array, Batch, Params


class Objective(NamedTuple):
    """A model with some examples of the current task.

    Attributes:
        logits: `logits(leaves, inputs) -> float32 [N, C]` over all classes; a
            `jax.tree_util.Partial` of a fixed function.
        batches: `Batch` whose leaves are [B, N, ...].
        classes: bool [C], of the current task.
        old_classes: bool [C], of the tasks before; none at the first task.
        temperature: that the training loss divides the logits by.
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
        weights = losses.weights_of(batch)
        return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1.0), logits

    def task(self, number: Array | int) -> "Objective":
        """One of the objectives that were stacked."""
        batches = jax.tree.map(lambda leaf: leaf[number], self.batches)
        classes, old_classes = self.classes[number], self.old_classes[number]
        return self._replace(batches=batches, classes=classes, old_classes=old_classes)

    def old_log_probabilities(self, logits: Array, temperature: float) -> Array:
        """Log-probabilities among the old classes, [N, C]; hugely negative for the others."""
        return jax.nn.log_softmax(losses.mask_logits(logits, self.old_classes) / temperature)

    def mean_over_batches(self, figures: Callable[[Array], Array]) -> Array:
        """Mean of `figures(number of a batch)`, each batch weighing as its examples."""
        weights = jnp.sum(losses.weights_of(self.batches), axis=1)
        values = jax.lax.map(figures, jnp.arange(weights.shape[0]))
        total = jnp.tensordot(weights, values, 1, precision="highest")
        return total / jnp.maximum(jnp.sum(weights), 1.0)

    def gradient_norm(self, leaves: Params) -> Array:
        """Norm of a batch's gradient of the loss by the leaves, its mean over the batches.

        Example:
            >>> logits = jax.tree_util.Partial(lambda w, x: x * w[None])
            >>> batches = Batch(jnp.ones((1, 1, 1)), jnp.zeros((1, 1), int), jnp.ones((1, 1)))
            >>> masks = jnp.ones(2, bool), jnp.zeros(2, bool)
            >>> objective = Objective(logits, batches, *masks)
            >>> round(float(objective.gradient_norm(jnp.zeros(2))), 4)  # (-1/2, 1/2)
            0.7071
        """

        def norm_on(number: Array) -> Array:
            return trees.norm(jax.grad(self.loss, has_aux=True)(leaves, self.batch(number))[0])

        return self.mean_over_batches(norm_on)


def stack(objectives: Sequence[Objective], seen: Array) -> Objective:
    """Objectives of one model on several tasks as one, which a compiled function can loop over.

    Args:
        objectives: of T tasks, with batches of the same shapes.
        seen: bool [T]; the examples of the others get weight 0.

    Returns:
        An `Objective` whose batches and classes have a leading axis T; `task` takes one out.

    Example:
        >>> batches = Batch(jnp.ones((1, 2, 1)), jnp.zeros((1, 2), int), jnp.ones((1, 2)))
        >>> masks = jnp.ones(2, bool), jnp.zeros(2, bool)
        >>> one = Objective(jax.tree_util.Partial(lambda w, x: x * w[None]), batches, *masks)
        >>> stack([one, one], jnp.asarray([True, False])).batches.weights.tolist()
        [[[1.0, 1.0]], [[0.0, 0.0]]]
    """
    parts = [(one.batches, one.classes, one.old_classes) for one in objectives]
    batches, classes, old_classes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    batches = batches._replace(weights=losses.weights_of(batches) * seen[:, None, None])
    return objectives[0]._replace(batches=batches, classes=classes, old_classes=old_classes)
