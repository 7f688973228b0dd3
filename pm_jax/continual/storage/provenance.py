"""The origin of a run: its settings, the versions, the revision and the device."""

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

import pm_jax
from pm_jax.continual.settings.config import Config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


def provenance(config: Config) -> dict[str, Any]:
    """Describe this process: `environment()`, hash of the settings, revision of the checkout."""
    origin = {"configuration": configuration_hash(config), **environment()}
    revision = git_revision()
    return origin | ({"git_revision": revision} if revision else {})


def configuration_hash(config: Config) -> str:
    """Hash the settings that decide what a run computes, to 64 hexadecimal digits.

    Settings of earlier versions keep their hash: the split that is shown and one classifier were
    among them, and a later setting that has its default was not.
    """
    settings: dict[str, Any] = {"evaluate_on": "test", "classifier": "trained"}
    for field in dataclasses.fields(Config):
        value, about = getattr(config, field.name), field.metadata
        if about["identity"] and not (about["later"] and value == field.default):
            settings[field.name] = value
    if len(config.classifiers) == 1:
        settings.pop("classifiers", None)
        settings["classifier"] = config.classifiers[0]
    # Sorted, so that the hash survives another order of the fields.
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@functools.cache
def git_revision(directory: Path = Path(__file__).parents[2]) -> str | None:
    """Return the commit of the checkout that tracks a package, "-dirty" if its files changed."""
    # Variables such as GIT_DIR would make git look at another checkout.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}

    def git(*arguments: str) -> subprocess.CompletedProcess:
        command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
        return subprocess.run(command, env=environment, capture_output=True)

    try:
        # HEAD:./__init__.py fails if the package is installed in a virtual environment inside
        # another checkout, whose revision would say nothing about the package.
        commit = git("rev-parse", "HEAD", "HEAD:./__init__.py")
        if commit.returncode:
            return None
        changed = git("diff", "--quiet", "HEAD", "--", ".").returncode
    except OSError:
        return None
    return commit.stdout.split()[0].decode() + ("-dirty" if changed else "")


def environment() -> dict[str, Any]:
    """Describe versions and device of this process, without paths or names of machines."""
    versions: dict[str, str | None] = {"pm_jax": pm_jax.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # scikit-learn is one of the optional ones
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "packages": versions,
    }
