"""Sums over all elements that merge, where the elements come a block at a time.

The elements of a rule such as TIES meet in nothing but sums: counts, norms and inner products. The
rule takes these sums through `over_all`, which returns them as they are where the whole model is at
hand. For a model in files, larger than memory, `pm_jax.offline` calls the rule on block after block
within `in_blocks`: `over_all` raises `Missing` with the block's part of the first sum that is not
known yet. Once the parts of all blocks are added up, the blocks are merged anew with the total.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax.types import PyTree


class Missing(Exception):
    """A sum over all elements is needed and not known.

    Attributes:
        part: the block's part of it, a pytree of arrays, traced where the merge is.
    """

    def __init__(self, part: PyTree):
        super().__init__("a sum over all elements is not known")
        self.part = part


class _Blocks(NamedTuple):
    """What is known of all elements while one block of them merges.

    Attributes:
        size: number of all elements.
        totals: the sums in the order in which the rule asks for them; each is taken once.
    """

    size: int
    totals: Iterator[PyTree]


_blocks: contextvars.ContextVar[_Blocks | None] = contextvars.ContextVar("blocks", default=None)


@contextlib.contextmanager
def in_blocks(size: int, totals: Sequence[PyTree]) -> Iterator[None]:
    """Let a rule merge one block of `size` elements, with the sums over all that are known.

    Example:
        >>> with in_blocks(4, [jnp.asarray(10.0)]):
        ...     float(over_all(jnp.asarray(3.0))), size_of([jnp.ones(2)])
        (10.0, 4)
    """
    token = _blocks.set(_Blocks(size, iter(totals)))
    try:
        yield
    finally:
        _blocks.reset(token)


def in_use() -> bool:
    """True within `in_blocks`.

    Example:
        >>> with in_blocks(4, []):
        ...     in_use()
        True
    """
    return _blocks.get() is not None


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
    blocks = _blocks.get()
    if blocks is None:
        return sums
    total = next(blocks.totals, None)
    if total is None:
        raise Missing(sums)
    return jax.tree.map(lambda part, whole: jnp.asarray(whole, part.dtype), sums, total)


def size_of(leaves: Sequence[jax.Array]) -> int:
    """Number of elements of the leaves, or of all that merge where the leaves are a block.

    Example:
        >>> size_of([jnp.ones((2, 3)), jnp.ones(1)])
        7
    """
    blocks = _blocks.get()
    return sum(leaf.size for leaf in leaves) if blocks is None else blocks.size
