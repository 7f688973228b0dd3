"""The grammar of merge rules: a factory of hyper-parameters returns pure functions.

`rule = pm_jax.rules.perturb_and_merge()` is made once, `state = rule.init(params)` before the first
task, and `params, state, info = rule.update(state, previous=..., trained=..., evidence=...)` after
each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pm_jax import trees
from pm_jax.lora import Adapter, Adapters
from pm_jax.objectives import Objective
from pm_jax.quadratics import Quadratic
from pm_jax.types import Array, Key, Params


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
    """

    quadratic: Quadratic | None = None
    curvature_error: Array | float = float("nan")
    key: Key | None = None
    trajectory: Params | None = None
    objective: Objective | None = None
    onset_gradient_norm: Array | float = float("nan")
    input_moments: dict[str, Array] | None = None
    adapters: Adapters | None = None


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
        snapshots: when `Evidence.trajectory` is taken, fractions of the task's steps in [0, 1].
        figures: names of the entries of `MergeInfo.figures`.
        hook: what the rule does while a task trains, or `None`.
        absorb: `absorb(state, evidence) -> state`, after the merge, with the same evidence measured
            anew at the merged model and `input_moments`; or `None`.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any, MergeInfo]]
    needs: frozenset[str] = frozenset()
    next_task_from: str = "merged"
    snapshots: tuple[float, ...] = ()
    figures: tuple[str, ...] = ()
    hook: TrainingHook | None = None
    absorb: Callable[[Any, Evidence], Any] | None = None


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
        alpha = jnp.asarray(coefficient(tasks), jnp.float32)
        return trees.lerp(previous, trained, alpha), TaskCount(tasks), MergeInfo.of(alpha)

    return MergeRule(init, update)
