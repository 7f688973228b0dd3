"""Labelled examples as people have them, read as batches of one size.

Examples are one `Batch`, a tuple of arrays, or any iterable of either. Batches of an iterable are
joined and cut again: whatever sizes they come in, the n-th example is the n-th row, and all but
the last batch are full.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import losses, trees
from pm_jax.types import Batch, InvalidInput, PyTree, cause


def are_traced(tree: PyTree) -> bool:
    """True inside a transformation such as `jax.jit`, where arrays have shapes and no values."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def are_arrays(examples: Any) -> bool:
    """True for one `Batch` or one tuple of arrays; false for what may be an iterable of them."""
    if isinstance(examples, Batch):
        return True
    return isinstance(examples, tuple) and len(examples) in (2, 3) and _are_labels(examples[1])


def as_batch(item: Any, name: str) -> Batch:
    """One `Batch` of arrays with weights, from a `Batch`, or from a tuple or list of its fields.

    Args:
        item: leaves are JAX's or NumPy's arrays, or whatever `np.asarray` reads.
        name: what errors call the item.

    Raises:
        InvalidInput: another thing, lengths that differ, or labels or weights of a wrong type.
    """
    batch = _array_leaves(_as_fields(item, name), name)
    labels = batch.labels
    if not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim > 1 and not np.issubdtype(labels.dtype, np.bool_)
        remedy = "np.argmax(labels, axis=-1)" if one_hot else "labels.astype(int)"
        raise InvalidInput(
            f"{name}: has labels of type {labels.dtype} and shape {labels.shape}; they must be the "
            f"numbers of the classes, integers [N] (or [N, T] of tokens): give {remedy}"
        )
    if isinstance(labels, np.ndarray):
        # One type: loaders mix int32 and int64, and each would be compiled for.
        narrow = labels.astype(np.int32)
        if (wrong := labels[narrow != labels]).size:
            raise InvalidInput(f"{name}: has a label {wrong[0]}; labels must be numbers of classes")
        batch = batch._replace(labels=narrow)
    if labels.ndim == 0:
        raise InvalidInput(
            f"{name}: has a label without an axis of examples; give batches [N, ...], which a "
            "DataLoader makes of a data set"
        )
    if not jax.tree.leaves(batch.inputs):
        raise InvalidInput(f"{name}: has no inputs; give (inputs, labels)")
    for path, leaf in trees.leaves_by_path(batch.inputs).items():
        if leaf.ndim == 0 or len(leaf) != len(labels):
            raise InvalidInput(
                f"{name}: has {_title('inputs', path)} of shape {leaf.shape} and labels of shape "
                f"{labels.shape}; all must have the same number of examples on the first axis"
            )
    return _with_sound_weights(batch, name)


def batches_of(examples: Iterable[Any], size: int) -> Iterator[tuple[str, Batch]]:
    """The batches of an iterable, cut anew to `size` examples, with the name of a batch in errors.

    The last one is padded with weight 0; it may be smaller where it is the first as well.

    Raises:
        InvalidInput: no batches, no `Batch` or tuple, or a batch unlike the first one.
    """
    held: list[Batch] = []
    first, name, full = None, "examples", False
    for number, item in enumerate(_iterated(examples)):
        name = f"examples: batch {number}"
        batch = as_batch(item, name)
        first = first or batch
        _check_alike(batch, first, name)
        start, stop = 0, len(batch.labels)
        while (end := start + size - sum(len(b.labels) for b in held)) <= stop:
            yield name, _joined([*held, _rows(batch, start, end)])
            held, start, full = [], end, True
        if start < stop:
            held.append(_rows(batch, start, stop))
    if first is None:
        raise InvalidInput(
            "examples: the iterable has no batches; a generator is used up after one pass, make "
            "it anew"
        )
    if held:
        last = _joined(held)
        yield name, padded(last, size if full else smaller(size, len(last.labels)))
    elif not full:
        raise InvalidInput("examples: all batches are empty; give one example at least")


def padded(batch: Batch, count: int) -> Batch:
    """The batch with its first example repeated, with weight 0, up to `count` rows.

    A model computes nothing unusual on an example that it knows.
    """
    missing = count - len(batch.labels)
    if not missing:
        return batch

    def longer(leaf: Any) -> Any:
        library: Any = jnp if isinstance(leaf, jax.Array) else np
        return library.concatenate([leaf, library.repeat(leaf[:1], missing, axis=0)])

    assert batch.weights is not None
    weights = longer(batch.weights)
    real = np.arange(count) < len(batch.labels)
    return losses.weighted(jax.tree.map(longer, batch)._replace(weights=weights), real)


def smaller(size: int, count: int) -> int:
    """A batch size for fewer examples than one batch: the next power of two, at most `size`.

    Not their own number: a program would be compiled for each.
    """
    return min(size, 1 << (count - 1).bit_length())


def rounded_up(number: int) -> int:
    """A number of batches that others round up to as well, at most an eighth larger.

    Example:
        >>> [rounded_up(n) for n in (1, 7, 9, 33)]
        [1, 7, 10, 40]
    """
    step = 1 << max(0, number.bit_length() - 3)
    return -(-number // step) * step


def check_labels(batch: Batch, logits: tuple[int, ...], name: str) -> None:
    """Hold labels against the shape of logits.

    Raises:
        InvalidInput: labels of another rank, or out of the range of the classes.
    """
    labels, classes = batch.labels, logits[-1]
    if labels.ndim != len(logits) - 1 or labels.shape[1:] != logits[1:-1]:
        one_hot = len(logits) == 2 and labels.shape[1:] == (classes,)
        shapes = f"labels of shape {_rest(labels)} where the logits are {_rest(logits)}"
        remedy = "np.argmax(labels, axis=-1)" if one_hot else f"labels {_rest(logits[:-1])}"
        raise InvalidInput(f"{name}: has {shapes}; give {remedy}, the numbers of the classes")
    if (values := _values(labels)) is None or (weights := _values(batch.weights)) is None:
        return
    weighs = np.broadcast_to(weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim)),
                             values.shape) > 0  # fmt: skip
    wrong = values[weighs & ((values < 0) | (values >= classes))]
    if wrong.size:
        token = "; a token that has none needs the weight 0" if values.ndim > 1 else ""
        raise InvalidInput(
            f"{name}: has a label {wrong[0]}; labels must be from 0 to {classes - 1}, the classes "
            f"of the logits{token}"
        )


def _are_labels(value: Any) -> bool:
    """True for an array, or a list of numbers, which labels may be."""
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], (int, float, np.number))
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_fields(item: Any, name: str) -> Batch:
    """The three fields of a batch as they are given."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, (tuple, list)) and len(item) in (2, 3) and _are_labels(item[1]):
        return Batch(*item)
    if isinstance(item, Mapping):
        keys = [repr(key) for key in item]
        ends = (keys[0], keys[-1]) if keys else ("'inputs'", "'labels'")
        way = ", ".join(f"batch[{key}]" for key in ends)
        raise InvalidInput(
            f"{name}: is a dict with {', '.join(keys) or 'no keys'}; give tuples instead, such as "
            f"(({way}) for batch in batches)"
        )
    kind = type(item).__name__
    if isinstance(item, (tuple, list)):
        kind += f" of {len(item)}: {', '.join(type(value).__name__ for value in item[:4])}"
    raise InvalidInput(
        f"{name}: is a {kind}; it must be a Batch or a tuple (inputs, labels) or (inputs, labels, "
        "weights) of arrays"
    )


def _array_leaves(batch: Batch, name: str) -> Batch:
    """The batch with every leaf an array of numbers."""

    def array(path: tuple, leaf: Any) -> Any:
        if isinstance(leaf, (jax.Array, np.ndarray)):
            found: Any = leaf
        else:
            try:
                found = np.asarray(leaf)
            except Exception as error:
                raise InvalidInput(
                    f"{name}: has {trees.path_name(path)} of type {type(leaf).__name__}, which "
                    f"NumPy cannot read ({cause(error)}); give arrays in the host's memory"
                ) from None
        if isinstance(found, np.ndarray) and found.dtype.kind in "OUSVMm":
            # ml_dtypes' bfloat16 is of kind V and is a number nevertheless.
            if not jnp.issubdtype(found.dtype, jnp.number):
                raise InvalidInput(
                    f"{name}: has {trees.path_name(path)} of {type(leaf).__name__} and type "
                    f"{found.dtype}, which are no numbers; give arrays"
                )
        return found

    labels = batch.labels
    if isinstance(labels, (list, tuple)):
        # A list is a tree of numbers to JAX, and one array here.
        batch = batch._replace(labels=np.asarray(labels))
    return jax.tree_util.tree_map_with_path(array, batch)


def _with_sound_weights(batch: Batch, name: str) -> Batch:
    weights: Any = batch.weights
    if weights is None:
        weights = np.ones(batch.labels.shape[:1], np.float32)
    if weights.shape not in (batch.labels.shape[:1], batch.labels.shape):
        raise InvalidInput(
            f"{name}: has weights of shape {weights.shape} and labels of shape "
            f"{batch.labels.shape}; give one weight for each example, or for each token"
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        weights = weights.astype(np.float32)
    values = _values(weights)
    if values is not None and not (values >= 0).all():
        raise InvalidInput(f"{name}: has a weight that is negative or NaN; give at least 0")
    return batch._replace(weights=weights)


def _iterated(examples: Any) -> Iterator[Any]:
    if isinstance(examples, (str, bytes, Mapping)) or not isinstance(examples, Iterable):
        # Some data sets have no `__iter__`, and Python iterates over their items.
        if not (hasattr(examples, "__getitem__") and not isinstance(examples, (str, Mapping))):
            _as_fields(examples, "examples")
    if hasattr(examples, "shape"):
        raise InvalidInput(
            f"examples: is one array of shape {examples.shape}; give a tuple (inputs, labels), or "
            "an iterable of them"
        )
    return iter(examples)


def _check_alike(batch: Batch, first: Batch, name: str) -> None:
    """Raise InvalidInput for a batch that differs from the first one in more than its length."""
    left, right = (trees.leaves_by_path(b._asdict()) for b in (batch, first))
    if list(left) != list(right):
        raise InvalidInput(
            f"{name}: has the leaves {', '.join(left)}, and batch 0 has {', '.join(right)}; all "
            "batches must have one structure"
        )
    for path, leaf in left.items():
        other = right[path]
        if (leaf.shape[1:], leaf.dtype) != (other.shape[1:], other.dtype):
            raise InvalidInput(
                f"{name}: has {path} of shape {_rest(leaf)} {leaf.dtype}, and batch 0 has "
                f"{_rest(other)} {other.dtype}; all batches must be alike but for their length"
            )


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    if (start, stop) == (0, len(batch.labels)):
        return batch
    return jax.tree.map(lambda leaf: leaf[start:stop], batch)


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]

    def together(*leaves: Any) -> Any:
        library: Any = jnp if isinstance(leaves[0], jax.Array) else np
        return library.concatenate(leaves)

    return jax.tree.map(together, *batches)


def _values(array: Any) -> np.ndarray | None:
    """An array's values in the host's memory; `None` where this process does not have them."""
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def _title(name: str, path: str) -> str:
    return f"{name}/{path}" if path else name


def _rest(array: Any) -> str:
    """A shape with N for its number of examples, "[N, 28, 28]"."""
    shape = getattr(array, "shape", array)
    return f"[{', '.join(['N', *map(str, shape[1:])])}]"
