"""The manifest of a directory: what was saved in it, by size and checksum.

A file leaves the manifest before it is written and enters it afterwards. A process that is killed
in between leaves a file that is not covered, never one that looks damaged; and no file is older
than the manifest beside it, so that a manifest that is lost is missed.
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

from pm_jax import whole_files
from pm_jax.continual.placement import processes

FILE = "manifest.json"
ASIDE = "damaged_"

Entry = Mapping[str, Any]
"""`{"bytes": size, "sha256": hexadecimal}` of a file."""


class DamagedManifest(ValueError):
    """A manifest that is not as it was written."""


class Damage(NamedTuple):
    """What is wrong with a file, or with a whole folder that is missing.

    Attributes:
        name: relative, with slashes.
        what: is wrong, to follow the name and a colon.
    """

    name: str
    what: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was saved in a directory.

    Attributes:
        files: `{name: entry}`, names relative, with slashes.
        about: what else is to be known, as JSON.

    Example:
        >>> Manifest.of(Manifest(about={"seed": 0}).content()).about
        {'seed': 0}
    """

    files: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def content(self) -> bytes:
        """Of its file, which holds a checksum of itself."""
        fields = {"about": dict(self.about), "files": dict(self.files)}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        text = json.dumps(fields | {"sha256": digest}, indent=1, sort_keys=True)
        return text.encode() + b"\n"

    def within(self, *names: str) -> dict[str, Entry]:
        """The entries of files, or of folders for all that is in them."""
        return {
            name: entry
            for name, entry in self.files.items()
            if any(name == each or name.startswith(f"{each}/" if each else "") for each in names)
        }

    @classmethod
    def of(cls, content: bytes) -> "Manifest":
        """The manifest of a file's content; raises `DamagedManifest`."""
        try:
            fields = json.loads(content)
            manifest = cls(fields["files"], fields["about"])
            # Written again, so that no byte can differ, not even a space.
            whole = manifest.content() == content and all(map(_is_entry, manifest.files.items()))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise DamagedManifest
        return manifest


def _is_entry(item: tuple[str, Entry]) -> bool:
    path = PurePosixPath(item[0])
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(item[1]["bytes"], int) and isinstance(item[1]["sha256"], str)


def read(directory: Path) -> Manifest:
    """The manifest of a directory.

    Args:
        directory: that holds one.

    Returns:
        As it was written.

    Raises:
        FileNotFoundError: it holds none.
        DamagedManifest: it is not as it was written.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> note(directory, seed=0)
        >>> read(directory).about
        {'seed': 0}
    """
    return Manifest.of((directory / FILE).read_bytes())


def known(directory: Path, folder: str = "") -> Manifest:
    """As `read`, with nothing in it where it is absent or damaged.

    Args:
        directory: present or not.
        folder: of which entries are wanted; all by default.

    Returns:
        What can be relied on.

    Example:
        >>> known(Path("/nonexistent"))
        Manifest(files={}, about={})
    """
    try:
        found = read(directory)
    except (OSError, DamagedManifest):
        return Manifest()
    return dataclasses.replace(found, files=found.within(folder))


def checksums(directory: Path, *names: str) -> dict[str, Entry]:
    """Size and SHA-256 of files as they are now.

    Args:
        directory: that they are in.
        names: of files, or of folders for all that is in them; what is absent is left out.

    Returns:
        `{name: entry}`, names relative to the directory.

    Raises:
        OSError: a file that cannot be read.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> _ = (directory / "x.txt").write_text("one line")
        >>> checksums(directory, "x.txt")["x.txt"]["bytes"]
        8
    """
    found: dict[str, Entry] = {}
    for name in names:
        for path in (directory / name, *(directory / name).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    entry = {"bytes": file.tell(), "sha256": digest}
                found[path.relative_to(directory).as_posix()] = entry
    return found


def damage(directory: Path, files: Mapping[str, Entry]) -> list[Damage]:
    """The files that are not as they were saved.

    Args:
        directory: that they are in.
        files: `{name: entry}`.

    Returns:
        One for each; one only for a folder that is missing with all its files.

    Example:
        >>> damage(Path("/nonexistent"), {"seed_0/x": {"bytes": 1, "sha256": "00"}})
        [Damage(name='seed_0', what='is missing')]
    """
    found = (_damage(directory, name, entry) for name, entry in sorted(files.items()))
    return list(dict.fromkeys(each for each in found if each))


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
    """Files that are written meanwhile: not covered by the manifest until they are.

    Args:
        directory: that they are in, present.
        names: of files or folders, as for `checksums`.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> with covering(directory, "x.txt"):
        ...     _ = (directory / "x.txt").write_text("one line")
        >>> damage(directory, read(directory).files)
        []
    """
    uncover(directory, *names)
    yield
    cover(directory, *names)


def uncover(directory: Path, *names: str) -> None:
    """Take files out of the manifest, before they are written or deleted.

    Args:
        directory: that they are in, present; its manifest is made if absent.
        names: of files or folders, as for `checksums`.

    Example:
        >>> import tempfile
        >>> uncover(Path(tempfile.mkdtemp()), "x.txt")
    """
    held = _held(directory)
    gone = held.within(*names)
    kept = {name: entry for name, entry in held.files.items() if name not in gone}
    _write(directory, dataclasses.replace(held, files=kept))


def cover(directory: Path, *names: str) -> None:
    """Enter files as they are now, but for those that are in the manifest already.

    Args:
        directory: that they are in, present.
        names: of files or folders, as for `checksums`.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> _ = (directory / "x.txt").write_text("one line")
        >>> cover(directory, "x.txt")
        >>> list(read(directory).files)
        ['x.txt']
    """
    held = _held(directory)
    enter(directory, checksums(directory, *(name for name in names if not held.within(name))))


def enter(directory: Path, files: Mapping[str, Entry]) -> None:
    """As `cover`, with checksums that are known.

    Args:
        directory: that the files are in, present.
        files: `{name: entry}`, as of `checksums`.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> enter(directory, {"x.txt": {"bytes": 1, "sha256": "00"}})
        >>> list(read(directory).files)
        ['x.txt']
    """
    held = _held(directory)
    _write(directory, dataclasses.replace(held, files={**held.files, **files}))


def note(directory: Path, **about: Any) -> None:
    """Keep in the manifest what else is to be known.

    Args:
        directory: made if absent.
        about: JSON by name; earlier ones of the same name are replaced.

    Example:
        >>> import tempfile
        >>> note(Path(tempfile.mkdtemp()), seed=0)
    """
    directory.mkdir(parents=True, exist_ok=True)
    held = _held(directory)
    _write(directory, dataclasses.replace(held, about={**held.about, **about}))


def set_aside(path: Path) -> Path:
    """Rename what is damaged, so that it is kept and stands in nobody's way.

    Args:
        path: of a file or folder.

    Returns:
        Its new path: `damaged_<name>`, with a number where that is taken.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "72"
        >>> path.mkdir()
        >>> set_aside(path).name
        'damaged_72'
    """
    aside, number = path.with_name(ASIDE + path.name), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{ASIDE}{path.name}_{number}")
    return path.rename(aside)


def _held(directory: Path) -> Manifest:
    """The manifest to be written again; a damaged one is kept beside it."""
    try:
        return read(directory)
    except FileNotFoundError:
        return Manifest()
    except DamagedManifest:
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
    if path.exists() and path.read_bytes() == content:
        return
    with whole_files.replacing(path) as temporary:
        temporary.write_bytes(content)
