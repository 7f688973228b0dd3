"""Jackknife: an error bar for the coefficient of any rule that measures curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax.coefficients import jackknife_error
from pm_jax.curvature.measures import Measurement
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule
from pm_jax.rules.checked import check_rule, merge_rule
from pm_jax.types import Array, InvalidInput, Params, require


class JackknifeState(NamedTuple):
    """State of the wrapped rule, and its K states without a group of examples, stacked."""

    rule: Any
    left_out: Any


def jackknifed(rule: MergeRule, groups: int) -> MergeRule:
    """Add to a rule the standard error of its coefficient over all tasks' examples.

        jackknife_error = sqrt( (K - 1) / K sum_k (alpha_k - mean alpha)^2 )

    with alpha_k before clipping, from the evidence of every task so far without one of K groups of
    its examples; NaN where one of them is degenerate. Models and coefficients are those of the
    wrapped rule. The state takes K times more memory than the wrapped rule's.

    Args:
        rule: reads `quadratic`, and of the examples only the figures of `measures.in_groups`.
        groups: K, at least 2.

    Returns:
        A `MergeRule` that needs `left_out` as well, with `jackknife_error` among its figures.

    Raises:
        ValueError: fewer groups, or a rule that reads no curvature.

    References:
        Efron and Stein, `The Jackknife Estimate of Variance
        <https://doi.org/10.1214/aos/1176345462>`_, 1981

    Example:
        >>> from pm_jax import rules
        >>> jackknifed(rules.perturb_and_merge(), 4).needs.figures
        ('jackknife_error',)
    """
    check_rule("rule", rule)
    require("jackknife", groups, groups >= 2, "0, or at least 2")
    if "quadratic" not in rule.needs.evidence:
        raise InvalidInput("rule: needs no quadratic, so that no examples can be left out of it")

    def init(params: Params) -> JackknifeState:
        states = [rule.init(params) for _ in range(groups)]
        left_out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return JackknifeState(rule.init(params), left_out)

    def update(
        state: JackknifeState, *, previous: Params, trained: Params, evidence: Evidence
    ) -> tuple[Params, JackknifeState, MergeInfo]:
        models = {"previous": previous, "trained": trained}
        merged, rule_state, info = rule.update(state.rule, **models, evidence=evidence)

        def without_group(state_and_measured: tuple[Any, Measurement]) -> tuple[Any, Array, Array]:
            rule_state, measured = state_and_measured
            along = None if evidence.curvature_along is None else measured.along
            others = evidence._replace(
                quadratic=measured.quadratic, curvature_along=along, left_out=None
            )
            # XLA never computes the results that are dropped here, such as the merged model.
            _, rule_state, info = rule.update(rule_state, **models, evidence=others)
            return rule_state, info.alpha_raw, info.degenerate

        measured = _left_out(evidence, groups)
        # One group after the other: in parallel they would take K times the memory of a merge.
        left_out, alphas, degenerate = jax.lax.map(without_group, (state.left_out, measured))
        # A degenerate coefficient is 1/t and would hide how far the others vary.
        unsound = jnp.any(degenerate > 0) | (info.degenerate > 0)
        error = jnp.where(unsound, jnp.nan, jackknife_error(alphas))
        info = info._replace(figures={**info.figures, "jackknife_error": error})
        return merged, JackknifeState(rule_state, left_out), info

    needs = rule.needs._replace(
        evidence=rule.needs.evidence | {"left_out"},
        figures=(*rule.needs.figures, "jackknife_error"),
        example_groups=groups,
    )
    return merge_rule(init, update, needs)


def _left_out(evidence: Evidence, groups: int) -> Measurement:
    """The measurements without each group; raises InvalidInput for another number of groups."""
    measured = evidence.left_out
    count = 0 if measured is None else len(measured.examples)
    if measured is None or count != groups:
        raise InvalidInput(
            f"evidence.left_out: has {count} groups and jackknife={groups} needs as many; measure "
            f"by measures.in_groups(measure, {groups})"
        )
    return measured
