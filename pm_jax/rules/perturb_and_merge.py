"""Perturb-and-Merge: the convex combination with the smallest total quadratic loss."""

from typing import NamedTuple

import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.coefficients import merge_coefficient, predicted_loss_change
from pm_jax.quadratics import DiagonalQuadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, diagonal_of
from pm_jax.types import Array, Params


class PerturbAndMergeState(NamedTuple):
    """State of Perturb-and-Merge.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        memory: the sum of the quadratics of all tasks; its size does not grow with the tasks.
    """

    tasks: Array
    memory: DiagonalQuadratic


def perturb_and_merge(*, clip: bool = True) -> MergeRule:
    """Merge with the coefficient that minimises the quadratic losses of all tasks seen.

        theta_hat_t = theta_hat_{t-1} + alpha_t Delta_t
        alpha_t = - sum_{i<=t} (theta_hat_{t-1} - theta_i*)^T F_i Delta_t
                  / sum_{i<=t} Delta_t^T F_i Delta_t

    Training of the next task starts from the merged model. The perturbation of the training loss is
    not part of the rule (see `pm_jax.perturbation`).

    Args:
        clip: restrict alpha to [0, 1], as the paper does.

    Returns:
        A `MergeRule` that needs `quadratic` (a `DiagonalQuadratic`) and `curvature_error`; its
        `update` raises ValueError for any other quadratic.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, NeurIPS 2025

    Example:
        >>> import jax.numpy as jnp
        >>> rule = perturb_and_merge()
        >>> state, start = rule.init(jnp.zeros(1)), jnp.zeros(1)
        >>> for trained, fisher in [(1.0, 3.0), (5.0, 1.0)]:
        ...     trained = jnp.full(1, trained)
        ...     evidence = Evidence(DiagonalQuadratic.at(trained, jnp.full(1, fisher)))
        ...     start, state, info = rule.update(
        ...         state, previous=start, trained=trained, evidence=evidence)
        >>> start.tolist(), float(info.alpha)  # (3 * 1 + 1 * 5) / (3 + 1)
        ([2.0], 0.25)
    """

    def init(params: Params) -> PerturbAndMergeState:
        return PerturbAndMergeState(jnp.zeros((), jnp.int32), DiagonalQuadratic.zero(params))

    def update(
        state: PerturbAndMergeState, *, previous: Params, trained: Params, evidence: Evidence
    ):
        quadratic = diagonal_of(evidence)
        tasks = state.tasks + 1
        memory = state.memory.plus(quadratic)
        delta = task_vectors.difference(trained, previous)
        found = merge_coefficient(
            memory,
            previous,
            delta,
            task=tasks,
            curvature_error=evidence.curvature_error,
            clip=clip,
        )
        change = predicted_loss_change(found.alpha, quadratic.curvature_along(delta))
        info = MergeInfo(
            alpha=found.alpha,
            alpha_raw=found.alpha_raw,
            numerator=found.numerator,
            denominator=found.denominator,
            standard_error=found.standard_error,
            predicted_loss_change=change,
            degenerate=found.degenerate.astype(jnp.float32),
        )
        return trees.lerp(previous, trained, found.alpha), PerturbAndMergeState(tasks, memory), info

    return MergeRule(init, update, frozenset({"quadratic", "curvature_error"}))
