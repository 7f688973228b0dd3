"""The grammar of merge rules, in the manner of gradient transformations.

A factory takes the hyper-parameters and returns a `MergeRule`, two pure functions:

    rule = pm_jax.rules.perturb_and_merge()
    state = rule.init(params)                                 # before the first task
    params, state, info = rule.update(                        # after each task
        state, previous=start, trained=trained, evidence=evidence)

The third field, `rule.needs`, says what their caller must arrange. A wrapper is a function from a
rule to a rule, such as `jackknifed`. Factories and wrappers make rules by `checked.merge_rule`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from pm_jax.curvature.measures import Measurement
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.lora import Adapter, Adapters
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, Key, Params


class Evidence(NamedTuple):
    """Everything a finished task offers to a merge beyond the two models.

    Attributes:
        quadratic: curvature of the task's loss at the trained model.
        curvature_error: standard error of `Delta^T H_t Delta` over the task's examples, scalar.
        key: PRNG key of this merge; random numbers of a leaf come from it and the leaf's path.
        trajectory: float32 snapshots of training at `Requirements.snapshots`, leaves [K, ...].
        objective: the task's loss on some of its examples, at the trained model's classifier.
        onset_gradient_norm: `Objective.gradient_norm` at the model that the task started from.
        input_moments: `{path of a dense kernel: [in, in]}`, second moments of the layer's inputs;
            only in the evidence that a rule absorbs.
        adapters: the task's adapters; their products are 0 where the task trained in full.
        all_objectives: the objectives of every task, stacked by `objectives.stack`; for analysis
            only, as no learner has the data of earlier tasks.
        curvature_along: exact `Delta^T H_t Delta`, scalar, where it was measured.
        left_out: measurements without each of `Requirements.example_groups`, stacked.
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


class Comparison(NamedTuple):
    """How the models of a merge compare; float32 scalars, NaN where that is not known.

    Attributes:
        leaves: number of floating-point leaves, which merge.
        kept: number of other leaves in which the trained model differs from the previous one; the
            merged model has the trained one's.
        unchanged_by_training: 1 where the trained model equals the previous one, else 0; leaves
            that are not floating point do not count.
        unchanged_by_merge: likewise for the merged model and the previous one.
    """

    leaves: Array | float = float("nan")
    kept: Array | float = float("nan")
    unchanged_by_training: Array | float = float("nan")
    unchanged_by_merge: Array | float = float("nan")


class MergeInfo(NamedTuple):
    """Figures of a merge; float32 scalars, NaN where a figure does not apply.

    Attributes:
        alpha: the coefficient used; the mean over all entries where there are several.
        alpha_raw: the coefficient before clipping.
        numerator: dividend of the closed form.
        denominator: divisor of the closed form.
        standard_error: error of `alpha_raw`, over the current task's examples.
        predicted_loss_change: the current task's loss at the merged model less the trained one's.
        degenerate: 1 where the curvature gave no minimum and alpha is 1/t, else 0; the share of
            such entries where there are several coefficients.
        figures: other figures of the rule, under the names in `Requirements.figures`.
        comparison: how the models compare, for `remarks`.
    """

    alpha: Array
    alpha_raw: Array
    numerator: Array
    denominator: Array
    standard_error: Array
    predicted_loss_change: Array
    degenerate: Array
    figures: dict[str, Array] = {}
    comparison: Comparison = Comparison()

    def without_comparison(self) -> "MergeInfo":
        """The same figures, but for the comparison of the models, which is then not computed.

        It reads the merged model once more, for which XLA's CPU schedule may keep one more model's
        worth of temporary values in memory.
        """
        nan = jnp.full((), jnp.nan, jnp.float32)
        return self._replace(comparison=Comparison(nan, nan, nan, nan))

    @classmethod
    def of(cls, alpha: Array | float, degenerate: Array | float = 0.0) -> "MergeInfo":
        """The info of a merge that predicts nothing."""
        nan = jnp.full((), jnp.nan, jnp.float32)
        alpha, degenerate = (jnp.asarray(x, jnp.float32) for x in (alpha, degenerate))
        return cls(alpha, alpha, nan, nan, nan, nan, degenerate)

    def remarks(self) -> tuple[str, ...]:
        """Sentences about a merge that may not be what was meant; outside of jit.

        Example:
            >>> from pm_jax import rules
            >>> rule, model = rules.averaging(), {"w": jnp.ones(2), "step": 3}
            >>> info = rule.update(rule.init(model), previous=model, trained=model)[2]
            >>> info.remarks()
            ('the trained model equals the previous one: there was nothing new to merge',)
        """
        comparison = Comparison(*map(float, self.comparison))
        said = []
        if comparison.leaves == 0:
            said.append("the models have no floating-point leaf: there was nothing to merge")
        elif comparison.unchanged_by_training == 1:
            said.append("the trained model equals the previous one: there was nothing new to merge")
        else:
            if comparison.unchanged_by_merge == 1:
                said.append(
                    "the merged model is the previous one: nothing of the trained model is in it "
                    f"(alpha is {float(self.alpha):.3g})"
                )
            if self.degenerate == 1:
                said.append(
                    "the evidence gave no coefficient: the rule fell back on "
                    f"alpha = {float(self.alpha):.3g}"
                )
        if comparison.kept == 1:
            said.append(
                "1 leaf that is not floating point differs between the models: the trained "
                "model's is kept"
            )
        elif comparison.kept > 1:
            said.append(
                f"{comparison.kept:.0f} leaves that are not floating point differ between the "
                "models: the trained model's are kept"
            )
        return tuple(said)


Moving = dict[str, Array | Adapter]
"""`{path: array}` of what trains and merges, or its gradients; adapted kernels have `Adapter`s."""


class TrainingHook(NamedTuple):
    """Functions of the rule's state that a learner calls, inside jit, while a task trains.

    Attributes:
        onset: `onset(state, moving) -> moving`, on the leaves before the first step.
        project: `project(state, moving) -> moving`, on the gradients and updates of a step.
        project_until: share of the task's steps in which `project` is called.
        refresh: `refresh(state, key, moving) -> (moving, renewed)`, between epochs; the optimiser's
            moments are cleared where `renewed` (bool, of the same structure) is true.
        refresh_every: epochs from one `refresh` to the next.
    """

    onset: Callable[[Any, Moving], Moving] | None = None
    project: Callable[[Any, Moving], Moving] | None = None
    project_until: float = 0.0
    refresh: Callable[[Any, Key, Moving], tuple[Moving, Moving]] | None = None
    refresh_every: int = 1


class InitFn(Protocol):
    """Makes the state of a rule."""

    def __call__(self, params: Params, /, *args: Any, **given: Any) -> Any:
        """Return the state before the first task, a pytree of arrays whose shapes stay.

        Args:
            params: the pre-trained model `theta_0`, a pytree of arrays.
            *args: none so far.
            **given: `adapters` of product 0, for a rule that reads `Evidence.adapters`.
        """


class UpdateFn(Protocol):
    """Merges one trained task."""

    def __call__(
        self, state: Any, *, previous: Params, trained: Params, evidence: Evidence
    ) -> tuple[Params, Any, MergeInfo]:
        """Return the merged model, the next state and the figures of the merge.

        Args:
            state: the rule's state before this task.
            previous: the model that the task started from; may be `None` for a rule that does not
                read it.
            trained: the model that it ended with, of the same structure. Leaves that are not
                floating point (steps, keys, ids) do not merge: the merged model has this model's.
            evidence: the fields that the rule reads; a rule that reads none has a default.

        Raises:
            InvalidInput: models, state and evidence do not fit together, or the rule reads more
                evidence than is given.
        """


class Parts(NamedTuple):
    """A rule that looks at matrices as rules of single tensors, for files larger than memory.

    Attributes:
        matrix: merges one matrix [in, out] that is a model of its own.
        other: merges any other tensor, and matrices outside of the pattern.
        pattern: regular expression over the whole names of the matrices; empty for all of them.
        has_sides: whether the transposed matrices would not merge into the transposed matrix.
        input_axes: of kernels with more than two axes, see `matrices.matrices`.
        factor: `factor(norms, length) -> scalar`, by which the whole displacement from theta_0 is
            multiplied at the end, from the norms [T] of all task vectors and its own; or `None`.
    """

    matrix: "MergeRule"
    other: "MergeRule"
    pattern: str = ""
    has_sides: bool = True
    input_axes: int = 0
    factor: Callable[[Array, Array], Array] | None = None


class Groups(NamedTuple):
    """Groups of leaves that merge apart from one another where curvature is diagonal.

    Attributes:
        names: `names(paths) -> list of str`, the group of each leaf.
        rule: merges one group that is a model of its own.
    """

    names: Callable[[Sequence[str]], list[str]]
    rule: "MergeRule"


class Requirements(NamedTuple):
    """Everything a rule asks of its caller beyond calls of `init` and `update`.

    Attributes:
        evidence: names of the fields of `Evidence` that `update` reads.
        next_task_from: the model that the next task starts from: "merged", "trained", or "initial"
            for theta_0.
        scope: how much of a model `update` must see at once to give the same parameters: one
            "element", one "tensor", or the whole "model".
        meets_in_sums: whether the elements of that scope meet in `block_sums.over_all` alone, and
            so merge block by block once the sums are known.
        snapshots: fractions of the task's steps, in [0, 1], at which `trajectory` is kept.
        figures: names of the entries of `MergeInfo.figures`.
        example_groups: K of `Evidence.left_out` (see `measures.in_groups`).
        hook: functions that training calls, or `None`.
        absorb: `absorb(state, evidence) -> state`, called after the merge with the same evidence
            measured anew at the merged model and with `input_moments`; or `None`.
        keeps_tasks: whether the state has a model-sized vector for every task; a run then keeps it
            in the host's memory between merges.
        tasks_at_once: whether all tasks are trained as one.
        analysis_only: whether the rule needs the data of all tasks: a bound, not a method.
        reads_previous: whether `update` reads the model that the task started from.
        moving_tasks: how many tasks, the first ones, move what merges; `None` for all. Later merges
            leave the model as it is, so that nothing but a classifier needs to be trained for them.
        parts: the rule tensor by tensor, for one that tells matrices from other tensors; or `None`.
        groups: the rule group by group, for one that merges groups of leaves apart; or `None`.
        curvatures: kinds of `Evidence.quadratic` that it takes, "diagonal" or "input_moment";
            empty for any.
    """

    evidence: frozenset[str] = frozenset()
    next_task_from: str = "merged"
    scope: str = "model"
    meets_in_sums: bool = False
    snapshots: tuple[float, ...] = ()
    figures: tuple[str, ...] = ()
    example_groups: int = 0
    hook: TrainingHook | None = None
    absorb: Callable[[Any, Evidence], Any] | None = None
    keeps_tasks: bool = False
    tasks_at_once: bool = False
    analysis_only: bool = False
    reads_previous: bool = True
    moving_tasks: int | None = None
    parts: Parts | None = None
    groups: Groups | None = None
    curvatures: tuple[str, ...] = ()

    @property
    def takes_part_in_training(self) -> bool:
        """True if the rule must be present while a task trains."""
        watches = self.evidence & {"trajectory", "adapters"}
        return bool(self.hook or self.tasks_at_once or watches)


class MergeRule(NamedTuple):
    """A merge rule: two pure functions, and what they ask of their caller.

    Attributes:
        init: makes the state before the first task.
        update: merges a finished task.
        needs: what the caller must arrange and measure.
    """

    init: InitFn
    update: UpdateFn
    needs: Requirements = Requirements()
