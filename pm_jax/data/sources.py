"""Labelled images by name: digits, a NumPy archive, or data sets of tensorflow-datasets."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from pm_jax.data import stored_images
from pm_jax.data.digits import load_digits, rotated
from pm_jax.data.stream import LabelledArrays, first_classes, first_of_each_class
from pm_jax.data.tfds_images import DOMAINS, load_images
from pm_jax.types import InvalidInput, cause

ARCHIVE_FIELDS = ("x_train", "y_train", "x_test", "y_test")


class ReadOptions(TypedDict, total=False):
    """The options of `tfds_images.load_images`."""

    class_subset: int
    train_per_class: int
    test_per_class: int
    stored_size: int
    cache_dir: str


# Seeds and baselines share one decoding.
@functools.lru_cache(maxsize=1)
def load(
    dataset: str, data_dir: str = "", *, rgb: bool = False, **options: Unpack[ReadOptions]
) -> LabelledArrays:
    """Load a data set, uint8 images [N, H, W, channels] with labels, into memory.

    Raises:
        InvalidInput: the data set is unknown, not prepared or damaged, or has several sizes.
    """
    if dataset == "digits" or dataset.endswith(".npz"):
        arrays = load_digits() if dataset == "digits" else load_archive(Path(dataset))
        arrays = keep_classes(arrays, options.get("class_subset", 0))
        train, test = options.get("train_per_class", 0), options.get("test_per_class", 0)
        arrays = keep_first(arrays, train, test)
    else:
        # Where tasks bring new classes, the domains of a data set are pooled.
        names = [f"{dataset}/{domain}" for domain in DOMAINS.get(dataset, ())] or [dataset]
        domains = load_images(names, data_dir, **options)
        arrays = domains[0] if len(domains) == 1 else _pooled(domains, dataset)
    return _as_rgb(arrays) if rgb else arrays


@functools.lru_cache(maxsize=1)
def load_domains(
    dataset: str,
    num_domains: int,
    data_dir: str = "",
    *,
    rgb: bool = False,
    **options: Unpack[ReadOptions],
) -> tuple[LabelledArrays, ...]:
    """Load the first `num_domains` domains of "domainnet": the same classes, different images.

    Raises:
        InvalidInput: there are fewer domains, or as `load`.
    """
    domains = DOMAINS[dataset]
    if not 1 <= num_domains <= (count := len(domains)):
        raise InvalidInput(
            f"num_tasks={num_domains}: {dataset} has {count} domains; choose 1..{count} tasks"
        )
    names = [f"{dataset}/{domain}" for domain in domains[:num_domains]]
    loaded = load_images(names, data_dir, **options)
    return tuple(_as_rgb(arrays) if rgb else arrays for arrays in loaded)


@functools.lru_cache(maxsize=1)
def load_rotated(
    dataset: str, angles: tuple[float, ...], data_dir: str = "", **options: Any
) -> tuple[LabelledArrays, ...]:
    """Load a data set once for each angle, and turn it by that.

    Raises:
        InvalidInput: as `load`.
    """
    arrays = load(dataset, data_dir, **options)
    return tuple(rotated(arrays, angle) for angle in angles)


def keep_classes(arrays: LabelledArrays, count: int) -> LabelledArrays:
    """Keep the examples of the first `count` classes, by their numbers; 0 keeps all.

    Raises:
        InvalidInput: there are fewer classes.
    """
    if not count:
        return arrays
    classes = np.unique(np.concatenate([arrays.train_labels, arrays.test_labels]))
    kept = first_classes(classes, count, arrays.name)
    train, test = np.isin(arrays.train_labels, kept), np.isin(arrays.test_labels, kept)
    groups, names = arrays.class_groups, arrays.class_names
    return LabelledArrays(
        arrays.train_inputs[train],
        arrays.train_labels[train],
        arrays.test_inputs[test],
        arrays.test_labels[test],
        arrays.name,
        None if groups is None else groups[:count],
        len(classes) - count,
        names and names[:count],
    )


def keep_first(arrays: LabelledArrays, train_per_class: int, test_per_class: int) -> LabelledArrays:
    """Keep the first examples of each class, in the data's order; 0 keeps all."""
    train = first_of_each_class(arrays.train_labels, train_per_class)
    test = first_of_each_class(arrays.test_labels, test_per_class)
    return arrays._replace(
        train_inputs=arrays.train_inputs[train],
        train_labels=arrays.train_labels[train],
        test_inputs=arrays.test_inputs[test],
        test_labels=arrays.test_labels[test],
    )


def _pooled(domains: list[LabelledArrays], name: str) -> LabelledArrays:
    parts = zip(*(domain[:4] for domain in domains), strict=True)
    x_train, y_train, x_test, y_test = (np.concatenate(part) for part in parts)
    return domains[0]._replace(
        train_inputs=x_train,
        train_labels=y_train,
        test_inputs=x_test,
        test_labels=y_test,
        name=name,
    )


def _as_rgb(arrays: LabelledArrays) -> LabelledArrays:
    return arrays.with_inputs(lambda images: stored_images.as_rgb(images, arrays.name))


def load_archive(path: Path) -> LabelledArrays:
    """Load the user's `.npz`: uint8 images [N, H, W] or [N, H, W, channels], labels from 0 on.

    Raises:
        InvalidInput: the file is missing or damaged, or a field is missing or has another form.
    """
    needs = "it must be uint8 [N, H, W] or [N, H, W, channels], none of them 0"
    arrays = read_archive(path, needs, _are_images)
    arrays = arrays.with_inputs(lambda images: images if images.ndim == 4 else images[..., None])
    if arrays.train_inputs.shape[1:] != arrays.test_inputs.shape[1:]:
        raise InvalidInput(f"dataset={path}: x_train and x_test have images of different shapes")
    return arrays


def _are_images(inputs: np.ndarray) -> bool:
    return inputs.dtype == np.uint8 and inputs.ndim in (3, 4) and inputs.size > 0


def read_archive(path: Path, needs: str, fits: Callable[[np.ndarray], bool]) -> LabelledArrays:
    """Read an `.npz` whose inputs must fit what a model needs; raises `InvalidInput`."""
    if not path.is_file():
        raise InvalidInput(f"dataset={path}: there is no such file")
    try:
        # Opened here, because NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in ARCHIVE_FIELDS if name in archive}
    except Exception as error:  # zip and NumPy raise many types for damaged files.
        raise InvalidInput(
            f"dataset={path}: cannot be read ({cause(error)}); write it anew with numpy.savez, "
            "without objects"
        ) from error
    if missing := [name for name in ARCHIVE_FIELDS if name not in fields]:
        raise InvalidInput(
            f"dataset={path}: lacks {', '.join(missing)}; write all of {', '.join(ARCHIVE_FIELDS)}"
        )
    for part in ("train", "test"):
        inputs, labels = fields[f"x_{part}"], fields[f"y_{part}"]
        if not fits(inputs):
            raise InvalidInput(
                f"dataset={path}: x_{part} is {inputs.dtype} {inputs.shape}; {needs}"
            )
        integers = labels.shape == inputs.shape[:1] and labels.dtype.kind in "iu"
        if not integers or min(labels, default=0) < 0:
            raise InvalidInput(
                f"dataset={path}: y_{part} is {labels.dtype} {labels.shape}; it must hold a whole "
                f"number from 0 on for each of {len(inputs)} examples"
            )
    x_train, y_train, x_test, y_test = (fields[name] for name in ARCHIVE_FIELDS)
    return LabelledArrays(x_train, y_train, x_test, y_test, path.stem)
