"""Encoded images as uint8 arrays of one size, and a cache of those that had to be resized."""

import concurrent.futures
import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name for a number of channels."""

CHUNK = 256
"""Encoded images in memory at a time."""


def decoded(
    encoded: Iterable[bytes], name: str, channels: int = 3, side: int = 0
) -> Iterator[np.ndarray]:
    """Decode images with Pillow, in threads, in the order given.

    Args:
        encoded: PNG, JPEG, ... files.
        name: of the data set, for the error message.
        channels: 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha); images are converted.
        side: of the square that each becomes, in pixels: its largest central square, resized
            bicubically with antialiasing, as by resizing the shorter side and cropping; 0 to leave
            images as they are.

    Returns:
        uint8 images [H, W, channels], one by one.

    Raises:
        InvalidInput: an image that cannot be decoded.

    Example:
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("L", (20, 10), 7).save(file, "PNG")
        >>> [image.shape for image in decoded([file.getvalue()], "mine", side=4)]
        [(4, 4, 3)]
    """
    from PIL import Image, ImageOps

    def decode(data: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(data)) as image:
                converted = image.convert(MODES[channels])
        except Exception as error:  # Pillow raises many types for damaged files.
            raise InvalidInput(
                f"dataset={name}: holds an image that cannot be decoded "
                f"({type(error).__name__}: {error}); prepare it again"
            ) from error
        if side:
            converted = ImageOps.fit(converted, (side, side), Image.Resampling.BICUBIC)
        return np.asarray(converted).reshape(*converted.size[::-1], channels)

    remaining = iter(encoded)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(remaining, CHUNK)):
            yield from pool.map(decode, chunk)


def gathered(images: Iterable[np.ndarray], name: str, count: int) -> np.ndarray:
    """Images of one size in one array.

    Args:
        images: uint8 [H, W, channels], one by one.
        name: of the data set, for the error message.
        count: N, at least 1.

    Returns:
        uint8 [N, H, W, channels].

    Raises:
        InvalidInput: images that differ in size.

    Example:
        >>> gathered([np.zeros((4, 4, 3), np.uint8)] * 5, "mine", 5).shape
        (5, 4, 4, 3)
    """
    remaining = iter(images)
    first = next(remaining)
    result = np.empty((count, *first.shape), np.uint8)
    for place, image in zip(result, itertools.chain([first], remaining), strict=True):
        if image.shape != first.shape:
            sizes = " and ".join(f"{i.shape[1]}x{i.shape[0]}" for i in (first, image))
            raise InvalidInput(
                f"dataset={name}: has images of several sizes, {sizes} pixels; "
                "set stored_size to bring them to one"
            )
        place[...] = image
    return result


def as_rgb(images: np.ndarray, name: str) -> np.ndarray:
    """Images with the three channels that models pre-trained on photographs take.

    Args:
        images: uint8 [N, H, W, channels] with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)
            channels; alpha is dropped.
        name: of the data set, for the error message.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        InvalidInput: another number of channels.

    Example:
        >>> as_rgb(np.full((1, 1, 1, 2), [7, 255], np.uint8), "mine").tolist()
        [[[[7, 7, 7]]]]
    """
    match images.shape[-1]:
        case 1 | 2:
            return np.repeat(images[..., :1], 3, axis=-1)
        case 3 | 4:
            return images[..., :3]
    raise InvalidInput(
        f"dataset={name}: has images of {images.shape[-1]} channels; a pre-trained model takes "
        "1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)"
    )


def cached(
    folders: Sequence[Path], stem: str, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """What `keep` has stored, if it is whole.

    Args:
        folders: to look in, in this order.
        stem: first part of the file names.
        shape: of an image, [H, W, channels].

    Returns:
        Images, read from the disk when they are used, and labels; `None` where there are none.

    Example:
        >>> cached([Path("/nonexistent")], "train", (8, 8, 3))
    """
    for folder in folders:
        try:
            images = np.load(folder / f"{stem}.images.npy", mmap_mode="r")
            labels = np.load(folder / f"{stem}.labels.npy")
        except Exception:  # NumPy raises many types for damaged files, which are made anew.
            continue
        if images.dtype == np.uint8 and images.shape == (len(labels), *shape):
            return np.asarray(images), labels
    return None


def keep(
    folders: Sequence[Path],
    stem: str,
    images: Iterable[np.ndarray],
    labels: Sequence[int],
    count: int,
    shape: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Store images one by one, so that they never are in memory together.

    Args:
        folders: the first that can be written is used.
        stem: first part of the file names.
        images: uint8 [H, W, channels].
        labels: of the images; may grow while those are drawn.
        count: N.
        shape: of an image.

    Returns:
        As `cached`.

    Raises:
        InvalidInput: nowhere to write, or no room.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> found, labels = keep([folder], "x", [np.ones((2, 2, 1), np.uint8)], [3], 1, (2, 2, 1))
        >>> found.sum(), labels.tolist(), cached([folder], "x", (2, 2, 1)) is not None
        (np.uint64(4), [3], True)
    """
    folder = _writable(folders)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    try:
        with _writing(folder / f"{stem}.images.npy") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in images:
                file.write(image.tobytes())
        with _writing(folder / f"{stem}.labels.npy") as file:
            np.save(file, np.asarray(labels, np.int64))
    except OSError as error:
        raise InvalidInput(
            f"cache_dir={folder}: resized images cannot be stored ({error}); name another place"
        ) from error
    found = cached([folder], stem, shape)
    if found is None:
        raise InvalidInput(
            f"cache_dir={folder}: what was stored cannot be read; name another place"
        )
    return found


def _writable(folders: Sequence[Path]) -> Path:
    problem: OSError | None = None
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Only an attempt tells: permissions do not know of read-only mounts.
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problem = error
    raise InvalidInput(
        f"cache_dir={folders[-1]}: resized images cannot be stored ({problem}); "
        "name a place that can be written"
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all, also where other processes write the same one."""
    with files.replacing(path, unique=True) as temporary, temporary.open("wb") as file:
        yield file
