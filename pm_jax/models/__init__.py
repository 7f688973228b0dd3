"""Flax linen models: inputs [N, ...] to logits [N, C], the classifier being the module `head`."""

from pm_jax.models.clip import ClipImageTower, ClipTextTower
from pm_jax.models.mlp import MLP
from pm_jax.models.model import Model
from pm_jax.models.text_encoder import TextEncoder
from pm_jax.models.vit import VisionTransformer

__all__ = [
    "MLP",
    "ClipImageTower",
    "ClipTextTower",
    "Model",
    "TextEncoder",
    "VisionTransformer",
]
