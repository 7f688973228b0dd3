"""PAM: task adapters that are kept in line with a global one while they train."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import lora, task_vectors, trees
from pm_jax.lora import Adapter, Adapters
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Moving, Requirements, TrainingHook
from pm_jax.rules.building import require
from pm_jax.types import Array, Key, Params


class PamState(NamedTuple):
    """State of PAM.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        origin: the pre-trained model `theta_0`, `{path: leaf}`.
        shared: G, `{path: float32 displacement}`, an `Adapter` for an adapted kernel; 0 before the
            first task that moves the model.
    """

    tasks: Array
    origin: dict[str, Array]
    shared: Moving


def pam(*, share: float = 0.5, every: int = 1) -> MergeRule:
    """Average each task's adapter into a global one, entry by entry of the factors.

        while R_t trains: entries of R_t of another sign than G's, where |G| is large, start anew
        G <- (G + R_t) / 2,    theta_t = theta_0 + A_G B_G

    Details that are ours, where the paper's text was not at hand:

    - Every task starts from theta_0 with a fresh R; G enters its training only in this way.
    - Entries start anew every `every` epochs: those of B at 0, those of A at a fresh draw; their
      moments in the optimiser are cleared. `|G|` is large if among the `share` largest of its
      matrix, ties included.
    - G is R for the first task that moves the model.
    - Leaves that train without an adapter go the same way by their displacement from theta_0: they
      start anew at theta_0's value.

    Args:
        share: of each matrix's entries that are kept in line, in (0, 1].
        every: epochs between looks, at least 1.

    Returns:
        A `MergeRule` that needs `adapters`; its `init` takes adapters of the shapes to come too.

    Raises:
        ValueError: a setting out of range.

    References:
        PAM, `arXiv 2506.03189 <https://arxiv.org/abs/2506.03189>`_

    Example:
        >>> rule = pam()
        >>> state, start = rule.init({"w": jnp.zeros(1)}), {"w": jnp.zeros(1)}
        >>> for trained in (2.0, 4.0):
        ...     merged, state, _ = rule.update(
        ...         state, previous=start, trained={"w": jnp.full(1, trained)})
        >>> merged["w"].tolist()
        [3.0]
    """
    require("share", share, 0 < share <= 1, "in (0, 1]")
    require("every", every, every >= 1, "at least 1")

    def init(params: Params, adapters: Adapters | None = None) -> PamState:
        origin = {path: jnp.asarray(x) for path, x in trees.leaves_by_path(params).items()}
        shared: Moving = {**task_vectors.difference(origin, origin), **(adapters or {})}
        return PamState(jnp.zeros((), jnp.int32), origin, jax.tree.map(jnp.zeros_like, shared))

    def update(
        state: PamState, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, PamState, MergeInfo]:
        del previous
        adapters = (evidence.adapters if evidence else None) or {}
        leaves = trees.leaves_by_path(trained)
        own: Moving = {**task_vectors.difference(leaves, state.origin), **adapters}
        # A fresh adapter has an A that is not 0, but its product A B is 0.
        still = [jnp.all(_moved(shared) == 0) for shared in state.shared.values()]
        first = jnp.all(jnp.stack(still))
        shared: Moving = jax.tree.map(
            lambda g, r: jnp.where(first, r, (g + r) / 2), state.shared, own
        )
        merged = {
            path: jnp.where(first, leaves[path], _at(state.origin[path], shared[path]))
            for path in leaves
        }
        info = MergeInfo.of(jnp.where(first, 1.0, 0.5))
        return (
            trees.replace(trained, merged),
            state._replace(tasks=state.tasks + 1, shared=shared),
            info,
        )

    hook = TrainingHook(refresh=functools.partial(_realigned, share), refresh_every=every)
    needs = Requirements(frozenset({"adapters"}), next_task_from="initial", hook=hook)
    return MergeRule(init, update, needs)


def _moved(displacement: Array | Adapter) -> Array:
    """An array that is 0 exactly where the displacement is 0."""
    return displacement.b if isinstance(displacement, Adapter) else displacement


def _at(origin: Array, displacement: Array | Adapter) -> Array:
    if isinstance(displacement, Adapter):
        return lora.fold({"": origin}, {"": displacement})[""]
    return task_vectors.apply(origin, displacement)


def _realigned(share: float, state: PamState, key: Key, moving: Moving) -> tuple[Moving, Moving]:
    """Renew the entries of the wrong sign; returns the leaves and which entries (bool)."""
    keys = trees.leaf_keys(key, dict.fromkeys(moving, 0))
    opposed_to = functools.partial(opposed_entries, share=share)
    moved = dict(moving)
    renewed: Moving = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), moving)
    fresh: Array | Adapter
    for path, own in moving.items():
        shared = state.shared.get(path)
        if isinstance(own, Adapter) and isinstance(shared, Adapter):
            fresh = Adapter(lora.input_factor(keys[path], *own.a.shape), jnp.zeros_like(own.b))
            renewed[path] = Adapter(opposed_to(shared.a, own.a), opposed_to(shared.b, own.b))
        elif not isinstance(own, Adapter) and not isinstance(shared, Adapter | None):
            fresh = state.origin[path]
            renewed[path] = opposed_to(shared, own - state.origin[path])
        else:  # in full, where the tasks to come have an adapter, or not among what merges
            continue
        moved[path] = jax.tree.map(jnp.where, renewed[path], fresh, own)
    return moved, renewed


def opposed_entries(shared: Array, own: Array, share: float = 0.5) -> Array:
    """Entries whose sign differs from that of a large entry of another matrix.

    Args:
        shared: G, any shape.
        own: R, of the same shape.
        share: of G's entries that are large, in (0, 1], ties included.

    Returns:
        bool, true where |G| is large and `G R < 0`.

    Example:
        >>> shared = jnp.asarray([[4.0, -3.0], [1.0, 0.5]])
        >>> opposed_entries(shared, jnp.asarray([[-1.0, -1.0], [-1.0, 1.0]])).tolist()
        [[True, False], [False, False]]
    """
    sizes = jnp.sort(jnp.abs(shared), axis=None)
    smallest = sizes[sizes.size - max(1, round(share * sizes.size))]
    return (jnp.abs(shared) >= smallest) & (shared * own < 0)
