"""Which tensors of a file are matrices, and on which of their sides the inputs are.

A file does not say so, but names do: Flax calls the weights of a layer `kernel` and stores them as
[*inputs, *outputs], PyTorch calls them `weight` and stores [out, in, *window]. A tensor of two axes
whose name is another has to be told by `layout`, unless the rule does not care for the side.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pm_jax import files, trees
from pm_jax.curvature.kernels import Axes
from pm_jax.offline.tensor_files import Entry
from pm_jax.rules import matrices as of_trees
from pm_jax.rules.base import Parts
from pm_jax.types import InvalidInput

LAYOUTS = {"flax": "[in, out]", "torch": "[out, in]"}
"""How matrices are stored, by the library that stores them so."""


class StoredMatrix(NamedTuple):
    """How a tensor holds one matrix or a stack of them.

    Attributes:
        layout: a key of `LAYOUTS`.
        axes: how the tensor's axes divide in Flax's layout.
    """

    layout: str
    axes: Axes = Axes(stacked=0, inputs=1)

    def separate(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Return the matrices [in, out] of a tensor."""
        if self.layout == "torch":
            return [tensor.reshape(len(tensor), -1).T]
        return [*tensor.reshape(-1, *self.axes.sides(tensor.shape))]

    def joined(self, matrices: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Return the tensor of some matrices: the way back from `separate`."""
        if self.layout == "torch":
            return np.ascontiguousarray(matrices[0].T).reshape(shape)
        return np.stack(matrices).reshape(shape)


def stored_matrices(
    entries: Mapping[str, Entry], names: Sequence[str], parts: Parts, layout: str
) -> dict[str, StoredMatrix]:
    """Find the matrices that a rule merges, among the tensors of some names.

    Raises:
        InvalidInput: the pattern matches none or something else; or it is not known how one is
            stored.
    """
    found = _matrices({name: entries[name].shape for name in names}, parts, layout)
    if parts.pattern:
        try:
            matched = trees.match_paths(dict.fromkeys(names, 0), parts.pattern)
        except ValueError as error:
            raise InvalidInput(f"rule_settings={error}") from None
        if strange := [name for name in matched if name not in found]:
            raise InvalidInput(
                f"rule_settings=pattern={parts.pattern!r}: matches {strange[0]} of shape "
                f"{list(entries[strange[0]].shape)}, which is no matrix; narrow it"
            )
        found = {name: found[name] for name in matched}
    if parts.has_sides and not found:
        raise InvalidInput(
            "rule_settings=pattern=: the files have no matrix to filter; use another rule"
        )
    if unknown := [name for name, matrix in found.items() if not matrix.layout]:
        raise InvalidInput(
            f"layout=: {unknown[0]} of shape {list(entries[unknown[0]].shape)} is named neither "
            "kernel (Flax, [in, out]) nor weight (PyTorch, [out, in]); give flax or torch, or "
            "leave it out by the rule's pattern"
        )
    return found


def _matrices(
    shapes: Mapping[str, tuple[int, ...]], parts: Parts, layout: str
) -> dict[str, StoredMatrix]:
    """All matrices among some tensors; an empty layout for one that nothing tells."""
    paths = {name: name if "/" in name else name.replace(".", "/") for name in shapes}
    like = {paths[n]: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}
    # As Flax has them, all tensors of two axes but tables of embeddings are matrices.
    flax = {
        path: axes
        for path in like
        if of_trees.is_matrix(path, like[path])
        for axes in [of_trees.matrices(_with_bias(path, like), "", parts.input_axes)[path]]
    }
    found = {}
    for name, path in paths.items():
        module, _, last = path.rpartition("/")
        is_table = "embed" in module.rpartition("/")[2] and len(shapes[name]) == 2
        if last.endswith("weight") and len(shapes[name]) > 1 and layout != "flax" and not is_table:
            found[name] = StoredMatrix("torch")
        elif path in flax and not is_table:
            by_name = "flax" if last == "kernel" or not parts.has_sides else ""
            found[name] = StoredMatrix(layout or by_name, flax[path])
    return found


def _with_bias(
    path: str, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """A kernel and the bias beside it, which tells how its axes divide."""
    bias = f"{path.rpartition('/')[0]}/bias".lstrip("/")
    return {name: like[name] for name in (path, bias) if name in like}


def described(found: Mapping[str, StoredMatrix], parts: Parts) -> list[str]:
    """Say in lines how matrices were read."""
    if not parts.has_sides:
        return [f"matrices: {files.listed([*found])}"] if found else []
    lines = []
    for layout, form in LAYOUTS.items():
        if names := [name for name, matrix in found.items() if matrix.layout == layout]:
            lines.append(f"matrices read as {form}, {layout}'s layout: {files.listed(names)}")
    return lines
