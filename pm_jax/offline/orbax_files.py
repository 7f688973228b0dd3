"""Orbax checkpoints as safetensors files, array by array, and back."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.offline.tensor_files import (
    FLOATS,
    WHOLE_NUMBERS,
    Entry,
    TensorFile,
    laid_out,
    writing,
)
from pm_jax.types import InvalidInput, PyTree

_VALUE = "/value"
"""Ends the paths in a saved nnx state, whose variables hold the arrays."""


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
            leaves = _leaves(tree)
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
                    file.write(np.asarray(_leaves(restored)[name], leaf.dtype).tobytes())
    except InvalidInput:
        # It is said already what is wrong with the output, or which leaf has no place in it.
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for damaged folders.
        raise InvalidInput(
            f"{argument}={directory}: cannot be read as a checkpoint of Orbax "
            f"({type(error).__name__}); give the folder of one saved tree"
        ) from error


def from_safetensors(merged: TensorFile, like: Path, path: Path, made: dict[str, str]) -> None:
    """Save the tensors of a file in a new folder, as the tree of another folder has them.

    All arrays may be in memory at once. Leaves that do not merge, such as PRNG keys, are the other
    folder's; `made` says how the tree was made, in Orbax's custom metadata.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    from orbax import checkpoint as orbax

    with orbax.PyTreeCheckpointer() as checkpointer:
        kinds = checkpointer.metadata(like.absolute()).item_metadata.tree
        wanted = _leaves(kinds)
        merging = {id(leaf) for name, leaf in wanted.items() if _merges(merged.entries[name])}
        request = jax.tree.map(
            lambda leaf: orbax.PLACEHOLDER if id(leaf) in merging else _shape(leaf), kinds
        )
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        as_saved = jax.tree.map(
            # Without a place Orbax would look for the devices that saved the array.
            lambda leaf: (
                orbax.ArrayRestoreArgs(sharding=here)
                if getattr(leaf, "sharding", None)
                else orbax.RestoreArgs()
            ),
            kinds,
        )
        kept = checkpointer.restore(
            like.absolute(), args=orbax.args.PyTreeRestore(request, restore_args=as_saved)
        )
        arrays = {
            id(leaf): _array(merged, name, leaf)
            for name, leaf in wanted.items()
            if id(leaf) in merging
        }
        whole = jax.tree.map(lambda leaf, other: arrays.get(id(leaf), other), kinds, kept)
        try:
            checkpointer.save(
                path.absolute(), args=orbax.args.PyTreeSave(whole, custom_metadata=made)
            )
        except Exception as error:  # Orbax and TensorStore raise many types.
            shutil.rmtree(path, ignore_errors=True)
            raise InvalidInput(
                f"output={path}: cannot be written ({type(error).__name__}); choose another place"
            ) from error


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, which for an nnx state are those of its variables."""
    leaves = trees.leaves_by_path(tree)
    if all(path.endswith(_VALUE) for path in leaves):
        return {path.removesuffix(_VALUE): leaf for path, leaf in leaves.items()}
    return leaves


def _merges(entry: Entry) -> bool:
    return entry.dtype in FLOATS


def _array(merged: TensorFile, name: str, like: Any) -> Any:
    entry = merged.entries[name]
    stored = np.concatenate([*merged.pieces(name), np.zeros(0, np.uint8)])
    values = stored.view(FLOATS[entry.dtype]).reshape(entry.shape)
    # Orbax restores what it saved: an array of JAX, or one of NumPy, which has no sharding.
    return jnp.asarray(values) if getattr(like, "sharding", None) else values


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _entries(source: str, leaves: dict[str, Any]) -> dict[str, Entry]:
    names = {dtype: name for name, dtype in (FLOATS | WHOLE_NUMBERS).items()}
    tensors = {}
    for path, leaf in leaves.items():
        # Orbax also stores text, which has no type here.
        kind = getattr(leaf, "dtype", "text")
        if kind == "text" or np.dtype(kind) not in names:
            raise InvalidInput(
                f"{source}: {path} is {kind}, which safetensors does not hold; save the tree "
                "without it"
            )
        dtype, shape = np.dtype(kind), tuple(leaf.shape)
        tensors[path] = (names[dtype], shape, math.prod(shape) * dtype.itemsize)
    return laid_out(tensors)
