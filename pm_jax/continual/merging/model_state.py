"""The state of a model at a merge: kept, interpolated like the parameters, or measured anew."""

from typing import Any

import jax
import jax.numpy as jnp

from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.logits import normalized
from pm_jax.continual.training.purpose_keys import STATISTICS, purpose_key
from pm_jax.integrations.linen import running_mean
from pm_jax.losses import weights_of
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, PyTree


class BatchStatisticsPass(DataPass):
    """Measures a model's running averages on a task: `(data, key, params, task, model_state)`.

    The result is the state with the mean over all examples of the statistics of their batches, of
    the size of training.
    """

    def __init__(self, config: Config, model: Any):
        super().__init__(devices_of(config), config.batch_size, evaluation_transform(config))
        self._measure = getattr(model, "batch_statistics", None)

    def begin(self, data: DeviceData, given: tuple) -> tuple[PyTree, Order]:
        """Begin with no examples, and those of the task in random order."""
        key, _, task, model_state = given
        order = data.shuffled(purpose_key(key, STATISTICS, task), task)
        zero = jnp.zeros((), jnp.float32)
        return (model_state, zero, zero), order.padded_with_examples(self.batches.size)

    @in_full_precision
    def update(self, carry: PyTree, batch: Batch, data: DeviceData, given: tuple) -> PyTree:
        """Move the mean towards the statistics of a batch."""
        del data
        key, params, task, model_state = given
        mean, examples, number = carry
        if self._measure is None:  # Nothing of the state is a running average.
            return carry
        # The numbers of the batches follow a counter that no shuffle has.
        model_key = purpose_key(key, STATISTICS, task, 1 + number.astype(jnp.int32))
        measured = self._measure(params, model_state, normalized(batch.inputs), model_key)
        count = jnp.sum(weights_of(batch))
        examples = examples + count
        share = count / jnp.maximum(examples, 1.0)
        return running_mean(mean, measured, share), examples, number + 1

    def finish(self, carry: PyTree, data: DeviceData, given: tuple) -> PyTree:
        """Return the mean."""
        del data, given
        return carry[0]


@jax.jit
def between(previous: PyTree, trained: PyTree, alpha: Array) -> PyTree:
    """Interpolate two states by a coefficient, at most to either end; only floats move."""
    share = jnp.clip(jnp.nan_to_num(alpha, nan=1.0), 0.0, 1.0)

    def mixed(low: Array, high: Array) -> Array:
        if not jnp.issubdtype(high.dtype, jnp.floating):
            return high
        step = (high - low).astype(jnp.float32)
        # Exact at both ends, as `trees.lerp` is.
        value = jnp.where(share < 0.5, low + share * step, high - (1 - share) * step)
        return value.astype(high.dtype)

    return jax.tree.map(mixed, previous, trained)
