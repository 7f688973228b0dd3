"""Rules whose coefficient does not depend on the data: the baselines, and CoMA's fixed step."""

import itertools
import math

import jax.numpy as jnp

from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_by_count, weight_of
from pm_jax.types import Array, require


def sequential() -> MergeRule:
    """Keep the trained model, `theta_t*`.

    Returns:
        A `MergeRule` without settings that needs no evidence.
    """
    return merge_by_count(jnp.ones_like)


def frozen() -> MergeRule:
    """Keep theta_0, the pre-trained model or, from scratch, that of the first task.

    It is the row that shows what doing nothing gives. No task moves what merges, so a learner
    trains the columns of a classifier at most; from scratch the first task is the pre-training,
    and is trained all the same.

    Returns:
        A `MergeRule` without settings that needs no evidence.

    Example:
        >>> rule, start = frozen(), jnp.zeros(1)
        >>> rule.update(rule.init(start), previous=start, trained=jnp.ones(1))[0].tolist()
        [0.0]
    """
    return merge_by_count(lambda tasks: jnp.zeros_like(tasks, jnp.float32), moving_tasks=0)


def first_session() -> MergeRule:
    """Adapt the model to the first task and keep it from then on, `theta_1*`.

    A learner trains the columns of a classifier at most after the first task.

    Returns:
        A `MergeRule` without settings that needs no evidence.

    References:
        Panos et al., `First Session Adaptation: A Strong Replay-Free Baseline for
        Class-Incremental Learning <https://arxiv.org/abs/2303.13199>`_, ICCV 2023

    Example:
        >>> rule, start = first_session(), jnp.zeros(1)
        >>> first, state, _ = rule.update(rule.init(start), previous=start, trained=jnp.ones(1))
        >>> rule.update(state, previous=first, trained=jnp.full(1, 5.0))[0].tolist()
        [1.0]
    """
    return merge_by_count(lambda tasks: (tasks == 1).astype(jnp.float32), moving_tasks=1)


def averaging(*, power: float = 1.0, model_weights: tuple[float, ...] = ()) -> MergeRule:
    """Move t^-power of the way to the trained model, `lerp(theta_hat, theta_t*, t^-power)`.

    With power 1 the model is the running average of the trained ones: Perturb-and-Merge with equal
    curvature for every task. A smaller power keeps more of the new task. With weights it is the sum
    of `w_i theta_i*`, by steps of `w_t / (w_1 + ... + w_t)`.

    Args:
        power: above 0; 1 weighs all tasks the same, 1/2 is `slao`, and towards 0 the rule becomes
            sequential training.
        model_weights: one weight for each task, none below 0, of sum 1; empty for equal ones.

    Returns:
        A `MergeRule` that needs no evidence.

    Raises:
        ValueError: power or weights out of range, or both given.

    Example:
        >>> rule = averaging()
        >>> state = rule.init(jnp.zeros(1))
        >>> first, state, _ = rule.update(state, previous=jnp.zeros(1), trained=jnp.ones(1))
        >>> rule.update(state, previous=first, trained=jnp.full(1, 3.0))[0].tolist()
        [2.0]
    """
    require("power", power, power > 0, "above 0, and 1 for the mean of all tasks")
    if model_weights:
        total = math.fsum(model_weights)
        holds = min(model_weights) >= 0 and abs(total - 1) < 1e-6
        remedy = f"; divide each by {total:g}" if total > 0 else ""
        shown = ":".join(f"{weight:g}" for weight in model_weights)
        require("model_weights", shown, holds, f"at least 0 and of sum 1{remedy}")
        require("power", power, power == 1, "left out where there are weights")
        sums = itertools.accumulate(model_weights)
        # Models of weight 0 may come first, before there is anything to divide by.
        steps = tuple(w / s if w else 0.0 for w, s in zip(model_weights, sums, strict=True))
        return merge_by_count(lambda tasks: weight_of(steps, tasks))

    def coefficient(tasks: Array) -> Array:
        count = tasks.astype(jnp.float32)
        # A general power may miss these two by its last bits.
        if power == 1:
            return 1 / count
        return 1 / (jnp.sqrt(count) if power == 0.5 else count**power)

    return merge_by_count(coefficient)


def slao() -> MergeRule:
    """Move `1 / sqrt(t)` of the way to the trained model, the coefficient of SLAO.

    It is `averaging(power=0.5)`, for effective weights: the paper merges one factor of adapters so,
    and starts the next adapters from the last ones, which belongs to training and is not here.

    Returns:
        A `MergeRule` without settings that needs no evidence.

    References:
        SLAO, `arXiv 2512.23017 <https://arxiv.org/abs/2512.23017>`_, ICLR 2026

    Example:
        >>> rule, models = slao(), [jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), jnp.full(1, 4.0)]
        >>> state, merged = rule.init(models[0]), models[0]
        >>> for trained in models:
        ...     merged, state, info = rule.update(state, previous=merged, trained=trained)
        >>> float(info.alpha), merged.tolist()
        (0.5, [2.0])
    """
    return averaging(power=0.5)


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
