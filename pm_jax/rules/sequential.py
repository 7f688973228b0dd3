"""Sequential training: the baseline that does not merge."""

import jax.numpy as jnp

from pm_jax import trees
from pm_jax.rules.base import Evidence, MergeRule, TaskCount, fixed_coefficient
from pm_jax.types import Params


def sequential() -> MergeRule:
    """Keep the trained model, `theta_t*`.

    Returns:
        A `MergeRule` without settings, needing no evidence.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = sequential()
        >>> merged, *_ = rule.update(rule.init(jnp.zeros(1)), previous=jnp.zeros(1),
        ...                          trained=jnp.ones(1), evidence=None)
        >>> merged.tolist()
        [1.0]
    """

    def init(params: Params) -> TaskCount:
        del params
        return TaskCount(jnp.zeros((), jnp.int32))

    def update(
        state: TaskCount, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ):
        del evidence
        alpha = jnp.ones((), jnp.float32)
        merged = trees.lerp(previous, trained, alpha)
        return merged, TaskCount(state.tasks + 1), fixed_coefficient(alpha)

    return MergeRule(init, update)
