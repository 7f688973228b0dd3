"""Exact selection of the largest or of random entries, without sorting.

The k-th largest value is built bit by bit, from the highest on: 32 counts over the entries, which
reduce leaf by leaf and so keep sharded leaves sharded.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pm_jax.types import Array, Key


@jax.jit
def kth_largest(leaves: Sequence[Array], count: Array | int) -> Array:
    """The k-th largest entry of all leaves, k = `count`; 0 where there are fewer.

    Leaves are float32, not negative, or uint32, where k = 0 gives the greatest uint32.
    """
    # The bits of floats that are not negative are in the order of their values.
    bits = [jax.lax.bitcast_convert_type(leaf, jnp.uint32) for leaf in leaves]

    def step(position, prefix):
        candidate = prefix | (jnp.uint32(1) << (31 - position).astype(jnp.uint32))
        # uint32 counts up to 2^32 entries, where int32 would overflow at 2^31.
        reached = sum(jnp.sum(leaf >= candidate, dtype=jnp.uint32) for leaf in bits)
        return jnp.where(reached >= jnp.asarray(count, jnp.uint32), candidate, prefix)

    largest = jax.lax.fori_loop(0, 32, step, jnp.zeros((), jnp.uint32))
    return jax.lax.bitcast_convert_type(largest, leaves[0].dtype)


@jax.jit
def random_members(key: Key, members: Array, count: Array | int) -> Array:
    """Choose `count` of the members (bool, any shape), every subset with the same probability.

    All are chosen where there are fewer; the count is an int32 scalar, not negative.
    """
    flat = members.ravel()
    # The last bit is set, so that a member's draw is never the 0 of the others.
    draws = jnp.where(flat, jax.random.bits(key, flat.shape, jnp.uint32) | 1, 0)
    threshold = kth_largest([draws], count)
    above, tied = draws > threshold, flat & (draws == threshold)
    missing = jnp.asarray(count, jnp.int32) - jnp.sum(above, dtype=jnp.int32)

    def first(tied):
        return tied & (jnp.cumsum(tied, dtype=jnp.int32) <= missing)

    # Equal draws are rare: the running sum over all entries is skipped unless they are too many.
    too_many = jnp.sum(tied, dtype=jnp.int32) > missing
    tied = jax.lax.cond(too_many, first, lambda tied: tied, tied)
    return (above | tied).reshape(members.shape)
