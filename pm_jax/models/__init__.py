"""Flax linen models: inputs [N, ...] to logits [N, C], the classifier being the module `head`."""

import importlib
import warnings
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Find `pretrained`, which has moved to `pm_jax.weights`, as an attribute of this package.

    Raises:
        AttributeError: another name.
    """
    if name != "pretrained":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "pm_jax.models.pretrained is pm_jax.weights.pretrained now; import it from there",
        DeprecationWarning,
        stacklevel=2,
    )
    return importlib.import_module("pm_jax.weights.pretrained")
