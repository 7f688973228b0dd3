"""Running average of all task models."""

import jax.numpy as jnp

from pm_jax import trees
from pm_jax.rules.base import Evidence, MergeRule, TaskCount, fixed_coefficient
from pm_jax.types import Params


def averaging() -> MergeRule:
    """Move 1/t of the way to the trained model, `lerp(theta_hat, theta_t*, 1/t)`.

    It is Perturb-and-Merge with equal curvature for every task.

    Returns:
        A `MergeRule` without settings, needing no evidence.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = averaging()
        >>> state = rule.init(jnp.zeros(1))
        >>> first, state, _ = rule.update(state, previous=jnp.zeros(1), trained=jnp.ones(1))
        >>> second, state, _ = rule.update(state, previous=first, trained=jnp.full(1, 3.0))
        >>> second.tolist()
        [2.0]
    """

    def init(params: Params) -> TaskCount:
        del params
        return TaskCount(jnp.zeros((), jnp.int32))

    def update(
        state: TaskCount, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ):
        del evidence
        tasks = state.tasks + 1
        alpha = 1 / tasks.astype(jnp.float32)
        return trees.lerp(previous, trained, alpha), TaskCount(tasks), fixed_coefficient(alpha)

    return MergeRule(init, update)
