"""Class statistics of a task's features, for the classifier of `pm_jax.discriminant`."""

from typing import TypeAlias

import flax.linen as nn

from pm_jax import losses
from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.logits import normalized
from pm_jax.curvature import dense_layers
from pm_jax.discriminant import ClassStatistics
from pm_jax.types import Array, Batch, Params

BATCH_SIZE = 256


def features_of(model: nn.Module, params: Params, inputs: Array) -> Array:
    """Return the inputs [N, D] of a model's classifier `head` for examples as they are stored."""
    return dense_layers.inputs_of(
        lambda: model.apply({"params": params}, normalized(inputs)), "head"
    )


class StatisticsPass(DataPass):
    """Adds a task's training examples to statistics: `add(data, statistics, params, task)`."""

    Given: TypeAlias = tuple[ClassStatistics, Params, Array]

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(devices_of(config), BATCH_SIZE, evaluation_transform(config))
        self._model = model

    def begin(self, data: DeviceData, given: Given) -> tuple[ClassStatistics, Order]:
        """Begin with the statistics so far, and the examples of the task."""
        statistics, _, task = given
        return statistics, data.order(task)

    def update(
        self, statistics: ClassStatistics, batch: Batch, data: DeviceData, given: Given
    ) -> ClassStatistics:
        """Add the features of a batch."""
        del data
        features = features_of(self._model, given[1], batch.inputs)
        return statistics.plus(features, batch.labels, losses.weights_of(batch))
