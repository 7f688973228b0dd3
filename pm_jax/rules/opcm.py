"""OPCM: every task vector is kept out of the leading singular space of the merged one."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Parts, Requirements
from pm_jax.rules.building import check_starts, origin_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.matrices import as_matrices, kept_share, matrices, product, singular
from pm_jax.rules.task_arithmetic import task_arithmetic
from pm_jax.types import Array, Params, PyTree, require


class OpcmState(NamedTuple):
    """State of OPCM.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        origin: the pre-trained model `theta_0`.
        total: `lam_t D_t`, the sum of the projected task vectors before any rescaling, float32.
        mean_norm: float32 scalar, mean norm of all task vectors seen.
    """

    tasks: Array
    origin: Params
    total: PyTree
    mean_norm: Array


def opcm(
    *, threshold: float = 0.5, input_axes: int = 0, next_task_from: str = "initial"
) -> MergeRule:
    """Add task vectors that are projected away from what is merged, and keep the sum's length.

    The first model is kept. From the second task on, with `D = theta_hat_{t-1} - theta_0`
    and `tau = theta_t* - theta_0`, every matrix has

        D = U S V^T,   r = first index where cumsum(S) / sum(S) > threshold
        P = U^T tau V,   diag(P) <- 0,   P[:r, :r] <- 0,   tau' = U P V^T

    and every other tensor `tau' = tau`. The whole displacement is then rescaled to the mean norm
    of all task vectors seen:

        theta_hat_t = theta_0 + (lam_{t-1} D + tau') / lam_t
        lam_t = ||lam_{t-1} D + tau'|| / mean_{i<=t} ||theta_i* - theta_0||,   about sqrt(t)

    `lam_t D_t` is the sum of all tau', which is what the state has; its singular vectors are those
    of D. Singular vectors of the value 0 are arbitrary, and nothing is removed along them, where
    the code removes the diagonal entries (ours). Kernels of more than two axes count as matrices
    (inputs) x (outputs), convolutions too, where the code has linear layers only. If lengths
    overflow or are 0, lam_t is sqrt(t).

    Args:
        threshold: share of the singular values' sum in the space that is kept free, in [0, 1).
        input_axes: see `matrices.matrices`.
        next_task_from: "initial", as the models of the paper are trained independently, "merged" or
            "trained".

    Returns:
        A `MergeRule` that needs no evidence. Its alpha is `1 / lam_t`; `figures` has the share of
        the task vector's squared norm that is left of it, `kept_share`.

    Raises:
        ValueError: a setting out of range.
        InvalidInput: when called, the axes of a kernel may divide in several ways.

    References:
        Tang et al., `Merging Models on the Fly Without Retraining: A Sequential Approach to
        Scalable Continual Model Merging <https://arxiv.org/abs/2501.09522>`_, 2025; details as in
        its code

    Example:
        >>> rule, zero = opcm(), jnp.zeros((2, 2))
        >>> state = rule.init(zero)
        >>> for trained in (jnp.diag(jnp.asarray([4.0, 0])), jnp.asarray([[4.0, 0], [3, 0]])):
        ...     merged, state, info = rule.update(state, previous=None, trained=trained)
        >>> (merged / merged[0, 0]).tolist(), round(float(info.figures["kept_share"]), 2)
        ([[1.0, 0.0], [0.75, 0.0]], 0.36)
    """
    require("threshold", threshold, 0 <= threshold < 1, "in [0, 1)")
    require("input_axes", input_axes, input_axes >= 0, "at least 0")
    check_starts(next_task_from)

    def init(params: Params) -> OpcmState:
        origin = origin_of(params)
        # For its errors, before any training.
        matrices(params, input_axes=input_axes)
        total = task_vectors.difference(origin, origin)
        return OpcmState(jnp.zeros((), jnp.int32), origin, total, jnp.zeros(()))

    def projected(total: PyTree, task_vector: PyTree) -> PyTree:
        axes = matrices(task_vector, input_axes=input_axes)
        leaves, structure = jax.tree.flatten(task_vector)
        paths = trees.leaves_by_path(task_vector)
        found = []
        for path, own, tau in zip(paths, jax.tree.leaves(total), leaves, strict=True):
            if path in axes:
                by_matrix = jax.vmap(functools.partial(_projected, threshold))
                earlier, step = (as_matrices(x, axes[path]) for x in (own, tau))
                tau = by_matrix(earlier, step).reshape(tau.shape)
            found.append(tau)
        return jax.tree.unflatten(structure, found)

    def by_tensor(
        state: OpcmState, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, OpcmState, MergeInfo]:
        """Merge without the rescaling, which alone looks at several leaves."""
        del previous, evidence
        task_vector = task_vectors.difference(trained, state.origin)
        added = projected(state.total, task_vector)
        total = jax.tree.map(jnp.add, state.total, added)
        state = state._replace(tasks=state.tasks + 1, total=total)
        merged = task_vectors.apply(state.origin, total)
        return merged, state, MergeInfo.of(1.0)._replace(figures=kept_share(added, task_vector))

    def update(
        state: OpcmState, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, OpcmState, MergeInfo]:
        _, state, info = by_tensor(state, previous=previous, trained=trained, evidence=evidence)
        length = trees.norm(task_vectors.difference(trained, state.origin))
        mean_norm = state.mean_norm + (length - state.mean_norm) / state.tasks
        scale, degenerate = _scale(mean_norm, trees.norm(state.total), state.tasks)
        merged = jax.tree.map(
            # The first model to the bit, without the rounding of a sum.
            lambda moved, own: jnp.where(state.tasks == 1, own, moved),
            task_vectors.apply(state.origin, state.total, scale),
            trained,
        )
        info = MergeInfo.of(scale, degenerate)._replace(figures=info.figures)
        return merged, state._replace(mean_norm=mean_norm), info

    needs = Requirements(
        next_task_from=next_task_from, figures=("kept_share",), reads_previous=False
    )
    parts = Parts(
        matrix=merge_rule(init, by_tensor, needs._replace(scope="tensor")),
        other=task_arithmetic(scale=1.0),
        has_sides=False,
        input_axes=input_axes,
        factor=lambda norms, length: _scale(jnp.mean(norms), length, jnp.asarray(len(norms)))[0],
    )
    return merge_rule(init, update, needs._replace(parts=parts))


def _projected(threshold: float, total: Array, task_vector: Array) -> Array:
    """The part of a task vector [in, out] that OPCM adds to the sum of the earlier ones."""
    u, s, v = singular(total)
    share = jnp.cumsum(s) / jnp.maximum(jnp.sum(s), jnp.finfo(s.dtype).tiny)
    # `r` depends on the data, so that a mask takes the place of a slice.
    leading = jnp.arange(len(s)) < jnp.argmax(share > threshold)
    removed = (leading[:, None] & leading[None, :]) | jnp.eye(len(s), dtype=bool)
    # What is removed and not what is kept: a thin decomposition spans only that.
    inside = jnp.where(removed, product(u.T, task_vector, v), 0)
    return task_vector - product(u, inside, v.T)


def _scale(mean_norm: Array, length: Array, tasks: Array) -> tuple[Array, Array]:
    """`1 / lam_t`, and 1 where lengths give none and sqrt(t) takes its place, else 0."""
    scale = mean_norm / jnp.where(length > 0, length, 1.0)
    sound = jnp.isfinite(scale) & (length > 0)
    scale = jnp.where(sound, scale, 1 / jnp.sqrt(tasks.astype(jnp.float32)))
    return jnp.where(tasks == 1, 1.0, scale), ((tasks > 1) & ~sound).astype(jnp.float32)
