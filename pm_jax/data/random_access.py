"""Inputs that are read example by example, whenever they are needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pm_jax.types import InvalidInput

LABELS = ("label", "labels", "target", "y")
INPUTS = ("image", "inputs", "input", "tokens", "x")
"""Names of the two parts of an example that is a mapping."""


class SourceInputs:
    """The inputs of a source as an array [N, ...] that is read on demand.

    Attributes:
        shape: of the array.
        dtype: of the array.
    """

    def __init__(self, parts: Sequence[tuple[Any, int]], shape: tuple[int, ...], dtype: np.dtype):
        # The first example of every part, to find the part of a row.
        self._parts = parts
        self._firsts = np.cumsum([0, *(count for _, count in parts)])
        self.shape, self.dtype = (int(self._firsts[-1]), *shape), dtype

    @property
    def nbytes(self) -> int:
        """Number of bytes that the array would take."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Read rows: a slice, or whole numbers of any shape."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        result = np.empty((rows.size, *self.shape[1:]), self.dtype)
        for place, row in zip(result, rows.ravel().tolist(), strict=True):
            part = int(np.searchsorted(self._firsts, row, side="right")) - 1
            source, index = self._parts[part][0], row - int(self._firsts[part])
            # Arrays have a row where sources have an example.
            example = (
                source[index] if isinstance(source, np.ndarray) else example_parts(source[index])[0]
            )
            place[...] = stored_form(np.asarray(example))
        return result.reshape(*rows.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self[:], dtype)


def joined_inputs(parts: Sequence[Any]) -> Any:
    """Lay inputs behind one another, arrays as one array, sources without reading them."""
    if not any(isinstance(part, SourceInputs) for part in parts):
        return np.concatenate(parts)
    pairs = [
        pair
        for part in parts
        for pair in (part._parts if isinstance(part, SourceInputs) else [(part, len(part))])
    ]
    return SourceInputs(pairs, parts[0].shape[1:], np.dtype(parts[0].dtype))


def example_parts(example: Any, name: str = "the source") -> tuple[Any, Any]:
    """Return input and label of an example."""
    if isinstance(example, Mapping):
        label = next((key for key in LABELS if key in example), None)
        others = [key for key in example if key != label]
        chosen = next((key for key in INPUTS if key in others), None)
        if chosen is None and len(others) == 1:
            chosen = others[0]
        if label is None or chosen is None:
            raise InvalidInput(
                f"dataset={name} has the fields {', '.join(map(str, example))}; it needs one of "
                f"{', '.join(LABELS)} and one of {', '.join(INPUTS)}"
            )
        return example[chosen], example[label]
    if isinstance(example, (tuple, list)) and len(example) == 2:
        return example[0], example[1]
    raise InvalidInput(
        f"dataset={name} is a {type(example).__name__}; it must be (input, label) or a mapping"
    )


def stored_form(array: np.ndarray) -> np.ndarray:
    """Return an array in a type that the devices have: 64 bits become 32, bool becomes float32."""
    # uint8 would be taken for grey levels.
    kinds = {"float64": "float32", "int64": "int32", "uint16": "int32", "bool": "float32"}
    if array.dtype.name in ("uint32", "uint64"):
        kinds[array.dtype.name] = "int32"
    return array.astype(kinds[array.dtype.name]) if array.dtype.name in kinds else array
