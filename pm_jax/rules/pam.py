"""PAM: task adapters that are kept in line with a global one while they train."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import lora, task_vectors, trees
from pm_jax.lora import Adapter, Adapters
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Moving, Requirements, TrainingHook
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Array, Key, Params, require


class PamState(NamedTuple):
    """State of PAM.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        origin: the pre-trained model `theta_0`, `{path: leaf}`.
        shared: G, `{path: float32 displacement}`, an `Adapter` for an adapted kernel; 0 at first.
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
    - Entries start anew every `every` epochs: B's at 0, A's at a fresh draw, both with cleared
      moments in the optimiser. `|G|` is large if among the `share` largest of its matrix, ties
      included.
    - G is R for the first task that moves the model.
    - For leaves that train without an adapter R is the displacement from theta_0, and an entry
      starts anew at theta_0's value.

    Args:
        share: share of each matrix's entries that count as large, in (0, 1].
        every: epochs between renewals, at least 1.

    Returns:
        A `MergeRule` that needs `adapters`; its `init` also takes adapters, for their shapes.

    Raises:
        ValueError: a setting out of range.

    References:
        PAM, `arXiv 2506.03189 <https://arxiv.org/abs/2506.03189>`_

    Example:
        >>> rule = pam()
        >>> state, start = rule.init({"w": jnp.zeros(1)}), {"w": jnp.zeros(1)}
        >>> for trained in ({"w": jnp.full(1, 2.0)}, {"w": jnp.full(1, 4.0)}):
        ...     merged, state, _ = rule.update(state, previous=start, trained=trained)
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
        displacements: Moving = {**task_vectors.difference(leaves, state.origin), **adapters}
        # A fresh adapter has an A that is not 0; its product A B is 0 because B is.
        still = [
            jnp.all((g.b if isinstance(g, Adapter) else g) == 0) for g in state.shared.values()
        ]
        first = jnp.all(jnp.stack(still))
        shared: Moving = jax.tree.map(
            lambda g, r: jnp.where(first, r, (g + r) / 2), state.shared, displacements
        )
        # At first the trained model itself, without the rounding of a sum.
        merged = {
            path: jnp.where(first, leaves[path], _at(state.origin[path], shared[path]))
            for path in leaves
        }
        info = MergeInfo.of(jnp.where(first, 1.0, 0.5))
        state = state._replace(tasks=state.tasks + 1, shared=shared)
        return trees.replace(trained, merged), state, info

    hook = TrainingHook(refresh=functools.partial(_realigned, share), refresh_every=every)
    needs = Requirements(
        frozenset({"adapters"}), next_task_from="initial", hook=hook, reads_previous=False
    )
    return merge_rule(init, update, needs)


def _at(origin: Array, displacement: Array | Adapter) -> Array:
    if isinstance(displacement, Adapter):
        return lora.fold({"": origin}, {"": displacement})[""]
    return task_vectors.apply(origin, displacement)


def _realigned(share: float, state: PamState, key: Key, moving: Moving) -> tuple[Moving, Moving]:
    """Renew the entries of the wrong sign; returns the leaves and which entries (bool)."""
    # One leaf for each path: an adapter is two leaves, but draws one A.
    keys = trees.leaf_keys(key, dict.fromkeys(moving, 0))
    opposed_to = functools.partial(opposed_entries, share=share)
    moved = dict(moving)
    # The caller clears the optimiser's moments where this is true: they point the old way.
    renewed: Moving = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), moving)
    fresh: Array | Adapter
    for path, leaf in moving.items():
        shared = state.shared.get(path)
        if isinstance(leaf, Adapter) and isinstance(shared, Adapter):
            axes = lora.axes_of_adapter(path, leaf, state.origin[path].shape)
            rows = math.prod(axes.split(leaf.a.shape)[1])
            a = lora.input_factor(keys[path], leaf.a.shape, rows)
            fresh = Adapter(a, jnp.zeros_like(leaf.b))
            renewed[path] = Adapter(opposed_to(shared.a, leaf.a), opposed_to(shared.b, leaf.b))
        elif not isinstance(leaf, Adapter) and not isinstance(shared, Adapter | None):
            fresh = state.origin[path]
            renewed[path] = opposed_to(shared, leaf - state.origin[path])
        else:  # a leaf that does not merge, or trains in full now and with an adapter later
            continue
        moved[path] = jax.tree.map(jnp.where, renewed[path], fresh, leaf)
    return moved, renewed


def opposed_entries(shared: Array, task: Array, share: float = 0.5) -> Array:
    """True where |G| is among its `share` largest entries, ties included, and `G R < 0`.

    G is the shared matrix and R the task's, of any but the same shape.
    """
    sizes = jnp.sort(jnp.abs(shared), axis=None)
    smallest = sizes[sizes.size - max(1, round(share * sizes.size))]
    # Before the first task G is 0 and all tie, but nothing has another sign than 0.
    return (jnp.abs(shared) >= smallest) & (shared * task < 0)
