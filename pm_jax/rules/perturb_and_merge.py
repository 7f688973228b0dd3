"""Perturb-and-Merge: the convex combination with the smallest total quadratic loss."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.coefficients import (
    MergeCoefficient,
    merge_coefficient,
    merge_coefficients,
)
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.curvature.exact import AlongDirection
from pm_jax.curvature.quadratics import Quadratic, SumQuadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import quadratic_of, require
from pm_jax.rules.jackknife import jackknifed
from pm_jax.types import Array, InvalidInput, Params


class PerturbAndMergeState(NamedTuple):
    """State of Perturb-and-Merge.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        memory: the sum of the quadratics of all tasks; its size does not grow with the tasks.
    """

    tasks: Array
    memory: Quadratic


def perturb_and_merge(
    *,
    clip: bool = True,
    normalize: str = "none",
    per: str = "model",
    jackknife: int = 0,
    memory: Callable[[Params], Quadratic] = DiagonalQuadratic.zero,
) -> MergeRule:
    """Merge with the coefficient that minimises the quadratic losses of all tasks seen.

        theta_hat_t = theta_hat_{t-1} + alpha_t Delta_t
        alpha_t = - sum_{i<=t} (theta_hat_{t-1} - theta_i*)^T F_i Delta_t
                  / sum_{i<=t} Delta_t^T F_i Delta_t

    Training of the next task starts from the merged model. The perturbation of the training loss is
    not part of the rule (see `pm_jax.perturbation`).

    Args:
        clip: restrict alpha to [0, 1], as the paper does.
        normalize: "none", as the paper, or "trace": each task's curvature over its trace, so that
            tasks count alike however small the loss that they were trained to.
        per: what has a coefficient of its own: the "model", as in the paper, a "block" (of a path
            up to its first part with a number), a "module", a "tensor", or what a regular
            expression matches at the beginning of a path. They minimise the quadratic together.
        jackknife: K, to find the standard error of alpha over the examples of all tasks as
            `jackknife_error` in the info's figures: from K coefficients, each without one of K
            groups of every task's examples. At K times the memory, and for one coefficient. 0 for
            none.
        memory: the quadratic that is 0 everywhere, of the kind that the evidence has.

    Returns:
        A `MergeRule` that needs `quadratic` (of the memory's kind), `curvature_error`, `left_out`
        for a jackknife, and for one coefficient `curvature_along`: where it is given, it stands for
        the current task's curvature along Delta. Its `update` raises ValueError for any other
        quadratic. Where there are several coefficients, its info has their mean over all entries,
        and no standard error.

    Raises:
        ValueError: a setting that is none of these.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, NeurIPS 2025

    Example:
        >>> import jax.numpy as jnp
        >>> rule = perturb_and_merge()
        >>> state, start = rule.init(jnp.zeros(1)), jnp.zeros(1)
        >>> for trained, fisher in [(1.0, 3.0), (5.0, 1.0)]:
        ...     trained = jnp.full(1, trained)
        ...     evidence = Evidence(DiagonalQuadratic.at(trained, jnp.full(1, fisher)))
        ...     start, state, info = rule.update(
        ...         state, previous=start, trained=trained, evidence=evidence)
        >>> start.tolist(), float(info.alpha)  # (3 * 1 + 1 * 5) / (3 + 1)
        ([2.0], 0.25)
    """
    kinds = ("none", "trace")
    require("normalize", normalize, normalize in kinds, f"one of {', '.join(kinds)}")
    group_names([], per)  # says whether the expression can be read
    require("jackknife", jackknife, jackknife == 0 or jackknife >= 2, "0, or at least 2")
    require("per", per, not jackknife or per == "model", "model for a jackknife, or jackknife=0")

    def init(params: Params) -> PerturbAndMergeState:
        group_names(list(trees.leaves_by_path(params)), per)
        return PerturbAndMergeState(jnp.zeros((), jnp.int32), memory(params))

    def update(
        state: PerturbAndMergeState, *, previous: Params, trained: Params, evidence: Evidence
    ) -> tuple[Params, PerturbAndMergeState, MergeInfo]:
        quadratic = quadratic_of(evidence, type(state.memory.curvature))
        tasks = state.tasks + 1
        delta = task_vectors.difference(trained, previous)
        counted, scale = quadratic, jnp.ones(())
        if normalize == "trace":
            scale = _inverse(quadratic.trace())
            counted = quadratic.scaled(scale)
        remembered = state.memory.plus(counted)
        total: Quadratic | SumQuadratic = remembered
        along = evidence.curvature_along if per == "model" else None
        if along is not None:
            # The task's own curvature is known exactly along Delta: this term takes the place of
            # the stored one in the sum that is minimised, but not in the memory.
            quadratic = Quadratic.at(trained, AlongDirection(delta, along))
            total = state.memory + quadratic.scaled(scale)
        names = group_names(list(trees.leaves_by_path(delta)), per)
        groups = tuple(sorted(set(names)).index(name) for name in names)
        if max(groups) == 0:
            error = scale * jnp.asarray(evidence.curvature_error)
            coefficient = merge_coefficient(
                total, previous, delta, task=tasks, curvature_error=error, clip=clip
            )
            coefficient = jax.tree.map(lambda x: x[None], coefficient)
        else:
            coefficient = merge_coefficients(total, previous, delta, groups, task=tasks, clip=clip)
        structure = jax.tree.structure(delta)
        alphas = jax.tree.unflatten(structure, [coefficient.alpha[group] for group in groups])
        rest = jax.tree.map(lambda alpha, step: (1 - alpha) * step, alphas, delta)
        change = 0.5 * quadratic.curvature_along(rest)
        sizes = [leaf.size for leaf in jax.tree.leaves(delta)]
        info = _info(coefficient, groups, sizes)._replace(predicted_loss_change=change)
        merged = jax.tree.map(trees.lerp, previous, trained, alphas)
        return merged, PerturbAndMergeState(tasks, remembered), info

    reads = {"quadratic", "curvature_error"} | ({"curvature_along"} if per == "model" else set())
    rule = MergeRule(init, update, Requirements(evidence=frozenset(reads)))
    return jackknifed(rule, jackknife) if jackknife else rule


def group_names(paths: Sequence[str], per: str) -> list[str]:
    """The groups of leaves that share a coefficient.

    Args:
        paths: of the leaves.
        per: "model", "block", "module", "tensor", or a regular expression.

    Returns:
        The name of each leaf's group; "" where an expression does not match.

    Raises:
        InvalidInput: an expression that cannot be read, or matches none of the paths.

    Example:
        >>> group_names(["encoder/block_0/attn/key/kernel", "head/bias"], "block")
        ['encoder/block_0', 'head']
        >>> group_names(["encoder/block_0/attn/key/kernel", "head/bias"], ".*(key|value)")
        ['encoder/block_0/attn/key', '']
    """
    patterns = {
        "model": "",
        "block": r"(?:[^/]*/)*?[^/]*\d[^/]*|[^/]*",
        "module": r".*(?=/)|",
        "tensor": r".*",
    }
    try:
        pattern = re.compile(patterns.get(per, per))
    except re.error as error:
        raise InvalidInput(
            f"per={per}: must be model, block, module, tensor or a regular expression ({error})"
        ) from None
    names = [found[0] if (found := pattern.match(path)) else "" for path in paths]
    if per not in patterns and paths and not any(names):
        raise InvalidInput(
            f"rule_settings=per={per}: matches no leaf that merges; they are {', '.join(paths[:3])}"
            f"{', ...' if len(paths) > 3 else ''}; or use model, block, module or tensor"
        )
    return names


def _inverse(value: Array) -> Array:
    """`1 / value`, or 1 where that is not a number to divide by."""
    sound = jnp.isfinite(value) & (value > jnp.finfo(value.dtype).tiny)
    return jnp.where(sound, 1 / jnp.where(sound, value, 1.0), 1.0)


def _info(found: MergeCoefficient, groups: Sequence[int], sizes: Sequence[int]) -> MergeInfo:
    """The info of one coefficient, or of several as their mean over all entries."""
    entries = jnp.bincount(
        jnp.asarray(groups), jnp.asarray(sizes, jnp.float32), length=max(groups) + 1
    )

    def mean(values: Array) -> Array:
        return jnp.sum(values * entries) / jnp.sum(entries)

    return MergeInfo(
        alpha=mean(found.alpha),
        alpha_raw=mean(found.alpha_raw),
        numerator=jnp.sum(found.numerator),
        denominator=jnp.sum(found.denominator),
        standard_error=jnp.sum(found.standard_error),
        predicted_loss_change=jnp.full((), jnp.nan),
        degenerate=mean(found.degenerate.astype(jnp.float32)),
    )
