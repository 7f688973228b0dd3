"""Decoding images into uint8 arrays, and a cache of images that had to be resized."""

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
from pm_jax.data.packages import needed_for
from pm_jax.types import InvalidInput

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""

CHUNK = 256
"""Encoded images in memory at a time."""


def decoded(
    encoded: Iterable[bytes | Path],
    name: str,
    channels: int = 3,
    side: int = 0,
    skipped: list[int] | None = None,
) -> Iterator[np.ndarray]:
    """Decode image files with Pillow, in threads, and yield uint8 [H, W, channels] in their order.

    Args:
        encoded: the contents of files, or their paths.
        name: of the data set, for messages.
        channels: of the images that are returned.
        side: of the squares that they are resized to; 0 to leave them.
        skipped: gets the numbers of images that cannot be decoded, which are left out.

    Raises:
        InvalidInput: an image cannot be decoded and `skipped` is `None`.
    """
    with needed_for(f"dataset={name}"):
        from PIL import Image, ImageOps

    def decode(data: bytes | Path) -> np.ndarray | InvalidInput:
        try:
            # Files are read here, in the thread.
            content = data.read_bytes() if isinstance(data, Path) else data
            with Image.open(io.BytesIO(content)) as image:
                # Pillow would cut values beyond 255 off.
                if image.mode in ("I", "F") or image.mode.startswith("I;"):
                    raise ValueError(f"its mode is {image.mode}, not 8 bits a channel")
                converted = image.convert(MODES[channels])
        except Exception as error:  # Pillow raises many types for damaged files.
            return _unreadable(name, data, error)
        if side:
            # The largest central square, so that no image is distorted.
            converted = ImageOps.fit(converted, (side, side), Image.Resampling.BICUBIC)
        return np.asarray(converted).reshape(*converted.size[::-1], channels)

    remaining, numbers = iter(encoded), itertools.count()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # In chunks, as `map` would draw all encoded images at once.
        while chunk := list(itertools.islice(remaining, CHUNK)):
            for image in pool.map(decode, chunk):
                number = next(numbers)
                if isinstance(image, np.ndarray):
                    yield image
                elif skipped is None:
                    raise image
                else:
                    skipped.append(number)


def _unreadable(name: str, data: bytes | Path, error: Exception) -> InvalidInput:
    if isinstance(data, Path):
        # The message of a library names the file, or a buffer in memory.
        reason = f"{type(error).__name__}: {error}".split(" <_io")[0]
        line = InvalidInput(
            f"dataset={name}: {data} cannot be read as an image ({reason}); mend or remove it, or "
            "set skip_unreadable"
        )
    else:
        line = InvalidInput(
            f"dataset={name}: holds an image that cannot be decoded "
            f"({type(error).__name__}: {error}); prepare it again"
        )
    line.__cause__ = error
    return line


def gathered(images: Iterable[np.ndarray], name: str, count: int) -> np.ndarray:
    """Gather images of one size, at least one and at most `count`, into one array.

    Raises:
        InvalidInput: the images differ in size.
    """
    remaining = iter(images)
    first = next(remaining)
    result, number = np.empty((count, *first.shape), np.uint8), 0
    for number, image in enumerate(itertools.chain([first], remaining), start=1):
        if image.shape != first.shape:
            sizes = " and ".join(f"{i.shape[1]}x{i.shape[0]}" for i in (first, image))
            raise InvalidInput(
                f"dataset={name}: has images of several sizes, {sizes} pixels; "
                "set stored_size to bring them to one"
            )
        result[number - 1] = image
    return result[:number]


def as_rgb(images: np.ndarray, name: str) -> np.ndarray:
    """Convert images of 1, 2 or 4 channels to three, and drop alpha.

    Raises:
        InvalidInput: the images have another number of channels.
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


def folders(inside: Path, beside: Path | None, cache_dir: str) -> list[Path]:
    """List folders for resized images, the best one first: beside the data, or the user's cache."""
    if cache_dir:
        return [Path(cache_dir) / inside]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    places = [user_cache / "pm_jax" / inside]
    return [beside / "pm_jax_images" / inside, *places] if beside else places


def cached(
    folders: Sequence[Path], stem: str, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Look for images of a shape that `keep` has stored, and their labels; `None` without any."""
    for folder in folders:
        try:
            images = np.load(folder / f"{stem}.images.npy", mmap_mode="r")
            labels = np.load(folder / f"{stem}.labels.npy")
        except Exception:
            # NumPy raises many types for damaged files, which are made anew.
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
    """Store images one by one, at most `count`, and return them as `cached` does.

    Raises:
        InvalidInput: no folder can be written, or the disk is full.
    """
    folder = _writable(folders)

    def header(number: int) -> dict:
        return {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}

    try:
        with _writing(folder / f"{stem}.images.npy") as file:
            # The header of an .npy file; the images follow one by one, never all in memory.
            np.lib.format.write_array_header_1_0(file, header(count))
            written = 0
            for image in images:
                file.write(image.tobytes())
                written += 1
            # NumPy leaves room in the header for a first axis of any length.
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header(written))
        # The labels come last: they grow while the images are drawn from the files.
        with _writing(folder / f"{stem}.labels.npy") as file:
            np.save(file, np.asarray(labels, np.int64))
    except OSError as error:
        raise InvalidInput(
            f"cache_dir={folder}: resized images cannot be stored ({error}); name another place"
        ) from error
    stored = cached([folder], stem, shape)
    if stored is None:
        raise InvalidInput(
            f"cache_dir={folder}: what was stored cannot be read; name another place"
        )
    return stored


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
