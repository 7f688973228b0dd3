"""Sums over all elements that merge, where the elements come a block at a time.

The elements of a rule such as TIES meet in nothing but sums: counts, norms and inner products. The
rule takes these sums through `over_all`, which returns them as they are where the whole model is at
hand. For a model in files, larger than memory, `pm_jax.offline` calls the rule on block after block
within `in_blocks`: `over_all` raises `Missing` with the block's part of the first sum that is not
known yet. Once the parts of all blocks are added up, the blocks are merged anew with the total.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pm_jax.types import PyTree


class Missing(Exception):
    """Something about all elements is needed and not known.

    Attributes:
        part: the block's part of a sum, a pytree of arrays, traced where the merge is; `None` where
            it is no sum.
        of_size: otherwise the function that makes it of the number of all elements.
    """

    def __init__(self, part: PyTree, of_size: Callable[[int], int] | None = None):
        super().__init__("a sum over all elements is not known")
        self.part, self.of_size = part, of_size


_totals: contextvars.ContextVar[Iterator[PyTree] | None] = contextvars.ContextVar(
    "totals", default=None
)
"""The totals that are known while one block merges, in the order in which its rule asks."""


@contextlib.contextmanager
def in_blocks(totals: Sequence[PyTree]) -> Iterator[None]:
    """Let a rule merge one block of elements, with what is known of all of them.

    Example:
        >>> with in_blocks([jnp.asarray(10.0)]):
        ...     float(over_all(jnp.asarray(3.0)))
        10.0
    """
    token = _totals.set(iter(totals))
    try:
        yield
    finally:
        _totals.reset(token)


def in_use() -> bool:
    """True within `in_blocks`.

    Example:
        >>> with in_blocks([]):
        ...     in_use()
        True
    """
    return _totals.get() is not None


def over_all(sums: Any) -> Any:
    """Sums over the elements at hand, a pytree of arrays, as sums over all elements that merge.

    Must not be called in a function that `jax.jit` or `jax.lax` traces within the merge: `Missing`
    would carry its tracers out, and a trace that is kept would not know of the blocks.

    Raises:
        Missing: the elements are a block, and the total is not known.

    Example:
        >>> float(over_all(jnp.asarray(3.0)))  # the whole model is at hand
        3.0
    """
    totals = _totals.get()
    if totals is None:
        return sums
    total = next(totals, None)
    if total is None:
        raise Missing(sums)
    return jax.tree.map(lambda part, whole: jnp.asarray(whole, part.dtype), sums, total)


def of_size(function: Callable[[int], int], leaves: Sequence[jax.Array]) -> jax.Array | int:
    """The whole number below 2^32 that a function makes of the number of elements that merge.

    It is an int where the leaves are all of them, and a uint32 scalar where they are a block.

    Raises:
        Missing: the elements are a block, and the number is not known.

    Example:
        >>> of_size(lambda size: size // 2, [jnp.ones((2, 3)), jnp.ones(2)])
        4
    """
    totals = _totals.get()
    if totals is None:
        return function(sum(leaf.size for leaf in leaves))
    number = next(totals, None)
    if number is None:
        raise Missing(None, function)
    return jnp.asarray(number, jnp.uint32)
