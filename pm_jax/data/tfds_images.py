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

from pm_jax.data import prepared, stored_images
from pm_jax.data.stream import LabelledArrays, first_classes, first_of_each_class
from pm_jax.types import InvalidInput, cause

DOMAINS = {"domainnet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")}
"""Data sets with a configuration for each domain, in the order of the tasks."""

TEST_FRACTION = 0.2


class _Part(NamedTuple):
    """Examples to read: a split, the side of its division (if any), and their number per class."""

    split: str
    side: str
    per_class: int
    # Classes to keep, by the data set's own numbers; `None` for all.
    classes: tuple[int, ...] | None = None


def load_images(
    names: Sequence[str],
    data_dir: str = "",
    *,
    class_subset: int = 0,
    train_per_class: int = 0,
    test_per_class: int = 0,
    stored_size: int = 0,
    cache_dir: str = "",
) -> list[LabelledArrays]:
    """Load image data sets that tensorflow-datasets has prepared; several share their classes.

    With a `class_subset` images of other classes than the first so many are not decoded.

    Raises:
        InvalidInput: a data set is unknown, not prepared, damaged, or has no labelled uint8 images;
            has several sizes without stored_size; has a class without training examples, or fewer
            classes than `class_subset`; or there is no place for resized images.
    """
    builders = [_builder(name, data_dir) for name in names]
    of_each = [
        _parts(name, builder, train_per_class, test_per_class)
        for name, builder in zip(names, builders, strict=True)
    ]
    left_out = 0
    if class_subset:
        trained = [
            _labels(name, builder, parts[0])[1]
            for name, builder, parts in zip(names, builders, of_each, strict=True)
        ]
        classes = np.unique(np.concatenate(trained))
        kept = tuple(first_classes(classes, class_subset, names[0]).tolist())
        left_out = len(classes) - len(kept)
        of_each = [[part._replace(classes=kept) for part in parts] for parts in of_each]
    data_sets = []
    for name, builder, parts in zip(names, builders, of_each, strict=True):
        train, test = (_read(name, builder, part, stored_size, cache_dir) for part in parts)
        data_sets.append(LabelledArrays(*train, *test, name=name, left_out_classes=left_out))
    shapes = {images.shape[1:] for arrays in data_sets for images in (arrays[0], arrays[2])}
    if len(shapes) > 1:
        raise InvalidInput(
            f"dataset={names[0]}: its parts have images of the shapes "
            f"{' and '.join(map(str, sorted(shapes)))}; set stored_size to bring them to one size"
        )
    return _renumbered(data_sets, builders[0].info.features["label"])


def _builder(name: str, data_dir: str) -> Any:
    """Find a prepared data set, and check that it has labelled uint8 images."""
    import tensorflow_datasets as tfds

    builder = prepared.find(name, data_dir)
    features = dict(builder.info.features.items())
    for field, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if not isinstance(features.get(field), kind):
            raise InvalidInput(
                f"dataset={name}: has no feature {field!r} of type {kind.__name__}; it has "
                f"{', '.join(features)}"
            )
    image = features["image"]
    if image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise InvalidInput(
            f"dataset={name}: its images are {np.dtype(image.np_dtype)} {image.shape}; uint8 "
            "(height, width, channels) is needed"
        )
    return builder


def _parts(name: str, builder: Any, train_per_class: int, test_per_class: int) -> list[_Part]:
    """Choose the split, or side of a split, to train on and the one to test on."""
    splits = builder.info.splits
    # Without a split for testing, the one for validation is used.
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    if "train" in splits and held_out:
        parts = [_Part("train", "", train_per_class), _Part(held_out, "", test_per_class)]
    else:
        # ImageNet-R and -A have one split: 20 % of every class are for testing, as many as
        # the 24,000 and 6,000 images of ImageNet-R in L2P (https://arxiv.org/abs/2112.08654).
        only = "train" if "train" in splits else "test"
        parts = [_Part(only, "train", train_per_class), _Part(only, "test", test_per_class)]
    if parts[0].split not in splits:
        raise InvalidInput(
            f"dataset={name}: needs a split 'train' or 'test'; it has {', '.join(splits)}"
        )
    return parts


def _read(
    name: str, builder: Any, part: _Part, stored_size: int, cache_dir: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels of a part, from the cache if they were resized before."""
    channels = builder.info.features["image"].shape[-1] or 3
    shape = (stored_size, stored_size, channels)
    stem, folders = _stem(builder, part), _folders(builder, stored_size, cache_dir)
    stored = stored_images.cached(folders, stem, shape) if stored_size else None
    if stored:
        return stored
    positions = _positions(name, builder, part)
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


def _positions(name: str, builder: Any, part: _Part) -> np.ndarray | None:
    """Find the places of a part's examples in its split, rising; `None` for all."""
    if not part.side and not part.per_class and part.classes is None:
        return None
    positions, labels = _labels(name, builder, part)
    if part.classes is not None:
        chosen = np.isin(labels, part.classes)
        positions, labels = positions[chosen], labels[chosen]
        if not len(labels):
            raise InvalidInput(
                f"class_subset={len(part.classes)}: split {part.split} of {name} has no example of "
                "these classes; choose more, or 0 for all"
            )
    return positions[first_of_each_class(labels, part.per_class)]


def _labels(name: str, builder: Any, part: _Part) -> tuple[np.ndarray, np.ndarray]:
    """Read the labels of a split's side alone, with their places, so that no image is decoded."""
    labels = _labels_of_split(builder, part.split)
    positions = _divided(name, labels)[part.side] if part.side else np.arange(len(labels))
    return positions, labels[positions]


# A subset of the classes asks for the labels of a split up to three times.
@functools.lru_cache(maxsize=4)
def _labels_of_split(builder: Any, split: str) -> np.ndarray:
    examples = prepared.examples(builder, split, ("label",))
    return np.fromiter((example["label"] for example in examples), np.int64)


def _divided(name: str, labels: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn import model_selection

    try:
        sides = model_selection.train_test_split(
            np.arange(len(labels)), test_size=TEST_FRACTION, random_state=0, stratify=labels
        )
    except ValueError as error:
        fewest = "it is empty"
        if len(labels):
            classes, counts = np.unique(labels, return_counts=True)
            fewest = f"its class {classes[counts.argmin()]} has {counts.min()} examples"
        raise InvalidInput(
            f"dataset={name}: its only split cannot be divided to train and to test "
            f"({cause(error)}); {fewest}, prepare more"
        ) from None
    return {"train": np.sort(sides[0]), "test": np.sort(sides[1])}


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
    if part.classes is not None:
        numbers = hashlib.sha256(repr(part.classes).encode()).hexdigest()
        words += [f"{len(part.classes)}_classes_{numbers[:8]}"]
    return "-".join(words)


def _folders(builder: Any, stored_size: int, cache_dir: str) -> list[Path]:
    """List folders for resized images, the best one first."""
    inside = Path(builder.info.full_name) / f"{stored_size}px"
    if cache_dir:
        return [Path(cache_dir) / inside]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    places = [user_cache / "pm_jax" / inside]
    version = Path(os.fspath(builder.data_path))
    # A data set in a bucket has no folder beside it.
    if version.is_dir():
        depth = len(Path(builder.info.full_name).parts)
        places.insert(0, version.parents[depth - 1] / "pm_jax_images" / inside)
    return places


def _renumbered(data_sets: list[LabelledArrays], classes: Any) -> list[LabelledArrays]:
    """Number the classes that have a training example in any data set 0..C-1."""
    # imagenet_r declares 1,000 classes and has 200; the others are dropped, in their order.
    trained = np.unique(np.concatenate([arrays.train_labels for arrays in data_sets]))
    tested = np.unique(np.concatenate([arrays.test_labels for arrays in data_sets]))
    name = data_sets[0].name
    if min(*trained, *tested) < 0:
        raise InvalidInput(f"dataset={name}: has examples without label")
    if len(missing := np.setdiff1d(tested, trained)):
        raise InvalidInput(
            f"dataset={name}: class {missing[0]} ({classes.int2str(missing[0])}) has test examples "
            "and no training example"
        )
    named = tuple(classes.int2str(label) for label in trained.tolist())
    # Without names of its own a data set calls its classes by their numbers.
    names = None if named == tuple(map(str, range(len(named)))) else named
    return [
        arrays._replace(
            class_names=names,
            train_labels=np.searchsorted(trained, arrays.train_labels),
            test_labels=np.searchsorted(trained, arrays.test_labels),
        )
        for arrays in data_sets
    ]
