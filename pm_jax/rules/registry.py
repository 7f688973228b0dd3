"""Every merge rule by name, and how one is made from a line of settings."""

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
    return registries.make("rule", REGISTRY, name, settings, **given)
