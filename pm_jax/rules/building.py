"""Pieces that merge rules are built from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.curvature.diagonal import Diagonal
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.types import Array, Key, Params, PyTree

MEASURES = {
    "Diagonal": "fisher_empirical or fisher_exact",
    "Kronecker": "fisher_kronecker",
    "LowRank": "gauss_newton_low_rank",
}
"""Measures to name in errors, by the kind of curvature that they find."""


class TaskCount(NamedTuple):
    """State of a rule that only counts.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
    """

    tasks: Array


def merge_by_count(coefficient: Callable[[Array], Array]) -> MergeRule:
    """A rule whose coefficient depends only on how many tasks were merged.

    Args:
        coefficient: from t, an int32 scalar counted from 1, to a float32 scalar.

    Returns:
        A `MergeRule` that needs no evidence; its info has NaN where curvature would be needed.

    Example:
        >>> rule = merge_by_count(lambda t: 1 / t)
        >>> _, _, info = rule.update(rule.init(0.0), previous=jnp.zeros(1), trained=jnp.ones(1))
        >>> float(info.alpha), float(info.denominator)
        (1.0, nan)
    """

    def init(params: Params) -> TaskCount:
        del params
        return TaskCount(jnp.zeros((), jnp.int32))

    def update(
        state: TaskCount, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, TaskCount, MergeInfo]:
        del evidence
        tasks = state.tasks + 1
        info = MergeInfo.of(coefficient(tasks))
        return trees.lerp(previous, trained, info.alpha), TaskCount(tasks), info

    return MergeRule(init, update, Requirements(scope="element"))


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

    Merging is for inference: the next task starts from the trained model.

    Args:
        accumulate: from v_{t-1} (zero at first), the task's own vector, t (int32 scalar, from 1)
            and the key of the merge to v_t.
        scale: coefficient of the task vector.
        evidence_fields: names of the fields of `Evidence` that `accumulate` reads: "key", or none.

    Returns:
        A `MergeRule`.

    Example:
        >>> rule = merge_running_task_vector(lambda old, new, t, key: new, 0.5)
        >>> state = rule.init(jnp.ones(1))
        >>> rule.update(state, previous=jnp.ones(1), trained=jnp.full(1, 3.0))[0].tolist()
        [2.0]
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

    needs = Requirements(evidence_fields, next_task_from="trained", scope="element")
    return MergeRule(init, update, needs)


def origin_of(params: Params) -> Params:
    """The pre-trained model as a rule keeps it: a new tree of its arrays.

    The state of an nnx model is made of mutable variables, which go on training.

    Args:
        params: pytree of arrays.

    Returns:
        The same arrays.

    Example:
        >>> origin_of({"w": 1.0})["w"].shape
        ()
    """
    return jax.tree.map(jnp.asarray, params)


def key_of(evidence: Evidence | None) -> Key:
    """The key of a merge.

    Args:
        evidence: of the task.

    Returns:
        A PRNG key.

    Raises:
        ValueError: the evidence has none.

    Example:
        >>> key_of(Evidence())
        Traceback (most recent call last):
        ValueError: evidence.key=None: the rule draws random numbers; give a PRNG key
    """
    if evidence is None or evidence.key is None:
        raise ValueError("evidence.key=None: the rule draws random numbers; give a PRNG key")
    return evidence.key


def diagonal_of(evidence: Evidence) -> PyTree:
    """The diagonal of a task's curvature, for rules that work entry by entry.

    Args:
        evidence: of the task.

    Returns:
        Pytree of the structure of the parameters.

    Raises:
        ValueError: the evidence has no quadratic, or one of another kind.

    Example:
        >>> from pm_jax.curvature import DiagonalQuadratic
        >>> diagonal_of(Evidence(DiagonalQuadratic.at(jnp.zeros(1), jnp.ones(1)))).tolist()
        [1.0]
    """
    curvature: Any = quadratic_of(evidence, Diagonal).curvature
    return curvature.diagonal


def quadratic_of(evidence: Evidence, kind: type[Curvature]) -> Quadratic:
    """The quadratic of a task, whose curvature is of the kind that a rule keeps.

    Args:
        evidence: of the task.
        kind: a subclass of `Curvature`.

    Returns:
        Its quadratic.

    Raises:
        ValueError: the evidence has no quadratic, or one of another kind.

    Example:
        >>> quadratic_of(Evidence(), Diagonal)
        Traceback (most recent call last):
        ValueError: evidence.quadratic=NoneType: must be a DiagonalQuadratic; measure it by ...
    """
    quadratic = evidence.quadratic
    if not isinstance(quadratic, Quadratic) or not isinstance(quadratic.curvature, kind):
        measures = MEASURES.get(kind.__name__, "a measure of that kind")
        raise ValueError(
            f"evidence.quadratic={type(quadratic).__name__}: must be a {kind.__name__}Quadratic; "
            f"measure it by {measures}, or give the rule another memory"
        )
    return quadratic


def mean_of_entries(tree: PyTree) -> Array:
    """Mean over the entries of all leaves.

    Args:
        tree: pytree of arrays.

    Returns:
        float32 scalar.

    Example:
        >>> float(mean_of_entries([jnp.asarray(True), jnp.zeros(3)]))
        0.25
    """
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves)
    return total / jnp.float32(sum(leaf.size for leaf in leaves))


def require(name: str, value: float | str, holds: bool, wanted: str) -> None:
    """Check a setting of a rule.

    Args:
        name: of the setting.
        value: given for it.
        holds: whether the rule takes the value.
        wanted: what it would take.

    Raises:
        ValueError: it does not hold.

    Example:
        >>> require("scale", -1.0, False, "above 0")
        Traceback (most recent call last):
        ValueError: scale=-1.0: must be above 0
    """
    if not holds:
        raise ValueError(f"{name}={value}: must be {wanted}")


def jit_merge(update: Callable[..., Any]) -> jax.stages.Wrapped:
    """Compile a merge so that it needs little memory beyond what it is given.

    The buffers of the state that it is given are donated, so that state cannot be used again. To be
    written into without a copy, the next state must be the first of the results.

    Args:
        update: pure function `(state, ...) -> (next state, ...)`.

    Returns:
        The compiled function, for the default backend.

    Example:
        >>> import jax.numpy as jnp
        >>> from pm_jax import rules
        >>> rule = rules.averaging()
        >>> @jit_merge
        ... def merge(state, previous, trained):
        ...     merged, state, info = rule.update(state, previous=previous, trained=trained)
        ...     return state, merged
        >>> state, merged = merge(rule.init(jnp.zeros(1)), jnp.zeros(1), jnp.ones(1))
        >>> merged.tolist()
        [1.0]
    """
    options = None
    if jax.default_backend() == "cpu":
        # XLA's default CPU schedule starts every leaf before it finishes any, which keeps all
        # temporaries in memory; this one goes leaf by leaf.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return jax.jit(update, donate_argnums=0, compiler_options=options)
