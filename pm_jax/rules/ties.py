"""TIES: trim the task vectors, elect signs, and average what agrees with them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import block_sums, task_vectors
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import origin_of, weight_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.selection import kth_largest
from pm_jax.types import Array, Params, PyTree, require


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


class WeightedTiesState(NamedTuple):
    """State of TIES with weights.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        sums: the sums of the weighted task vectors; its counts are sums of weights, float32.
    """

    tasks: Array
    sums: TiesState

    @property
    def origin(self) -> Params:
        """The pre-trained model."""
        return self.sums.origin


def ties(
    *,
    scale: float = 0.55,
    keep: float = 0.2,
    trim: str = "global",
    model_weights: tuple[float, ...] = (),
) -> MergeRule:
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
        model_weights: one weight for each task, none below 0, by which its trimmed task vector is
            multiplied before signs are elected, and counted in the mean; empty for ones.

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

    if model_weights:
        shown = ":".join(f"{weight:g}" for weight in model_weights)
        holds = min(model_weights) >= 0 and max(model_weights) > 0
        require("model_weights", shown, holds, "at least 0, and one of them above")

    def init(params: Params) -> TiesState | WeightedTiesState:
        origin = origin_of(params)
        # Separate trees for the two sums, because merging donates their buffers.
        sums = [task_vectors.difference(origin, origin) for _ in range(2)]
        # uint16 halves the memory of the counts, and is enough for 65,535 tasks.
        kind = jnp.float32 if model_weights else jnp.uint16
        counts = [jax.tree.map(lambda x: jnp.zeros(x.shape, kind), s) for s in sums]
        state = TiesState(origin, *sums, *counts)
        return WeightedTiesState(jnp.zeros((), jnp.int32), state) if model_weights else state

    def by_group(function: Callable[[list], list], tree: PyTree) -> PyTree:
        """Map lists of the leaves that share a threshold and a balance of signs."""
        leaves, structure = jax.tree.flatten(tree)
        groups = [leaves] if trim == "global" else [[leaf] for leaf in leaves]
        return jax.tree.unflatten(structure, [x for group in groups for x in function(group)])

    def add(state: TiesState, trained: Params, weight: Array | None) -> TiesState:
        """Add the trimmed task vector of a model to the sums."""
        task_vector = task_vectors.difference(trained, state.origin)
        task_vector = by_group(functools.partial(_trimmed, keep=keep), task_vector)

        def weighted(leaf: Array) -> Array:
            return leaf if weight is None else leaf * weight.astype(leaf.dtype)

        def counted(count: Array, entries: Array) -> Array:
            return (
                count + entries if weight is None else count + entries * weight.astype(count.dtype)
            )

        task_vector = jax.tree.map(weighted, task_vector)
        return TiesState(
            state.origin,
            jax.tree.map(lambda s, x: s + jnp.maximum(x, 0), state.positive, task_vector),
            jax.tree.map(lambda s, x: s + jnp.minimum(x, 0), state.negative, task_vector),
            jax.tree.map(lambda c, x: counted(c, x > 0), state.positive_count, task_vector),
            jax.tree.map(lambda c, x: counted(c, x < 0), state.negative_count, task_vector),
        )

    def update(
        state: TiesState | WeightedTiesState,
        *,
        previous: Params,
        trained: Params,
        evidence: Evidence | None = None,
    ):
        del previous, evidence
        if isinstance(state, WeightedTiesState):
            tasks = state.tasks + 1
            sums = add(state.sums, trained, weight_of(model_weights, tasks))
            state = WeightedTiesState(tasks, sums)
        else:
            state = sums = add(state, trained, None)
        elected = by_group(_elected, jax.tree.map(jnp.add, sums.positive, sums.negative))
        merged = jax.tree.map(_mean_of_elected, elected, *sums[1:])
        return task_vectors.apply(sums.origin, merged, scale), state, MergeInfo.of(scale)

    scope = "model" if trim == "global" else "tensor"
    needs = Requirements(
        next_task_from="trained", scope=scope, meets_in_sums=True, reads_previous=False
    )
    return merge_rule(init, update, needs)


def _trimmed(leaves: list, keep: float) -> list:
    """The entries of largest magnitude, zero elsewhere."""
    count = block_sums.of_size(functools.partial(_kept_count, keep), leaves)
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) for leaf in leaves]
    threshold = kth_largest(magnitudes, count)
    return [
        jnp.where(magnitude >= threshold, leaf, 0)
        for magnitude, leaf in zip(magnitudes, leaves, strict=True)
    ]


def _kept_count(keep: float, size: int) -> int:
    """The number of entries in a share of them."""
    # The product of a decimal share and a count may miss a whole number from below.
    count = max(1, int(keep * size + 1e-6))
    require("keep", keep, count < 2**32, "such that fewer than 2^32 entries are kept")
    return count


def _elected(totals: list) -> list:
    """True where the elected sign of an entry is positive."""
    balance = block_sums.over_all(
        sum(jnp.sum(jnp.sign(total), dtype=jnp.int32) for total in totals)
    )
    return [(total > 0) | ((total == 0) & (balance > 0)) for total in totals]


def _mean_of_elected(elected, positive, negative, positive_count, negative_count):
    count = jnp.where(elected, positive_count, negative_count)
    # An entry without any elected value has sum 0 and count 0, and becomes 0 / 1.
    count = jnp.where(count > 0, count, 1)
    return jnp.where(elected, positive, negative) / count.astype(positive.dtype)
