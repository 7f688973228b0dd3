"""Class statistics of a task's features, for the classifiers made from them."""

from typing import Any, NamedTuple

from pm_jax import losses
from pm_jax.classifiers import CLASS_STATISTICS, ClassStatistics
from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.logits import normalized
from pm_jax.integrations.wrap import as_model
from pm_jax.types import Array, Batch, Params, PyTree

BATCH_SIZE = 256


class Given(NamedTuple):
    """The arguments of `StatisticsPass`, beside the data."""

    statistics: ClassStatistics
    params: Params
    task: Array
    model_state: PyTree = None


def features_of(model: Any, params: Params, inputs: Array, model_state: PyTree = None) -> Array:
    """Return the inputs [N, D] of a model's classifier for examples as they are stored."""
    features: Any = getattr(as_model(model), "features")  # noqa: B009  it is optional
    return features(params, model_state, normalized(inputs))


class StatisticsPass(DataPass):
    """Adds a task's training examples to statistics: `add(data, *Given)`."""

    def __init__(self, config: Config, model: Any):
        super().__init__(devices_of(config), BATCH_SIZE, evaluation_transform(config))
        self._model = model

    def begin(self, data: DeviceData, given: tuple) -> tuple[ClassStatistics, Order]:
        """Begin with the statistics so far, and the examples of the task."""
        statistics, _, task, _ = Given(*given)
        return statistics, data.order(task)

    def update(
        self, statistics: ClassStatistics, batch: Batch, data: DeviceData, given: tuple
    ) -> ClassStatistics:
        """Add the features of a batch."""
        del data
        _, params, _, model_state = Given(*given)
        features = features_of(self._model, params, batch.inputs, model_state)
        weights = losses.weights_of(batch)
        return CLASS_STATISTICS.observe(statistics, features, batch.labels, weights)
