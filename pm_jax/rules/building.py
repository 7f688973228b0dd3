"""Pieces that merge rules are built from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.coefficients import MergeCoefficient, predicted_loss_change
from pm_jax.curvature.diagonal import Diagonal
from pm_jax.curvature.measures import Measurement
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree, require

MEASURES = {
    "Diagonal": "fisher_empirical or fisher_exact",
    "Kronecker": "fisher_kronecker",
    "LowRank": "gauss_newton_low_rank",
    "InputMoment": "input_moment",
}
"""Measures to name in errors, by the kind of curvature that they measure."""


class TaskCount(NamedTuple):
    """State of a rule that only counts tasks.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
    """

    tasks: Array

    @classmethod
    def zero(cls, params: Params) -> "TaskCount":
        """The state before the first task."""
        del params
        return cls(jnp.zeros((), jnp.int32))


def merge_by_count(
    coefficient: Callable[[Array], Array], moving_tasks: int | None = None
) -> MergeRule:
    """A rule whose coefficient depends only on t, the number of tasks, counted from 1.

    The coefficient is 0 after `moving_tasks` tasks, where that is given.
    """

    def update(
        state: TaskCount, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, TaskCount, MergeInfo]:
        del evidence
        tasks = state.tasks + 1
        info = MergeInfo.of(coefficient(tasks))
        return trees.lerp(previous, trained, info.alpha), TaskCount(tasks), info

    needs = Requirements(scope="element", moving_tasks=moving_tasks)
    return merge_rule(TaskCount.zero, update, needs)


class RunningTaskVector(NamedTuple):
    """State of a rule that keeps one task vector for all tasks.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        origin: the pre-trained model `theta_0`.
        task_vector: float32, of the same structure.
    """

    tasks: Array
    origin: Params
    task_vector: PyTree


def merge_running_task_vector(
    accumulate: Callable[[PyTree, PyTree, Array, Key | None], PyTree],
    scale: float,
    evidence_fields: frozenset[str] = frozenset(),
) -> MergeRule:
    """A rule that moves the pre-trained model along one task vector made of those of all tasks.

        theta_hat_t = theta_0 + scale v_t,   v_t = accumulate(v_{t-1}, theta_t* - theta_0, t, key)

    with v_0 = 0 and t an int32 scalar from 1. Merging is for inference: the next task starts from
    the trained model. `evidence_fields` holds "key" where `accumulate` draws random numbers.
    """

    def init(params: Params) -> RunningTaskVector:
        origin = origin_of(params)
        return RunningTaskVector(
            jnp.zeros((), jnp.int32), origin, task_vectors.difference(origin, origin)
        )

    def update(
        state: RunningTaskVector,
        *,
        previous: Params,
        trained: Params,
        evidence: Evidence | None = None,
    ) -> tuple[Params, RunningTaskVector, MergeInfo]:
        del previous
        tasks = state.tasks + 1
        key = key_of(evidence) if evidence_fields else None
        task_vector = task_vectors.difference(trained, state.origin)
        task_vector = accumulate(state.task_vector, task_vector, tasks, key)
        merged = task_vectors.apply(state.origin, task_vector, scale)
        return merged, RunningTaskVector(tasks, state.origin, task_vector), MergeInfo.of(scale)

    needs = Requirements(
        evidence_fields, next_task_from="trained", scope="element", reads_previous=False
    )
    return merge_rule(init, update, needs)


def weight_of(weights: tuple[float, ...], tasks: Array) -> Array:
    """The weight of the t-th model, a float scalar; NaN beyond the last of them."""
    return jnp.take(jnp.asarray(weights), tasks - 1, mode="fill", fill_value=jnp.nan)


def origin_of(params: Params) -> Params:
    """The pre-trained model as a rule keeps it: the same arrays in a new tree."""
    # An nnx state is made of mutable variables, which go on training: the tree must be a copy.
    return jax.tree.map(jnp.asarray, params)


def stacked_zeros(tree: PyTree, count: int) -> PyTree:
    """Room for one tree of each of `count` tasks: zeros [count, ...] of every leaf's type."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), tree)


def key_of(evidence: Evidence | None) -> Key:
    """The PRNG key of a merge; raises InvalidInput where the evidence has none."""
    if evidence is None or evidence.key is None:
        raise InvalidInput("evidence.key=None: the rule draws random numbers; give a PRNG key")
    return evidence.key


def diagonal_of(evidence: Evidence) -> PyTree:
    """The diagonal of a task's curvature; raises InvalidInput where it is of another kind."""
    curvature: Any = quadratic_of(evidence, Diagonal).curvature
    return curvature.diagonal


def quadratic_of(evidence: Evidence, kind: type[Curvature]) -> Quadratic:
    """The quadratic of a task; raises InvalidInput unless its curvature is of the rule's kind."""
    quadratic = evidence.quadratic
    if not isinstance(quadratic, Quadratic) or not isinstance(quadratic.curvature, kind):
        if isinstance(quadratic, Measurement):
            raise InvalidInput(
                "evidence.quadratic=Measurement: holds the quadratic in a field; give "
                "Evidence(measurement.quadratic, measurement.standard_error)"
            )
        measures = MEASURES.get(kind.__name__, "a measure of that kind")
        raise InvalidInput(
            f"evidence.quadratic={type(quadratic).__name__}: must be a {kind.__name__}Quadratic; "
            f"measure it by {measures}, or give the rule another memory"
        )
    return quadratic


def with_fallback(weights: PyTree, fallback: Array | float) -> tuple[PyTree, MergeInfo]:
    """Weights entry by entry with a fallback where they are not finite, and the info of both."""
    missing = jax.tree.map(lambda weight: ~jnp.isfinite(weight), weights)
    weights = jax.tree.map(lambda w, none: jnp.where(none, fallback, w), weights, missing)
    return weights, MergeInfo.of(_mean_of_entries(weights), _mean_of_entries(missing))


def _mean_of_entries(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves)
    # Dividing by a Python int would overflow: models have more than 2^31 entries.
    return total / jnp.float32(sum(leaf.size for leaf in leaves))


def info_of(coefficient: MergeCoefficient, curvature: Array | float) -> MergeInfo:
    """The info of a coefficient, with the current task's `Delta^T H_t Delta` for its prediction.

    It is NaN where H is not that of the loss.
    """
    return MergeInfo.of(coefficient.alpha, coefficient.degenerate)._replace(
        alpha_raw=coefficient.alpha_raw,
        numerator=coefficient.numerator,
        denominator=coefficient.denominator,
        predicted_loss_change=predicted_loss_change(coefficient.alpha, curvature),
    )


def check_starts(next_task_from: str) -> None:
    """Raise InvalidInput unless the argument says where a task starts, as `Requirements` does."""
    starts = ("initial", "merged", "trained")
    require("next_task_from", next_task_from, next_task_from in starts, ", ".join(starts))


def jit_merge(update: Callable[..., Any]) -> jax.stages.Wrapped:
    """Compile a merge for the default backend so that it needs little memory beyond its inputs.

    Args:
        update: pure function `(state, ...) -> (next state, ...)`, the next state first.

    Returns:
        The compiled function. It donates the state's buffers, so that state cannot be used again.

    Example:
        >>> add = jit_merge(lambda total, vector: (total + vector, vector))
        >>> add(jnp.zeros(1), jnp.ones(1))[0].tolist()
        [1.0]
    """
    options = None
    if jax.default_backend() == "cpu":
        # XLA's default CPU schedule starts every leaf before it finishes any, which keeps all
        # temporaries in memory; this one goes leaf by leaf.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    # Donated buffers are handed to the results in their order: the next state, which comes first,
    # is written into them without a copy.
    return jax.jit(update, donate_argnums=0, compiler_options=options)
