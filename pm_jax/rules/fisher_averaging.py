"""Fisher averaging: the minimum, entry by entry, of the quadratic losses of all tasks."""

import jax
import jax.numpy as jnp

from pm_jax.quadratics import DiagonalQuadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, diagonal_of, mean_of_entries
from pm_jax.trees import compute_dtype
from pm_jax.types import Params


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
        quadratic = diagonal_of(evidence)
        memory = state.plus(quadratic)

        def minimum(center, diagonal, gradient, last, new):
            step = gradient / diagonal
            usable = (diagonal > jnp.finfo(diagonal.dtype).tiny) & jnp.isfinite(step)
            dtype = compute_dtype(center, diagonal)
            found = jnp.asarray(center, dtype) - step
            return jnp.where(usable, found, jnp.asarray(last, dtype)).astype(new.dtype)

        total = memory.diagonal
        merged = jax.tree.map(minimum, memory.center, total, memory.gradient, previous, trained)
        shares = jax.tree.map(
            lambda own, all_tasks: jnp.nan_to_num(own / all_tasks, posinf=0.0, neginf=0.0),
            quadratic.diagonal,
            total,
        )
        without = jax.tree.map(lambda s: ~(s > jnp.finfo(s.dtype).tiny), total)
        info = MergeInfo.of(mean_of_entries(shares), mean_of_entries(without))
        return merged, memory, info

    return MergeRule(DiagonalQuadratic.zero, update, frozenset({"quadratic"}))
