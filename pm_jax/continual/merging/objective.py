"""The loss of a task on some of its examples, for rules that optimise while they merge."""

from typing import Any

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.continual.placement.compiled import compiled
from pm_jax.continual.placement.data import DeviceData, HostData, Order, StreamData
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.logits import logits_of
from pm_jax.continual.training.purpose_keys import EXAMPLES, purpose_key
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, Batch, Key, Params, PyTree


class ExamplesPass(DataPass):
    """`config.merge_examples` drawn examples of a task: `examples(data, key, task)`.

    The result is one `Batch` with leaves [batches, batch size, ...].
    """

    def __init__(
        self,
        config: Config,
        input_shape: tuple[int, ...],
        largest_task: int,
        input_dtype: str = "",
    ):
        super().__init__(devices_of(config), config.batch_size, evaluation_transform(config))
        self._count = config.merge_examples
        number = -(-min(self._count, largest_task) // self.batches.size)
        stored = input_dtype or ("int32" if config.reads_text else "uint8")

        def blank() -> Batch:
            inputs = self._transform(jnp.zeros((self.batches.size, *input_shape), stored))
            labels = jnp.zeros(self.batches.size, jnp.int32)
            return Batch(inputs, labels, jnp.zeros(self.batches.size, jnp.float32))

        # Only shapes: the transform may change them, as by a crop to the model's size.
        self._blank: PyTree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype),
            jax.eval_shape(blank),
        )

    def begin(self, data: DeviceData, given: tuple[Key, Array]) -> tuple[PyTree, Order]:
        """Begin with blank batches, and the first examples of the task in random order."""
        key, task = given
        order = data.shuffled(purpose_key(key, EXAMPLES, task), task)
        order = Order.of(order.rows, jnp.minimum(order.length, self._count))
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._blank)
        return (jnp.zeros((), jnp.int32), blank), order

    def update(self, carry: PyTree, batch: Batch, data: DeviceData, given: Any) -> PyTree:
        """Keep a batch."""
        del data, given
        number, batches = carry
        kept = jax.tree.map(lambda leaves, leaf: leaves.at[number].set(leaf), batches, batch)
        return number + 1, kept

    def finish(self, carry: PyTree, data: DeviceData, given: Any) -> Batch:
        """Return the batches, each divided among the devices."""
        del data, given
        return self.batches.devices.spread(carry[1], axis=1)


class Objectives:
    """Makes the objective of a task, a function of the leaves that merge."""

    def __init__(
        self,
        config: Config,
        model: Any,
        input_shape: tuple[int, ...],
        largest_task: int,
        input_dtype: str = "",
    ):
        self.devices, self._model = devices_of(config), model
        self._temperature = config.temperature
        self._examples = ExamplesPass(config, input_shape, largest_task, input_dtype)

    def of_task(
        self,
        data: StreamData,
        key: Key,
        params: Params,
        task: Array,
        model_state: PyTree = None,
    ) -> Objective:
        """Make the objective of a task; its examples are the same whatever the parameters."""
        rest = data.rest if isinstance(data, HostData) else data
        classes, old_classes = self._masks(rest.class_masks, task)
        # A Partial is a pytree, so that compiled functions take objectives as arguments.
        return Objective(
            jax.tree_util.Partial(self._logits, params, model_state),
            self._examples(data, key, task),
            classes,
            old_classes,
            self._temperature,
        )

    def _logits(self, params: Params, model_state: PyTree, leaves: Params, inputs: Array) -> Array:
        # The objective masks classes by itself.
        every_class = jnp.ones(1, bool)
        moved = trees.replace(params, leaves)
        return logits_of(self._model, moved, inputs, every_class, model_state=model_state)

    @compiled()
    def _masks(self, class_masks: Array, task: Array) -> tuple[Array, Array]:
        """Return the classes of a task, and of the tasks before it."""
        before = jnp.arange(class_masks.shape[0])[:, None] < task
        return class_masks[task], jnp.any(class_masks & before, axis=0)
