"""Rules whose coefficient does not depend on the data: the baselines, and CoMA's fixed step."""

import jax.numpy as jnp

from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_by_count, require


def sequential() -> MergeRule:
    """Keep the trained model, `theta_t*`.

    Returns:
        A `MergeRule` without settings that needs no evidence.
    """
    return merge_by_count(jnp.ones_like)


def averaging() -> MergeRule:
    """Move 1/t of the way to the trained model, `lerp(theta_hat, theta_t*, 1/t)`.

    It is Perturb-and-Merge with equal curvature for every task.

    Returns:
        A `MergeRule` without settings that needs no evidence.

    Example:
        >>> rule = averaging()
        >>> state = rule.init(jnp.zeros(1))
        >>> first, state, _ = rule.update(state, previous=jnp.zeros(1), trained=jnp.ones(1))
        >>> rule.update(state, previous=first, trained=jnp.full(1, 3.0))[0].tolist()
        [2.0]
    """
    return merge_by_count(lambda tasks: 1 / tasks.astype(jnp.float32))


def coma(*, step: float = 0.4) -> MergeRule:
    """Move a fixed share of the way to the trained model: an exponential moving average.

        theta_hat_1 = theta_1*,   theta_hat_t = (1 - step) theta_hat_{t-1} + step theta_t*

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
    # The first task has nothing to be averaged with but theta_0, which knows none.
    return merge_by_count(lambda tasks: jnp.where(tasks == 1, 1.0, step))


def joint() -> MergeRule:
    """Train all tasks at once, as one, over the classes of all; nothing is merged.

    An analysis tool, the usual upper bound of continual learning: it needs the data of all tasks
    together. The model passes over each example as often as in a first task.

    Returns:
        A `MergeRule` that needs no evidence.

    Example:
        >>> joint().needs.tasks_at_once
        True
    """
    rule = sequential()
    return rule._replace(needs=rule.needs._replace(tasks_at_once=True, analysis_only=True))
