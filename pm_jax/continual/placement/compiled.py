"""Methods that are compiled once for each object, and the numbers that are given to them."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a method by `self.devices.jit` with these options; arguments count without `self`."""

    def decorate(method: Callable[..., Any]) -> Any:
        def of_object(self: Any) -> Callable[..., Any]:
            @functools.wraps(method)
            def call(*arguments: Any, **named: Any) -> Any:
                return method(self, *arguments, **named)

            return self.devices.jit(call, **options)

        # Kept by the object: a function compiled for the class would hold every object for ever.
        return functools.cached_property(functools.wraps(method)(of_object))

    return decorate


def number(value: int) -> Any:
    """Make an int32 array of a number: a Python number would be weakly typed, another program."""
    return np.asarray(value, np.int32)
