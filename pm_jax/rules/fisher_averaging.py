"""Fisher averaging: the minimum, entry by entry, of the quadratic losses of all tasks."""

import jax
import jax.numpy as jnp

from pm_jax.curvature.diagonal import Diagonal, DiagonalQuadratic
from pm_jax.rules.base import Evidence, MergeRule, Requirements
from pm_jax.rules.building import diagonal_of, quadratic_of, with_fallback
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Params

NEGLIGIBLE = 1e-30
"""Curvature below which its product with a displacement may underflow."""


def fisher_averaging() -> MergeRule:
    """Average all task models with their Fisher information as weights.

        theta_hat_t = theta_0 + sum_{i<=t} F_i (theta_i* - theta_0) / sum_{i<=t} F_i

    It is the unconstrained minimum of the quadratic that Perturb-and-Merge minimises along one
    direction, and its state is the same sum. Entries without curvature keep the last merged model.

    Returns:
        A `MergeRule` without settings that needs `quadratic` (a `DiagonalQuadratic`); its `update`
        raises ValueError for any other.

    References:
        Matena and Raffel, `Merging Models with Fisher-Weighted Averaging
        <https://arxiv.org/abs/2111.09832>`_, NeurIPS 2022

    Example:
        >>> rule = fisher_averaging()
        >>> state, merged = rule.init(jnp.zeros(1)), jnp.zeros(1)
        >>> for trained, fisher in [(jnp.full(1, 1.0), 3.0), (jnp.full(1, 5.0), 1.0)]:
        ...     evidence = Evidence(DiagonalQuadratic.at(trained, jnp.full(1, fisher)))
        ...     merged, state, _ = rule.update(
        ...         state, previous=merged, trained=trained, evidence=evidence)
        >>> merged.tolist()  # (3 * 1 + 1 * 5) / (3 + 1)
        [2.0]
    """

    def update(state: DiagonalQuadratic, *, previous: Params, trained: Params, evidence: Evidence):
        memory = state.plus(quadratic_of(evidence, Diagonal))

        def minimum(center, total, gradient, last, new):
            # NaN marks the entries that no task's Fisher weighs.
            step = jnp.where(total > NEGLIGIBLE, gradient / total, jnp.nan)
            center, last = center.astype(step.dtype), last.astype(step.dtype)
            return jnp.where(jnp.isfinite(step), center - step, last).astype(new.dtype)

        def share(current, total):
            usable = (total > NEGLIGIBLE) & jnp.isfinite(total)
            return jnp.where(usable, current / total, jnp.nan)

        total = memory.diagonal
        merged = jax.tree.map(minimum, memory.center, total, memory.gradient, previous, trained)
        _, info = with_fallback(jax.tree.map(share, diagonal_of(evidence), total), 0.0)
        return merged, memory, info

    needs = Requirements(frozenset({"quadratic"}), scope="element")
    return merge_rule(DiagonalQuadratic.zero, update, needs)
