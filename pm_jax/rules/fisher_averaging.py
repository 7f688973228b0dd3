"""Fisher averaging: the minimum of the quadratic losses of all tasks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pm_jax.curvature.diagonal import Diagonal, DiagonalQuadratic
from pm_jax.curvature.input_moments import InputMomentQuadratic
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.rules.base import Evidence, MergeRule, Requirements
from pm_jax.rules.building import diagonal_of, quadratic_of, with_fallback
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.regmean import RegmeanState, merge_at_minimum
from pm_jax.types import Array, InvalidInput, Params

NEGLIGIBLE = 1e-30
"""Curvature below which its product with a displacement may underflow."""


def fisher_averaging(
    *, memory: Callable[[Params], Quadratic] = DiagonalQuadratic.zero
) -> MergeRule:
    """Average all task models with their Fisher information as weights.

        theta_hat_t = theta_0 + sum_{i<=t} F_i (theta_i* - theta_0) / sum_{i<=t} F_i

    It is the unconstrained minimum of the quadratic that Perturb-and-Merge minimises along one
    direction, and its state is the same sum. Entries without curvature keep the last merged model.

    With a memory of input moments, `F_i` is `A_i (x) I` of every dense kernel: the minimum is
    `regmean`'s without a ridge, directions in which no input lies keep the last merged model, and
    leaves that are no dense kernels are averaged.

    Args:
        memory: the quadratic that is 0 everywhere, diagonal or of input moments, as the evidence.

    Returns:
        A `MergeRule` that needs `quadratic` (of the memory's kind); its `update` raises ValueError
        for any other.

    Raises:
        ValueError: in `init`, a memory of another kind.

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

    def init(params: Params) -> DiagonalQuadratic | RegmeanState:
        zero = memory(params)
        if isinstance(zero, InputMomentQuadratic):
            return RegmeanState.start(zero)
        if isinstance(zero, DiagonalQuadratic):
            return zero
        raise InvalidInput(
            f"memory={type(zero).__name__}: must be a DiagonalQuadratic or an InputMomentQuadratic"
        )

    def update(state: Any, *, previous: Params, trained: Params, evidence: Evidence):
        if isinstance(state, RegmeanState):
            return merge_at_minimum(state, previous, trained, evidence, _pseudo_inverse)
        total_quadratic = state.plus(quadratic_of(evidence, Diagonal))

        def minimum(center, total, gradient, last, new):
            # NaN marks the entries that no task's Fisher weighs.
            step = jnp.where(total > NEGLIGIBLE, gradient / total, jnp.nan)
            center, last = center.astype(step.dtype), last.astype(step.dtype)
            return jnp.where(jnp.isfinite(step), center - step, last).astype(new.dtype)

        def share(current, total):
            usable = (total > NEGLIGIBLE) & jnp.isfinite(total)
            return jnp.where(usable, current / total, jnp.nan)

        total, center = total_quadratic.diagonal, total_quadratic.center
        merged = jax.tree.map(minimum, center, total, total_quadratic.gradient, previous, trained)
        _, info = with_fallback(jax.tree.map(share, diagonal_of(evidence), total), 0.0)
        return merged, total_quadratic, info

    kinds = ("diagonal", "input_moment")
    needs = Requirements(frozenset({"quadratic"}), scope="element", curvatures=kinds)
    return merge_rule(init, update, needs)


def _pseudo_inverse(moment: Array, slope: Array) -> Array:
    """`A^+ G`, with eigenvalues of A as 0 that float32 does not resolve."""
    values, vectors = jnp.linalg.eigh(moment)
    least = moment.shape[-1] * jnp.finfo(moment.dtype).eps * values[..., -1:]
    inverse = jnp.where(values > least, 1 / jnp.where(values > least, values, 1), 0)
    coordinates = jnp.matmul(jnp.swapaxes(vectors, -1, -2), slope, precision="highest")
    return jnp.matmul(vectors, inverse[..., None] * coordinates, precision="highest")
