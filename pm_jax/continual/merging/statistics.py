"""Statistics that a task's features leave behind, for classifiers that are made from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from pm_jax import losses
from pm_jax.classifiers import Statistics, drift
from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.logits import normalized
from pm_jax.continual.training.purpose_keys import CLASSIFIERS, purpose_key
from pm_jax.integrations.wrap import as_model
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, Key, Params, PyTree

BATCH_SIZE = 256


class Given(NamedTuple):
    """The arguments of `StatisticsPass`, beside the data.

    Attributes:
        key: of the run, so that what is drawn is the same for all tasks.
        params: the merged model.
        before: parameters and state of the model that earlier statistics are of; `None` where
            the drift of the features does not matter.
    """

    key: Key
    params: Params
    task: Array
    model_state: PyTree = None
    before: tuple[Params, PyTree] | None = None


class TaskStatistics(NamedTuple):
    """Statistics of the features of one task.

    Attributes:
        classes: the state of each kind of statistics, by name.
        drift: moments of the features before and after the merge, or `None`.
    """

    classes: dict[str, PyTree]
    drift: drift.DriftStatistics | None


def features_of(model: Any, params: Params, inputs: Array, model_state: PyTree = None) -> Array:
    """Return the inputs [N, D] of a model's classifier for examples as they are stored."""
    features: Any = getattr(as_model(model), "features")  # noqa: B009  it is optional
    return features(params, model_state, normalized(inputs))


class StatisticsPass(DataPass):
    """Observes the features of a task's training examples: `observe(data, *Given)`.

    However many classifiers there are, features are computed once, and once more where their drift
    is observed too.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        statistics: Sequence[Statistics],
        num_classes: int,
        width: int,
    ):
        super().__init__(devices_of(config), BATCH_SIZE, evaluation_transform(config))
        self._model, self._statistics = model, tuple(statistics)
        self._size = num_classes, width

    def begin(self, data: DeviceData, given: tuple) -> tuple[TaskStatistics, Order]:
        """Begin with no examples, and those of the task in stored order."""
        arguments = Given(*given)
        return self.blank(arguments.key, arguments.before is not None), data.order(arguments.task)

    def blank(self, key: Key, with_drift: bool) -> TaskStatistics:
        """Make the statistics of no examples."""
        key = purpose_key(key, CLASSIFIERS)
        classes = {each.name: each.init(*self._size, key) for each in self._statistics}
        # A weakly typed array would make another program of the first task's.
        classes = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), classes)
        return TaskStatistics(classes, drift.init(self._size[1]) if with_drift else None)

    @in_full_precision
    def update(
        self, carry: TaskStatistics, batch: Batch, data: DeviceData, given: tuple
    ) -> TaskStatistics:
        """Observe the features of a batch."""
        del data
        _, params, _, model_state, before = Given(*given)
        weights = losses.weights_of(batch)
        after = features_of(self._model, params, batch.inputs, model_state)
        classes = {
            each.name: each.observe(carry.classes[each.name], after, batch.labels, weights)
            for each in self._statistics
        }
        moments = carry.drift
        if before is not None and moments is not None:
            earlier = features_of(self._model, before[0], batch.inputs, before[1])
            moments = drift.observe(moments, earlier, after, weights)
        return TaskStatistics(classes, moments)
