"""Sequential training: the baseline that does not merge."""

import jax.numpy as jnp

from pm_jax.rules.base import MergeRule, merge_by_count


def sequential() -> MergeRule:
    """Keep the trained model, `theta_t*`.

    Returns:
        A `MergeRule` without settings, needing no evidence.

    Example:
        >>> rule = sequential()
        >>> rule.update(rule.init(0.0), previous=jnp.zeros(1), trained=jnp.ones(1))[0].tolist()
        [1.0]
    """
    return merge_by_count(jnp.ones_like)
