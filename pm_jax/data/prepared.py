"""Data sets that tensorflow-datasets has prepared, read with or without TensorFlow."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pm_jax.types import InvalidInput


def find(name: str, data_dir: str = "", splits: Sequence[str] = ()) -> Any:
    """A data set that is prepared on disk in a form that can be read here.

    Args:
        name: in the catalogue, "cifar100" or "domainnet/real".
        data_dir: where it is prepared; empty for the default of tensorflow-datasets.
        splits: that it must have.

    Returns:
        Its `tfds.core.DatasetBuilder`.

    Raises:
        InvalidInput: unknown, not prepared, without these splits, or in need of TensorFlow where
            that is not installed.

    Example:
        >>> find("no_such_data_set")
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: dataset=no_such_data_set: is not in the catalogue of ...
    """
    import tensorflow_datasets as tfds

    where = {"data_dir": data_dir} if data_dir else {}
    try:
        found = tfds.builder(name, **where)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError):
        raise InvalidInput(
            f"dataset={name}: is not in the catalogue of tensorflow-datasets, nor 'digits' or the "
            "path of an .npz"
        ) from None
    command = f"tfds build {name} --file_format=array_record"
    command += f" --data_dir={data_dir}" if data_dir else ""
    if not found.is_prepared():
        raise InvalidInput(
            f"dataset={name}: is not prepared in {found.data_path.parent}; prepare it with: "
            f"{command}"
        )
    if lacking := [split for split in splits if split not in found.info.splits]:
        raise InvalidInput(
            f"dataset={name}: needs a split {lacking[0]!r}; it has {', '.join(found.info.splits)}"
        )
    if not _has_random_access(found) and not importlib.util.find_spec("tensorflow"):
        raise InvalidInput(
            f"dataset={name}: is prepared as {found.info.file_format.value}, which takes "
            f"TensorFlow; pip install 'pm_jax[tensorflow]', or prepare it elsewhere with: {command}"
        )
    return found


def examples(
    builder: Any, split: str, fields: Sequence[str], positions: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """The examples of a split in the order of the files, images still encoded.

    Args:
        builder: of `find`. What is prepared as array_record is read without TensorFlow, what is
            prepared as tfrecord with it.
        split: name of a split.
        fields: that are wanted; there may be others.
        positions: int [M], rising, the places of those wanted; `None` for all.

    Returns:
        Their features.

    Raises:
        InvalidInput: files that are missing or damaged.

    Example:
        >>> import itertools
        >>> list(itertools.islice(examples(None, "train", ("label",)), 0))  # Nothing is read yet.
        []
    """
    name, features = builder.info.full_name, builder.info.features
    try:
        if _has_random_access(builder):
            source = builder.as_data_source(split=split, decoders=_encoded(features, features))
            for position in range(len(source)) if positions is None else positions.tolist():
                yield source[position]
        else:
            yield from _with_tensorflow(builder, split, fields, positions)
    except Exception as error:  # The readers raise many types for damaged files.
        raise InvalidInput(
            f"dataset={name}: split {split} cannot be read ({type(error).__name__}: {error}); "
            "prepare it again"
        ) from error


def _has_random_access(builder: Any) -> bool:
    import tensorflow_datasets as tfds

    formats = tfds.core.FileFormat.with_random_access()
    return bool(builder.info.available_file_formats() & formats)


def _encoded(features: Any, fields: Sequence[str]) -> dict[str, Any]:
    """Decoders that leave the images among some fields as they are on the disk."""
    import tensorflow_datasets as tfds

    images = [field for field in fields if isinstance(features[field], tfds.features.Image)]
    return {field: tfds.decode.SkipDecoding() for field in images}


def _with_tensorflow(
    builder: Any, split: str, fields: Sequence[str], positions: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    with contextlib.suppress(RuntimeError):  # Too late where TensorFlow has been used before.
        tf.config.set_visible_devices([], "GPU")  # It would take all of its memory.
    decoders = tfds.decode.PartialDecoding(
        dict.fromkeys(fields, True), decoders=_encoded(builder.info.features, fields)
    )
    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    dataset = builder.as_dataset(split=split, decoders=decoders, read_config=in_order)
    wanted = None if positions is None else set(positions.tolist())
    for position, example in enumerate(tfds.as_numpy(dataset)):
        if wanted is None or position in wanted:
            yield example
