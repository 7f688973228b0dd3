"""The way from examples as they are stored to logits."""

import flax.linen as nn
import jax.numpy as jnp

from pm_jax import losses
from pm_jax.types import Array, Params


def normalized(inputs: Array) -> Array:
    """Scale uint8 images from 0..255 to -1..1; token ids stay as they are."""
    if inputs.dtype != jnp.uint8:
        return inputs
    return inputs.astype(jnp.float32) / 127.5 - 1.0


def logits_of(
    model: nn.Module, params: Params, inputs: Array, class_mask: Array, temperature: float = 1.0
) -> Array:
    """Return logits as the loss sees them, float32 [N, C]: over the temperature, and masked."""
    logits = jnp.asarray(model.apply({"params": params}, normalized(inputs)))
    # float32 whatever the model computes in: losses and curvature are sums over many examples.
    return losses.mask_logits(logits.astype(jnp.float32) / temperature, class_mask)
