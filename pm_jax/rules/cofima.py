"""CoFiMA: a fixed step towards every new model, weighted by Fisher information."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.rules.base import Evidence, MergeRule, Requirements
from pm_jax.rules.building import diagonal_of, with_fallback
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Array, Params, PyTree, require


class CofimaState(NamedTuple):
    """State of CoFiMA.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        fisher: diagonal of the last task only, float32.
    """

    tasks: Array
    fisher: PyTree


def cofima(*, step: float = 0.4, cap: float = 0.0) -> MergeRule:
    """Average with the last merged model, entry by entry, by the Fisher of the last two tasks.

        theta_hat_1 = theta_1*
        theta_hat_t = ((1 - step) F_{t-1} theta_hat_{t-1} + step F_t theta_t*)
                      / ((1 - step) F_{t-1} + step F_t)

    Entries whose denominator vanishes take CoMA's step.

    Args:
        step: lambda of the paper, in (0, 1].
        cap: bound on the Fisher from above; 0 for none. The paper's code has 1e-4, for squares of
            batch-mean gradients; ours are per example, to which that number does not carry over.

    Returns:
        A `MergeRule` that needs `quadratic` (a `DiagonalQuadratic`).

    Raises:
        ValueError: step or cap out of range, or in `update` another kind of quadratic.

    References:
        Marouf et al., `Weighted Ensemble Models Are Strong Continual Learners
        <https://arxiv.org/abs/2312.08977>`_, ECCV 2024

    Example:
        >>> rule, start = cofima(step=0.5), jnp.zeros(1)
        >>> state = CofimaState(jnp.asarray(1), jnp.full(1, 3.0))  # one task, of Fisher 3
        >>> evidence = Evidence(DiagonalQuadratic.at(start, jnp.ones(1)))
        >>> rule.update(state, previous=start, trained=start + 4, evidence=evidence)[0].tolist()
        [1.0]
    """
    require("step", step, 0 < step <= 1, "in (0, 1]")
    require("cap", cap, cap >= 0, "at least 0, where 0 is none")

    def init(params: Params) -> CofimaState:
        return CofimaState(jnp.zeros((), jnp.int32), DiagonalQuadratic.zero(params).diagonal)

    def update(state: CofimaState, *, previous: Params, trained: Params, evidence: Evidence):
        tasks, fisher = state.tasks + 1, diagonal_of(evidence)
        if cap:
            fisher = jax.tree.map(lambda f: jnp.minimum(f, cap), fisher)

        def weight(old, new):
            total = (1 - step) * old + step * new
            # NaN marks the entries that neither Fisher weighs; below `tiny` the quotient is noise.
            return jnp.where(total > jnp.finfo(total.dtype).tiny, step * new / total, jnp.nan)

        weights = jax.tree.map(weight, state.fisher, fisher)
        weights, info = with_fallback(weights, jnp.where(tasks == 1, 1.0, step))
        merged = jax.tree.map(trees.lerp, previous, trained, weights)
        return merged, CofimaState(tasks, fisher), info

    needs = Requirements(frozenset({"quadratic"}), scope="element", curvatures=("diagonal",))
    return merge_rule(init, update, needs)
