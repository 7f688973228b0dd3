"""The grammar of merge rules: a factory of hyper-parameters returns pure functions.

`rule = pm_jax.rules.perturb_and_merge()` is made once, `state = rule.init(params)` before the first
task, and `params, state, info = rule.update(state, previous=..., trained=..., evidence=...)` after
each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.curvature.measures import Measurement
from pm_jax.curvature.quadratics import DiagonalQuadratic, Quadratic, StoredQuadratic
from pm_jax.lora import Adapter, Adapters
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, Key, Params, PyTree

Kind = TypeVar("Kind", bound=StoredQuadratic)
MEASURES = {
    "DiagonalQuadratic": "fisher_empirical or fisher_exact",
    "KroneckerQuadratic": "fisher_kronecker",
    "LowRankQuadratic": "gauss_newton_low_rank",
}
"""By the quadratic that they find."""


class Evidence(NamedTuple):
    """What a finished task can offer beyond the two models; a rule says what it needs of it.

    Attributes:
        quadratic: curvature of the task's loss at the trained model.
        curvature_error: standard error of `Delta^T H_t Delta` over the task's examples, scalar.
        key: PRNG key of this merge; what is random in a leaf folds in its path.
        trajectory: float32 snapshots of the merging leaves along the task's training, stacked
            [K, ...], at the rule's `snapshots`.
        objective: the task's loss on some of its examples, at the trained model's classifier.
        onset_gradient_norm: `Objective.gradient_norm` at the model that the task started from.
        input_moments: `{path of a dense kernel: [in, in]}`, second moments of the layer's inputs;
            in the evidence that a rule absorbs only.
        adapters: the task's adapters; their products are 0 where the task trained in full.
        all_objectives: those of every task of the stream, stacked (see `objectives.stack`); for
            analysis only, as no learner has the data of earlier tasks.
        curvature_along: exact `Delta^T H_t Delta`, scalar, where it was measured.
        left_out: what was measured without each of the rule's `example_groups`, stacked.
    """

    quadratic: Quadratic | None = None
    curvature_error: Array | float = float("nan")
    key: Key | None = None
    trajectory: Params | None = None
    objective: Objective | None = None
    onset_gradient_norm: Array | float = float("nan")
    input_moments: dict[str, Array] | None = None
    adapters: Adapters | None = None
    all_objectives: Objective | None = None
    curvature_along: Array | None = None
    left_out: Measurement | None = None


class MergeInfo(NamedTuple):
    """What a merge did; float32 scalars, NaN where a figure does not apply.

    Attributes:
        alpha: the coefficient used; the mean over all entries where each has its own.
        alpha_raw: before clipping.
        numerator: of the closed form.
        denominator: of the closed form.
        standard_error: of `alpha_raw`, over the current task's examples.
        predicted_loss_change: of the current task, trained to merged model.
        degenerate: 1 where the curvature gave no minimum and alpha is 1/t, else 0; the share of
            such entries where each has its own coefficient.
        figures: what else the rule has to say, under the names in `MergeRule.figures`.
    """

    alpha: Array
    alpha_raw: Array
    numerator: Array
    denominator: Array
    standard_error: Array
    predicted_loss_change: Array
    degenerate: Array
    figures: dict[str, Array] = {}

    @classmethod
    def of(cls, alpha: Array | float, degenerate: Array | float = 0.0) -> "MergeInfo":
        """The info of a merge that predicts nothing."""
        nan = jnp.full((), jnp.nan, jnp.float32)
        alpha, degenerate = (jnp.asarray(x, jnp.float32) for x in (alpha, degenerate))
        return cls(alpha, alpha, nan, nan, nan, nan, degenerate)


Moving = dict[str, Array | Adapter]
"""What trains and merges by its path, or gradients of it: an `Adapter` for an adapted kernel."""


class TrainingHook(NamedTuple):
    """What a rule does while a task trains; functions of the rule's state that jit compiles.

    Attributes:
        onset: `onset(state, moving) -> moving`, of what trains before the first step.
        project: `project(state, moving) -> moving`, of a step's gradients and of the optimiser's
            updates.
        project_until: share of the task's steps in which `project` takes part.
        refresh: `refresh(state, key, moving) -> (moving, renewed)`, between epochs; the optimiser's
            moments are cleared where `renewed` (bool, of the same structure) is true.
        refresh_every: epochs from one `refresh` to the next.
    """

    onset: Callable[[Any, Moving], Moving] | None = None
    project: Callable[[Any, Moving], Moving] | None = None
    project_until: float = 0.0
    refresh: Callable[[Any, Key, Moving], tuple[Moving, Moving]] | None = None
    refresh_every: int = 1


class MergeRule(NamedTuple):
    """A merge rule.

    Attributes:
        init: `init(params) -> state`, with the pre-trained model `theta_0`; the state is a pytree.
            A rule that needs `adapters` is given those of product 0 as well, by that name.
        update: `update(state, *, previous, trained, evidence) -> (params, state, info)`.
        needs: names of the fields of `Evidence` that `update` reads.
        next_task_from: "merged", "trained" or "initial" (theta_0), the model that the next task
            starts from.
        scope: how much of a model `update` must see at once to give the same parameters: any
            "element" by itself, each "tensor" by itself, or the whole "model".
        snapshots: when `Evidence.trajectory` is taken, fractions of the task's steps in [0, 1].
        figures: names of the entries of `MergeInfo.figures`.
        example_groups: K of `Evidence.left_out` (see `measures.in_groups`), where it is needed.
        hook: what the rule does while a task trains, or `None`.
        absorb: `absorb(state, evidence) -> state`, after the merge, with the same evidence measured
            anew at the merged model and `input_moments`; or `None`.
        keeps_tasks: whether the state holds a vector of each task, of the size of what merges; a
            run then has it in the host's memory but while it merges.
        tasks_at_once: whether all tasks are trained as one.
        analysis_only: whether it is no method but a bound for methods, as it needs the data of all
            tasks.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any, MergeInfo]]
    needs: frozenset[str] = frozenset()
    next_task_from: str = "merged"
    scope: str = "model"
    snapshots: tuple[float, ...] = ()
    figures: tuple[str, ...] = ()
    example_groups: int = 0
    hook: TrainingHook | None = None
    absorb: Callable[[Any, Evidence], Any] | None = None
    keeps_tasks: bool = False
    tasks_at_once: bool = False
    analysis_only: bool = False

    @property
    def takes_part_in_training(self) -> bool:
        """Whether a model that was trained without the rule is of no use to it."""
        watches = self.needs & {"trajectory", "adapters"}
        return bool(self.hook or self.tasks_at_once or watches)


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

    return MergeRule(init, update, scope="element")


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
    needs: frozenset[str] = frozenset(),
) -> MergeRule:
    """A rule that moves the pre-trained model along one task vector made of those of all tasks.

        theta_hat_t = theta_0 + scale v_t,   v_t = accumulate(v_{t-1}, theta_t* - theta_0, t, key)

    Merging is for inference: the next task starts from the trained model.

    Args:
        accumulate: from v_{t-1} (zero at first), the task's own vector, t (int32 scalar, from 1)
            and the key of the merge to v_t.
        scale: coefficient of the task vector.
        needs: "key", or nothing.

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
        key = key_of(evidence) if needs else None
        task_vector = task_vectors.difference(trained, state.origin)
        task_vector = accumulate(state.task_vector, task_vector, tasks, key)
        merged = task_vectors.apply(state.origin, task_vector, scale)
        return merged, RunningTaskVector(tasks, state.origin, task_vector), MergeInfo.of(scale)

    return MergeRule(init, update, needs, next_task_from="trained", scope="element")


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


def diagonal_of(evidence: Evidence) -> DiagonalQuadratic:
    """The quadratic of a task, for rules that need its diagonal.

    Args:
        evidence: of the task.

    Returns:
        Its quadratic.

    Raises:
        ValueError: it is of another kind.

    Example:
        >>> diagonal_of(Evidence(DiagonalQuadratic.at(jnp.zeros(1), jnp.ones(1)))).diagonal.tolist()
        [1.0]
    """
    return quadratic_of(evidence, DiagonalQuadratic)


def quadratic_of(evidence: Evidence, kind: type[Kind]) -> Kind:
    """The quadratic of a task, of the kind that a rule keeps.

    Args:
        evidence: of the task.
        kind: a subclass of `StoredQuadratic`.

    Returns:
        Its quadratic.

    Raises:
        ValueError: it is of another kind.

    Example:
        >>> quadratic_of(Evidence(), DiagonalQuadratic)
        Traceback (most recent call last):
        ValueError: evidence.quadratic=NoneType: must be a DiagonalQuadratic; measure it by ...
    """
    if not isinstance(evidence.quadratic, kind):
        measures = MEASURES.get(kind.__name__, "a measure of that kind")
        raise ValueError(
            f"evidence.quadratic={type(evidence.quadratic).__name__}: must be a {kind.__name__}; "
            f"measure it by {measures}, or give the rule another memory"
        )
    return evidence.quadratic


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
