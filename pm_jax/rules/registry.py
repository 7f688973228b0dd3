"""Every merge rule by name, and how one is made from a line of settings."""

import inspect
from collections.abc import Callable
from typing import Any

from pm_jax import registries
from pm_jax.rules.base import MergeRule
from pm_jax.rules.became import became
from pm_jax.rules.cofima import cofima
from pm_jax.rules.dare import dare
from pm_jax.rules.exact_curvature import exact_curvature
from pm_jax.rules.fisher_averaging import fisher_averaging
from pm_jax.rules.magmax import magmax
from pm_jax.rules.null_space import null_space
from pm_jax.rules.opcm import opcm
from pm_jax.rules.oracle import oracle
from pm_jax.rules.pam import pam
from pm_jax.rules.perturb_and_merge import perturb_and_merge
from pm_jax.rules.random_mix import random_mix
from pm_jax.rules.regmean import regmean
from pm_jax.rules.simple import (
    averaging,
    coma,
    first_session,
    frozen,
    joint,
    sequential,
    slao,
)
from pm_jax.rules.task_arithmetic import task_arithmetic
from pm_jax.rules.ties import ties
from pm_jax.rules.trm import trm
from pm_jax.rules.tunable_magmax import tunable_magmax
from pm_jax.types import InvalidInput

REGISTRY: dict[str, Callable[..., MergeRule]] = {
    "perturb_and_merge": perturb_and_merge,
    "frozen": frozen,
    "first_session": first_session,
    "sequential": sequential,
    "averaging": averaging,
    "slao": slao,
    "became": became,
    "trm": trm,
    "pam": pam,
    "fisher_averaging": fisher_averaging,
    "regmean": regmean,
    "coma": coma,
    "cofima": cofima,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "opcm": opcm,
    "null_space": null_space,
    "random_mix": random_mix,
    "magmax": magmax,
    "tunable_magmax": tunable_magmax,
    "exact_curvature": exact_curvature,
    "oracle": oracle,
    "joint": joint,
}
"""Factories by name: what `--rule` accepts and what the contract tests run over."""


def make(name: str, settings: str = "", **given: Any) -> MergeRule:
    """Make a merge rule from its name and a line of settings.

    Args:
        name: a name in `REGISTRY`.
        settings: "name=value,name=value" of the factory's keywords; numbers may be fractions, the
            numbers of a tuple are separated by colons.
        **given: the caller's values for settings, used where the rule has them; `settings` cannot
            change them.

    Raises:
        InvalidInput: no such rule or setting, or a value out of range; the message names the
            rule's settings.

    Example:
        >>> make("perturb_and_merge", "clip=false").needs.next_task_from
        'merged'
    """
    # Weights belong to models that are there already: experiments.merge gives them.
    given = {"model_weights": (), **given}
    return registries.make("rule", REGISTRY, name, with_own_names(name, settings), **given)


def with_own_names(name: str, settings: str) -> str:
    """Replace `density`, mergekit's and PEFT's name, by a rule's own: keep, or 1 - drop.

    Raises:
        InvalidInput: the density is no number in (0, 1], or the rule's own name is given too.

    Example:
        >>> with_own_names("ties", "density=0.3,trim=tensor"), with_own_names("dare", "density=1/4")
        ('keep=0.3,trim=tensor', 'drop=0.75')
    """
    own = {"ties": "keep", "dare": "drop"}.get(name)
    parts = settings.replace(" ", "").split(",")
    for place, part in enumerate(parts):
        key, equals, text = part.partition("=")
        if key != "density" or not equals or not own:
            continue
        given = f"rule_settings={part}"
        try:
            density = registries.number(text)
        except ValueError:
            density = 0.0
        if not 0 < density <= 1:
            raise InvalidInput(f"{given}: must be a number or fraction in (0, 1]")
        if any(other.startswith(f"{own}=") for other in parts):
            raise InvalidInput(f"{given}: says what {own} says too; leave one of them out")
        parts[place] = f"keep={text}" if own == "keep" else f"drop={1 - density!r}"
    return ",".join(parts)


def takes_weights(factory: Callable[..., MergeRule]) -> bool:
    """Tell whether the rules of a factory take a weight for each model."""
    return "model_weights" in inspect.signature(factory).parameters
