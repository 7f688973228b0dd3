"""Image classification data sets of tensorflow-datasets."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from pm_jax.data import labels as labelling
from pm_jax.data import prepared, splits, stored_images
from pm_jax.data.assembling import check_one_shape
from pm_jax.data.stream import LabelledArrays, first_classes, first_of_each_class
from pm_jax.types import InvalidInput

DOMAINS = {"domainnet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")}
"""Data sets with a configuration for each domain, in the order of the tasks."""


class _Part(NamedTuple):
    """Examples to read: a split, the side of its division (if any), and their number per class."""

    split: str
    side: str = ""
    per_class: int = 0
    # Classes to keep, by the data set's own numbers; `None` for all.
    classes: tuple[int, ...] | None = None
    # A field and its value; `None` for all domains.
    domain: tuple[str, Any] | None = None


class _Reading(NamedTuple):
    """A data set, or a domain of one, that is to be read: its parts by their roles."""

    name: str
    builder: Any
    parts: dict[str, _Part]
    notes: tuple[str, ...] = ()


def load_images(
    names: Sequence[str],
    data_dir: str = "",
    *,
    class_subset: int = 0,
    train_per_class: int = 0,
    test_per_class: int = 0,
    stored_size: int = 0,
    cache_dir: str = "",
    test_split: str = "",
    validation_split: str = "",
    domain_field: str = "",
) -> list[LabelledArrays]:
    """Load image data sets that tensorflow-datasets has prepared; several share their classes.

    With a `class_subset` images of other classes than the first so many are not decoded. With a
    `domain_field` each of its values is a data set.

    Raises:
        InvalidInput: a data set is unknown, not prepared, damaged, or has no labelled uint8 images;
            has several sizes without stored_size; has a class without training examples, or fewer
            classes than `class_subset`; or there is no place for resized images.
    """
    readings = []
    for name in names:
        builder = _builder(name, data_dir)
        roles = splits.roles(name, [*builder.info.splits], test_split, validation_split)
        parts = _parts(roles, train_per_class, test_per_class)
        reading = _Reading(name, builder, parts, tuple(roles.notes_about(name)))
        readings += _by_domain(reading, domain_field) if domain_field else [reading]
    left_out = 0
    if class_subset:
        trained = [_labels(each, each.parts["train"])[1] for each in readings]
        classes = np.unique(np.concatenate(trained))
        classes = classes[classes != labelling.UNLABELLED]
        kept = tuple(first_classes(classes, class_subset, names[0]).tolist())
        left_out = len(classes) - len(kept)
        readings = [
            each._replace(
                parts={role: part._replace(classes=kept) for role, part in each.parts.items()}
            )
            for each in readings
        ]
    data_sets = []
    for each in readings:
        notes = [*each.notes]
        read = {
            role: _with_label(*_read(each, part, stored_size, cache_dir), each.name, role, notes)
            for role, part in each.parts.items()
        }
        data_sets.append(
            LabelledArrays(
                *read["train"],
                *read["test"],
                name=each.name,
                left_out_classes=left_out,
                validation=read.get("validation"),
                notes=tuple(notes),
            )
        )
    check_one_shape(data_sets)
    return _renumbered(data_sets, readings[0].builder.info.features["label"])


def _by_domain(reading: _Reading, field: str) -> list[_Reading]:
    """Part a data set by the values that a field has in its training split."""
    name, builder, parts, notes = reading
    feature = prepared.field_of(builder, field, name)
    values = np.unique(_field_of_split(builder, parts["train"].split, field)).tolist()
    return [
        _Reading(
            f"{name}/{prepared.domain_of(feature, value)}",
            builder,
            {role: part._replace(domain=(field, value)) for role, part in parts.items()},
            notes,
        )
        for value in values
    ]


def _builder(name: str, data_dir: str) -> Any:
    """Find a prepared data set, and check that it has labelled uint8 images."""
    builder = prepared.find(name, data_dir)
    import tensorflow_datasets as tfds  # after `find`, which says so where it is not installed

    features = dict(builder.info.features.items())
    for field, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if not isinstance(features.get(field), kind):
            texts = "; a text model reads text" if "text" in features else ""
            raise InvalidInput(
                f"dataset={name}: has no feature {field!r} of type {kind.__name__}; it has "
                f"{', '.join(features)}{texts}"
            )
    image = features["image"]
    if image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise InvalidInput(
            f"dataset={name}: its images are {np.dtype(image.np_dtype)} {image.shape}; uint8 "
            "(height, width, channels) is needed"
        )
    return builder


def _parts(roles: splits.Roles, train_per_class: int, test_per_class: int) -> dict[str, _Part]:
    """Choose the split, or side of a split, for each role."""
    sides = ("train", "test") if roles.test is None else ("", "")
    parts = {
        "train": _Part(roles.train, sides[0], train_per_class),
        "test": _Part(roles.test or roles.train, sides[1], test_per_class),
    }
    return parts | ({"validation": _Part(roles.validation)} if roles.validation else {})


def _with_label(
    images: np.ndarray, labels: np.ndarray, name: str, role: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    rows = labelling.with_label(labels, name, role, notes)
    # A selection of all would copy what lies in a file.
    return (images, labels) if len(rows) == len(labels) else (images[rows], labels[rows])


def _read(
    reading: _Reading, part: _Part, stored_size: int, cache_dir: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels of a part, from the cache if they were resized before."""
    name, builder = reading.name, reading.builder
    channels = builder.info.features["image"].shape[-1] or 3
    shape = (stored_size, stored_size, channels)
    stem, folders = _stem(builder, part), _folders(builder, stored_size, cache_dir)
    stored = stored_images.cached(folders, stem, shape) if stored_size else None
    if stored:
        return stored
    positions = _positions(reading, part)
    count = builder.info.splits[part.split].num_examples if positions is None else len(positions)
    labels: list[int] = []

    # Labels are collected as the images are drawn, so that the files are read once.
    def encoded() -> Iterator[bytes]:
        for example in prepared.examples(builder, part.split, ("image", "label"), positions):
            labels.append(int(example["label"]))
            yield example["image"]

    images = stored_images.decoded(encoded(), name, channels, stored_size)
    if stored_size:
        shown = tqdm.tqdm(images, f"{name}, {part.split}: resizing", count, disable=None)
        return stored_images.keep(folders, stem, shown, labels, count, shape)
    return stored_images.gathered(images, name, count), np.asarray(labels, np.int64)


def _positions(reading: _Reading, part: _Part) -> np.ndarray | None:
    """Find the places of a part's examples in its split, rising; `None` for all."""
    if part == _Part(part.split):
        return None
    positions, labels = _labels(reading, part)
    if part.classes is not None:
        chosen = np.isin(labels, part.classes)
        positions, labels = positions[chosen], labels[chosen]
        if not len(labels):
            raise InvalidInput(
                f"class_subset={len(part.classes)}: split {part.split} of {reading.name} has no "
                "example of these classes; choose more, or 0 for all"
            )
    return positions[first_of_each_class(labels, part.per_class)]


def _labels(reading: _Reading, part: _Part) -> tuple[np.ndarray, np.ndarray]:
    """Read the labels of a split's side alone, with their places, so that no image is decoded."""
    labels = _field_of_split(reading.builder, part.split, "label")
    positions = np.arange(len(labels))
    if part.domain:
        field, value = part.domain
        positions = np.flatnonzero(_field_of_split(reading.builder, part.split, field) == value)
        if not len(positions):
            raise InvalidInput(
                f"dataset={reading.name}: split {part.split} has no example of this domain; name "
                "another field with domain_field"
            )
    if part.side:
        positions = positions[splits.divided(reading.name, labels[positions])[part.side]]
    return positions, labels[positions]


# A subset of the classes asks for the labels of a split up to three times.
@functools.lru_cache(maxsize=6)
def _field_of_split(builder: Any, split: str, field: str) -> np.ndarray:
    examples = prepared.examples(builder, split, (field,))
    return np.asarray([example[field] for example in examples])


def _stem(builder: Any, part: _Part) -> str:
    """Name a part; the name changes if another data set is prepared under the same version."""
    split = builder.info.splits[part.split]
    # The sizes and the first bytes tell one preparation from another.
    seal = hashlib.sha256(repr((split.shard_lengths, split.num_bytes)).encode())
    with contextlib.suppress(OSError), split.filepaths[0].open("rb") as file:
        seal.update(file.read(1 << 16))
    words = [part.split, seal.hexdigest()[:12]]
    words += [part.side] if part.side else []
    words += [f"first_{part.per_class}"] if part.per_class else []
    if part.domain:
        words += [hashlib.sha256(repr(part.domain).encode()).hexdigest()[:8]]
    if part.classes is not None:
        numbers = hashlib.sha256(repr(part.classes).encode()).hexdigest()
        words += [f"{len(part.classes)}_classes_{numbers[:8]}"]
    return "-".join(words)


def _folders(builder: Any, stored_size: int, cache_dir: str) -> list[Path]:
    """List folders for resized images, the best one first."""
    inside = Path(builder.info.full_name) / f"{stored_size}px"
    version = Path(os.fspath(builder.data_path))
    # A data set in a bucket has no folder beside it.
    depth = len(Path(builder.info.full_name).parts)
    beside = version.parents[depth - 1] if version.is_dir() else None
    return stored_images.folders(inside, beside, cache_dir)


def _renumbered(data_sets: list[LabelledArrays], feature: Any) -> list[LabelledArrays]:
    """Number the classes that have a training example in any data set 0..C-1."""
    # imagenet_r declares 1,000 classes and has 200; the others are dropped, in their order.
    classes = labelling.classes_of(
        [arrays.train_labels for arrays in data_sets],
        [labels for arrays in data_sets for _, labels in arrays.parts()[1:]],
        data_sets[0].name,
        feature.names if feature.num_classes else None,
    )
    return [
        arrays.with_parts([(x, classes.numbers(y)) for x, y in arrays.parts()])._replace(
            class_names=classes.names
        )
        for arrays in data_sets
    ]
