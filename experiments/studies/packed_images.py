"""Images of a prepared data set in one small file, for a machine without tensorflow-datasets.

JPEG files go in as they are. Other images of a class become one image, one below the other, in
lossless WebP, which takes half of their PNG files.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.continual import Config
from pm_jax.data import prepared, stored_images
from pm_jax.types import InvalidInput, cause

SPLITS = ("train", "test")
HIGHEST = 16383
"""Pixels from top to bottom that WebP can have."""


def pack(config: Config, path: Path) -> None:
    """Pack the images that a class-incremental run would read from a prepared data set.

    Raises:
        InvalidInput: the data set is unknown, not prepared, damaged, or has images of several
            sizes that are no JPEG files.
    """
    arrays: dict[str, Any] = {}
    per_class = (config.train_per_class, config.test_per_class)
    classes: list[int] | None = None
    for split, count in zip(SPLITS, per_class, strict=True):
        groups = _by_class(config, split)
        if classes is None:
            classes = sorted(groups)[: config.class_subset or None]
        packed = [
            (label, number, data)
            for label in classes
            for number, data in _together(groups.get(label, [])[: count or None], config.dataset)
        ]
        labels, counts, contents = zip(*packed, strict=True)
        arrays[f"labels_{split}"], arrays[f"counts_{split}"] = np.array(labels), np.array(counts)
        arrays[f"sizes_{split}"] = np.array([len(data) for data in contents])
        arrays[f"files_{split}"] = np.frombuffer(b"".join(contents), np.uint8)
    _write(path, arrays)


def unpack(path: Path, output: Path) -> None:
    """Write what `pack` has packed as an `.npz` that `--dataset` takes.

    Raises:
        InvalidInput: the file is missing or damaged, or its images have several sizes.
    """
    arrays: dict[str, Any] = {}
    try:
        with path.open("rb") as file, np.load(file) as archive:
            fields = dict(archive)
        for split in SPLITS:
            ends = np.cumsum(fields[f"sizes_{split}"])[:-1]
            contents = (part.tobytes() for part in np.split(fields[f"files_{split}"], ends))
            counts = fields[f"counts_{split}"]
            images = stored_images.decoded(contents, str(path))
            parts = [
                image.reshape(count, -1, *image.shape[1:])
                for image, count in zip(images, counts, strict=True)
            ]
            arrays[f"x_{split}"] = np.concatenate(parts)
            arrays[f"y_{split}"] = np.repeat(fields[f"labels_{split}"], counts)
    except Exception as error:  # zip, NumPy and Pillow raise many types for damaged files.
        raise InvalidInput(
            f"packed={path}: cannot be read ({cause(error)}); pack the images again"
        ) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, arrays)


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _by_class(config: Config, split: str) -> dict[int, list[bytes]]:
    builder = prepared.find(config.dataset, config.data_dir, SPLITS)
    groups: dict[int, list[bytes]] = {}
    for example in prepared.examples(builder, split, ("image", "label")):
        groups.setdefault(int(example["label"]), []).append(bytes(example["image"]))
    return groups


def _together(images: list[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Yield files of one or more images of a class, and how many each holds."""
    from PIL import Image

    if images and images[0].startswith(b"\xff\xd8"):
        yield from ((1, image) for image in images)
        return
    while images:
        height = next(stored_images.decoded(images[:1], name)).shape[0]
        now, images = images[: HIGHEST // height], images[HIGHEST // height :]
        pixels = stored_images.gathered(stored_images.decoded(now, name), name, len(now))
        file = io.BytesIO()
        stacked = pixels.reshape(-1, *pixels.shape[2:])
        Image.fromarray(stacked).save(file, "WEBP", lossless=True, method=4)
        yield len(now), file.getvalue()
