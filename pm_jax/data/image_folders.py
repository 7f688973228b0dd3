"""Folders of images: a folder for each class, within one for each split or domain."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from pm_jax import files
from pm_jax.data import splits as split_names
from pm_jax.data import stored_images
from pm_jax.data.assembling import Split, assembled
from pm_jax.data.labels import in_order
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHANNELS = 3
LAYOUT = "images lie in CLASS, or DOMAIN/CLASS, of train, val and test folders or of none"


class Listing(NamedTuple):
    """The images of one split, by their paths in the folder.

    Attributes:
        paths: in alphabetical order.
        labels: names of the classes, strings [N].
        domains: of the domains, strings [N]; `None` without.
    """

    paths: list[str]
    labels: np.ndarray
    domains: np.ndarray | None


def load(
    root: Path,
    *,
    test_split: str = "",
    validation_split: str = "",
    stored_size: int = 0,
    cache_dir: str = "",
    skip_unreadable: bool = False,
    **keeping: Any,
) -> list[LabelledArrays]:
    """Load the images of a folder, uint8 [N, H, W, 3]; `keeping` is as `assembled` takes it.

    Raises:
        InvalidInput: the folder has another layout or no images, or one cannot be read.
    """
    listings, notes = listed(root)
    roles = split_names.roles(str(root), list(listings), test_split, validation_split)
    notes += roles.notes_about(_name_of(root))
    skipped: list[str] = []
    reading = _Reading(root, stored_size, cache_dir, skipped if skip_unreadable else None)
    splits = {role: reading.split(split, listings[split]) for role, split in roles.named().items()}
    name = _name_of(root)
    data_sets = assembled(name, splits, notes=notes, **keeping)
    if skipped:
        note = f"{name}: {len(skipped)} unreadable images are skipped: {files.listed(skipped)}"
        data_sets = [arrays._replace(notes=(*arrays.notes, note)) for arrays in data_sets]
    return data_sets


def listed(root: Path) -> tuple[dict[str, Listing], list[str]]:
    """List the images of a folder by split ("train" where there are none), and lines about it.

    Raises:
        InvalidInput: there is no such folder, or it has another layout or no images.
    """
    if not root.is_dir():
        raise InvalidInput(f"dataset={root}: there is no such folder")
    images, others, empty = _walked(root)
    if not images:
        raise InvalidInput(f"dataset={root}: has no images; {LAYOUT}")
    order = _order_of_levels([*images])
    depths = {len(folder): folder for folder in images}
    if len(depths) > 1:
        one, other = ("/".join(folder) or "." for folder in [*depths.values()][:2])
        raise InvalidInput(
            f"dataset={root}: has images in {one} and in {other}, at several depths; {LAYOUT}"
        )
    if (depth := next(iter(depths))) != len(order):
        raise InvalidInput(
            f"dataset={root}: has images in {'/'.join(depths[depth]) or 'itself'}; {LAYOUT}"
        )
    by_split: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for folder in sorted(images):
        levels = dict(zip(order, folder, strict=True))
        found = by_split.setdefault(levels.get("split", "train"), [])
        found += [("/".join((*folder, name)), levels) for name in sorted(images[folder])]
    listings = {
        split: Listing(
            [path for path, _ in found],
            np.asarray([levels["class"] for _, levels in found]),
            np.asarray([levels["domain"] for _, levels in found]) if "domain" in order else None,
        )
        for split, found in by_split.items()
    }
    return listings, _notes(root, order, listings, others, empty)


def _walked(root: Path) -> tuple[dict[tuple[str, ...], list[str]], list[str], list[str]]:
    """Find the names of images by their folders, other files, and folders without files."""
    images: dict[tuple[str, ...], list[str]] = {}
    others, empty = [], []

    def fail(error: OSError) -> None:
        raise InvalidInput(
            f"dataset={root}: {error.filename} cannot be read ({error.strerror}); set its "
            "permissions right"
        ) from error

    for path, folders, names in os.walk(root, onerror=fail, followlinks=True):
        # Systems leave hidden files behind, such as .DS_Store.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in names if not name.startswith(".")]
        folder = Path(path).relative_to(root)
        found = [name for name in names if name.lower().endswith(ENDINGS)]
        if found:
            images[folder.parts] = found
        elif not folders:
            empty.append(folder.as_posix())
        others += [
            (folder / name).as_posix() for name in names if not name.lower().endswith(ENDINGS)
        ]
    return images, others, empty


def _order_of_levels(folders: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Tell what the levels of folders are: splits are known by their names."""
    depth = max(map(len, folders))
    levels = [{folder[level] for folder in folders if len(folder) > level} for level in range(2)]
    # A class of vehicles may be called "train".
    if _are_splits(levels[0]) and (depth > 1 or levels[0] <= {*split_names.KNOWN}):
        order: tuple[str, ...] = ("split", "domain", "class")
        return order if depth > 2 else ("split", "class")
    if depth > 2 and _are_splits(levels[1]):
        return ("domain", "split", "class")
    return ("domain", "class") if depth > 1 else ("class",)


def _are_splits(names: set[str]) -> bool:
    return "train" in names or (bool(names) and names <= {*split_names.KNOWN})


def _notes(
    root: Path,
    order: Sequence[str],
    listings: Mapping[str, Listing],
    others: Sequence[str],
    empty: Sequence[str],
) -> list[str]:
    name, notes = _name_of(root), []
    if "domain" in order:
        found = [each.domains for each in listings.values() if each.domains is not None]
        domains = in_order(np.concatenate(found)).tolist()
        notes.append(
            f"{name}: its folders are {'/'.join(order)}; the domains are {files.listed(domains)}"
        )
    if others:
        notes.append(f"{name}: {len(others)} files are no images: {files.listed(others)}")
    if empty:
        notes.append(f"{name}: {len(empty)} folders have no images: {files.listed(empty)}")
    return notes


def _name_of(root: Path) -> str:
    """Return the name of a folder, which may be given as "." too."""
    return root.absolute().name


class _Reading(NamedTuple):
    """How the images of a folder are read; unreadable ones are skipped where there is a list."""

    root: Path
    stored_size: int
    cache_dir: str
    skipped: list[str] | None

    def split(self, name: str, listing: Listing) -> Split:
        """Make a split whose images are read when they are wanted."""

        def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            paths = [listing.paths[position] for position in positions.tolist()]
            images, kept = self._images(name, paths)
            if self.skipped is not None:
                readable = {*kept.tolist()}
                self.skipped.extend(p for i, p in enumerate(paths) if i not in readable)
            return images, positions[kept]

        return Split(listing.labels, read, listing.domains)

    def _images(self, split: str, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Read images, and the places of those that could be read among the paths."""
        shown, size, count = f"{self.root}, {split}", self.stored_size, len(paths)
        shape, stem = (size, size, CHANNELS), f"{split}-{self._seal(paths)}"
        inside = Path(_name_of(self.root)) / f"{size}px"
        folders = stored_images.folders(inside, self.root.absolute().parent, self.cache_dir)
        stored = stored_images.cached(folders, stem, shape) if size else None
        # Another call may have skipped images that this one must not.
        if stored and (self.skipped is not None or len(stored[1]) == count):
            return stored
        unread: list[int] | None = None if self.skipped is None else []
        kept: list[int] = []
        encoded = (self.root / path for path in paths)
        images = stored_images.decoded(encoded, str(self.root), CHANNELS, size, unread)

        def until_the_end() -> Iterator[np.ndarray]:
            yield from images
            # Only now is it known which images could not be read.
            kept.extend(np.setdiff1d(np.arange(count), unread or []).tolist())
            if not kept:
                raise InvalidInput(
                    f"dataset={self.root}: none of {count} images of {split} can be read; mend them"
                )

        if size:
            bar = tqdm.tqdm(until_the_end(), f"{shown}: resizing", count, disable=None)
            return stored_images.keep(folders, stem, bar, kept, count, shape)
        return stored_images.gathered(until_the_end(), str(self.root), count), np.asarray(kept)

    def _seal(self, paths: Sequence[str]) -> str:
        """Hash names, sizes and times of change, by which one preparation differs from another."""
        seal = hashlib.sha256()
        for path in paths if self.stored_size else ():
            status = (self.root / path).stat()
            seal.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
        return seal.hexdigest()[:16]
