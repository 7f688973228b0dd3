"""By what a compiled measurement is remembered: the measure, and the model as it computes now.

A model may read values that are no arguments of it, such as batch statistics in a variable of a
notebook. A compiled program has those of the day it was compiled. So the model is traced anew for
every measurement, which computes nothing, and a program serves only the same computation with the
same constants.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pm_jax.types import Array

ADDRESS = re.compile(r"0x[0-9a-f]+")
"""Addresses of Python functions in a program's text, which differ from trace to trace."""


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A traced function; two are equal if they compute the same with the same constants.

    Attributes:
        text: of the program.
        constants: arrays that it reads and that are no arguments.

    Example:
        >>> mask = np.ones(2)
        >>> before = Computation.of(lambda x: x * mask, np.zeros(2))
        >>> before == Computation.of(lambda x: x * mask, np.zeros(2))
        True
        >>> mask = np.zeros(2)
        >>> before == Computation.of(lambda x: x * mask, np.zeros(2))
        False
    """

    text: str
    constants: tuple[Any, ...]

    @property
    def draws(self) -> bool:
        """True if the function draws random numbers, whatever key it has."""
        return "random_bits[" in self.text

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> Computation:
        """Trace a function anew."""
        # A function that is traced for the second time is remembered by JAX; a new one is not.
        traced = jax.make_jaxpr(lambda *args: function(*args))(*arguments)
        return cls(ADDRESS.sub("", str(traced)), tuple(_constants(traced)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Computation)
            and self.text == other.text
            and len(self.constants) == len(other.constants)
            and all(map(_same, self.constants, other.constants))
        )

    def __hash__(self) -> int:
        return hash((self.text, len(self.constants)))


class ById:
    """A value that is equal to itself alone, for those that cannot be compared or hashed."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __call__(self, *args: Any) -> Any:
        """Call the value, a function."""
        return self.value(*args)


def hashable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or a stand-in with a hash, such as for a dataclass that is called.

    Example:
        >>> @dataclasses.dataclass
        ... class Shift:
        ...     by: float
        ...     def __call__(self, x):
        ...         return x + self.by
        >>> hashable(Shift(1.0))(2.0), len({hashable(shift) for shift in [Shift(1.0)] * 2})
        (3.0, 1)
    """
    try:
        hash(function)
    except TypeError:
        return ById(function)
    return function


@dataclasses.dataclass(frozen=True)
class Program:
    """The static argument of what is compiled.

    Attributes:
        owner: a hashable value that the program is made from, such as a `Measure`.
        computation: of its model on a batch; `None` where the model is not known.
    """

    owner: Any
    computation: Computation | None


def _constants(traced: Any) -> Iterator[Any]:
    """All arrays in a traced program and in the programs that it calls."""
    yield from getattr(traced, "consts", ())
    program = getattr(traced, "jaxpr", traced)
    for equation in program.eqns:
        for value in equation.invars:
            # Scalars are in the text as well.
            literal: Any = getattr(value, "val", 0)
            if np.ndim(literal):
                yield literal
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                    yield from _constants(part)


def _same(left: Array, right: Array) -> bool:
    """Whether two constants are one array, or equal ones."""
    if left is right:
        return True
    if np.shape(left) != np.shape(right) or getattr(left, "dtype", 0) != getattr(right, "dtype", 0):
        return False
    if jax.numpy.issubdtype(getattr(left, "dtype", np.bool_), jax.dtypes.prng_key):
        left, right = (jax.random.key_data(x) for x in (left, right))
    return np.array_equal(left, right, equal_nan=jax.numpy.issubdtype(left.dtype, np.inexact))
