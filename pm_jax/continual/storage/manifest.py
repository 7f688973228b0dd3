"""The manifest of a directory: what was saved in it, by size and checksum.

A file leaves the manifest before it is written and enters it afterwards. A process that is killed
in between leaves a file that is not listed, never one that looks damaged. Every directory gets its
manifest before its first file, so that a missing manifest is noticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pm_jax import files
from pm_jax.continual.placement import processes

FILE = "manifest.json"
ASIDE = "damaged_"
"""A damaged file that is kept has this in front of its name."""
FORM = {"about": {}, "files": {str: {"bytes": int, "sha256": str}}}

Entry = Mapping[str, Any]
"""`{"bytes": size, "sha256": hexadecimal}` of a file."""


class DamagedManifest(ValueError):
    """A manifest whose bytes differ from those written."""


class Damage(NamedTuple):
    """A damaged file, or a whole folder that is missing."""

    # Path in the directory, with slashes.
    name: str
    # The problem, worded to follow the name.
    what: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files that were saved in a directory, and notes about them."""

    # Entries by path in the directory, with slashes.
    files: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    # Notes by name, as JSON.
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def content(self) -> bytes:
        """Return the manifest as the bytes of its file, which end with their own checksum."""
        fields = {"about": dict(self.about), "files": dict(self.files)}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        text = json.dumps(fields | {"sha256": digest}, indent=1, sort_keys=True)
        return text.encode() + b"\n"

    def within(self, *names: str) -> dict[str, Entry]:
        """Return the entries of some files; a folder's name stands for all files in it."""
        return {
            path: entry
            for path, entry in self.files.items()
            if any(path == name or path.startswith(f"{name}/" if name else "") for name in names)
        }

    @classmethod
    def of(cls, content: bytes) -> "Manifest":
        """Parse the bytes of a manifest's file.

        Raises:
            DamagedManifest: the bytes differ from those written.
        """
        try:
            fields = files.parse_json(content, FORM)
            manifest = cls(fields["files"], fields["about"])
            # Written once more and compared, so that not even a changed space goes unnoticed.
            whole = manifest.content() == content and all(map(_is_inside, manifest.files))
        except (ValueError, RecursionError):  # json.dumps nests less deeply than json.loads
            whole = False
        if not whole:
            raise DamagedManifest
        return manifest


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read(directory: Path) -> Manifest:
    """Read the manifest of a directory.

    Raises:
        FileNotFoundError: there is none.
        DamagedManifest: it differs from what was written.
    """
    return Manifest.of((directory / FILE).read_bytes())


def read_or_empty(directory: Path, folder: str = "") -> Manifest:
    """Read the entries of a folder in a directory; an absent or damaged manifest has none."""
    try:
        manifest = read(directory)
    except (OSError, DamagedManifest):
        return Manifest()
    return dataclasses.replace(manifest, files=manifest.within(folder))


def checksums(directory: Path, *names: str) -> dict[str, Entry]:
    """Measure files, or all files of folders, as they are now; what is absent is left out.

    Raises:
        OSError: a file cannot be read.
    """
    entries: dict[str, Entry] = {}
    for name in names:
        for path in (directory / name, *(directory / name).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    # The position, not a second look: the file may grow meanwhile.
                    entry = {"bytes": file.tell(), "sha256": digest}
                entries[path.relative_to(directory).as_posix()] = entry
    return entries


def damage(directory: Path, entries: Mapping[str, Entry]) -> list[Damage]:
    """List the files that differ from their entries; a missing folder is listed once."""
    damages = (_damage(directory, name, entry) for name, entry in sorted(entries.items()))
    # Every file of a missing folder reports the folder: keep the first report only.
    return list(dict.fromkeys(damage for damage in damages if damage))


def _damage(directory: Path, name: str, entry: Entry) -> Damage | None:
    try:
        status = (directory / name).stat()
        if not stat.S_ISREG(status.st_mode):
            return Damage(name, "is no file any more")
        if status.st_size != entry["bytes"]:
            return Damage(name, f"has {status.st_size} bytes, not the {entry['bytes']} saved")
        if checksums(directory, name)[name] != entry:
            return Damage(name, "has other bytes than were saved")
    except (FileNotFoundError, NotADirectoryError):
        above = reversed((PurePosixPath(name), *PurePosixPath(name).parents[:-1]))
        gone = next(path for path in above if not (directory / path).exists())
        return Damage(str(gone), "is missing")
    except (OSError, ValueError) as error:
        return Damage(name, f"cannot be read ({getattr(error, 'strerror', None) or error})")
    return None


@contextlib.contextmanager
def covering(directory: Path, *names: str) -> Iterator[None]:
    """Keep files and folders out of the manifest while they are written, and enter them then."""
    uncover(directory, *names)
    # After an error they stay out of the manifest, as they may be incomplete.
    yield
    cover(directory, *names)


def uncover(directory: Path, *names: str) -> None:
    """Take files and folders out of the manifest, before they are written or deleted."""
    manifest = _read_to_rewrite(directory)
    gone = manifest.within(*names)
    kept = {name: entry for name, entry in manifest.files.items() if name not in gone}
    _write(directory, dataclasses.replace(manifest, files=kept))


def cover(directory: Path, *names: str) -> None:
    """Enter files and folders as they are now, except those that the manifest already lists."""
    manifest = _read_to_rewrite(directory)
    missing = (name for name in names if not manifest.within(name))
    enter(directory, checksums(directory, *missing))


def enter(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Add entries to the manifest."""
    manifest = _read_to_rewrite(directory)
    _write(directory, dataclasses.replace(manifest, files={**manifest.files, **entries}))


def note(directory: Path, **about: Any) -> None:
    """Add notes to the manifest, and make the directory if it is absent."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = _read_to_rewrite(directory)
    _write(directory, dataclasses.replace(manifest, about={**manifest.about, **about}))


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `damaged_<name>`, numbered if that name is in use."""
    aside, number = path.with_name(ASIDE + path.name), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{ASIDE}{path.name}_{number}")
    return path.rename(aside)


def _read_to_rewrite(directory: Path) -> Manifest:
    """Read the manifest for a change; a damaged one is set aside, and a new one begins."""
    try:
        return read(directory)
    except FileNotFoundError:
        return Manifest()
    except DamagedManifest:
        # Only one of several processes may rename the file.
        if not processes.is_first():
            return Manifest()
        aside = set_aside(directory / FILE)
        print(
            f"warning: {directory / FILE} is damaged; kept as {aside.name}, what it covered can "
            "no longer be verified",
            file=sys.stderr,
            flush=True,
        )
        return Manifest()


def _write(directory: Path, manifest: Manifest) -> None:
    path, content = directory / FILE, manifest.content()
    if not processes.is_first():
        return
    # An unchanged file keeps its time of change.
    if path.exists() and path.read_bytes() == content:
        return
    with files.replacing(path) as temporary:
        temporary.write_bytes(content)
