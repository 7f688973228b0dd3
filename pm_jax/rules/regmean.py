"""RegMean, streaming: the merge whose layers answer all tasks' inputs as the tasks' own do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pm_jax import trees
from pm_jax.curvature.input_moments import InputMoment, InputMomentQuadratic
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import quadratic_of
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Array, Params, require


class RegmeanState(NamedTuple):
    """State of a rule that minimises the quadratic of input moments.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        memory: the sum of all tasks' quadratics, of one size.
    """

    tasks: Array
    memory: InputMomentQuadratic

    @classmethod
    def start(cls, memory: InputMomentQuadratic) -> "RegmeanState":
        """The state before the first task."""
        return cls(jnp.zeros((), jnp.int32), memory)


Inverse = Callable[[Array, Array], Array]
"""A function of a moment A [..., in, in] of mean eigenvalue 1 and a slope G [..., in, out]."""


def regmean(
    *,
    ridge: float = 1e-3,
    memory: Callable[[Params], Quadratic] = InputMomentQuadratic.zero,
) -> MergeRule:
    """Merge dense kernels such that the outputs of layers stay those of the tasks' own models.

        W_t = theta_0 + (S + lam I)^-1 (R + lam (W_{t-1} - theta_0)),   lam = ridge tr(S) / in
        S = sum_{i<=t} A_i,   R = sum_{i<=t} A_i (W_i* - theta_0),   A_i = mean_n sum_t x x^T

    for a kernel W [in, out] with the inputs x of its layer on task i: the minimum of
    `sum_i tr((W - W_i*)^T A_i (W - W_i*)) + lam |W - W_{t-1}|^2`. The first task's model is kept as
    trained; later ones stay at the merged model where no input reaches. Leaves that are no such
    kernels are averaged, `lerp(theta_hat, theta_t*, 1/t)`, and so is a kernel whose moments are 0
    or not finite.

    Args:
        ridge: pull towards the last merged model, over the mean eigenvalue of S; above 0.
        memory: the quadratic that is 0 everywhere; with a function of one's own that calls
            `InputMomentQuadratic.zero(params, kernels)` for kernels that are named otherwise.

    Returns:
        A `MergeRule` that needs `quadratic` (an `InputMomentQuadratic`, see `input_moment`). The
        info's alpha is the task's share of the trace of S, mean over all entries.

    Raises:
        ValueError: ridge not above 0; in `init`, no kernel; in `update`, another kind of quadratic.

    References:
        Jin et al., `Dataless Knowledge Fusion by Merging Weights of Language Models
        <https://arxiv.org/abs/2212.09849>`_, ICLR 2023, which keeps a moment for every model and
        scales its off-diagonal entries instead of a ridge

    Example:
        >>> rule = regmean(ridge=1e-6)
        >>> start = {"kernel": jnp.zeros((1, 1))}
        >>> state, merged = rule.init(start), start
        >>> for value, moment in [(1.0, 3.0), (5.0, 1.0)]:
        ...     trained = {"kernel": jnp.full((1, 1), value)}
        ...     moments = {"kernel": jnp.full((1, 1), moment)}
        ...     evidence = Evidence(InputMomentQuadratic.at(trained, moments))
        ...     merged, state, info = rule.update(
        ...         state, previous=merged, trained=trained, evidence=evidence)
        >>> round(float(merged["kernel"][0, 0]), 3), float(info.alpha)  # (3 * 1 + 1 * 5) / (3 + 1)
        (2.0, 0.25)
    """
    require("ridge", ridge, ridge > 0, "above 0")

    def damped(moment: Array, slope: Array) -> Array:
        # By LU, since XLA's Cholesky takes five times as long on a CPU.
        identity = jnp.eye(moment.shape[-1], dtype=moment.dtype)
        matrix = moment + ridge * jnp.broadcast_to(identity, moment.shape)
        return jnp.linalg.solve(matrix, slope)

    def init(params: Params) -> RegmeanState:
        zero: Any = memory(params)
        return RegmeanState.start(zero)

    def update(state: RegmeanState, *, previous: Params, trained: Params, evidence: Evidence):
        return merge_at_minimum(state, previous, trained, evidence, damped)

    needs = Requirements(frozenset({"quadratic"}), scope="tensor", curvatures=("input_moment",))
    return merge_rule(init, update, needs)


def merge_at_minimum(
    state: RegmeanState, previous: Params, trained: Params, evidence: Evidence, inverse: Inverse
) -> tuple[Params, RegmeanState, MergeInfo]:
    """Merge a task at the minimum of the sum of quadratics, `W - inverse(S, grad Q(W))`.

    W is the previous model's kernel; other leaves, and all where there is no minimum, are averaged.
    """
    quadratic: Any = quadratic_of(evidence, InputMoment)
    tasks = state.tasks + 1
    memory = state.memory.plus(quadratic)
    slopes = trees.leaves_by_path(memory.gradient_at(previous))
    olds, news = trees.leaves_by_path(previous), trees.leaves_by_path(trained)
    average = 1 / tasks.astype(jnp.float32)
    merged, shares, lost = {}, {}, {}
    for path, new in news.items():
        merged[path] = trees.lerp(olds[path], new, average)
        shares[path], lost[path] = average, jnp.zeros((), jnp.float32)
        if path not in memory.curvature.moments:
            continue
        moment = memory.curvature.moments[path]
        step, sound = _step(moment, slopes[path], inverse)
        at_minimum = (jnp.asarray(olds[path], step.dtype) - step).astype(new.dtype)
        own = _mean_eigenvalue(quadratic.curvature.moments[path])
        share = jnp.where(sound, own / _mean_eigenvalue(moment), average)
        shares[path] = jnp.mean(share).astype(jnp.float32)
        lost[path] = jnp.mean(1.0 - sound.astype(jnp.float32))
        # The first task has no other to be reconciled with.
        chosen = (sound & (tasks > 1)).reshape(*sound.shape, *[1] * (new.ndim - sound.ndim))
        merged[path] = jnp.where(chosen, at_minimum, merged[path])
    entries = {path: float(leaf.size) for path, leaf in news.items()}
    total = sum(entries.values())

    def mean(values: dict[str, Array]) -> Array:
        return sum((values[path] * (entries[path] / total) for path in news), jnp.zeros(()))

    alpha = jnp.where(tasks > 1, mean(shares), 1.0)
    info = MergeInfo.of(alpha, mean(lost))
    return trees.replace(trained, merged), RegmeanState(tasks, memory), info


def _mean_eigenvalue(moment: Array) -> Array:
    """`tr(A) / in`, [*stacked]."""
    return jnp.trace(moment, axis1=-2, axis2=-1) / moment.shape[-1]


def _step(moment: Array, slope: Array, inverse: Inverse) -> tuple[Array, Array]:
    """`inverse(S, grad Q)` of a kernel in its shape, and which of its matrices have one."""
    scale = _mean_eigenvalue(moment)
    sound = jnp.isfinite(scale) & (scale > jnp.finfo(moment.dtype).tiny)
    # Both sides over S's mean eigenvalue, so that a common factor cancels and nothing underflows.
    divisor = jnp.where(sound, scale, 1.0)[..., None, None]
    step = inverse(moment / divisor, slope.reshape(*moment.shape[:-1], -1) / divisor)
    return step.reshape(slope.shape), sound & jnp.all(jnp.isfinite(step), axis=(-2, -1))
