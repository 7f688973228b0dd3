"""TIES: trim the task vectors, elect signs, and average what agrees with them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import task_vectors
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import origin_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.selection import kth_largest
from pm_jax.types import Params, PyTree, require


class TiesState(NamedTuple):
    """State of TIES: sums and counts of the trimmed task vectors' entries by their sign.

    Attributes:
        origin: the pre-trained model `theta_0`.
        positive: sum of the positive entries, float32.
        negative: sum of the negative entries, float32.
        positive_count: number of the positive entries, uint16.
        negative_count: number of the negative entries, uint16.
    """

    origin: Params
    positive: PyTree
    negative: PyTree
    positive_count: PyTree
    negative_count: PyTree


def ties(*, scale: float = 0.55, keep: float = 0.2, trim: str = "global") -> MergeRule:
    """Merge the large entries of all task vectors that agree in sign.

    Each `tau_i = theta_i* - theta_0` keeps its largest magnitudes, ties with the smallest of them
    included. An entry's sign is that of the sum over tasks; where that is 0, of the sum of all
    elected signs, and negative where that is 0 too. `theta_0` moves by `scale` times the mean of
    the entries that are not zero and have the elected sign. The state does not grow with the tasks,
    and the threshold is exact. Positive and negative entries are summed apart, in float32: where
    they would cancel in exact arithmetic, a residue of one unit in the last place may elect a sign,
    as 0.3 + 0.6 - 0.9 elects the positive one.

    Args:
        scale: coefficient of the merged task vector, above 0.
        keep: share of the entries that is kept, in (0, 1]. Their number is rounded down and one at
            least; a product that misses a whole number by less than 1e-6 counts as it, so that 0.29
            of 100 entries are 29, where floating point has 28.999999999999996.
        trim: "global" for a threshold and a sum of signs over all leaves, "tensor" for one by leaf.

    Returns:
        A `MergeRule` that needs no evidence; the next task starts from the trained model.

    Raises:
        ValueError: a setting out of range.

    References:
        Yadav et al., `TIES-Merging: Resolving Interference When Merging Models
        <https://arxiv.org/abs/2306.01708>`_, NeurIPS 2023; scale and tie rules as in the code of
        MagMax, `arXiv 2407.06322 <https://arxiv.org/abs/2407.06322>`_, which keeps one entry more

    Example:
        >>> rule = ties(scale=1.0, keep=0.5)
        >>> state = rule.init(jnp.zeros(4))
        >>> for trained in ([3.0, 4.0, 1.0, 0.0], [-1.0, 2.0, 0.5, 0.0]):
        ...     merged, state, _ = rule.update(state, previous=None, trained=jnp.asarray(trained))
        >>> merged.tolist()
        [3.0, 3.0, 0.0, 0.0]
    """
    require("scale", scale, scale > 0, "above 0")
    require("keep", keep, 0 < keep <= 1, "in (0, 1]")
    require("trim", trim, trim in ("global", "tensor"), "global or tensor")

    def init(params: Params) -> TiesState:
        origin = origin_of(params)
        # Separate trees for the two sums, because merging donates their buffers.
        sums = [task_vectors.difference(origin, origin) for _ in range(2)]
        # uint16 halves the memory of the counts, and is enough for 65,535 tasks.
        counts = [jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint16), s) for s in sums]
        return TiesState(origin, *sums, *counts)

    def by_group(function: Callable[[list], list], tree: PyTree) -> PyTree:
        """Map lists of the leaves that share a threshold and a balance of signs."""
        leaves, structure = jax.tree.flatten(tree)
        groups = [leaves] if trim == "global" else [[leaf] for leaf in leaves]
        return jax.tree.unflatten(structure, [x for group in groups for x in function(group)])

    def update(
        state: TiesState, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ):
        del previous, evidence
        task_vector = task_vectors.difference(trained, state.origin)
        task_vector = by_group(functools.partial(_trimmed, keep=keep), task_vector)
        state = TiesState(
            state.origin,
            jax.tree.map(lambda s, x: s + jnp.maximum(x, 0), state.positive, task_vector),
            jax.tree.map(lambda s, x: s + jnp.minimum(x, 0), state.negative, task_vector),
            jax.tree.map(lambda c, x: c + (x > 0), state.positive_count, task_vector),
            jax.tree.map(lambda c, x: c + (x < 0), state.negative_count, task_vector),
        )
        elected = by_group(_elected, jax.tree.map(jnp.add, state.positive, state.negative))
        merged = jax.tree.map(_mean_of_elected, elected, *state[1:])
        return task_vectors.apply(state.origin, merged, scale), state, MergeInfo.of(scale)

    scope = "model" if trim == "global" else "tensor"
    needs = Requirements(next_task_from="trained", scope=scope, reads_previous=False)
    return merge_rule(init, update, needs)


def _trimmed(leaves: list, keep: float) -> list:
    """The entries of largest magnitude, zero elsewhere."""
    # The product of a decimal share and a count may miss a whole number from below.
    count = max(1, int(keep * sum(leaf.size for leaf in leaves) + 1e-6))
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) for leaf in leaves]
    threshold = kth_largest(magnitudes, count)
    return [
        jnp.where(magnitude >= threshold, leaf, 0)
        for magnitude, leaf in zip(magnitudes, leaves, strict=True)
    ]


def _elected(totals: list) -> list:
    """True where the elected sign of an entry is positive."""
    balance = sum(jnp.sum(jnp.sign(total), dtype=jnp.int32) for total in totals)
    return [(total > 0) | ((total == 0) & (balance > 0)) for total in totals]


def _mean_of_elected(elected, positive, negative, positive_count, negative_count):
    count = jnp.where(elected, positive_count, negative_count)
    # An entry without any elected value has sum 0 and count 0, and becomes 0 / 1.
    return jnp.where(elected, positive, negative) / jnp.maximum(count, 1).astype(positive.dtype)
