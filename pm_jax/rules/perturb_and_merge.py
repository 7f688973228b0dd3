"""Perturb-and-Merge: the convex combination with the smallest total quadratic loss."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import block_sums, task_vectors, trees
from pm_jax.coefficients import MergeCoefficient, merge_coefficient, merge_coefficients
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.curvature.exact import AlongDirection
from pm_jax.curvature.quadratics import Quadratic, SumQuadratic
from pm_jax.rules.base import Evidence, Groups, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import quadratic_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.jackknife import jackknifed
from pm_jax.types import Array, InvalidInput, Params, require


class PerturbAndMergeState(NamedTuple):
    """State of Perturb-and-Merge.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        memory: the sum of all tasks' quadratics, of one size.
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

    The next task starts from the merged model. The perturbation of the training loss is not part of
    the rule (see `pm_jax.perturbation`).

    Args:
        clip: restrict alpha to [0, 1], as the paper does.
        normalize: "none", as the paper, or "trace": each task's curvature over its trace, so that
            tasks count alike however small the loss that they were trained to.
        per: the part of the model that has a coefficient: the "model", as in the paper, a "block"
            (a path up to its first part with a number), a "module", a "tensor", or the match of a
            regular expression at the beginning of a path. They minimise the quadratic together.
        jackknife: K, at least 2, for an error bar as in `jackknifed`, of a single coefficient; 0
            for none.
        memory: the quadratic that is 0 everywhere, of the kind that the evidence has.

    Returns:
        A `MergeRule` that needs `quadratic` (of the memory's kind), `curvature_error`, `left_out`
        for a jackknife, and for a single coefficient `curvature_along`, which replaces the current
        task's curvature along Delta where it is given. The info of several coefficients has their
        mean over all entries, and no standard error.

    Raises:
        ValueError: a setting out of range, or in `update` another kind of quadratic.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, NeurIPS 2025

    Example:
        >>> rule = perturb_and_merge()
        >>> state, start = rule.init(jnp.zeros(1)), jnp.zeros(1)
        >>> for trained, fisher in [(jnp.full(1, 1.0), 3.0), (jnp.full(1, 5.0), 1.0)]:
        ...     evidence = Evidence(DiagonalQuadratic.at(trained, jnp.full(1, fisher)))
        ...     start, state, info = rule.update(
        ...         state, previous=start, trained=trained, evidence=evidence)
        >>> start.tolist(), float(info.alpha)  # (3 * 1 + 1 * 5) / (3 + 1)
        ([2.0], 0.25)
    """
    kinds = ("none", "trace")
    require("normalize", normalize, normalize in kinds, f"one of {', '.join(kinds)}")
    group_names([], per)  # raises here, and not in `init`, for an expression that cannot be read
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
            scale = _inverse(block_sums.over_all(quadratic.trace()))
            counted = quadratic.scaled(scale)
        remembered = state.memory.plus(counted)
        total: Quadratic | SumQuadratic = remembered
        along = evidence.curvature_along if per == "model" else None
        if along is not None:
            # The task's own curvature is known exactly along Delta: this term takes the place of
            # the stored one in the sum that is minimised, but not in the memory.
            quadratic = Quadratic.at(trained, AlongDirection(delta, along))
            total = state.memory + quadratic.scaled(scale)
        # Numbers instead of names: they index an array inside jit.
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
        # One alpha for each leaf.
        alphas = jax.tree.unflatten(structure, [coefficient.alpha[group] for group in groups])
        rest = jax.tree.map(lambda alpha, step: (1 - alpha) * step, alphas, delta)
        change = 0.5 * quadratic.curvature_along(rest)
        if not quadratic.curvature.of_loss:
            change = jnp.full((), jnp.nan)
        sizes = [leaf.size for leaf in jax.tree.leaves(delta)]
        info = _info(coefficient, groups, sizes)._replace(predicted_loss_change=change)
        merged = jax.tree.map(trees.lerp, previous, trained, alphas)
        return merged, PerturbAndMergeState(tasks, remembered), info

    reads = {"quadratic", "curvature_error"} | ({"curvature_along"} if per == "model" else set())
    needs = Requirements(evidence=frozenset(reads), meets_in_sums=per == "model")
    # Traces are those of whole models, whatever the groups.
    if per != "model" and normalize == "none":
        alone = perturb_and_merge(clip=clip, memory=memory)
        needs = needs._replace(groups=Groups(functools.partial(group_names, per=per), alone))
    rule = merge_rule(init, update, needs)
    return jackknifed(rule, jackknife) if jackknife else rule


def group_names(paths: Sequence[str], per: str) -> list[str]:
    """Name each leaf's group, which shares a coefficient; "" where an expression does not match.

    Raises:
        InvalidInput: an expression that cannot be read, or matches none of the paths.

    Example:
        >>> group_names(["encoder/block_0/attn/key/kernel", "head/bias"], "block")
        ['encoder/block_0', 'head']
        >>> group_names(["blocks.0.attn.qkv.weight", "norm.weight"], "module")  # names of PyTorch
        ['blocks.0.attn.qkv', 'norm']
        >>> group_names(["encoder/block_0/attn/key/kernel", "head/bias"], ".*(key|value)")
        ['encoder/block_0/attn/key', '']
    """
    patterns = {
        "model": "",
        # The alternative is for a path without a number: its first part.
        "block": r"(?:[^/.]*[/.])*?[^/.]*\d[^/.]*|[^/.]*",
        "module": r".*(?=[/.])|",
        "tensor": r".*",
    }
    try:
        pattern = re.compile(patterns.get(per, per))
    except re.error as error:
        raise InvalidInput(
            f"per={per}: must be model, block, module, tensor or a regular expression ({error})"
        ) from None
    names = [match[0] if (match := pattern.match(path)) else "" for path in paths]
    if per not in patterns and paths and not any(names):
        raise InvalidInput(
            f"rule_settings=per={per}: matches no leaf that merges; they are {', '.join(paths[:3])}"
            f"{', ...' if len(paths) > 3 else ''}; or use model, block, module or tensor"
        )
    return names


def _inverse(value: Array) -> Array:
    """`1 / value`, or 1 where the value is not one to divide by."""
    # Two `where`s: the division by 0 in the branch that is not chosen would still be computed.
    sound = jnp.isfinite(value) & (value > jnp.finfo(value.dtype).tiny)
    return jnp.where(sound, 1 / jnp.where(sound, value, 1.0), 1.0)


def _info(coefficient: MergeCoefficient, groups: Sequence[int], sizes: Sequence[int]) -> MergeInfo:
    """The info of G coefficients, the mean over all entries; leaves have a group and a size."""
    # float32: the number of a model's entries may not fit int32.
    entries = jnp.bincount(
        jnp.asarray(groups), jnp.asarray(sizes, jnp.float32), length=max(groups) + 1
    )

    def mean(values: Array) -> Array:
        return jnp.sum(values * entries) / jnp.sum(entries)

    return MergeInfo(
        alpha=mean(coefficient.alpha),
        alpha_raw=mean(coefficient.alpha_raw),
        numerator=jnp.sum(coefficient.numerator),
        denominator=jnp.sum(coefficient.denominator),
        standard_error=jnp.sum(coefficient.standard_error),
        predicted_loss_change=jnp.full((), jnp.nan),
        degenerate=mean(coefficient.degenerate.astype(jnp.float32)),
    )
