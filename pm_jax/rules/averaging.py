"""Running average of all task models."""

import jax.numpy as jnp

from pm_jax.rules.base import MergeRule, merge_by_count


def averaging() -> MergeRule:
    """Move 1/t of the way to the trained model, `lerp(theta_hat, theta_t*, 1/t)`.

    It is Perturb-and-Merge with equal curvature for every task.

    Returns:
        A `MergeRule` without settings, needing no evidence.

    Example:
        >>> rule = averaging()
        >>> state = rule.init(jnp.zeros(1))
        >>> first, state, _ = rule.update(state, previous=jnp.zeros(1), trained=jnp.ones(1))
        >>> second, state, _ = rule.update(state, previous=first, trained=jnp.full(1, 3.0))
        >>> second.tolist()
        [2.0]
    """
    return merge_by_count(lambda tasks: 1 / tasks.astype(jnp.float32))
