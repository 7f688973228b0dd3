"""Settings under the headings that help and dry runs show them under."""

import dataclasses
import fractions
import shlex
from typing import Any

from pm_jax.continual.settings.config import Config

GROUPS = (
    *("run", "stream", "model", "what trains", "training", "perturbation", "merging"),
    *("classifier", "evaluation", "devices", "files"),
)
"""Headings in their order; a field of the settings says in which group it is."""
WIDTH = 100


def written(value: Any) -> str:
    """Write a setting as its flag takes it; numbers as fractions where that is shorter."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        fraction = fractions.Fraction(value).limit_denominator(100)
        if float(fraction) == value and len(str(fraction)) < len(str(value)):
            return str(fraction)
    return str(value)


def listed(config: Config) -> list[str]:
    """List all settings in lines: those that differ from the defaults, then all by group."""
    default = Config()
    pairs = {f.name: (getattr(config, f.name), f) for f in dataclasses.fields(config)}
    lines = [
        f"  {name}={_quoted(value)} (default {_quoted(getattr(default, name))})"
        for name, (value, _) in pairs.items()
        if value != getattr(default, name)
    ]
    lines.insert(0, "differs from the defaults:" if lines else "differs from the defaults: nothing")
    for group in GROUPS:
        words = [
            f"{name}={_quoted(value)}"
            for name, (value, field) in pairs.items()
            if field.metadata["group"] == group
        ]
        if words:
            lines.append(f"{group}:")
            lines += _filled(words)
    return lines


def changes(base: Config, config: Config) -> str:
    """Name the settings of a run that are not those of another one beside it."""
    pairs = {
        f.name: (getattr(base, f.name), getattr(config, f.name)) for f in dataclasses.fields(config)
    }
    return ", ".join(f"{name}={written(now)}" for name, (was, now) in pairs.items() if now != was)


def _quoted(value: Any) -> str:
    return shlex.quote(written(value))


def _filled(words: list[str], indent: str = "  ") -> list[str]:
    """Fill lines with words, each of which stays in one piece."""
    lines = [indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines
