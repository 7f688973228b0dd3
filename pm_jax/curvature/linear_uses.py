"""Parameters that a model uses once, in one matrix product or convolution.

They are found in the model's traced program, whatever library the model is written with. All that
such a parameter does to the outputs goes through that one equation, so that its gradient follows
from the equation's other operand x and the gradient g of its result: `x^T g`, with rows for the
positions of a convolution. A parameter that is used anywhere else as well, such as a tied
embedding or a kernel with a penalty, is none of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pm_jax.types import Array

INLINED = ("jit", "pjit")
"""Calls within which uses are found. The values of others, as `nn.remat`, cannot leave them."""

Place = tuple[int, ...]
"""Index of an equation in a program, after those of the calls that it is within."""


class LinearUse(NamedTuple):
    """The one equation that uses a parameter, and is linear in it.

    Attributes:
        equation: `dot_general` or `conv_general_dilated`, of a program for one example.
        side: which of the two operands the parameter is.
    """

    equation: Any
    side: int

    @property
    def output(self) -> Any:
        """Shape and type of the result."""
        return self.equation.outvars[0].aval

    @property
    def rows(self) -> int:
        """Rows of x and g."""
        return self.output.size // math.prod(self._shape[axis] for axis in self._free)

    def covered(self) -> bool:
        """Whether inputs and gradients can be had as rows, in the parameter's own type.

        Matrix products of several rows are left out, because the general way is no slower there.
        """
        operands = [*(x.aval for x in self.equation.invars), self.output]
        dtype = operands[self.side].dtype
        if any(x.dtype != dtype for x in operands) or dtype not in (jnp.float32, jnp.float64):
            return False
        params = self.equation.params
        match self.equation.primitive.name:
            case "dot_general":
                return not any(params["dimension_numbers"][1]) and self.rows == 1
            case "conv_general_dilated":
                groups = params["feature_group_count"], params["batch_group_count"]
                return self.side == 1 and groups == (1, 1)
        return False

    def input_rows(self, x: Array) -> Array:
        """The operand x as [rows, in]."""
        if self.equation.primitive.name == "dot_general":
            contracted = self.equation.params["dimension_numbers"][0][1 - self.side]
            free = [axis for axis in range(x.ndim) if axis not in contracted]
            return jnp.transpose(x, (*free, *contracted)).reshape(self.rows, -1)
        return self._patches(x)

    def gradient_rows(self, g: Array) -> Array:
        """The gradient of the result as [rows, out]."""
        if self.equation.primitive.name == "dot_general":
            # The axes of the first operand come first.
            return g.reshape(self.rows, -1) if self.side else g.reshape(-1, self.rows).T
        batch, features, *window = self.equation.params["dimension_numbers"].out_spec
        return jnp.transpose(g, (batch, *window, features)).reshape(self.rows, -1)

    def as_matrix(self, leaf: Array) -> Array:
        """The parameter as [in, out]."""
        inputs = math.prod(self._shape[axis] for axis in self._summed)
        return jnp.transpose(leaf, (*self._summed, *self._free)).reshape(inputs, -1)

    def from_matrix(self, matrix: Array) -> Array:
        """The way back from `as_matrix`."""
        order = (*self._summed, *self._free)
        moved = matrix.reshape([self._shape[axis] for axis in order])
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.equation.invars[self.side].aval.shape

    @property
    def _summed(self) -> tuple[int, ...]:
        """Axes of the parameter that the equation sums over, in the order of `input_rows`."""
        numbers = self.equation.params["dimension_numbers"]
        if self.equation.primitive.name == "dot_general":
            return tuple(numbers[0][self.side])
        return (*numbers.rhs_spec[2:], numbers.rhs_spec[1])

    @property
    def _free(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self._shape)) if axis not in self._summed)

    def _patches(self, x: Array) -> Array:
        """Inputs of a convolution under its window, [positions, window x channels]."""
        # Slices, which are copies: `lax.conv_general_dilated_patches` would run a convolution.
        params = self.equation.params
        numbers = params["dimension_numbers"]
        batch, features, *window = numbers.lhs_spec
        x = jnp.transpose(x, (batch, *window, features))
        around = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
        counts = [self.output.shape[axis] for axis in numbers.out_spec[2:]]
        sizes = [self._shape[axis] for axis in numbers.rhs_spec[2:]]

        def under(offsets: tuple[int, ...]) -> Array:
            first = [o * d for o, d in zip(offsets, params["rhs_dilation"], strict=True)]
            strides = params["window_strides"]
            last = [f + (n - 1) * s + 1 for f, n, s in zip(first, counts, strides, strict=True)]
            ends = x.shape[0], x.shape[-1]
            return lax.slice(x, (0, *first, 0), (ends[0], *last, ends[1]), (1, *strides, 1))

        slices = [under(offsets) for offsets in itertools.product(*map(range, sizes))]
        return jnp.concatenate(slices, axis=-1).reshape(self.rows, -1)


class Traced(NamedTuple):
    """A program of parameters and an input, and the parameters that it uses linearly.

    Attributes:
        program: closed, of the leaves of the parameters and then those of the input.
        uses: `{place: (number of the leaf, its use)}`.
    """

    program: Any
    uses: dict[Place, tuple[int, LinearUse]]

    @classmethod
    def of(cls, function: Callable[..., Array], params: Any, batch: Any) -> Traced:
        """Trace a function that returns one array.

        Example:
            >>> w, x = {"once": jnp.ones((2, 3)), "twice": jnp.ones((3, 3))}, jnp.ones((1, 2))
            >>> def f(w, x):
            ...     return x @ w["once"] @ w["twice"] @ w["twice"]
            >>> [number for number, _ in Traced.of(f, w, x).uses.values()]
            [0]
        """
        # A new function, because jax remembers the traces of one that it has seen.
        program = jax.make_jaxpr(lambda params, batch: function(params, batch))(params, batch)
        count = len(jax.tree.leaves(params))
        leaves = {var: number for number, var in enumerate(program.jaxpr.invars[:count])}
        return cls(program, _uses(program.jaxpr, leaves))

    def run(
        self, leaves: Sequence[Array], batch: Any, slots: Mapping[int, Array]
    ) -> tuple[Array, dict[int, Array]]:
        """Outputs, with a slot added to the result of every use, and the other operands of uses.

        The gradient of a slot is that of the result. Slots and operands have the leaves' numbers.
        """
        inputs: dict[int, Array] = {}

        def run(program: Any, constants: Sequence[Any], args: Sequence[Any], place: Place) -> Any:
            values = dict(zip(program.constvars, constants, strict=True))
            values.update(zip(program.invars, args, strict=True))
            for index, equation in enumerate(program.eqns):
                here = (*place, index)
                if any(use[: len(here)] == here and use != here for use in self.uses):
                    inner = equation.params["jaxpr"]
                    operands = [value_of(values, x) for x in equation.invars]
                    results = run(inner.jaxpr, inner.consts, operands, here)
                else:
                    results = results_of(program, equation, values)
                if here in self.uses:
                    number, use = self.uses[here]
                    inputs[number] = value_of(values, equation.invars[1 - use.side])
                    results = [results[0] + slots[number]]
                values.update(zip(equation.outvars, results, strict=True))
            return [value_of(values, x) for x in program.outvars]

        args = [*leaves, *jax.tree.leaves(batch)]
        (outputs,) = run(self.program.jaxpr, self.program.consts, args, ())
        return outputs, inputs


def _uses(program: Any, leaves: Mapping[Any, int]) -> dict[Place, tuple[int, LinearUse]]:
    """The uses of variables in an open program, of those that have only one."""
    occurrences: dict[int, list[Place]] = {number: [] for number in leaves.values()}
    for index, equation in enumerate(program.eqns):
        for side, var in enumerate(equation.invars):
            if not is_literal(var) and var in leaves:
                occurrences[leaves[var]].append((index, side))
    for var in program.outvars:
        if not is_literal(var) and var in leaves:
            # Two, so that it is not the only one.
            occurrences[leaves[var]] += [(), ()]
    found: dict[Place, tuple[int, LinearUse]] = {}
    for number, places in occurrences.items():
        if len(places) != 1:
            continue
        index, side = places[0]
        equation = program.eqns[index]
        if equation.primitive.name in INLINED:
            inner = equation.params["jaxpr"].jaxpr
            deeper = _uses(inner, {inner.invars[side]: number})
            found.update({(index, *place): use for place, use in deeper.items()})
        elif equation.primitive.name in ("dot_general", "conv_general_dilated"):
            if (use := LinearUse(equation, side)).covered():
                found[(index,)] = number, use
    return found


def results_of(program: Any, equation: Any, values: Mapping[Any, Any]) -> list[Any]:
    """The results of one equation of an open program."""
    # As a program of its own, which JAX evaluates in the equation's context, such as precision.
    operands = [x for x in equation.invars if not is_literal(x)]
    operands = list(dict.fromkeys(operands))
    alone = program.replace(
        constvars=[], invars=operands, outvars=equation.outvars, eqns=[equation]
    )
    return jax.core.eval_jaxpr(alone, [], *(values[x] for x in operands))


def is_literal(var: Any) -> bool:
    """Whether an operand of an equation is a number and no variable."""
    return hasattr(var, "val")


def value_of(values: Mapping[Any, Any], var: Any) -> Any:
    """The value of an operand, among those of the variables."""
    return var.val if is_literal(var) else values[var]
