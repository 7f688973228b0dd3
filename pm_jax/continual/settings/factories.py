"""Models and data sets that a setting names as package.module:factory."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from pm_jax.registries import number
from pm_jax.types import InvalidInput, cause

REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_reference(text: str) -> bool:
    """Tell whether a setting names a factory.

    Example:
        >>> is_reference("my_code.models:resnet"), is_reference("imagenet:2.0.0")
        (True, False)
    """
    return bool(REFERENCE.fullmatch(text)) and not text.endswith(".npz")


def called(name: str, reference: str, settings: str, **given: Any) -> Any:
    """Import a factory and call it with its settings.

    Args:
        name: of the setting, "model" or "dataset".
        reference: "package.module:factory"; modules of the current directory are found.
        settings: "key=value,key=value", keyword arguments of the factory.
        **given: further keyword arguments, which `settings` cannot change.

    Raises:
        InvalidInput: it cannot be imported, does not take the arguments, or fails.
    """
    factory = _imported(name, reference)
    arguments = {**_read(name, settings, given), **given}
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        signature = None  # some builtins have none
    try:
        if signature:
            signature.bind(**arguments)
    except TypeError as error:
        raise InvalidInput(
            f"{name}_settings={settings}: {reference} does not take them ({error}); it takes "
            f"{signature}"
        ) from None
    try:
        return factory(**arguments)
    except InvalidInput:
        raise
    except Exception as error:  # Someone else's code may raise anything.
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InvalidInput(
            f"{name}={reference}: fails when it is called with {shown} ({cause(error)})"
        ) from error


def _imported(name: str, reference: str) -> Callable[..., Any]:
    module_name, _, attribute = reference.partition(":")
    # `python -m` has the current directory on the path already, other ways of starting do not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # The module's own code runs, and may raise anything.
        raise InvalidInput(
            f"{name}={reference}: {module_name} cannot be imported ({cause(error)}); give "
            "package.module:factory, of a module that is installed or in the current directory"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidInput(f"{name}={reference}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise InvalidInput(
            f"{name}={reference}: is a {type(found).__name__} and no function; name the function "
            "that makes it"
        )
    return found


def _read(name: str, settings: str, given: dict[str, Any]) -> dict[str, Any]:
    """Read "key=value,key=value"; values are numbers, true, false, none, tuples 1:2, or text."""
    values: dict[str, Any] = {}
    for setting in filter(None, settings.replace(" ", "").split(",")):
        key, equals, text = setting.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidInput(f"{name}_settings={setting}: must be key=value,key=value")
        if key in given or key in values:
            why = "is set by the run" if key in given else "is given twice"
            raise InvalidInput(f"{name}_settings={setting}: {key} {why}; leave it out")
        values[key] = _value(text)
    return values


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if ":" in text:
        parts = [_value(part) for part in text.split(":") if part]
        # Text with a colon, such as a path, is text; "64:" is a tuple of one number.
        return tuple(parts) if all(isinstance(part, (int, float)) for part in parts) else text
    for kind in (int, number):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
