"""Models that begin from public weights plus an adapter of PEFT."""

from typing import NamedTuple

import numpy as np

from pm_jax import trees
from pm_jax.types import InvalidInput, Params
from pm_jax.weights.layouts import LAYOUTS, OURS, Entry, depth_of
from pm_jax.weights.peft_folder import PeftFolder, tensors_of

_AXES = {"dense": (1, 0), "conv": (2, 3, 1, 0)}
"""Order of the axes of PyTorch's weight in our kernel, by the kind of an entry."""


class Place(NamedTuple):
    """The module of an adapter that displaces one of our kernels, and the kernel's entry."""

    module: str
    entry: Entry


def places_of(params: Params, adapter: PeftFolder, layout: str) -> dict[str, Place]:
    """Find the kernels that an adapter displaces, by their paths.

    The layout is that of the weights; adapters of AugReg's, and of trees of Orbax, have the names
    under which those weights are exported.

    Raises:
        InvalidInput: it has modules that the model does not have, or the classifier's, which every
            run makes anew.
    """
    leaves = trees.leaves_by_path(params)
    if layout in ("augreg", OURS):
        is_text, is_rotary = "word_embed/embedding" in leaves, "pos_embed" not in leaves
        layout = "bert" if is_text else "dinov3" if is_rotary else "timm"
    entries = {
        entry.path: entry
        for entry in LAYOUTS[layout](depth_of(leaves))
        if entry.kind in _AXES and entry.path in leaves and not entry.path.startswith("head/")
    }
    modules = tensors_of(adapter, [entry.name for entry in entries.values()])
    return {
        path: Place(modules[entry.name], entry)
        for path, entry in entries.items()
        if entry.name in modules
    }


def with_adapter(params: Params, adapter: PeftFolder, layout: str) -> Params:
    """Add the displacement of an adapter to a model; its classifier stays as it is.

    The layout is that of the weights, as in `places_of`.

    Raises:
        InvalidInput: the adapter is of another model.
    """
    leaves, moved = trees.leaves_by_path(params), {}
    for path, place in places_of(params, adapter, layout).items():
        step = adapter.displacement(place.module)
        if place.entry.part:
            part, count = place.entry.part
            step = np.array_split(step, count)[part]
        axes = _AXES[place.entry.kind]
        if len(step.shape) != len(axes) or step.transpose(axes).shape != leaves[path].shape:
            raise InvalidInput(
                f"{adapter.argument}={adapter.source}: the displacement of {place.module} is "
                f"{list(adapter.modules[place.module].shape)}, which does not fit {path} of "
                f"{list(leaves[path].shape)}; give the adapter of this architecture"
            )
        moved[path] = leaves[path] + step.transpose(axes)
    return trees.replace(params, moved)
