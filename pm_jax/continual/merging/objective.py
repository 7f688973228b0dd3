"""What rules that optimise while they merge see of a task: its loss on some of its examples."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.placement.feed import HostData
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.purpose_keys import EXAMPLES, purpose_key
from pm_jax.continual.training.task_program import DeviceData, logits_of
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, Batch, Key, Params


def objective_fn(
    config: Config, model: nn.Module, merging: tuple[str, ...]
) -> Callable[..., Objective]:
    """How the objective of a task is made, in the coordinates that merge.

    Its examples are `config.merge_examples` of the task's, drawn by the key, in batches as in
    training and as evaluation sees them; the same examples whatever the parameters.

    Args:
        config: settings.
        model: linen module.
        merging: paths of the leaves that merge; the others are those of the parameters given.

    Returns:
        `objective(key, params, data, task) -> Objective`, with full parameters, the stream on the
        device or the host, and the task's number as an int32 scalar.

    Example:
        >>> stream = Config().task_stream(0)
        >>> model = nn.Dense(10)
        >>> make = objective_fn(Config(merge_examples=40), model, ())
        >>> data = DeviceData.of(devices_of(Config()), stream, stream.train)
        >>> make(jax.random.key(0), {}, data, 0).batches.weights.sum(axis=1).tolist()
        [32.0, 8.0]
    """
    transform, devices = evaluation_transform(config), devices_of(config)
    batch_size = config.batch_size

    def logits_fn(params: Params, leaves: Params, inputs: Array) -> Array:
        everything = jnp.ones(1, bool)
        return logits_of(model, trees.replace(params, leaves), inputs, everything)

    @devices.jit
    def choose(key: Key, data: DeviceData, task: Array) -> tuple[Array, Array]:
        row, count = data.positions[task], data.sizes[task]
        number = -(-min(config.merge_examples, row.shape[0]) // batch_size)
        draws = jax.random.uniform(purpose_key(key, EXAMPLES, task), row.shape)
        order = jnp.argsort(jnp.where(jnp.arange(row.shape[0]) < count, draws, 2.0))
        places = jnp.arange(number * batch_size)
        rows = row[order[jnp.minimum(places, row.shape[0] - 1)]]
        weights = (places < jnp.minimum(count, config.merge_examples)).astype(jnp.float32)
        return rows, weights

    @devices.jit
    def masks(data: DeviceData, task: Array) -> tuple[Array, Array]:
        before = jnp.arange(data.class_masks.shape[0])[:, None] < task
        return data.class_masks[task], jnp.any(data.class_masks & before, axis=0)

    @jax.jit
    def batches_of(inputs: Array, labels: Array, weights: Array) -> Batch:
        batch = Batch(transform(inputs), labels, weights)
        in_batches = jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), batch)
        return devices.spread(in_batches, axis=1)

    @jax.jit
    def examples(data: DeviceData, rows: Array) -> Array:
        return data.take(devices, rows, rows)

    def objective(key: Key, params: Params, data: DeviceData | HostData, task: Array) -> Objective:
        rest = data.rest if isinstance(data, HostData) else data
        rows, weights = choose(key, rest, task)
        if isinstance(data, HostData):
            inputs = data.inputs[np.asarray(rows)]
        else:
            inputs = examples(data, rows)
        batches = batches_of(inputs, rest.labels[rows], weights)
        logits = jax.tree_util.Partial(logits_fn, params)
        classes, old_classes = masks(rest, task)
        return Objective(logits, batches, classes, old_classes, config.temperature)

    return objective
