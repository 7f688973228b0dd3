"""Exact selection of the largest or of random entries, without sorting.

The k-th largest value is found bit by bit, from the highest on: 32 counts over the entries, which
reduce leaf by leaf and so keep sharded leaves sharded.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pm_jax.types import Array, Key


@jax.jit
def kth_largest(leaves: Sequence[Array], count: Array | int) -> Array:
    """The value that exactly `count` entries reach, if no two are equal there.

    Args:
        leaves: float32, not negative, or uint32; less than 2^32 entries in all.
        count: k, from 1 on; for uint32 from 0 on.

    Returns:
        Scalar of the leaves' type: the k-th largest entry, 0 where there are fewer, and the
        greatest uint32 for k = 0.

    Example:
        >>> float(kth_largest([jnp.asarray([3.0, 0.5]), jnp.asarray([2.0])], 2))
        2.0
    """
    # The bits of floats that are not negative are in the order of their values.
    bits = [jax.lax.bitcast_convert_type(leaf, jnp.uint32) for leaf in leaves]

    def step(position, found):
        candidate = found | (jnp.uint32(1) << (31 - position).astype(jnp.uint32))
        reached = sum(jnp.sum(leaf >= candidate, dtype=jnp.uint32) for leaf in bits)
        return jnp.where(reached >= jnp.asarray(count, jnp.uint32), candidate, found)

    found = jax.lax.fori_loop(0, 32, step, jnp.zeros((), jnp.uint32))
    return jax.lax.bitcast_convert_type(found, leaves[0].dtype)


@jax.jit
def random_members(key: Key, members: Array, count: Array | int) -> Array:
    """Choose a number of members, every subset with the same probability.

    Args:
        key: PRNG key.
        members: bool, any shape.
        count: how many, int32 scalar, not negative; all where there are fewer.

    Returns:
        bool of the same shape.

    Example:
        >>> members = jnp.asarray([True, False, True, True])
        >>> chosen = random_members(jax.random.key(0), members, 2)
        >>> int(chosen.sum()), bool(chosen[1])
        (2, False)
    """
    flat = members.ravel()
    draws = jnp.where(flat, jax.random.bits(key, flat.shape, jnp.uint32) | 1, 0)
    threshold = kth_largest([draws], count)
    above, tied = draws > threshold, flat & (draws == threshold)
    missing = jnp.asarray(count, jnp.int32) - jnp.sum(above, dtype=jnp.int32)

    def first(tied):
        return tied & (jnp.cumsum(tied, dtype=jnp.int32) <= missing)

    # Equal draws are rare; of them the first.
    too_many = jnp.sum(tied, dtype=jnp.int32) > missing
    tied = jax.lax.cond(too_many, first, lambda tied: tied, tied)
    return (above | tied).reshape(members.shape)
