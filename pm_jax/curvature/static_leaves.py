"""Trees with leaves that are no arrays, such as names, at the border of compiled functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from pm_jax.types import Array, PyTree


def is_array(leaf: Any) -> bool:
    """True for what a compiled function takes as an argument: an array or a number."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OUSMm"
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


@dataclasses.dataclass(frozen=True)
class Frame:
    """All of a tree but its arrays; hashable, so that a compiled function is remembered by it.

    Attributes:
        structure: of the tree.
        others: its leaves that are no arrays, by their number.

    Example:
        >>> arrays, frame = Frame.split({"kernel": 1.0, "name": "dense"})
        >>> arrays, frame.joined([2.0])
        ([1.0], {'kernel': 2.0, 'name': 'dense'})
    """

    structure: Any
    others: tuple[tuple[int, Any], ...]

    @classmethod
    def split(cls, tree: PyTree) -> tuple[list[Array], Frame]:
        """The arrays of a tree in its order, and the rest."""
        leaves, structure = jax.tree.flatten(tree)
        others = tuple((n, leaf) for n, leaf in enumerate(leaves) if not is_array(leaf))
        return [leaf for leaf in leaves if is_array(leaf)], cls(structure, others)

    def joined(self, arrays: list[Array]) -> PyTree:
        """The tree with other arrays."""
        leaves: list[Any] = list(arrays)
        # In ascending order, so that each one finds its place.
        for number, leaf in self.others:
            leaves.insert(number, leaf)
        return jax.tree.unflatten(self.structure, leaves)
