"""Rules that only merging of files offers: those of mergekit under its names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax import block_sums, trees
from pm_jax.rules import MergeRule, Requirements, averaging
from pm_jax.rules.base import Evidence, MergeInfo
from pm_jax.rules.building import TaskCount
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Array, Params, require

COLLINEAR = 0.9995
"""Vectors with a cosine beyond this are interpolated along the line between them."""


def linear(*, model_weights: tuple[float, ...] = ()) -> MergeRule:
    """Average the models with weights of sum 1: `averaging` under another name.

    Args:
        model_weights: one weight for each model, none below 0; empty for equal ones.

    Returns:
        A `MergeRule` that needs no evidence.

    Example:
        >>> rule, state, merged = linear(model_weights=(0.25, 0.75)), None, jnp.zeros(1)
        >>> state = rule.init(merged)
        >>> for trained in (jnp.ones(1), jnp.full(1, 5.0)):
        ...     merged, state, _ = rule.update(state, previous=merged, trained=trained)
        >>> merged.tolist()
        [4.0]
    """
    return averaging(model_weights=model_weights)


def slerp(*, t: float = 0.5) -> MergeRule:
    """Move along the arc from the merged model to the next one, tensor by tensor.

        theta_hat_1 = theta_1*,   w = angle between theta_hat_{t-1} and theta_t*,
        theta_hat_t = sin((1 - s) w) / sin(w) theta_hat_{t-1} + sin(s w) / sin(w) theta_t*

    with s the setting `t`; each tensor is one vector. Where the angle is nearly 0 or 180 degrees,
    or a tensor is 0, it is the line between the two, as in mergekit.

    Args:
        t: how far along the arc, in [0, 1].

    Returns:
        A `MergeRule` that needs no evidence.

    Raises:
        ValueError: t out of range.

    References:
        Shoemake, `Animating Rotation with Quaternion Curves
        <https://doi.org/10.1145/325334.325242>`_, SIGGRAPH 1985

    Example:
        >>> rule, merged = slerp(), jnp.zeros(2)
        >>> state = rule.init(merged)
        >>> for trained in (jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])):
        ...     merged, state, _ = rule.update(state, previous=merged, trained=trained)
        >>> merged.round(4).tolist()  # halfway along the circle
        [0.7070999..., 0.7070999...]
    """
    require("t", t, 0 <= t <= 1, "in [0, 1]")

    def update(
        state: TaskCount, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, TaskCount, MergeInfo]:
        del evidence
        tasks = state.tasks + 1
        share = jnp.where(tasks == 1, 1.0, t)
        merged = jax.tree.map(lambda low, high: _on_arc(low, high, share), previous, trained)
        return merged, TaskCount(tasks), MergeInfo.of(share)

    return merge_rule(TaskCount.zero, update, Requirements(scope="tensor", meets_in_sums=True))


def _on_arc(low: Array, high: Array, share: Array) -> Array:
    dtype, stored = trees.compute_dtype(low, high), high.dtype
    low, high = (jnp.asarray(x, dtype) for x in (low, high))
    # Divided by their sums first, as squares of small or large numbers are none of float32.
    sizes = block_sums.over_all(jnp.stack([jnp.sum(jnp.abs(low)), jnp.sum(jnp.abs(high))]))
    one, other = (
        x / jnp.where(size > 0, size, 1) for x, size in zip((low, high), sizes, strict=True)
    )
    products = jnp.stack([jnp.sum(one * one), jnp.sum(other * other), jnp.sum(one * other)])
    one_square, other_square, inner = block_sums.over_all(products)
    lengths = jnp.sqrt(one_square) * jnp.sqrt(other_square)
    cosine = inner / jnp.where(lengths > 0, lengths, 1)
    straight = (jnp.abs(cosine) > COLLINEAR) | (lengths == 0)
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    parts = jnp.sin((1 - share) * angle) * low + jnp.sin(share * angle) * high
    merged = jnp.where(straight, trees.lerp(low, high, share), parts / jnp.sin(angle))
    return merged.astype(stored)


OF_FILES: dict[str, Callable[..., MergeRule]] = {"linear": linear, "slerp": slerp}
"""Factories by name, which experiments.merge offers beside those of `rules.REGISTRY`."""
