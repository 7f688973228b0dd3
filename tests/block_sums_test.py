"""Sums over all elements of models that come in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import block_sums
from pm_jax.rules.selection import kth_largest


def by_blocks(function, blocks):
    """A function of all blocks together, of which each call sees one."""
    size, totals = sum(block.size for block in blocks), []
    while True:
        try:
            with block_sums.in_blocks(totals):
                return function(blocks[0])
        except block_sums.Missing as missing:
            if missing.of_size:
                totals.append(missing.of_size(size))
                continue
            parts = []
            for block in blocks:
                with block_sums.in_blocks(totals), pytest.raises(block_sums.Missing) as found:
                    function(block)
                parts.append(found.value.part)
            totals.append(jax.tree.map(lambda *x: sum(x[1:], start=x[0]), *parts))


@pytest.mark.parametrize("values", ["normal", "of few values", "zero", "tiny"])
def test_the_kth_largest_of_blocks_is_that_of_a_sort(values):
    rng = np.random.default_rng(0)
    drawn = abs(rng.normal(size=3000)).astype(np.float32)
    if values != "normal":
        drawn = {"of few values": drawn.round(1), "zero": 0 * drawn, "tiny": drawn * 1e-38}[values]
    blocks = [jnp.asarray(block) for block in drawn.reshape(3, 1000)]
    for count in (1, 2, 300, 2999, 3000):
        found = by_blocks(lambda block, count=count: kth_largest([block], count), blocks)
        assert float(found) == float(np.sort(drawn)[-count])


@pytest.mark.parametrize(("count", "wanted"), [(2_500_000_000, 0.25), (2_000_000_000, 0.5)])
def test_models_of_more_entries_than_uint32_counts(count, wanted):
    """As many as a language model has: 2e9 entries of 0.5, 2e9 of 0.25 and 1e9 of 0.125."""
    values = np.asarray([0.5, 0.25, 0.125], np.float32)
    high = np.zeros(1 << 16, np.uint32)
    high[values.view(np.uint32) >> 16] = [2_000_000_000, 2_000_000_000, 1_000_000_000]
    low = np.zeros(1 << 16, np.uint32)
    low[0] = 2_000_000_000
    with block_sums.in_blocks([high, low]):
        assert float(kth_largest([jnp.asarray(values)], count)) == wanted


def test_sums_keep_their_order_and_the_type_of_the_part():
    def function(block):
        first = block_sums.over_all({"sum": jnp.sum(block)})["sum"]
        second = block_sums.over_all(jnp.sum(block / first))
        return first, second, block_sums.of_size(lambda size: size, [block])

    blocks = [jnp.asarray([1.0, 3.0]), jnp.asarray([4.0])]
    first, second, size = by_blocks(function, blocks)
    assert (float(first), float(second), int(size)) == (8.0, 1.0, 3)
    assert (first.dtype, size.dtype) == (jnp.float32, jnp.uint32)


def test_a_whole_model_is_a_block_of_its_own():
    assert not block_sums.in_use()
    leaves = [jnp.ones((2, 3)), jnp.ones(1)]
    assert block_sums.over_all(3) == 3 and block_sums.of_size(lambda size: size, leaves) == 7
