"""Flax linen models: inputs [N, ...] to logits [N, C], the classifier being the module `head`."""

from pm_jax.models.mlp import MLP
from pm_jax.models.vit import VisionTransformer

__all__ = ["MLP", "VisionTransformer"]
