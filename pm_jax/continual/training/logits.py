"""What a model of a run makes of examples as they are stored."""

import flax.linen as nn
import jax.numpy as jnp

from pm_jax import losses
from pm_jax.types import Array, Params


def normalized(inputs: Array) -> Array:
    """Examples as the models read them: images from 0..255 to -1..1, token ids as they are."""
    if inputs.dtype != jnp.uint8:
        return inputs
    return inputs.astype(jnp.float32) / 127.5 - 1.0


def logits_of(
    model: nn.Module,
    params: Params,
    inputs: Array,
    class_mask: Array,
    temperature: float = 1.0,
) -> Array:
    """Logits as the loss sees them, float32 [N, C]: over the temperature, masked by class."""
    logits = jnp.asarray(model.apply({"params": params}, normalized(inputs)))
    return losses.mask_logits(logits.astype(jnp.float32) / temperature, class_mask)
