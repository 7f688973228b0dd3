"""The way from examples as they are stored to logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import losses
from pm_jax.integrations.wrap import as_model
from pm_jax.models.model import Model
from pm_jax.types import Array, Key, Params, PyTree


def normalized(inputs: Array) -> Array:
    """Scale uint8 images from 0..255 to -1..1; token ids stay as they are."""
    if inputs.dtype != jnp.uint8:
        return inputs
    return inputs.astype(jnp.float32) / 127.5 - 1.0


def logits_of(
    model: Any,
    params: Params,
    inputs: Array,
    class_mask: Array,
    temperature: float = 1.0,
    model_state: PyTree = None,
) -> Array:
    """Return logits as the loss sees them, float32 [N, C]: over the temperature, and masked.

    `model` is all that `as_model` takes; it evaluates.
    """
    logits, _ = as_model(model).apply(params, model_state, normalized(inputs))
    return _as_seen(logits, class_mask, temperature)


def logits_and_features_of(
    model: Any, params: Params, inputs: Array, class_mask: Array, model_state: PyTree = None
) -> tuple[Array, Array]:
    """Return logits as `logits_of` does, and the inputs [N, D] of the model's classifier."""
    model = as_model(model)
    if hasattr(model, "logits_and_features"):
        # One pass for certain: XLA does not always see that two passes are alike.
        logits, features = model.logits_and_features(params, model_state, normalized(inputs))
        return _as_seen(logits, class_mask, 1.0), features
    logits = logits_of(model, params, inputs, class_mask, model_state=model_state)
    return logits, model.features(params, model_state, normalized(inputs))


def training_logits_of(
    model: Any,
    params: Params,
    model_state: PyTree,
    key: Key | None,
    inputs: Array,
    class_mask: Array,
    temperature: float = 1.0,
) -> tuple[Array, PyTree]:
    """Return logits of a model that trains, as `logits_of` does, and its next state."""
    logits, changed = as_model(model).apply(
        params, model_state, normalized(inputs), key=key, train=True
    )
    # The loop over the steps carries the state, whose types must not change on the way.
    changed = jax.tree.map(lambda old, new: new.astype(old.dtype), model_state, changed)
    return _as_seen(logits, class_mask, temperature), changed


class Evaluating(NamedTuple):
    """A model that trains as it evaluates: nothing is random, and its state stays.

    The columns of a classifier train on the features that they will predict from.
    """

    model: Model

    @property
    def classifier(self) -> str:
        """Return the path of the model's classifier."""
        return self.model.classifier

    def init(self, key: Key, inputs: Array, /) -> tuple[Params, PyTree]:
        """Make the model's parameters and its state."""
        return self.model.init(key, inputs)

    def apply(
        self,
        params: Params,
        state: PyTree,
        inputs: Array,
        /,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, PyTree]:
        """Compute the logits of the model that evaluates, and return its state as it was."""
        del key, train
        return self.model.apply(params, state, inputs)[0], state


def _as_seen(logits: Array, class_mask: Array, temperature: float) -> Array:
    # float32 whatever the model computes in: losses and curvature are sums over many examples.
    logits = jnp.asarray(logits).astype(jnp.float32)
    return losses.mask_logits(logits / temperature, class_mask)
