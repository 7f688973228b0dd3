"""Exact selection of the largest or of random entries, without sorting.

The k-th largest value is built bit by bit, from the highest on: 32 counts over the entries, which
reduce leaf by leaf and so keep sharded leaves sharded. In a model that comes in blocks each count
is a pass over the files, so two histograms, of the high and of the low 16 bits, take their place.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pm_jax import block_sums
from pm_jax.types import Array, Key


def kth_largest(leaves: Sequence[Array], count: Array | int) -> Array:
    """The k-th largest entry of all leaves, k = `count`; 0 where there are fewer.

    Leaves are float32, not negative, or uint32, where k = 0 gives the greatest uint32.
    """
    if block_sums.in_use():
        return _kth_largest_of_blocks(leaves, count)
    return _kth_largest(leaves, count)


@jax.jit
def _kth_largest(leaves: Sequence[Array], count: Array | int) -> Array:
    bits = _bits(leaves)

    def step(position, prefix):
        candidate = prefix | (jnp.uint32(1) << (31 - position).astype(jnp.uint32))
        # uint32 counts up to 2^32 entries, where int32 would overflow at 2^31.
        reached = sum(jnp.sum(leaf >= candidate, dtype=jnp.uint32) for leaf in bits)
        return jnp.where(reached >= jnp.asarray(count, jnp.uint32), candidate, prefix)

    largest = jax.lax.fori_loop(0, 32, step, jnp.zeros((), jnp.uint32))
    return jax.lax.bitcast_convert_type(largest, leaves[0].dtype)


def _kth_largest_of_blocks(leaves: Sequence[Array], count: Array | int) -> Array:
    """The k-th largest entry of a model that comes in blocks and has at least k entries."""
    bits = jnp.concatenate([leaf.ravel() for leaf in _bits(leaves)])
    rest, prefix = jnp.asarray(count, jnp.uint32), jnp.zeros((), jnp.uint32)
    counted = jnp.ones(bits.shape, jnp.uint32)
    for shift in (16, 0):
        half = (bits >> shift) & 0xFFFF
        counts = block_sums.over_all(jnp.zeros(1 << 16, jnp.uint32).at[half].add(counted))
        # Byte by byte, as the running sum of all counts would take longer than the counting.
        by_byte = counts.reshape(1 << 8, 1 << 8)
        high, rest = _reached(jax.lax.reduce(by_byte, jnp.uint32(0), _capped_sum, (1,)), rest)
        low, rest = _reached(by_byte[high], rest)
        chosen = (high << 8) | low
        prefix = prefix | (chosen << shift)
        counted = (half == chosen).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(prefix, leaves[0].dtype)


def _reached(counts: Array, rest: Array) -> tuple[Array, Array]:
    """The last place with `rest` or more counted from it on, and how many of these lie in it."""
    from_here = jax.lax.associative_scan(_capped_sum, counts, reverse=True)
    place = jnp.sum(from_here >= rest, dtype=jnp.uint32) - 1
    beyond = jnp.append(from_here[1:], jnp.uint32(0))
    return place, rest - beyond[place]


def _capped_sum(first: Array, second: Array) -> Array:
    """The sum, or the greatest uint32: a model in files may have more than 2^32 entries."""
    total = first + second
    return jnp.where(total < first, jnp.uint32(0xFFFFFFFF), total)


def _bits(leaves: Sequence[Array]) -> list[Array]:
    # The bits of floats that are not negative are in the order of their values.
    return [jax.lax.bitcast_convert_type(leaf, jnp.uint32) for leaf in leaves]


@jax.jit
def random_members(key: Key, members: Array, count: Array | int) -> Array:
    """Choose `count` of the members (bool, any shape), every subset with the same probability.

    All are chosen where there are fewer; the count is an int32 scalar, not negative.
    """
    flat = members.ravel()
    # The last bit is set, so that a member's draw is never the 0 of the others.
    draws = jnp.where(flat, jax.random.bits(key, flat.shape, jnp.uint32) | 1, 0)
    threshold = _kth_largest([draws], count)
    above, tied = draws > threshold, flat & (draws == threshold)
    missing = jnp.asarray(count, jnp.int32) - jnp.sum(above, dtype=jnp.int32)

    def first(tied):
        return tied & (jnp.cumsum(tied, dtype=jnp.int32) <= missing)

    # Equal draws are rare: the running sum over all entries is skipped unless they are too many.
    too_many = jnp.sum(tied, dtype=jnp.int32) > missing
    tied = jax.lax.cond(too_many, first, lambda tied: tied, tied)
    return (above | tied).reshape(members.shape)
