"""How a rule or a classifier is made from its name and a line of settings."""

import fractions
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pm_jax.types import InvalidInput

Made = TypeVar("Made")


def make(
    kind: str,
    registry: Mapping[str, Callable[..., Made]],
    name: str,
    settings: str = "",
    **given: Any,
) -> Made:
    """Call the factory with a name, with the keywords of a line of settings.

    Args:
        kind: the word for what is made, in errors: "rule".
        registry: factories by name; all their arguments are keywords with defaults.
        name: a name in the registry.
        settings: "name=value,name=value"; numbers may be fractions, the numbers of a tuple are
            separated by colons.
        **given: the caller's values for settings, used where the factory has them; `settings`
            cannot change them.

    Raises:
        InvalidInput: no such name or setting, or a value out of range; the message names the
            settings that there are.

    Example:
        >>> make("sum", {"add": lambda *, a=1, b=2: a + b}, "add", "b=5")
        6
    """
    if name not in registry:
        raise InvalidInput(f"{kind}={name}: must be one of {', '.join(registry)}")
    keywords = inspect.signature(registry[name]).parameters
    values = {key: value for key, value in given.items() if key in keywords}
    defaults = _defaults(registry[name], values)
    listed = _listed(defaults)
    remedy = f"{name} takes {listed or 'no settings'}" + (" by default" if listed else "")
    for setting in filter(None, settings.replace(" ", "").split(",")):
        key, equals, text = setting.partition("=")
        if not equals or key not in defaults:
            given_by_run = key in keywords.keys() - defaults.keys()
            wrong = "is set by the run" if given_by_run else f"is not a setting of the {kind}"
            raise InvalidInput(f"{kind}_settings={setting}: {key} {wrong}; {remedy}")
        try:
            values[key] = _read(text, defaults[key])
        except (KeyError, ValueError):
            wanted = _kind(defaults[key])
            raise InvalidInput(f"{kind}_settings={setting}: must be {wanted}; {remedy}") from None
    try:
        return registry[name](**values)
    except ValueError as error:
        raise InvalidInput(f"{kind}_settings={error}; {remedy}") from None


def meanings(
    registry: Mapping[str, Callable[..., Any]], given: Collection[str] = ()
) -> dict[str, str]:
    """Say in a line what each factory makes, and which settings it takes.

    Args:
        registry: factories by name, as `make` takes them.
        given: keywords that no line of settings can give.

    Returns:
        By name, the first line of the docstring and the settings with their defaults.

    Example:
        >>> def add(*, a=1, b=2):
        ...     "Add two numbers."
        >>> meanings({"add": add}, given=["b"])
        {'add': 'Add two numbers. Settings: a=1.'}
    """
    found = {}
    for name, factory in registry.items():
        listed = _listed(_defaults(factory, given))
        line = (inspect.getdoc(factory) or "").partition("\n")[0]
        found[name] = f"{line} Settings: {listed}." if listed else line
    return found


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


def _defaults(factory: Callable[..., Any], given: Collection[str]) -> dict[str, Any]:
    """Return the defaults of the keywords that a line of settings can give."""
    return {
        key: parameter.default
        for key, parameter in inspect.signature(factory).parameters.items()
        # A line of text cannot give a function, such as the memory's.
        if key not in given and not callable(parameter.default)
    }


def _listed(defaults: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_written(value)}" for key, value in defaults.items())


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
