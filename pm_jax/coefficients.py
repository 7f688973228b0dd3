"""The merge coefficient: the minimum of a quadratic along the task vector."""

from typing import NamedTuple

import jax.numpy as jnp

from pm_jax.quadratics import Quadratic
from pm_jax.types import Array, Params, PyTree


class MergeCoefficient(NamedTuple):
    """A merge coefficient and how it came about; float32 scalars.

    Attributes:
        alpha: the coefficient to use, in [0, 1] if clipped.
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
    quadratic: Quadratic,
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

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.1

    Example:
        >>> import jax.numpy as jnp
        >>> from pm_jax.quadratics import DiagonalQuadratic
        >>> old = DiagonalQuadratic.at(jnp.zeros(1), diagonal=jnp.asarray([3.0]))
        >>> new = DiagonalQuadratic.at(jnp.ones(1), diagonal=jnp.asarray([1.0]))
        >>> float(merge_coefficient(old + new, jnp.zeros(1), jnp.ones(1), task=2).alpha)
        0.25
    """
    numerator = -quadratic.gradient_along(previous, task_vector)
    denominator = quadratic.curvature_along(task_vector)
    task = jnp.asarray(task)
    first = task <= 1
    solvable = jnp.isfinite(numerator) & jnp.isfinite(denominator)
    solvable &= denominator > jnp.finfo(denominator.dtype).tiny
    quotient = numerator / jnp.where(solvable, denominator, 1)
    solvable &= jnp.isfinite(quotient)
    fallback = 1 / jnp.maximum(task, 1).astype(quotient.dtype)
    raw = jnp.where(first, 1.0, jnp.where(solvable, quotient, fallback))
    error = jnp.abs(1 - raw) / jnp.where(solvable, denominator, 1) * curvature_error
    return MergeCoefficient(
        alpha=jnp.clip(raw, 0, 1) if clip else raw,
        alpha_raw=raw,
        numerator=numerator,
        denominator=denominator,
        standard_error=jnp.where(first, 0.0, jnp.where(solvable, error, jnp.nan)),
        degenerate=~first & ~solvable,
    )


def predicted_loss_change(alpha: Array, current_curvature: Array) -> Array:
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
