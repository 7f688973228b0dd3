"""Tunable MAGMAX: MagMax with a chosen share of entries for every task."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import task_vectors, trees
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import key_of, origin_of, stacked_zeros
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.selection import random_members
from pm_jax.types import Array, Key, Params, PyTree, require


class TunableMagmaxState(NamedTuple):
    """State of Tunable MAGMAX: every task vector, unlike MagMax, which keeps one.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        origin: the pre-trained model `theta_0`.
        task_vectors: float32 leaves [max_tasks, ...]; 0 for tasks to come.
    """

    tasks: Array
    origin: Params
    task_vectors: PyTree


def tunable_magmax(
    *, scale: float = 0.5, preference: tuple[float, ...] = (), max_tasks: int = 10
) -> MergeRule:
    """Give every task its share of the entries, and keep to large magnitudes within it.

    In every leaf, task i has exactly the number of entries that its weight gives it (`quotas`), and
    `assigned` chooses which. `theta_0` moves by `scale` times the entries of the task vectors
    `tau_i = theta_i* - theta_0` chosen so. The state keeps all task vectors: `max_tasks` times the
    memory of the model.

    Args:
        scale: coefficient of the merged task vector, above 0.
        preference: `max_tasks` weights, not negative, of sum 1; empty for equal ones. Before the
            last task, the weights of the tasks seen are scaled to sum 1, or equal where they are
            all 0. `pm_jax.rules.preferences` computes weights from target data.
        max_tasks: number of tasks of the stream; after more, the merged model is NaN.

    Returns:
        A `MergeRule` that needs `key`; the next task starts from the trained model.

    Raises:
        ValueError: a setting out of range.

    References:
        Tunable MAGMAX, `arXiv 2605.20803 <https://arxiv.org/abs/2605.20803>`_; ties of magnitude go
        to the later task as in MagMax, which its code leaves open

    Example:
        >>> rule = tunable_magmax(scale=1.0, preference=(0.75, 0.25), max_tasks=2)
        >>> state, evidence = rule.init(jnp.zeros(4)), Evidence(key=jax.random.key(0))
        >>> for trained in (jnp.full(4, 1.0), jnp.full(4, 2.0)):
        ...     merged, state, _ = rule.update(
        ...         state, previous=None, trained=trained, evidence=evidence)
        >>> sorted(merged.tolist())
        [1.0, 1.0, 1.0, 2.0]
    """
    require("scale", scale, scale > 0, "above 0")
    require("max_tasks", max_tasks, max_tasks >= 1, "at least 1")
    weights = _weights_by_task(preference, max_tasks)

    def init(params: Params) -> TunableMagmaxState:
        origin = origin_of(params)
        room = stacked_zeros(task_vectors.difference(origin, origin), max_tasks)
        return TunableMagmaxState(jnp.zeros((), jnp.int32), origin, room)

    def update(state: TunableMagmaxState, *, previous: Params, trained: Params, evidence: Evidence):
        del previous
        tasks = state.tasks + 1
        task_vector = task_vectors.difference(trained, state.origin)
        every = jax.tree.map(lambda s, x: s.at[tasks - 1].set(x), state.task_vectors, task_vector)

        def leaf(key, stacked):
            # One row for each number of tasks seen, which is traced, by NumPy in float64.
            table = np.stack([quotas(stacked[0].size, row) for row in weights])
            owners = assigned(key, stacked, jnp.asarray(table, jnp.int32)[tasks - 1])
            return _entries_of(stacked, owners)

        chosen = _map_by_shape(leaf, trees.leaf_keys(key_of(evidence), task_vector), every)
        # A traced count cannot raise.
        factor = jnp.where(tasks <= max_tasks, scale, jnp.nan)
        merged = task_vectors.apply(state.origin, chosen, factor)
        return merged, TunableMagmaxState(tasks, state.origin, every), MergeInfo.of(factor)

    needs = Requirements(
        frozenset({"key"}),
        next_task_from="trained",
        scope="tensor",
        keeps_tasks=True,
        reads_previous=False,
    )
    return merge_rule(init, update, needs)


def _map_by_shape(function: Callable[..., Array], keys: PyTree, tree: PyTree) -> PyTree:
    """Map `function(key, leaf)` over a tree, compiled once for each shape."""
    # A transformer has a hundred leaves of a dozen shapes, and the function compiles for seconds.
    leaves, structure = jax.tree.flatten(tree)
    alike: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        alike.setdefault((leaf.shape, leaf.dtype), []).append(number)
    leaf_keys, by_number = jax.tree.leaves(keys), dict[int, Array]()
    for group in alike.values():
        # `switch` picks a leaf where it lies; stacking them would copy all of them.
        picks = [functools.partial(lambda n: (leaf_keys[n], leaves[n]), number) for number in group]
        results = jax.lax.map(
            lambda place, picks=picks: function(*jax.lax.switch(place, picks)),
            jnp.arange(len(group)),
        )
        by_number.update(zip(group, results, strict=True))
    return jax.tree.unflatten(structure, [by_number[number] for number in range(len(leaves))])


def _weights_by_task(preference: tuple[float, ...], max_tasks: int) -> np.ndarray:
    """Weights after each number of tasks, float64 [max_tasks, max_tasks], rows of sum 1."""
    given = np.asarray(preference or (1.0,) * max_tasks, np.float64)
    written = ":".join(f"{weight:g}" for weight in given)
    if len(given) != max_tasks:
        raise ValueError(f"preference={written}: must be {max_tasks} weights, one for each task")
    if preference and not (given.min() >= 0 and abs(given.sum() - 1) <= 1e-6):
        raise ValueError(f"preference={written}: must be at least 0 and sum to 1")
    seen = np.tril(np.ones((max_tasks, max_tasks)))
    rows = seen * given
    # Weights of 0 for all tasks seen cannot be scaled to sum 1: equal ones take their place.
    rows = np.where(rows.sum(axis=1, keepdims=True) > 0, rows, seen)
    return rows / rows.sum(axis=1, keepdims=True)


def quotas(size: int, weights: np.ndarray) -> np.ndarray:
    """Shares of `size` entries by T weights of sum 1: int64 [T] of sum `size`.

    Shares are rounded down, and the first tasks get one more until all entries are given away.

    Example:
        >>> quotas(8, np.asarray([1 / 3, 1 / 3, 1 / 3])).tolist()
        [3, 3, 2]
    """
    # float64, because float32 cannot count above 2^24; 1e-6, because 49 * (1/49) is below 1.
    counts = np.floor(size * np.asarray(weights, np.float64) + 1e-6).astype(np.int64)
    counts[: size - counts.sum()] += 1
    return counts


@jax.jit
def assigned(key: Key, stacked: Array, quotas: Array) -> Array:
    """Assign every entry of a leaf to a task: as many as its quota, large magnitudes first.

    1. An entry goes to the task with the largest magnitude, the later one of equals. A task with
       quota 0 takes no part.
    2. From the last task to the second: entries beyond the quota, chosen at random, go to the task
       with the largest magnitude among the earlier ones.
    3. Entries of the first task beyond its quota, chosen at random, go to the tasks below theirs:
       first, from the last task on, where a task has the largest magnitude of all but the first
       task; then at random.

    Task vectors are float [T, ...], quotas int32 [T] whose sum is the number of entries; the result
    is int32 [...], the task of every entry, from 0.
    """
    count, numbers, entitled = len(quotas), jnp.arange(len(quotas)), quotas > 0

    def from_last(position: Array) -> Array:
        return count - 1 - position

    def beyond(owners: Array, task: Array | int) -> Array:
        return jnp.sum(owners == task, dtype=jnp.int32) - quotas[task]

    def chosen(number: Array | int, members: Array, size: Array) -> Array:
        """Choose at random, and skip the drawing where there is nothing to choose."""
        draw = functools.partial(random_members, jax.random.fold_in(key, number), members)
        return jax.lax.cond(size > 0, draw, lambda _: jnp.zeros_like(members), size)

    def pass_on(position: Array, owners: Array) -> Array:
        task = from_last(position)
        moved = chosen(task, owners == task, beyond(owners, task))
        return jnp.where(moved, _largest(stacked, entitled & (numbers < task)), owners)

    owners = _largest(stacked, entitled)
    owners = jax.lax.fori_loop(0, count - 1, pass_on, owners)
    nobody = -1  # owns the entries that wait for a task below its quota
    owners = jnp.where(chosen(count, owners == 0, beyond(owners, 0)), nobody, owners)
    rivals = _largest(stacked, entitled & (numbers > 0))

    def fill(position: Array, owners: Array) -> Array:
        """Fill a task up to its quota; the second half of the positions is the second round."""
        task, preferred = from_last(position % (count - 1)), position < count - 1
        free = (owners == nobody) & (~preferred | (rivals == task))
        return jnp.where(chosen(count + 1 + position, free, -beyond(owners, task)), task, owners)

    return jax.lax.fori_loop(0, 2 * (count - 1), fill, owners)


def _largest(stacked: Array, allowed: Array) -> Array:
    """The allowed task of largest magnitude, the later one of equals; 0 where none is allowed."""

    def later(task, best):
        magnitude, owners = best
        candidate = jnp.abs(stacked[task])
        # At least, not above: of equal magnitudes the later task wins.
        wins = allowed[task] & (candidate >= magnitude)
        return jnp.where(wins, candidate, magnitude), jnp.where(wins, task, owners)

    # Below any magnitude, so that an allowed task wins over none.
    start = (jnp.full_like(stacked[0], -1.0), jnp.zeros(stacked.shape[1:], jnp.int32))
    return jax.lax.fori_loop(0, len(stacked), later, start)[1]


@jax.jit
def _entries_of(stacked: Array, owners: Array) -> Array:
    """Pick every entry [...] from the task that owns it."""

    def take(task, entries):
        return jnp.where(owners == task, stacked[task], entries)

    return jax.lax.fori_loop(0, len(stacked), take, jnp.zeros_like(stacked[0]))
