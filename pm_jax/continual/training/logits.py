"""The way from examples as they are stored to logits."""

from typing import Any

import jax
import jax.numpy as jnp

from pm_jax import losses
from pm_jax.integrations.wrap import as_model
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


def _as_seen(logits: Array, class_mask: Array, temperature: float) -> Array:
    # float32 whatever the model computes in: losses and curvature are sums over many examples.
    logits = jnp.asarray(logits).astype(jnp.float32)
    return losses.mask_logits(logits / temperature, class_mask)
