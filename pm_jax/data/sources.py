"""Labelled arrays by name: digits, a NumPy archive, or a data set of tensorflow-datasets."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax.data.digits import load_digits
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput

ARCHIVE_FIELDS = ("x_train", "y_train", "x_test", "y_test")


@functools.lru_cache(maxsize=1)  # seeds and baselines share one decoding
def load(
    dataset: str, data_dir: str = "", *, train_per_class: int = 0, test_per_class: int = 0
) -> LabelledArrays:
    """A data set in memory.

    Args:
        dataset: "digits", the path of an `.npz` with x_train, y_train, x_test and y_test, or the
            name of an image classification data set of tensorflow-datasets.
        data_dir: where tensorflow-datasets has prepared it; empty for its own default.
        train_per_class: training examples of each class to keep, the first in the data's order;
            0 for all.
        test_per_class: the same for test examples.

    Returns:
        uint8 images [N, H, W, channels] and labels.

    Raises:
        InvalidInput: the data set is unknown, not prepared, damaged, or not of images of one size.

    Example:
        >>> load("digits", train_per_class=5).train_inputs.shape
        (50, 8, 8, 1)
    """
    if dataset == "digits":
        arrays = load_digits()
    elif dataset.endswith(".npz"):
        arrays = load_archive(Path(dataset))
    else:
        arrays = load_tfds(dataset, data_dir)
    return keep_first(arrays, train_per_class, test_per_class)


def keep_first(arrays: LabelledArrays, train_per_class: int, test_per_class: int) -> LabelledArrays:
    """The first examples of each class, in the data's order.

    Args:
        arrays: a data set.
        train_per_class: training examples of each class to keep; 0 for all.
        test_per_class: the same for test examples.

    Returns:
        A smaller data set.

    Example:
        >>> x, y = np.zeros((4, 2), np.uint8), np.asarray([0, 1, 0, 1])
        >>> keep_first(LabelledArrays(x, y, x, y), 1, 0).train_labels.tolist()
        [0, 1]
    """
    train = _first_of_each_class(arrays.train_labels, train_per_class)
    test = _first_of_each_class(arrays.test_labels, test_per_class)
    return arrays._replace(
        train_inputs=arrays.train_inputs[train],
        train_labels=arrays.train_labels[train],
        test_inputs=arrays.test_inputs[test],
        test_labels=arrays.test_labels[test],
    )


def load_archive(path: Path) -> LabelledArrays:
    """The user's own arrays.

    Args:
        path: of an `.npz` with uint8 images x_train, x_test [N, H, W] or [N, H, W, channels], and
            labels y_train, y_test, whole numbers from 0 on. Nothing in it is unpickled.

    Returns:
        `LabelledArrays`.

    Raises:
        InvalidInput: the file is missing or damaged, or lacks a field or has it in another form.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.npz"
        >>> x, y = np.zeros((4, 8, 8), np.uint8), np.asarray([0, 1, 0, 1])
        >>> np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        >>> load_archive(path).train_inputs.shape
        (4, 8, 8, 1)
    """
    fields = read_archive(path)
    for part in ("train", "test"):
        images, labels = fields[f"x_{part}"], fields[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise InvalidInput(
                f"dataset={path}: x_{part} is {images.dtype} {images.shape}; it must be uint8 "
                "[N, H, W] or [N, H, W, channels]"
            )
        check_labels(path, part, labels, len(images))
        if images.ndim == 3:
            fields[f"x_{part}"] = images[..., None]
    if fields["x_train"].shape[1:] != fields["x_test"].shape[1:]:
        raise InvalidInput(f"dataset={path}: x_train and x_test have images of different shapes")
    x_train, y_train, x_test, y_test = (fields[name] for name in ARCHIVE_FIELDS)
    return LabelledArrays(x_train, y_train, x_test, y_test, path.stem)


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """The fields of an `.npz`, whatever they hold.

    Args:
        path: of the file. Nothing in it is unpickled.

    Returns:
        `{name: array}` with `ARCHIVE_FIELDS`.

    Raises:
        InvalidInput: the file is missing or damaged, or lacks a field.

    Example:
        >>> read_archive(Path("none.npz"))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: dataset=none.npz: there is no such file
    """
    if not path.is_file():
        raise InvalidInput(f"dataset={path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in ARCHIVE_FIELDS if name in archive}
    except Exception as error:  # zip and NumPy raise many types for damaged files.
        raise InvalidInput(
            f"dataset={path}: cannot be read ({type(error).__name__}: {error})"
        ) from error
    if missing := [name for name in ARCHIVE_FIELDS if name not in fields]:
        raise InvalidInput(f"dataset={path}: lacks {', '.join(missing)}")
    return fields


def check_labels(path: Path, part: str, labels: np.ndarray, examples: int) -> None:
    """Raise unless an archive's labels are whole numbers from 0 on, one per example.

    Args:
        path: of the archive.
        part: "train" or "test".
        labels: its y.
        examples: how many it has in x.

    Raises:
        InvalidInput: they are not.

    Example:
        >>> check_labels(Path("mine.npz"), "train", np.asarray([0, 1]), 2)
    """
    if labels.shape != (examples,) or labels.dtype.kind not in "iu" or min(labels) < 0:
        raise InvalidInput(
            f"dataset={path}: y_{part} is {labels.dtype} {labels.shape}; it must hold a whole "
            f"number from 0 on for each of {examples} examples"
        )


def prepared_builder(name: str, data_dir: str, splits: Sequence[str]) -> Any:
    """A data set of tensorflow-datasets that is prepared on disk.

    Args:
        name: in the catalogue, "cifar100".
        data_dir: where it is prepared; empty for the default of tensorflow-datasets.
        splits: that it must have.

    Returns:
        Its `tfds.core.DatasetBuilder`.

    Raises:
        InvalidInput: unknown, not prepared, or without these splits.

    Example:
        >>> prepared_builder("no_such_data_set", "", ("train",))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: dataset=no_such_data_set: is not in the catalogue of ...
    """
    import tensorflow_datasets as tfds

    where = {"data_dir": data_dir} if data_dir else {}
    try:
        builder = tfds.builder(name, **where)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError):
        raise InvalidInput(
            f"dataset={name}: is not in the catalogue of tensorflow-datasets, nor 'digits' or the "
            "path of an .npz"
        ) from None
    lacking = [split for split in splits if split not in builder.info.splits]
    if lacking:
        command = f"tfds build {name} --file_format=array_record"
        command += f" --data_dir={data_dir}" if data_dir else ""
        raise InvalidInput(
            f"dataset={name}: split {lacking[0]} is not prepared in {builder.data_path.parent}; "
            f"prepare it with: {command}"
        )
    return builder


def load_tfds(name: str, data_dir: str = "") -> LabelledArrays:
    """An image classification data set that tensorflow-datasets has prepared as array_record.

    It is read through `tfds.data_source`, without TensorFlow. Examples keep the order of the files.

    Args:
        name: in the catalogue, "cifar100".
        data_dir: where it is prepared; empty for the default of tensorflow-datasets.

    Returns:
        `LabelledArrays` of its splits train and test.

    Raises:
        InvalidInput: unknown, not prepared, without these splits or fields, or images that differ
            in size.

    Example:
        >>> load_tfds("no_such_data_set")
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: dataset=no_such_data_set: is not in the catalogue of ...
    """
    builder = prepared_builder(name, data_dir, ("train", "test"))
    parts = []
    for split in ("train", "test"):
        try:
            source = builder.as_data_source(split=split)
            examples = [(example["image"], example["label"]) for example in source]
        except (KeyError, NotImplementedError, ValueError, OSError) as error:
            raise InvalidInput(
                f"dataset={name}: cannot be read as labelled images in array_record "
                f"({type(error).__name__}: {error})"
            ) from error
        shapes = {image.shape for image, _ in examples}
        if len(shapes) > 1:
            raise InvalidInput(f"dataset={name}: has images of {len(shapes)} sizes; one is needed")
        images = np.stack([image for image, _ in examples])
        parts.append((images, np.asarray([label for _, label in examples], np.int64)))
    return LabelledArrays(*parts[0], *parts[1], name=name)


def _first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    if not count:
        return np.arange(len(labels))
    firsts = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(firsts))
