"""Methods that are compiled once for each object, and numbers as they take them."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a method once for each object; results lie where the object's `devices` say.

    The options are those of `jax.jit`; `donate_argnums` does not count `self`.
    """

    def decorate(method: Callable[..., Any]) -> Any:
        def of_object(self: Any) -> Callable[..., Any]:
            @functools.wraps(method)
            def call(*arguments: Any, **named: Any) -> Any:
                return method(self, *arguments, **named)

            return self.devices.jit(call, **options)

        return functools.cached_property(functools.wraps(method)(of_object))

    return decorate


def number(value: int) -> Any:
    """A number of a task or epoch as an int32 array, so that each runs the same program."""
    return np.asarray(value, np.int32)
