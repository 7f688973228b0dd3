"""Checks of the arguments of classifiers; they cost nothing in a compiled program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.classifiers.base import Columns
from pm_jax.types import Array, InvalidInput


def examples(
    features: Array, labels: Array, weights: Array, num_classes: int, width: int
) -> tuple[Array, Array, Array]:
    """Check N examples; returns features and weights in float32, and 0 for labels of padding.

    Raises:
        InvalidInput: shapes or dtypes do not fit; where the values are known, features that are
            not finite, weights below 0 or labels out of range.
    """
    features, labels, weights = map(jnp.asarray, (features, labels, weights))
    check_features("features", features, width)
    count = features.shape[0]
    for name, array in (("labels", labels), ("weights", weights)):
        if array.shape != (count,):
            raise InvalidInput(
                f"{name}: has shape {array.shape} for {count} examples; give one number each"
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InvalidInput(
            f"labels: has type {labels.dtype}; they must be the numbers of the classes, as "
            "labels.astype(int)"
        )
    weights = weights.astype(jnp.float32)
    check_weights(weights)
    counted = weights > 0
    # Padding may hold NaN, which a product with the weight 0 would keep, or no class at all.
    kept = jnp.where(counted[:, None], features.astype(jnp.float32), 0.0)
    labels = jnp.where(counted, labels, 0)
    check_finite("features", kept)
    known = values_of(labels)
    if known is not None and known.size and not 0 <= known.min() <= known.max() < num_classes:
        wrong = known.min() if known.min() < 0 else known.max()
        raise InvalidInput(
            f"labels={wrong}: must be from 0 to {num_classes - 1}; init takes the number of "
            "classes of all tasks"
        )
    return kept, labels, weights


def check_features(name: str, features: Array, width: int) -> None:
    """Check that features have the shape [N, width] and are floating-point numbers."""
    if features.ndim != 2 or features.shape[1] != width:
        raise InvalidInput(
            f"{name}: has shape {features.shape}; must be [N, {width}], as the statistics are"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise InvalidInput(
            f"{name}: has type {features.dtype}; must be floating-point numbers, as the inputs of "
            "a classifier's layer are"
        )


def check_weights(weights: Array) -> None:
    """Check weights that are known."""
    known = values_of(weights)
    if known is not None and not np.all((known >= 0) & np.isfinite(known)):
        raise InvalidInput("weights: must be at least 0 and finite, where 0 marks padding")


def check_finite(name: str, array: Array) -> None:
    """Check that an array that is known has finite numbers only."""
    known = values_of(array)
    if known is not None and not np.isfinite(known).all():
        raise InvalidInput(
            f"{name}: has numbers that are not finite, and so would the classifier; look at the "
            "loss of the training before this"
        )


def columns_of(columns: Columns | None, classifier: str) -> Columns:
    """Kernel and bias in float32.

    Raises:
        InvalidInput: there are none, or shapes do not fit.
    """
    if columns is None:
        raise InvalidInput(
            f"columns=None: {classifier} reads the trained columns; give (kernel [D, C], bias [C])"
        )
    kernel, bias = (jnp.asarray(leaf).astype(jnp.float32) for leaf in columns)
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
        raise InvalidInput(
            f"columns: have shapes {kernel.shape} and {bias.shape}; must be [D, C] and [C]"
        )
    return kernel, bias


def values_of(array: Any) -> np.ndarray | None:
    """An array's values in the host's memory; `None` where this process does not have them."""
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)
