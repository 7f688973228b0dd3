"""A folder in which JAX keeps compiled programs, so that a second start compiles nothing.

Its content is code that runs: nobody but the user may be able to write there.
"""

import contextlib
import functools
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import jax
from absl import flags

MOST_BYTES = 2 * 10**9
"""A start deletes the programs that were used longest ago, until no more than this is left."""
SHORTEST = "jax_persistent_cache_min_compile_time_secs"
TROUBLE = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)"


@functools.cache  # one process may import two binaries
def define_flag() -> None:
    """Define where compiled programs are kept."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder that keeps compiled programs for later runs; empty: none. By default it is that of "
        "the environment variable JAX_COMPILATION_CACHE_DIR, or else pm_jax/compiled in the user's "
        "cache folder.",
    )


def keep_in(folder: str | None) -> None:
    """Have JAX keep compiled programs in a folder: `None` for the default one, "" for none.

    A folder that cannot be used is said in one line, and all is compiled anew.
    """
    if SHORTEST.upper() not in os.environ:
        jax.config.update(SHORTEST, 0.0)
    _say_troubles_once()
    # The user's own setting of JAX stays, and what is in that folder.
    if folder is None and _present_folder() is not None:
        return
    place = folder
    if folder is None:
        place = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pm_jax", "compiled")
    if place:
        try:
            path = Path(place).expanduser()
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # By trying, because root passes every check of permissions.
            tempfile.TemporaryFile(dir=path).close()
            _delete_oldest(path)
            place = str(path)
        except (OSError, RuntimeError) as error:  # Without a home, ~ is a RuntimeError.
            why = getattr(error, "strerror", None) or error
            _warn(place, f"cannot be written ({why}); all is compiled anew")
            place = ""
    jax.config.update("jax_compilation_cache_dir", place or None)


def _present_folder() -> str | None:
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  which mypy cannot see


def _delete_oldest(folder: Path, most_bytes: int = MOST_BYTES) -> None:
    """Delete the programs that were used longest ago, until the others fit.

    JAX can bound the folder itself, but needs another package for it and reads the times of all
    entries whenever it adds one.
    """
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # Another process deletes as well.
            about = path.stat()
            entries.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= most_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size


@functools.cache  # Every further call would wrap the hook once more.
def _say_troubles_once() -> None:
    """Turn JAX's warnings about the folder, one for each program, into one line in all."""
    before = warnings.showwarning
    said: list[str] = []

    def show(message, *arguments, **named):
        trouble = re.match(TROUBLE, str(message), re.DOTALL)
        if not trouble:
            before(message, *arguments, **named)
            return
        doing, program, why = trouble.groups()
        folder = str(_present_folder())
        if doing == "reading":
            # JAX writes no entry where there is one: a damaged one would stay for ever.
            for path in Path(folder).glob(f"{program}-*"):
                with contextlib.suppress(OSError):
                    path.unlink()
        if not said:
            said.append(program)
            what = {"reading": "an entry cannot be read", "writing": "cannot be written"}[doing]
            _warn(folder, f"{what} ({program}: {why}); what is missing is compiled anew")

    warnings.showwarning = show
    warnings.filterwarnings("always", message="Error .* persistent compilation cache")


def _warn(folder: str, text: str) -> None:
    line = " ".join(f"warning: --compilation_cache={folder}: {text}".split())
    print(line, file=sys.stderr, flush=True)
