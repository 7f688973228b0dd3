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
    predicted_loss_change,
)
from pm_jax.quadratics import DiagonalQuadratic, StoredQuadratic
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, quadratic_of, require
from pm_jax.types import Array, InvalidInput, Params


class PerturbAndMergeState(NamedTuple):
    """State of Perturb-and-Merge.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        memory: the sum of the quadratics of all tasks; its size does not grow with the tasks.
    """

    tasks: Array
    memory: StoredQuadratic


def perturb_and_merge(
    *,
    clip: bool = True,
    normalize: str = "none",
    per: str = "model",
    memory: Callable[[Params], StoredQuadratic] = DiagonalQuadratic.zero,
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
        memory: the quadratic that is 0 everywhere, of the kind that the evidence has.

    Returns:
        A `MergeRule` that needs `quadratic` (of the memory's kind), `curvature_error` and, for one
        coefficient, `curvature_along`: where it is given, it stands for the current task's
        curvature along Delta. Its `update` raises ValueError for any other quadratic. Where there
        are several coefficients, its info has their mean over all entries, and no standard error.

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

    def init(params: Params) -> PerturbAndMergeState:
        group_names(list(trees.leaves_by_path(params)), per)
        return PerturbAndMergeState(jnp.zeros((), jnp.int32), memory(params))

    def update(
        state: PerturbAndMergeState, *, previous: Params, trained: Params, evidence: Evidence
    ):
        quadratic = quadratic_of(evidence, type(state.memory))
        tasks = state.tasks + 1
        delta = task_vectors.difference(trained, previous)
        counted, error = quadratic, jnp.asarray(evidence.curvature_error)
        correction: Array | float = 0.0
        if evidence.curvature_along is not None and per == "model":
            correction = evidence.curvature_along - quadratic.curvature_along(delta)
        scale: Array | float = 1.0
        if normalize == "trace":
            scale = _inverse(quadratic.trace())
            counted, error = quadratic.scaled(scale), scale * error
        total = state.memory.plus(counted)
        names = group_names(list(trees.leaves_by_path(delta)), per)
        groups = tuple(sorted(set(names)).index(name) for name in names)
        if max(groups) == 0:
            found = merge_coefficient(
                total,
                previous,
                delta,
                task=tasks,
                curvature_error=error,
                correction=scale * correction,
                clip=clip,
            )
            found = jax.tree.map(lambda x: x[None], found)
        else:
            found = merge_coefficients(total, previous, delta, groups, task=tasks, clip=clip)
        structure = jax.tree.structure(delta)
        alphas = jax.tree.unflatten(structure, [found.alpha[group] for group in groups])
        rest = jax.tree.map(lambda alpha, step: (1 - alpha) * step, alphas, delta)
        change = 0.5 * quadratic.curvature_along(rest)
        change += predicted_loss_change(found.alpha[0], correction)
        sizes = [leaf.size for leaf in jax.tree.leaves(delta)]
        info = _info(found, groups, sizes)._replace(predicted_loss_change=change)
        merged = jax.tree.map(trees.lerp, previous, trained, alphas)
        return merged, PerturbAndMergeState(tasks, total), info

    of_one = {"curvature_along"} if per == "model" else set()
    return MergeRule(init, update, frozenset({"quadratic", "curvature_error"} | of_one))


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
    sound = jnp.isfinite(value) & (value > jnp.finfo(value.dtype).tiny)
    return jnp.where(sound, 1 / jnp.where(sound, value, 1.0), 1.0)


def _info(found: MergeCoefficient, groups: Sequence[int], sizes: Sequence[int]) -> MergeInfo:
    """Of one coefficient, or of several as the mean over all entries."""
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
