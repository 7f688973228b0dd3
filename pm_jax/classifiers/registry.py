"""Every classifier by name, and how one is made from a line of settings."""

from collections.abc import Callable

from pm_jax import registries
from pm_jax.classifiers.aligned import aligned
from pm_jax.classifiers.base import Classifier
from pm_jax.classifiers.discriminant import discriminant
from pm_jax.classifiers.nearest_mean import nearest_mean
from pm_jax.classifiers.ridge import ridge
from pm_jax.classifiers.trained import trained
from pm_jax.classifiers.zero_shot import zero_shot

REGISTRY: dict[str, Callable[..., Classifier]] = {
    "trained": trained,
    "discriminant": discriminant,
    "nearest_mean": nearest_mean,
    "aligned": aligned,
    "ridge": ridge,
    "zero_shot": zero_shot,
}
"""Factories by name: what `--classifiers` accepts and what the contract tests run over."""


def make(name: str, settings: str = "") -> Classifier:
    """Make a classifier from its name and a line of settings.

    Args:
        name: a name in `REGISTRY`.
        settings: "name=value,name=value" of the factory's keywords; numbers may be fractions.

    Raises:
        InvalidInput: no such classifier or setting, or a value out of range; the message names the
            classifier's settings.

    Example:
        >>> make("nearest_mean").linear
        True
    """
    return registries.make("classifier", REGISTRY, name, settings)
