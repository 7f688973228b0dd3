"""Accuracy and loss of a model on the tasks of a stream, per example and in one compiled call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pm_jax.classifiers import Predictor
from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import Devices
from pm_jax.continual.training.logits import logits_and_features_of, logits_of
from pm_jax.losses import MASKED_LOGIT, weights_of
from pm_jax.types import Array, Batch, Params, PyTree

BATCH_SIZE = 256
"""Examples at a time; accuracies do not depend on it, and losses by rounding only."""


def scores_batch(training_batch: int) -> int:
    """Return the examples that are scored at a time, more of them on accelerators.

    Four times a training step's take less memory than the step, which keeps all activations.
    """
    return BATCH_SIZE if jax.default_backend() == "cpu" else max(BATCH_SIZE, 4 * training_batch)


def unchanged(inputs: Array) -> Array:
    """Return inputs as they are stored."""
    return inputs


class Scores(NamedTuple):
    """Scores of a model on the tasks of a stream; every field but the last is float32 [T].

    Attributes:
        accuracy: over all classes seen; [K, T] where K predictors are given.
        task_aware: over the task's own classes; likewise.
        loss: mean cross-entropy over the task's own classes, without perturbation, of the model's
            own columns.
        class_hits: number of right answers over all classes seen, by class, int32 [C]; [K, C]
            where K predictors are given.
    """

    accuracy: Array
    task_aware: Array
    loss: Array
    class_hits: Array


class ModelPass(DataPass):
    """A pass that applies a model, whose logits its loss divides by a temperature.

    `model` is all that `as_model` takes.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = BATCH_SIZE,
        *,
        temperature: float = 1.0,
        transform: Callable[[Array], Array] = unchanged,
        devices: Devices | None = None,
    ):
        super().__init__(devices or Devices.of(), batch_size, transform)
        self._model, self._temperature = model, temperature


class ScoresGiven(NamedTuple):
    """The arguments of `ScoresPass`, beside the data.

    Attributes:
        seen_mask: the classes that the first accuracy is over, bool [C].
        tasks: number of tasks; those behind them have 0.
        predictors: K classifiers of the model's features, where `None` stands for the model's own
            columns, which alone are scored without any.
    """

    params: Params
    seen_mask: Array
    tasks: Array
    model_state: PyTree = None
    predictors: tuple[Predictor | None, ...] | None = None


class ScoresPass(ModelPass):
    """Scores of a model on the first tasks: `scores(data, *ScoresGiven)`.

    The features of a batch are computed once, whatever number of predictors reads them.
    """

    def begin(self, data: DeviceData, given: tuple) -> tuple[PyTree, Order]:
        """Begin with zero counts, and the examples of all tasks, one task after the other."""
        count = ScoresGiven(*given).tasks
        tasks, largest = data.positions.shape
        places = jnp.arange(tasks * largest)
        owners = places // largest
        real = (places % largest < data.sizes[owners]) & (owners < count)
        # Padding goes behind all examples, so that no batch is made of it, however tasks differ.
        places = jnp.argsort(~real, stable=True)
        order = Order.of(data.positions.ravel()[places], jnp.sum(real))
        # The number of batches so far tells the places, and so the tasks, of a batch's examples.
        several = len(ScoresGiven(*given).predictors or (None,))
        number, correct = jnp.zeros((), jnp.int32), jnp.zeros((several, 2, tasks), jnp.int32)
        by_class = jnp.zeros((several, data.class_masks.shape[1]), jnp.int32)
        return (number, owners[places], correct, by_class, jnp.zeros(tasks)), order

    def update(self, carry: PyTree, batch: Batch, data: DeviceData, given: tuple) -> PyTree:
        """Add the hits and losses of a batch to those of its examples' tasks."""
        params, seen_mask, _, model_state, predictors = ScoresGiven(*given)
        number, owners, correct, by_class, losses = carry
        places = number * self.batches.size + jnp.arange(self.batches.size)
        task = owners[jnp.minimum(places, owners.shape[0] - 1)]
        real = weights_of(batch) > 0
        every_class = jnp.ones_like(seen_mask)
        arguments = self._model, params, batch.inputs, every_class
        features: Any = None
        if any(predictor is not None for predictor in predictors or ()):
            logits, features = logits_and_features_of(*arguments, model_state)
        else:
            logits = logits_of(*arguments, model_state=model_state)
        every = [logits if x is None else x(features) for x in predictors or (None,)]
        task_mask = data.class_masks[task]
        hits = [
            [
                real & (jnp.argmax(jnp.where(mask, one, -jnp.inf), axis=-1) == batch.labels)
                for mask in (seen_mask[None, :], task_mask)
            ]
            for one in every
        ]
        values = optax.softmax_cross_entropy_with_integer_labels(
            jnp.where(task_mask, logits / self._temperature, MASKED_LOGIT), batch.labels
        )
        # Hits are counted in int32: float32 would round beyond 2**24 examples.
        counted = jnp.asarray(hits).astype(jnp.int32)
        return (
            number + 1,
            owners,
            correct.at[..., task].add(counted),
            by_class.at[:, batch.labels].add(counted[:, 0]),
            losses.at[task].add(jnp.where(real, values, 0.0)),
        )

    def finish(self, carry: PyTree, data: DeviceData, given: tuple) -> Scores:
        """Return means over the examples of each task."""
        *_, correct, by_class, losses = carry
        shares = correct / data.sizes[None, None, :]
        if ScoresGiven(*given).predictors is None:
            shares, by_class = shares[0], by_class[0]
        return Scores(shares[..., 0, :], shares[..., 1, :], losses / data.sizes, by_class)


class MeanLossPass(ModelPass):
    """Mean cross-entropy over a task and its classes, float32.

    It is called as `mean_loss(data, params, task, model_state=None)`.
    """

    def begin(self, data: DeviceData, given: tuple) -> tuple[Array, Order]:
        """Begin with no loss, and the examples of the task."""
        return jnp.zeros((), jnp.float32), data.order(given[1])

    def update(self, total: Array, batch: Batch, data: DeviceData, given: tuple) -> Array:
        """Add the losses of a batch."""
        params, task, *model_state = given
        mask = data.class_masks[task]
        logits = logits_of(self._model, params, batch.inputs, mask, self._temperature, *model_state)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return total + jnp.sum(jnp.where(weights_of(batch) > 0, values, 0.0))

    def finish(self, total: Array, data: DeviceData, given: tuple) -> Array:
        """Divide the sum by the number of examples."""
        return total / data.sizes[given[1]]
