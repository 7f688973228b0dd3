"""Class statistics of a task's features, for the classifier of `pm_jax.discriminant`."""

import flax.linen as nn
import jax.numpy as jnp

from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.placement.feed import Pass
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.task_program import DeviceData, normalized
from pm_jax.curvature import dense_layers
from pm_jax.discriminant import ClassStatistics
from pm_jax.types import Array, Params

BATCH_SIZE = 256


def features_of(model: nn.Module, params: Params, inputs: Array) -> Array:
    """What a model's classifier reads, of examples as they are stored.

    Args:
        model: linen module whose classifier is the Dense layer `head`.
        params: its parameters.
        inputs: uint8 images or int32 token ids [N, ...].

    Returns:
        float32 [N, D].

    Example:
        >>> from pm_jax.models import MLP
        >>> model, inputs = MLP(3, (5,)), jnp.zeros((2, 4), jnp.uint8)
        >>> import jax
        >>> params = model.init(jax.random.key(0), normalized(inputs))["params"]
        >>> features_of(model, params, inputs).shape
        (2, 5)
    """
    return dense_layers.inputs_of(
        lambda: model.apply({"params": params}, normalized(inputs)), "head"
    )


def statistics_fn(config: Config, model: nn.Module) -> Pass:
    """How the statistics of a task's training examples are added to those before.

    Args:
        config: settings.
        model: linen module.

    Returns:
        A pass `add(statistics, params, data, task) -> ClassStatistics`, with `task` an int32
        scalar.

    Example:
        >>> type(statistics_fn(Config(), nn.Dense(2))).__name__
        'Pass'
    """
    transform, devices = evaluation_transform(config), devices_of(config)
    batch_size = devices.multiple(BATCH_SIZE)

    def begin(statistics: ClassStatistics, params: Params, data: DeviceData, task: Array):
        del params
        return statistics, data.positions[task], -(-data.sizes[task] // batch_size)

    def step(number, statistics, rows, _, params: Params, data: DeviceData, task: Array):
        places = number * batch_size + jnp.arange(batch_size)
        rows = rows[jnp.minimum(places, rows.shape[0] - 1)]
        features = features_of(model, params, transform(data.take(devices, rows, places)))
        weights = (places < data.sizes[task]).astype(jnp.float32)
        return statistics.plus(features, data.labels[rows], weights)

    return Pass(
        begin=begin,
        step=step,
        finish=lambda statistics, *_: statistics,
        batch_size=lambda *_: batch_size,
        devices=devices,
    )
