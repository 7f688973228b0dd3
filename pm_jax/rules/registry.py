"""Every merge rule by name, and how one is made from a line of settings."""

import fractions
import inspect
import math
from collections.abc import Callable
from typing import Any

from pm_jax.rules.base import MergeRule
from pm_jax.rules.became import became
from pm_jax.rules.cofima import cofima
from pm_jax.rules.dare import dare
from pm_jax.rules.exact_curvature import exact_curvature
from pm_jax.rules.fisher_averaging import fisher_averaging
from pm_jax.rules.magmax import magmax
from pm_jax.rules.oracle import oracle
from pm_jax.rules.pam import pam
from pm_jax.rules.perturb_and_merge import perturb_and_merge
from pm_jax.rules.random_mix import random_mix
from pm_jax.rules.simple import averaging, coma, joint, sequential
from pm_jax.rules.task_arithmetic import task_arithmetic
from pm_jax.rules.ties import ties
from pm_jax.rules.trm import trm
from pm_jax.rules.tunable_magmax import tunable_magmax
from pm_jax.types import InvalidInput

REGISTRY: dict[str, Callable[..., MergeRule]] = {
    "perturb_and_merge": perturb_and_merge,
    "sequential": sequential,
    "averaging": averaging,
    "became": became,
    "trm": trm,
    "pam": pam,
    "fisher_averaging": fisher_averaging,
    "coma": coma,
    "cofima": cofima,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
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
    if name not in REGISTRY:
        raise InvalidInput(f"rule={name}: must be one of {', '.join(REGISTRY)}")
    keywords = inspect.signature(REGISTRY[name]).parameters
    values = {key: value for key, value in given.items() if key in keywords}
    defaults = {
        key: parameter.default
        for key, parameter in keywords.items()
        # A line of text cannot give a function, such as the memory's.
        if key not in values and not callable(parameter.default)
    }
    listed = ", ".join(f"{key}={_written(value)}" for key, value in defaults.items())
    remedy = f"{name} takes {listed or 'no settings'}" + (" by default" if listed else "")
    for setting in filter(None, settings.replace(" ", "").split(",")):
        key, equals, text = setting.partition("=")
        if not equals or key not in defaults:
            given_by_run = key in keywords.keys() - defaults.keys()
            wrong = "is set by the run" if given_by_run else "is not a setting of the rule"
            raise InvalidInput(f"rule_settings={setting}: {key} {wrong}; {remedy}")
        try:
            values[key] = _read(text, defaults[key])
        except (KeyError, ValueError):
            kind = _kind(defaults[key])
            raise InvalidInput(f"rule_settings={setting}: must be {kind}; {remedy}") from None
    try:
        return REGISTRY[name](**values)
    except ValueError as error:
        raise InvalidInput(f"rule_settings={error}; {remedy}") from None


def number(text: str) -> float:
    """Read a finite number, which may be written as a fraction; raises ValueError for others."""
    try:
        # Fraction reads fractions only: it would write out all digits of 1e999999999.
        value = float(fractions.Fraction(text)) if "/" in text else float(text)
    except ArithmeticError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _read(text: str, default: Any) -> Any:
    """Read a value of the default's type."""
    # Before the numbers: a bool is an int, and bool("false") is true.
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(default, tuple):
        return tuple(number(part) for part in text.split(":") if part)
    return number(text) if isinstance(default, float) else type(default)(text)


def _written(value: Any) -> str:
    """Write a value as `_read` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _kind(default: Any) -> str:
    """Describe the values of the default's type in an error."""
    kinds = {
        bool: "true or false",
        int: "a whole number",
        tuple: "numbers or fractions separated by colons",
    }
    return kinds.get(type(default), "a number or fraction")
