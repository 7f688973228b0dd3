"""Orbax checkpoints as safetensors files, array by array."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pm_jax import trees
from pm_jax.offline.tensor_files import FLOATS, WHOLE_NUMBERS, Entry, writing
from pm_jax.types import InvalidInput


def to_safetensors(argument: str, directory: Path, path: Path) -> None:
    """Write the tree in an Orbax folder as a safetensors file, with names "a/b/c".

    Raises:
        InvalidInput: the folder cannot be read, or safetensors cannot store its content.
    """
    from orbax import checkpoint as orbax

    directory = directory.absolute()
    try:
        with orbax.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(directory).item_metadata.tree
            as_arrays = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), tree)
            leaves = trees.leaves_by_path(tree)
            with writing(path, _entries(f"{argument}={directory}", leaves), {}) as file:
                for name, leaf in leaves.items():
                    # Orbax skips the placeholders, so that one array is in memory at a time.
                    request = jax.tree.map(
                        lambda other, leaf=leaf: (
                            _shape(leaf) if other is leaf else orbax.PLACEHOLDER
                        ),
                        tree,
                    )
                    restored = checkpointer.restore(
                        directory, args=orbax.args.PyTreeRestore(request, restore_args=as_arrays)
                    )
                    file.write(
                        np.asarray(trees.leaves_by_path(restored)[name], leaf.dtype).tobytes()
                    )
    except InvalidInput:
        # It is said already what is wrong with the output, or which leaf has no place in it.
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for damaged folders.
        raise InvalidInput(
            f"{argument}={directory}: cannot be read as a checkpoint of Orbax "
            f"({type(error).__name__}); give the folder of one saved tree"
        ) from error


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _entries(source: str, leaves: dict[str, Any]) -> dict[str, Entry]:
    names = {dtype: name for name, dtype in (FLOATS | WHOLE_NUMBERS).items()}
    entries, begin = {}, 0
    for path, leaf in leaves.items():
        # Orbax also stores text, which has no type here.
        kind = getattr(leaf, "dtype", "text")
        if kind == "text" or np.dtype(kind) not in names:
            raise InvalidInput(
                f"{source}: {path} is {kind}, which safetensors does not hold; save the tree "
                "without it"
            )
        dtype = np.dtype(kind)
        end = begin + math.prod(leaf.shape) * dtype.itemsize
        entries[path] = Entry(names[dtype], tuple(leaf.shape), begin, end)
        begin = end
    return entries
