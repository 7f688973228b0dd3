"""What a run was made with: its settings, the versions, the revision and the device."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from pm_jax.continual.settings.config import Config

PACKAGES = ("pm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


def provenance(config: Config) -> dict[str, Any]:
    """What a run of this process is made with.

    Args:
        config: settings of the run.

    Returns:
        `environment()`, `configuration`, the hash of the settings, and `git_revision` where the
        package lies in a checkout.

    Example:
        >>> len(provenance(Config())["configuration"])
        64
    """
    found = {"configuration": configuration_hash(config), **environment()}
    revision = git_revision()
    return found | ({"git_revision": revision} if revision else {})


def configuration_hash(config: Config) -> str:
    """SHA-256 of the settings that make a run what it is, as hexadecimal digits.

    Args:
        config: settings; those that may differ between calls on a work directory do not count.

    Returns:
        64 digits.

    Example:
        >>> configuration_hash(Config(data_dir="x")) == configuration_hash(Config())
        True
        >>> configuration_hash(Config(epochs=2)) == configuration_hash(Config(epochs=3))
        False
    """
    given = dataclasses.asdict(config)
    settings = {f.name: given[f.name] for f in dataclasses.fields(Config)
                if f.metadata["identity"]}  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@functools.cache
def git_revision(directory: Path = Path(__file__).parents[2]) -> str | None:
    """The revision of the checkout that the package lies in.

    Args:
        directory: of a package.

    Returns:
        The commit, "-dirty" after it where the package's files have changed since; `None` without
        git, outside a checkout, and in one that the package is no part of.

    Example:
        >>> git_revision(Path("/"))
    """
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}

    def git(*arguments: str) -> subprocess.CompletedProcess:
        command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
        return subprocess.run(command, env=environment, capture_output=True)

    try:
        # The second fails in a checkout around an environment that the package is installed in.
        found = git("rev-parse", "HEAD", "HEAD:./__init__.py")
        if found.returncode:
            return None
        changed = git("diff", "--quiet", "HEAD", "--", ".").returncode
    except OSError:
        return None
    return found.stdout.split()[0].decode() + ("-dirty" if changed else "")


def environment() -> dict[str, Any]:
    """Versions and device of this process.

    Returns:
        Strings and numbers; no paths or names of machines.

    Example:
        >>> environment()["packages"]["jax"] == jax.__version__
        True
    """
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "packages": versions,
    }
