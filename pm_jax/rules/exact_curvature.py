"""Perturb-and-Merge's coefficient with all tasks' exact curvature, by replay of their data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import losses, task_vectors, trees
from pm_jax.coefficients import merge_coefficient_of
from pm_jax.curvature.exact import ExactQuadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import info_of, origin_of, stacked_zeros
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.objectives import map_tasks
from pm_jax.types import Array, InvalidInput, Params, require


class ExactCurvatureState(NamedTuple):
    """State of the rule.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        models: theta_1*, theta_2*, ..., leaves [max_tasks, ...].
    """

    tasks: Array
    models: Params


def exact_curvature(*, clip: bool = True, max_tasks: int = 10) -> MergeRule:
    """Merge with the minimum of all tasks' second-order expansions, curvature not approximated.

        alpha_t = - sum_{i<=t} (theta_hat_{t-1} - theta_i*)^T G_i Delta_t
                  / sum_{i<=t} Delta_t^T G_i Delta_t

    with `G_i` the Gauss-Newton matrix of task i's loss at `theta_i*` on some of its training
    examples, by jvp. The remaining gap between this coefficient and the oracle's is due to the
    expansion itself. An analysis tool: it keeps every model and needs the data of earlier tasks.

    Args:
        clip: restrict alpha to [0, 1].
        max_tasks: tasks that there is room for; later merges are NaN.

    Returns:
        A `MergeRule` that needs `all_objectives`.

    Raises:
        ValueError: max_tasks below 1.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.1,
        with the Hessian that its Fisher stands for

    Example:
        >>> exact_curvature().needs.analysis_only
        True
    """
    require("max_tasks", max_tasks, max_tasks >= 1, "at least 1")

    def init(params: Params) -> ExactCurvatureState:
        models = stacked_zeros(origin_of(params), max_tasks)
        return ExactCurvatureState(jnp.zeros((), jnp.int32), models)

    def update(
        state: ExactCurvatureState, *, previous: Params, trained: Params, evidence: Evidence
    ) -> tuple[Params, ExactCurvatureState, MergeInfo]:
        objectives = evidence.all_objectives
        if objectives is None:
            raise InvalidInput("evidence.all_objectives=None: exact_curvature looks at all tasks")
        models = jax.tree.map(
            lambda stack, new: stack.at[state.tasks].set(new), state.models, trained
        )
        delta = task_vectors.difference(trained, previous)

        def slope_and_curvature(number: Array) -> Array:
            """One task's term of both sums, the slope at the previous model."""
            objective = objectives.task(number)
            model = jax.tree.map(lambda stack: stack[number], models)

            def logits_fn(leaves: Params, inputs: Array) -> Array:
                logits = objective.logits(leaves, inputs) / objective.temperature
                return losses.mask_logits(logits, objective.classes)

            size = objective.batches.labels.shape[1]
            examples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), objective.batches)
            term = ExactQuadratic.at(model, examples, logits_fn, batch_size=size)
            return jnp.stack([term.gradient_along(previous, delta), term.curvature_along(delta)])

        numbers = jnp.arange(min(max_tasks, len(objectives.classes)))
        terms = map_tasks(slope_and_curvature, numbers <= state.tasks)
        slope, curvature = jnp.sum(terms, axis=0)
        tasks = state.tasks + 1
        coefficient = merge_coefficient_of(-slope, curvature, task=tasks, clip=clip)
        # A traced count cannot raise; the index of its term stays inside the array.
        overflow = jnp.where(tasks > max_tasks, jnp.nan, 0.0)
        info = info_of(coefficient, terms[jnp.minimum(state.tasks, len(terms) - 1), 1])
        info = info._replace(alpha=info.alpha + overflow)
        merged = trees.lerp(previous, trained, info.alpha)
        return merged, ExactCurvatureState(tasks, models), info

    needs = Requirements(frozenset({"all_objectives"}), keeps_tasks=True, analysis_only=True)
    return merge_rule(init, update, needs)
