"""Oracle: the merge coefficient by a line search on the data of all tasks."""

import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import TaskCount
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.objectives import Objective, map_tasks, stacked_weights, weighted_mean
from pm_jax.types import Array, InvalidInput, Params, require

CRITERIA = ("loss", "accuracy")


def oracle(*, criterion: str = "loss", points: int = 21) -> MergeRule:
    """Go to the point of the merge segment that is best for the tasks seen, by looking at them all.

        alpha_t = argmin_a sum_{i<=t} L_i(theta_hat_{t-1} + a (theta_t* - theta_hat_{t-1}))

    over a grid of a in [0, 1], with the tasks' true losses on some training examples of each;
    `alpha_1` is 1. An analysis tool, which tells how much a coefficient could gain at most: it
    needs the data of earlier tasks, which no continual learner has.

    Args:
        criterion: "loss", the sum above, or "accuracy", the mean over the tasks of their accuracy
            over all classes seen, of equal ones the one with the least loss.
        points: number of points of the grid, at least 2.

    Returns:
        A `MergeRule` that needs `all_objectives`; its info has `total_loss`, the sum at the merged
        model.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> oracle(criterion="accuracy").needs.figures
        ('total_loss',)
    """
    require("criterion", criterion, criterion in CRITERIA, f"one of {', '.join(CRITERIA)}")
    require("points", points, points >= 2, "at least 2")

    def update(
        state: TaskCount, *, previous: Params, trained: Params, evidence: Evidence
    ) -> tuple[Params, TaskCount, MergeInfo]:
        objectives = evidence.all_objectives
        if objectives is None:
            raise InvalidInput("evidence.all_objectives=None: the oracle looks at all tasks")
        alphas = jnp.linspace(0.0, 1.0, points)
        # One point after the other: in parallel the grid would take a model for every point.
        totals, errors = jax.lax.map(
            lambda alpha: _loss_and_error(objectives, trees.lerp(previous, trained, alpha)), alphas
        )
        # Infinite, because NaN has no place in an order.
        totals = jnp.where(jnp.isnan(totals), jnp.inf, totals)
        first = errors if criterion == "accuracy" else totals
        # lexsort takes its last key first, and among equals of both the smaller alpha.
        best = jnp.where(state.tasks == 0, points - 1, jnp.lexsort((totals, first))[0])
        info = MergeInfo.of(alphas[best])._replace(figures={"total_loss": totals[best]})
        merged = trees.lerp(previous, trained, info.alpha)
        return merged, TaskCount(state.tasks + 1), info

    needs = Requirements(frozenset({"all_objectives"}), figures=("total_loss",), analysis_only=True)
    return merge_rule(TaskCount.zero, update, needs)


def _loss_and_error(objectives: Objective, leaves: Params) -> tuple[Array, Array]:
    """Sum of the losses of the tasks with examples, and of their errors over all their classes."""
    nonempty = jnp.sum(stacked_weights(objectives.batches), axis=(1, 2)) > 0
    seen = jnp.any(objectives.classes & nonempty[:, None], axis=0)

    def of_task(number: Array) -> Array:
        objective = objectives.task(number)

        def of_batch(index: Array) -> Array:
            batch = objective.batch(index)
            loss, logits = objective.loss(leaves, batch)
            wrong = jnp.argmax(losses.mask_logits(logits, seen), axis=-1) != batch.labels
            return jnp.stack([loss, weighted_mean(wrong, batch)])

        return objective.mean_over_batches(of_batch)

    total, error = jnp.sum(map_tasks(of_task, nonempty), axis=0)
    return total, error
