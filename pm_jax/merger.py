"""One object for one's own training loop: at the end of a task it measures and merges.

    merger = pm_jax.merger(rule, measure)
    state = merger.init(params)                          # the pre-trained model
    for batches in tasks:
        trained = ...                                    # one's own training, from state.start
        params, state, info = merger.finish_task(state, trained, batches, key)

`params` is the model to predict with. `state` is one pytree, to be saved by Orbax; `state.start` is
the model that the next task starts from, and the base of the perturbation.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import lapack, task_vectors, trees
from pm_jax.curvature.measures import Measure, Measurement, in_groups, measure_all
from pm_jax.curvature.measuring import check_parameters
from pm_jax.curvature.static_leaves import Frame
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.checked import check_rule
from pm_jax.types import Array, Batch, InvalidInput, Key, Params, PyTree, cause

MEASURED = frozenset({"quadratic", "curvature_error", "curvature_along", "left_out"})
"""Fields of `Evidence` that a measure gives."""
NEEDS_MORE = {
    "trajectory": "snapshots of training",
    "adapters": "the adapters that a task trains",
    "objective": "the task's loss as an `Objective`",
    "onset_gradient_norm": "the gradient at the task's start",
    "all_objectives": "the data of all tasks",
    "input_moments": "the inputs of dense layers",
}
"""Fields of `Evidence` that neither a measure nor a key gives."""
TAKEN = (
    "perturb_and_merge, fisher_averaging, cofima, regmean (with a measure), frozen, "
    "first_session, sequential, averaging, slao, coma, task_arithmetic, ties, dare, opcm, "
    "null_space, random_mix, magmax, tunable_magmax (without)"
)
"""The rules of `pm_jax.rules` that a merger takes, in errors."""


class MergerState(NamedTuple):
    """Everything that a merger remembers from task to task; one pytree of arrays.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        start: the model that the next task starts from, and the base of its perturbation.
        rule: state of the merge rule.
    """

    tasks: Array
    start: Params
    rule: Any


@dataclasses.dataclass(frozen=True)
class Merger:
    """A merge rule and the measure of the curvature that it reads, made by `merger`.

    Attributes:
        rule: the merge rule.
        measure: how a task's curvature is measured; `None` for a rule that reads none.
    """

    rule: MergeRule
    measure: Measure | None

    def init(self, params: Params) -> MergerState:
        """The state before the first task.

        Args:
            params: the pre-trained model, a pytree; leaves that are not floating point (steps,
                keys, text) pass through, the trained model's to the next.

        Raises:
            InvalidInput: no pytree of arrays, or a measure of another kind than the rule reads.
        """
        check_parameters("params", params)
        if not jax.tree.leaves(params):
            raise InvalidInput(
                f"params={type(params).__name__}: has no leaves; give the model's parameters, a "
                "pytree of arrays"
            )
        arrays, frame = Frame.split(params)
        # The state's own buffers: a training step may donate the parameters it is given.
        rule = _init(self.rule, frame, arrays)
        start = jax.tree.map(_copied, params)
        if self.measure is not None:
            self._check_fit(params)
        return MergerState(jnp.zeros((), jnp.int32), start, rule)

    def finish_task(
        self,
        state: MergerState,
        trained: Params,
        batches: Batch | tuple[Any, ...] | Iterable[Any] | None = None,
        key: Key | None = None,
        *,
        model_state: PyTree | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> tuple[Params, MergerState, MergeInfo]:
        """Measure what the rule reads of a trained task, and merge it.

        Nothing is donated: `state` and `trained` stay usable. The results share no buffer with
        `trained` nor with each other, so that the next training may donate `params`. After the
        first task nothing is compiled, as long as shapes stay.

        Args:
            state: of `init`, or of the task before.
            trained: the model that training from `state.start` ended with.
            batches: the task's examples in any form that `measure_all` takes; none are read where
                the rule needs no curvature.
            key: PRNG key, for rules and measures that draw random numbers; every task draws others.
            model_state: as for `measure_all`: batch statistics or a class mask of this task.
                Running averages of batch norms are the trained model's and fit no merged one: see
                `pm_jax.integrations.linen.recalibrate_batch_statistics`.
            batch_size: examples per update of the measure.
            progress: show a progress bar of the measure.

        Returns:
            The merged model to predict with, the next state, and the figures of the merge.

        Raises:
            InvalidInput: no state of this merger, a model of another structure, no examples or key
                where they are needed, or what `measure_all` raises.
        """
        self._check_task(state, trained, batches, key)
        keys = (None, None) if key is None else _keys(key, state.tasks)
        measuring = functools.partial(
            self._evidence, state, batches=batches, keys=keys, model_state=model_state,
            batch_size=batch_size, progress=progress, trained=trained,
        )  # fmt: skip
        models, frame = Frame.split((state.start, trained))
        evidence = measuring(at=trained)
        with lapack.one_thread():
            update = _update(self.rule, frame, models, state.rule, evidence)
            merged, rule, info = jax.block_until_ready(update)
        others = jax.tree.map(lambda x: x if trees.is_floating(x) else _copied(x), trained)
        params = trees.with_floating(others, merged)
        if self.rule.needs.absorb:
            rule = _absorb(self.rule, rule, measuring(at=params))
        # A rule that keeps a model by its definition is no surprise.
        surprises = self.rule.needs.moving_tasks is None and info.comparison.unchanged_by_merge == 1
        if info.comparison.unchanged_by_training == 1 or surprises:
            warnings.warn(f"finish_task: {info.remarks()[0]}", stacklevel=2)
        start = {"merged": params, "trained": trained, "initial": state.start}
        next_start = jax.tree.map(_copied, start[self.rule.needs.next_task_from])
        return params, MergerState(state.tasks + 1, next_start, rule), info

    def _evidence(
        self,
        state: MergerState,
        *,
        at: Params,
        trained: Params,
        batches: Any,
        keys: tuple[Key | None, Key | None],
        **how: Any,
    ) -> Evidence:
        """Collect the evidence that the rule reads, with curvature measured at a model."""
        if self.measure is None:
            return Evidence(key=keys[1])
        direction = task_vectors.difference(trained, state.start)
        found = measure_all(self._measure(), at, batches, direction=direction, key=keys[0], **how)
        return self._evidence_of(found, keys[1])

    def _measure(self) -> Measure:
        """The measure, in groups where the rule leaves out examples."""
        assert self.measure is not None
        groups = self.rule.needs.example_groups
        return in_groups(self.measure, groups) if groups else self.measure

    def _evidence_of(self, found: Measurement, key: Key | None) -> Evidence:
        return Evidence(
            found.quadratic,
            found.standard_error,
            key,
            curvature_along=found.along if self._measure().along_is_exact else None,
            left_out=found.left_out,
        )

    def _check_fit(self, params: Params) -> None:
        """Trace a merge, so that a measure which does not fit is refused before any training."""
        arrays, frame = Frame.split(params)

        def merged(arrays: list[Array], key: Key) -> PyTree:
            model, measure = frame.joined(arrays), self._measure()
            zero = trees.zeros_like(model)
            found = measure.finalize(measure.init(model, zero, key))
            state = self.rule.init(model)
            _, state, info = self.rule.update(
                state, previous=model, trained=model, evidence=self._evidence_of(found, key)
            )
            return state, info

        try:
            jax.eval_shape(merged, arrays, jax.random.key(0))
        except (ValueError, KeyError, TypeError) as error:
            # Messages of `InvalidInput` say it better than their type does.
            said = str(error) if isinstance(error, ValueError) else cause(error)
            raise InvalidInput(f"measure={_name(self.measure)}: does not fit ({said})") from None

    def _check_task(self, state: Any, trained: Params, batches: Any, key: Key | None) -> None:
        """Raise InvalidInput for arguments that do not belong together."""
        if not isinstance(state, MergerState):
            raise InvalidInput(
                f"state={type(state).__name__}: must be a MergerState, of init or of the last "
                "finish_task; restore a saved one by giving Orbax merger.init(params) as target"
            )
        gone = [leaf for leaf in jax.tree.leaves((state, trained)) if _is_deleted(leaf)]
        if gone:
            raise InvalidInput(
                "state or trained: arrays have been deleted, as by a training step that donates "
                "them; start training from jax.tree.map(jnp.copy, state.start)"
            )
        check_parameters("trained", trained)
        trees.check_alike(trained, state.start, ("trained", "state.start"))
        if "key" in self.rule.needs.evidence and key is None:
            raise InvalidInput(
                "key=None: the rule draws random numbers; give a PRNG key, jax.random.key(seed)"
            )
        if self.measure is None:
            return
        if batches is None:
            raise InvalidInput(
                "batches=None: the rule reads the curvature of the task's loss; give its training "
                "examples"
            )
        if self.rule.needs.absorb and isinstance(batches, Iterator):
            raise InvalidInput(
                f"batches={type(batches).__name__}: can be read once, and this rule measures "
                "twice, at the trained and at the merged model; give a list or a loader"
            )


def merger(rule: MergeRule, measure: Measure | None = None) -> Merger:
    """Make the object that ends the tasks of one's own training loop.

    It takes every rule that needs no part in training and no data of other tasks:

    ==================================================  =======================================
    perturb_and_merge, fisher_averaging, cofima         with a measure
    regmean                                             with `input_moment`
    frozen, first_session, sequential, averaging, slao  without
    coma, task_arithmetic, ties, magmax, opcm           without
    null_space                                          without, `finish_task` with a key if a part
                                                        is learned
    dare, random_mix, tunable_magmax                    without, `finish_task` with a key
    became, trm, pam                                    refused: they take part in training
    oracle, exact_curvature, joint                      refused: they look at all tasks
    ==================================================  =======================================

    Args:
        rule: a merge rule, of `pm_jax.rules` or one's own.
        measure: how the curvature is measured that the rule reads, such as `fisher_exact`; made
            once, outside of the loop. `measures.with_along` adds the exact curvature along the task
            vector.

    Returns:
        A `Merger` with `init` and `finish_task`.

    Raises:
        InvalidInput: a rule that needs more than a merger has, no measure where the rule needs one
            or one that it does not read, or a factory in place of what it makes.

    Example:
        >>> import pm_jax
        >>> from pm_jax import rules
        >>> logits_fn = lambda params, inputs: inputs @ params["w"]
        >>> merger = pm_jax.merger(rules.perturb_and_merge(), pm_jax.fisher_exact(logits_fn))
        >>> state = merger.init({"w": jnp.zeros((1, 2))})
        >>> for slope in (1.0, 3.0):  # two tasks; their training gave these models
        ...     trained = {"w": jnp.asarray([[slope, 0.0]])}
        ...     batches = [(jnp.ones((2, 1)), jnp.asarray([0, 1]))]
        ...     params, state, info = merger.finish_task(state, trained, batches)
        >>> int(state.tasks), [round(x, 2) for x in params["w"][0].tolist()]
        (2, [1.37, 0.0])
    """
    check_rule("rule", rule)
    _refuse_needs(rule.needs)
    if measure is not None and not isinstance(measure, Measure):
        name = getattr(measure, "__name__", type(measure).__name__)
        remedy = f"call it: {name}(logits_fn)" if callable(measure) else "make one, as fisher_exact"
        raise InvalidInput(f"measure={name}: must be a Measure; {remedy}")
    reads = rule.needs.evidence & MEASURED
    if reads and measure is None:
        raise InvalidInput(
            f"measure=None: the rule reads {', '.join(sorted(reads))} of the task's loss; give a "
            "measure, such as pm_jax.fisher_exact(logits_fn)"
        )
    if measure is not None and not reads:
        raise InvalidInput(
            f"measure={_name(measure)}: the rule reads no curvature; leave the measure out, or use "
            "a rule that does, such as perturb_and_merge"
        )
    return Merger(rule, measure)


def _refuse_needs(needs: Requirements) -> None:
    """Raise InvalidInput for a rule that needs what a merger cannot give."""
    lacks = [text for name, text in NEEDS_MORE.items() if name in needs.evidence]
    if needs.hook:
        lacks.insert(0, "a part in training")
    if needs.tasks_at_once:
        lacks.insert(0, "all tasks at once")
    if unknown := sorted(needs.evidence - MEASURED - {"key"} - NEEDS_MORE.keys()):
        lacks += unknown
    if lacks:
        raise InvalidInput(
            f"rule: needs {', '.join(lacks)}, which a merger does not have; use the binaries or "
            f"Learner for it. A merger takes {TAKEN}"
        )


def _name(measure: Measure | None) -> str:
    made_from = measure.made_from if measure else None
    return getattr(made_from[0], "__name__", "Measure") if made_from else "Measure"


def _copied(leaf: Any) -> Any:
    """The leaf in a buffer of its own; what is no array stays."""
    if isinstance(leaf, np.ndarray | np.generic):
        # Not JAX's array, which would cut whole numbers to 32 bits; Orbax saves arrays alone.
        return np.array(leaf)
    return jnp.array(leaf, copy=True) if isinstance(leaf, jax.Array) else leaf


def _is_deleted(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
    )


@jax.jit
def _keys(key: Key, tasks: Array) -> tuple[Key, Key]:
    """The keys of a task's measurement and of its merge."""
    key = jax.random.fold_in(key, tasks)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(rule: MergeRule, frame: Frame, arrays: list[Array]) -> Any:
    # Copies, because a state that is an argument unchanged would be the caller's own buffers.
    return rule.init(jax.tree.map(_copied, frame.joined(arrays)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
    rule: MergeRule, frame: Frame, models: list[Array], state: Any, evidence: Evidence
) -> tuple[PyTree, Any, MergeInfo]:
    """Merge; returns the floating-point leaves of the merged model, next state and figures."""
    previous, trained = frame.joined(models)
    merged, state, info = rule.update(state, previous=previous, trained=trained, evidence=evidence)
    # The rest stays on the host, where leaves may be text.
    leaves = jax.tree.map(_copied, trees.floating(merged))
    return leaves, state, info


@functools.partial(jax.jit, static_argnums=0)
def _absorb(rule: MergeRule, state: Any, evidence: Evidence) -> Any:
    assert rule.needs.absorb
    return rule.needs.absorb(state, evidence)
