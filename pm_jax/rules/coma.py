"""CoMA: a fixed step towards every new model."""

import jax.numpy as jnp

from pm_jax.rules.base import MergeRule, merge_by_count, require


def coma(*, step: float = 0.4) -> MergeRule:
    """Move a fixed share of the way to the trained model: an exponential moving average.

        theta_hat_1 = theta_1*,   theta_hat_t = (1 - step) theta_hat_{t-1} + step theta_t*

    Training of the next task starts from the merged model.

    Args:
        step: lambda of the paper, in (0, 1].

    Returns:
        A `MergeRule` that needs no evidence.

    Raises:
        ValueError: step out of range.

    References:
        Marouf et al., `Weighted Ensemble Models Are Strong Continual Learners
        <https://arxiv.org/abs/2312.08977>`_, ECCV 2024

    Example:
        >>> rule = coma(step=0.25)
        >>> state = rule.init(jnp.zeros(1))
        >>> first, state, _ = rule.update(state, previous=jnp.zeros(1), trained=jnp.ones(1))
        >>> rule.update(state, previous=first, trained=jnp.full(1, 5.0))[0].tolist()
        [2.0]
    """
    require("step", step, 0 < step <= 1, "in (0, 1]")
    return merge_by_count(lambda tasks: jnp.where(tasks == 1, 1.0, step))
