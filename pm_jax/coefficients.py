"""The merge coefficient: the minimum of a quadratic along the task vector."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import block_sums, trees
from pm_jax.curvature.quadratics import Quadratic, SumQuadratic
from pm_jax.types import Array, InvalidInput, Params, PyTree

SWEEPS = 1000
"""Sweeps of coordinate descent over the groups of joint coefficients: a fixed number, for jit."""


class MergeCoefficient(NamedTuple):
    """A merge coefficient and the numbers behind it; float32 scalars, or [G] for several groups.

    Attributes:
        alpha: the coefficient of the merge, in [0, 1] if clipped.
        alpha_raw: the unconstrained minimiser, `numerator / denominator`.
        numerator: `-Delta . grad Q(theta_hat)`.
        denominator: `Delta^T H Delta`, over all tasks.
        standard_error: of `alpha_raw` over the current task's examples; 0 for the first task.
        degenerate: true where the denominator gave no minimum and alpha is 1/t.
    """

    alpha: Array
    alpha_raw: Array
    numerator: Array
    denominator: Array
    standard_error: Array
    degenerate: Array


def merge_coefficient(
    quadratic: Quadratic | SumQuadratic,
    previous: Params,
    task_vector: PyTree,
    *,
    task: Array | int,
    curvature_error: Array | float = float("nan"),
    clip: bool = True,
) -> MergeCoefficient:
    """Closed form of `argmin_a Q(previous + a task_vector)`.

        alpha = - Delta . grad Q(theta_hat) / Delta^T H Delta

    1 for the first task, by definition. Where the denominator is not finite or not above the
    smallest normal number (no displacement, no curvature, a negative one), alpha is 1/t.

    Args:
        quadratic: the sum over all tasks seen, the current one included.
        previous: `theta_hat_{t-1}`.
        task_vector: Delta, of the same structure.
        task: t, counted from 1; an array or an int.
        curvature_error: standard error of the current task's `Delta^T H_t Delta`.
        clip: restrict alpha to [0, 1].

    Returns:
        A `MergeCoefficient`. Its standard error is `|1 - alpha_raw| / denominator *
        curvature_error`, given the stored curvature of the earlier tasks.

    Raises:
        InvalidInput: structures or shapes differ.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.1

    Example:
        >>> from pm_jax.curvature import DiagonalQuadratic
        >>> old = DiagonalQuadratic.at(jnp.zeros(1), diagonal=jnp.asarray([3.0]))
        >>> new = DiagonalQuadratic.at(jnp.ones(1), diagonal=jnp.asarray([1.0]))
        >>> float(merge_coefficient(old + new, jnp.zeros(1), jnp.ones(1), task=2).alpha)
        0.25
    """
    trees.check_alike(task_vector, previous, ("task_vector", "previous"))
    slope, curvature = block_sums.over_all(
        (
            quadratic.gradient_along(previous, task_vector),
            quadratic.curvature_along(task_vector),
        )
    )
    return merge_coefficient_of(
        -slope,
        curvature,
        task=task,
        curvature_error=curvature_error,
        clip=clip,
    )


def merge_coefficients(
    quadratic: Quadratic | SumQuadratic,
    previous: Params,
    task_vector: PyTree,
    groups: Sequence[int],
    *,
    task: Array | int,
    clip: bool = True,
) -> MergeCoefficient:
    """One coefficient for each group of leaves, all minimising the quadratic together.

        argmin_{0 <= a <= 1} Q(previous + sum_g a_g Delta_g),   Delta_g the group's part of Delta

    Where H has no entries between leaves, the Gram matrix of the groups is diagonal, and the joint
    minimum consists of the groups' clipped minima. Otherwise see `box_minimum`. A group without a
    minimum has the alpha 1/t.

    Args:
        quadratic: the sum over all tasks seen, the current one included.
        previous: `theta_hat_{t-1}`, L leaves.
        task_vector: Delta, of the same structure.
        groups: L numbers from 0 to G - 1, the groups of the floating-point leaves.
        task: t, counted from 1; an array or an int.
        clip: restrict all alphas to [0, 1].

    Returns:
        A `MergeCoefficient` of arrays [G], whose standard error is NaN; its denominator is the
        diagonal of the Gram matrix. All are degenerate where that is not positive semi-definite.

    Raises:
        InvalidInput: structures or shapes differ, or another number of groups than of leaves.

    Example:
        >>> from pm_jax.curvature import DiagonalQuadratic
        >>> old = DiagonalQuadratic.at([jnp.zeros(1)] * 2, [jnp.ones(1), jnp.full(1, 3.0)])
        >>> new = DiagonalQuadratic.at([jnp.ones(1)] * 2, [jnp.ones(1)] * 2)
        >>> delta = [jnp.ones(1)] * 2
        >>> merge_coefficients(old + new, [jnp.zeros(1)] * 2, delta, (0, 1), task=2).alpha.tolist()
        [0.5, 0.25]
    """
    trees.check_alike(task_vector, previous, ("task_vector", "previous"))
    task_vector = trees.floating(task_vector)
    count = len(jax.tree.leaves(task_vector))
    if len(groups) != count or set(groups) != set(range(max(groups, default=-1) + 1)):
        raise InvalidInput(
            f"groups={list(groups)}: must be a number for each of {count} floating-point leaves; "
            "number them from 0 on without a gap"
        )
    if quadratic.leafwise:
        slopes, curvatures = (
            jax.ops.segment_sum(values, jnp.asarray(groups), max(groups) + 1)
            for values in quadratic.by_leaf(previous, task_vector)
        )
        return merge_coefficient_of(-slopes, curvatures, task=task, clip=clip)
    leaves, structure = jax.tree.flatten(task_vector)

    def part(group: int) -> PyTree:
        pairs = zip(leaves, groups, strict=True)
        parts = [x if number == group else jnp.zeros_like(x) for x, number in pairs]
        return jax.tree.unflatten(structure, parts)

    directions = [part(group) for group in range(max(groups) + 1)]
    slopes = jnp.stack([quadratic.gradient_along(previous, direction) for direction in directions])
    gram = quadratic.gram(directions)
    # Numerators, denominators and the fallback are those of the groups' separate minima.
    alone = merge_coefficient_of(-slopes, jnp.diagonal(gram), task=task, clip=clip)
    together, sound = box_minimum(gram, -slopes, clip=clip)
    usable = sound & ~alone.degenerate & (jnp.asarray(task) > 1)
    raw = jnp.where(usable, together, alone.alpha_raw)
    return alone._replace(
        alpha=jnp.clip(raw, 0, 1) if clip else raw,
        alpha_raw=raw,
        degenerate=alone.degenerate | ((jnp.asarray(task) > 1) & ~sound),
    )


def box_minimum(gram: Array, slopes: Array, *, clip: bool = True) -> tuple[Array, Array]:
    """`argmin_{0 <= a <= 1} 1/2 a^T G a - s^T a`, by coordinate descent with a ridge.

    G is [K, K], of which the symmetric part counts, and s is [K]. The ridge is 1e-6 times the mean
    of the diagonal; a coordinate without curvature stays at 0. Returned are the minimum [K] and
    whether G is positive semi-definite to rounding, without which there is no minimum.

    References:
        Wright, `Coordinate Descent Algorithms <https://arxiv.org/abs/1502.04759>`_, 2015

    Example:
        >>> gram, slopes = jnp.asarray([[1.0, 0.5], [0.5, 1.0]]), jnp.asarray([2.0, 0.75])
        >>> box_minimum(gram, slopes)[0].round(3).tolist()
        [1.0, 0.25]
    """
    gram, slopes = (jnp.asarray(gram) + jnp.asarray(gram).T) / 2, jnp.asarray(slopes)
    finite = jnp.all(jnp.isfinite(gram)) & jnp.all(jnp.isfinite(slopes))
    # An eigendecomposition of NaN is undefined; `sound` already says that there is no minimum.
    gram = jnp.where(finite, gram, 0)
    values = jnp.linalg.eigvalsh(gram)
    # The tolerance of float32: the zero eigenvalues of a singular matrix are rounded too.
    sound = finite & (values[0] >= -1e-5 * jnp.abs(values[-1]))
    curved = jnp.diagonal(gram) > 0
    # The ridge makes the minimum unique where two groups have the same effect.
    gram += 1e-6 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram), dtype=gram.dtype)

    def improve(step: Array, a: Array) -> Array:
        k = step % len(gram)
        descent = slopes[k] - jnp.dot(gram[k], a, precision="highest")
        best = a[k] + descent / jnp.where(curved[k], gram[k, k], 1)
        return a.at[k].set(jnp.where(curved[k], jnp.clip(best, 0, 1) if clip else best, 0))

    return jax.lax.fori_loop(0, SWEEPS * len(gram), improve, jnp.zeros_like(slopes)), sound


def merge_coefficient_of(
    numerator: Array,
    denominator: Array,
    *,
    task: Array | int,
    curvature_error: Array | float = float("nan"),
    clip: bool = True,
) -> MergeCoefficient:
    """The quotient of the closed form, scalar or [G], or 1/t where there is none.

    The arguments and the result are explained at `merge_coefficient` and `MergeCoefficient`.

    Example:
        >>> coefficient = merge_coefficient_of(jnp.asarray(3.0), jnp.asarray(0.0), task=4)
        >>> float(coefficient.alpha), bool(coefficient.degenerate)
        (0.25, True)
    """
    task = jnp.asarray(task)
    first = task <= 1
    solvable = jnp.isfinite(numerator) & jnp.isfinite(denominator)
    # Numbers below the smallest normal one have lost digits, or count as 0 on some devices.
    solvable &= denominator > jnp.finfo(denominator.dtype).tiny
    # Divided by 1 where there is no minimum: XLA computes both sides of the `where` below.
    quotient = numerator / jnp.where(solvable, denominator, 1)
    solvable &= jnp.isfinite(quotient)
    fallback = 1 / jnp.maximum(task, 1).astype(quotient.dtype)
    raw = jnp.where(first, 1.0, jnp.where(solvable, quotient, fallback))
    # The current curvature c is part of both, so that d alpha / d c = (1 - alpha) / denominator.
    error = jnp.abs(1 - raw) / jnp.where(solvable, denominator, 1) * curvature_error
    return MergeCoefficient(
        alpha=jnp.clip(raw, 0, 1) if clip else raw,
        alpha_raw=raw,
        numerator=numerator,
        denominator=denominator,
        standard_error=jnp.where(first, 0.0, jnp.where(solvable, error, jnp.nan)),
        degenerate=~first & ~solvable,
    )


def jackknife_error(left_out: Array) -> Array:
    """Standard error of an estimate, from its K values without one group of the examples.

        sqrt( (K - 1) / K sum_k (a_k - mean a)^2 )

    Args:
        left_out: the estimates a, [K], of groups of about equal size.

    Returns:
        Scalar, whose relative error is about `1 / sqrt(2 (K - 1))`.

    References:
        Efron and Stein, `The Jackknife Estimate of Variance
        <https://doi.org/10.1214/aos/1176345462>`_, 1981

    Example:
        >>> float(jackknife_error(jnp.asarray([1.0, 3.0])))  # of a mean: |x_1 - x_2| / 2
        1.0
    """
    groups = left_out.shape[0]
    return jnp.sqrt((groups - 1) / groups * jnp.sum((left_out - jnp.mean(left_out)) ** 2))


def predicted_loss_change(alpha: Array, current_curvature: Array | float) -> Array:
    """Predicted `L_t(theta_hat_t) - L_t(theta_t*)`, `1/2 (1 - alpha)^2 Delta^T H_t Delta`.

    Args:
        alpha: the coefficient used, scalar.
        current_curvature: `Delta^T H_t Delta` of the current task alone, scalar.

    Returns:
        Scalar, in the units of the loss.

    Example:
        >>> float(predicted_loss_change(0.5, 8.0))
        1.0
    """
    return 0.5 * (1 - alpha) ** 2 * current_curvature
