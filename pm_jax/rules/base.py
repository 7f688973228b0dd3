"""The grammar of merge rules: a factory of hyper-parameters returns pure functions.

`rule = pm_jax.rules.perturb_and_merge()` is made once, `state = rule.init(params)` before the first
task, and `params, state, info = rule.update(state, previous=..., trained=..., evidence=...)` after
each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pm_jax.quadratics import Quadratic
from pm_jax.types import Array, Params


class Evidence(NamedTuple):
    """What a finished task can offer beyond the two models; a rule says what it needs of it.

    Attributes:
        quadratic: curvature of the task's loss at the trained model.
        curvature_error: standard error of `Delta^T H_t Delta` over the task's examples, scalar.
    """

    quadratic: Quadratic | None = None
    curvature_error: Array | float = float("nan")


class MergeInfo(NamedTuple):
    """What a merge did; float32 scalars, NaN where a figure does not apply.

    Attributes:
        alpha: the coefficient used.
        alpha_raw: before clipping.
        numerator: of the closed form.
        denominator: of the closed form.
        standard_error: of `alpha_raw`, over the current task's examples.
        predicted_loss_change: of the current task, trained to merged model.
        degenerate: 1 where the curvature gave no minimum and alpha is 1/t, else 0.
    """

    alpha: Array
    alpha_raw: Array
    numerator: Array
    denominator: Array
    standard_error: Array
    predicted_loss_change: Array
    degenerate: Array


class MergeRule(NamedTuple):
    """A merge rule.

    Attributes:
        init: `init(params) -> state`, with the pre-trained model `theta_0`; the state is a pytree.
        update: `update(state, *, previous, trained, evidence) -> (params, state, info)`.
        needs: names of the fields of `Evidence` that `update` reads.
        next_task_from: "merged" or "trained", the model that the next task starts from.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any, MergeInfo]]
    needs: frozenset[str] = frozenset()
    next_task_from: str = "merged"


class TaskCount(NamedTuple):
    """State of a rule that only counts.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
    """

    tasks: Array


def fixed_coefficient(alpha: Array) -> MergeInfo:
    """The info of a merge whose coefficient needs no curvature.

    Args:
        alpha: the coefficient, scalar.

    Returns:
        A `MergeInfo` with NaN where curvature would be needed.

    Example:
        >>> info = fixed_coefficient(0.5)
        >>> float(info.alpha), float(info.denominator)
        (0.5, nan)
    """
    alpha, nan = jnp.asarray(alpha, jnp.float32), jnp.asarray(jnp.nan, jnp.float32)
    return MergeInfo(alpha, alpha, nan, nan, nan, nan, jnp.zeros((), jnp.float32))
