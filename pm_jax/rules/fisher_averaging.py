"""Fisher averaging: the minimum, entry by entry, of the quadratic losses of all tasks."""

import jax
import jax.numpy as jnp

from pm_jax.curvature.diagonal import Diagonal, DiagonalQuadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import diagonal_of, mean_of_entries, quadratic_of
from pm_jax.types import Params

NEGLIGIBLE = 1e-30
"""Curvature below which its product with a displacement may underflow."""


def fisher_averaging() -> MergeRule:
    """Average all task models with their Fisher information as weights.

        theta_hat_t = theta_0 + sum_{i<=t} F_i (theta_i* - theta_0) / sum_{i<=t} F_i

    It is the unconstrained minimum of the quadratic that Perturb-and-Merge minimises along one
    direction, and its state is the same sum. Entries without curvature keep the last merged model.
    Training of the next task starts from the merged model.

    Returns:
        A `MergeRule` without settings that needs `quadratic` (a `DiagonalQuadratic`); its `update`
        raises ValueError for any other.

    References:
        Matena and Raffel, `Merging Models with Fisher-Weighted Averaging
        <https://arxiv.org/abs/2111.09832>`_, NeurIPS 2022

    Example:
        >>> rule = fisher_averaging()
        >>> state, merged = rule.init(jnp.zeros(1)), jnp.zeros(1)
        >>> for trained, fisher in [(1.0, 3.0), (5.0, 1.0)]:
        ...     trained = jnp.full(1, trained)
        ...     evidence = Evidence(DiagonalQuadratic.at(trained, jnp.full(1, fisher)))
        ...     merged, state, _ = rule.update(
        ...         state, previous=merged, trained=trained, evidence=evidence)
        >>> merged.tolist()  # (3 * 1 + 1 * 5) / (3 + 1)
        [2.0]
    """

    def update(state: DiagonalQuadratic, *, previous: Params, trained: Params, evidence: Evidence):
        memory = state.plus(quadratic_of(evidence, Diagonal))

        def minimum(center, total, gradient, last, new):
            step = jnp.where(total > NEGLIGIBLE, gradient / total, jnp.nan)
            center, last = center.astype(step.dtype), last.astype(step.dtype)
            return jnp.where(jnp.isfinite(step), center - step, last).astype(new.dtype)

        total = memory.diagonal
        merged = jax.tree.map(minimum, memory.center, total, memory.gradient, previous, trained)
        curved = jax.tree.map(lambda curvature: (curvature > NEGLIGIBLE) & jnp.isfinite(curvature),
                             total)  # fmt: skip
        shares = jax.tree.map(
            lambda current, all_tasks, usable: jnp.where(usable, current / all_tasks, 0.0),
            diagonal_of(evidence),
            total,
            curved,
        )
        without = jax.tree.map(jnp.logical_not, curved)
        info = MergeInfo.of(mean_of_entries(shares), mean_of_entries(without))
        return merged, memory, info

    needs = Requirements(frozenset({"quadratic"}), scope="element")
    return MergeRule(DiagonalQuadratic.zero, update, needs)
