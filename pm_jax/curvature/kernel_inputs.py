"""The inputs of dense kernels, found in the traced program of any model.

A kernel W [in, out] acts by products `x W` with rows x, one for each token of an example, position
of a convolution and call of its layer. Whatever library the model is written with, the rows are
operands of the equations of its program that multiply by the kernel. Such equations are also found
within `nn.remat` and `nn.scan`, since nothing is differentiated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pm_jax import trees
from pm_jax.curvature.dense_layers import has_padding, refuse_padding
from pm_jax.curvature.kernels import Axes
from pm_jax.curvature.linear_uses import LinearUse, Place, is_literal, results_of, value_of
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, InvalidInput, Params, PyTree

CALLS = ("jit", "pjit", "checkpoint", "remat2", "closed_call", "custom_jvp_call", "custom_vjp_call")
"""Equations that are a program of their own, which runs once."""
SAME = ("convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "transpose")
"""Equations whose result is the kernel itself, in another type or order of axes."""


class View(NamedTuple):
    """A kernel as an equation sees it.

    Attributes:
        path: of the kernel.
        axes: the kernel's axis that is each axis of the view.
        loops: places of the scans that hand out its slices, the outermost first.
    """

    path: str
    axes: tuple[int, ...]
    loops: tuple[Place, ...] = ()


class Use(NamedTuple):
    """An equation that multiplies rows of inputs by a kernel.

    Attributes:
        kernel: as the equation sees it.
        equation: `dot_general` or `conv_general_dilated`, in a program for one example.
        side: which of the two operands the kernel is.
    """

    kernel: View
    equation: Any
    side: int

    def fits(self, axes: Axes) -> bool:
        """Whether the equation treats the kernel as the matrices into which its axes divide."""
        numbers = self.equation.params["dimension_numbers"]
        stack = set(self._stack(axes))
        inputs = list(range(axes.stacked, axes.stacked + axes.inputs))
        if self.equation.primitive.name == "dot_general":
            # Axes that both operands have can only be those that count the matrices.
            return sorted(self._others(0)) == inputs and set(self._others(1)) <= stack
        window = [self.kernel.axes[axis] for axis in (*numbers.rhs_spec[2:], numbers.rhs_spec[1])]
        groups = [self.equation.params[f"{kind}_group_count"] for kind in ("feature", "batch")]
        return window == inputs and groups == [1, 1] and self.side == 1 and not stack

    def rows(self, x: Array, axes: Axes) -> Array:
        """The other operand as [*stacked, rows, in], but for the axes that loops hand out."""
        if self.equation.primitive.name != "dot_general":
            return LinearUse(self.equation, self.side).input_rows(x)
        summed, shared = self._others(0), self._others(1)
        # In the order of the kernel's axes, whatever order the equation has them in.
        inputs = [summed[axis] for axis in sorted(summed)]
        counted = [shared[axis] for axis in sorted(shared)]
        rest = [axis for axis in range(x.ndim) if axis not in (*inputs, *counted)]
        width = math.prod(x.shape[axis] for axis in inputs)
        sizes = [x.shape[axis] for axis in counted]
        rows = jnp.transpose(x, (*counted, *rest, *inputs)).reshape(*sizes, -1, width)
        # All matrices along an axis that only the kernel has meet the same rows.
        missing = [place for place, axis in enumerate(self._stack(axes)) if axis not in shared]
        shape = self.equation.invars[self.side].aval.shape
        stacked = [shape[self.kernel.axes.index(axis)] for axis in self._stack(axes)]
        return jnp.broadcast_to(jnp.expand_dims(rows, missing), (*stacked, *rows.shape[-2:]))

    def _stack(self, axes: Axes) -> range:
        """The kernel's axes that count matrices and are no loop's."""
        return range(len(self.kernel.loops), axes.stacked)

    def _others(self, kind: int) -> dict[int, int]:
        """Axes of the inputs by those of the kernel that they meet: 0 summed over, 1 shared."""
        numbers = self.equation.params["dimension_numbers"][kind]
        pairs = zip(numbers[self.side], numbers[1 - self.side], strict=True)
        return {self.kernel.axes[ours]: theirs for ours, theirs in pairs}


Known = dict[Place, tuple[Use, Axes]]
"""Uses of kernels, with the division of the kernel's axes."""


@in_full_precision
def kernel_inputs(
    function: Callable[[Params, PyTree], Any],
    params: Params,
    inputs: PyTree,
    kernels: Mapping[str, Axes],
) -> dict[str, list[Array]]:
    """The inputs of kernels while a model runs on a batch, one array for each use.

    Args:
        function: `function(params, inputs)`, the model; a row of its result depends on one example.
        params: pytree of arrays.
        inputs: leaves [N, ...].
        kernels: `{path: how the kernel's axes divide}`.

    Returns:
        `{path: [inputs [N, *stacked, rows, in] of a use]}`; no uses for a kernel that the model
        does not read.

    Raises:
        InvalidInput: the model reads a kernel in another way than by such products, or pads its
            tokens.

    Example:
        >>> from pm_jax.curvature.kernels import Axes
        >>> params, x = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, jnp.asarray([[1.0, 2.0]])
        >>> found = kernel_inputs(
        ...     lambda p, x: x @ p["w"] + p["b"][None], params, x, {"w": Axes(0, 1)})
        >>> found["w"][0].tolist()
        [[[1.0, 2.0]]]
    """
    one = jax.tree.map(lambda leaf: leaf[:1], inputs)
    # A new function, because jax remembers the traces of one that it has seen.
    program = jax.make_jaxpr(lambda params, inputs: function(params, inputs))(params, one)
    refuse_padding(f"kernels={','.join(kernels)}", has_padding(program.jaxpr))
    paths = list(trees.leaves_by_path(params))
    views = {
        var: View(path, tuple(range(len(var.aval.shape))))
        for path, var in zip(paths, program.jaxpr.invars[: len(paths)], strict=True)
        if path in kernels
    }
    uses: dict[Place, Use] = {}
    others: dict[str, str] = {}
    outputs = _find(program.jaxpr, views, (), uses, others)
    others |= {view.path: "its outputs" for view in outputs if view}
    others |= {
        use.kernel.path: "a product over other axes, for each head or in groups"
        for use in uses.values()
        if not use.fits(kernels[use.kernel.path])
    }
    for path in kernels:
        if path in others:
            raise InvalidInput(
                f"kernels={path}: is read by the model in another way than by a product with a "
                f"dense layer's inputs ({others[path]}); leave it out"
            )
    leaves = jax.tree.leaves(params)
    known = {place: (use, kernels[use.kernel.path]) for place, use in uses.items()}

    def of_example(example: PyTree) -> dict[Place, Array]:
        single = jax.tree.map(lambda leaf: leaf[None], example)
        args = [*leaves, *jax.tree.leaves(single)]
        return _run(program.jaxpr, program.consts, args, (), known)[1]

    rows = jax.vmap(of_example)(inputs) if uses else {}
    return {
        path: [rows[place] for place, use in uses.items() if use.kernel.path == path]
        for path in kernels
    }


def _find(
    program: Any,
    views: dict[Any, View],
    place: Place,
    uses: dict[Place, Use],
    others: dict[str, str],
) -> list[View | None]:
    """Collect the uses of kernels in an open program; returns which kernels its results are.

    `views` has the kernels among its variables, and gets more; `others` gets the equations that
    read a kernel in another way.
    """
    for index, equation in enumerate(program.eqns):
        given = {
            side: views[var]
            for side, var in enumerate(equation.invars)
            if not is_literal(var) and var in views
        }
        if not given:
            continue
        here, name = (*place, index), equation.primitive.name
        if name in CALLS or name == "scan":
            inner, _ = _inner(equation)
            within = given if name != "scan" else _in_loop(equation, given, here, others)
            bound = {inner.invars[side]: view for side, view in within.items()}
            results = _find(inner, bound, here, uses, others)
            if name == "scan":
                others |= {view.path: "a loop that returns it" for view in results if view}
                continue
            pairs = zip(equation.outvars, results, strict=True)
            views.update({var: view for var, view in pairs if view})
        elif name in SAME:
            (view,) = given.values()
            order = equation.params.get("permutation", range(len(view.axes)))
            moved = view._replace(axes=tuple(view.axes[axis] for axis in order))
            views[equation.outvars[0]] = moved
        elif name in ("dot_general", "conv_general_dilated") and len(given) == 1:
            ((side, view),) = given.items()
            uses[here] = Use(view, equation, side)
        else:
            others |= {view.path: name for view in given.values()}
    return [None if is_literal(var) else views.get(var) for var in program.outvars]


def _in_loop(
    equation: Any, given: Mapping[int, View], here: Place, others: dict[str, str]
) -> dict[int, View]:
    """The kernels that the body of a scan sees, by its arguments."""
    constants, carried = _loop_sizes(equation)
    within = {}
    for side, view in given.items():
        if side < constants:
            within[side] = view
        elif side < constants + carried or view.axes[0] != len(view.loops):
            others[view.path] = "a loop that carries it, or goes over another axis of it"
        else:
            within[side] = View(view.path, view.axes[1:], (*view.loops, here))
    return within


def _loop_sizes(equation: Any) -> tuple[int, int]:
    """Count the constants and the carried values, which come first among a scan's arguments."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From jax 0.11 on the arguments are in three groups.
    constants, carried, _ = params["ft_in"].unpack()
    return len(list(constants)), len(list(carried))


def _inner(equation: Any) -> tuple[Any, Sequence[Any]]:
    """The program of a call, open, and its constants."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(equation.params[name] for name in names if name in equation.params)
    return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())


def _run(
    program: Any, constants: Sequence[Any], args: Sequence[Any], place: Place, uses: Known
) -> tuple[list[Any], dict[Place, Array]]:
    """The results of an open program, and the rows of inputs of the uses in it."""
    values = dict(zip(program.constvars, constants, strict=True))
    values.update(zip(program.invars, args, strict=True))
    rows: dict[Place, Array] = {}
    for index, equation in enumerate(program.eqns):
        here = (*place, index)
        if here in uses:
            use, axes = uses[here]
            rows[here] = use.rows(value_of(values, equation.invars[1 - use.side]), axes)
            results = results_of(program, equation, values)
        elif any(place[: len(here)] == here for place in uses):
            operands = [value_of(values, x) for x in equation.invars]
            loop = equation.primitive.name == "scan"
            results, found = (_run_loop if loop else _run_call)(equation, operands, here, uses)
            rows |= found
        else:
            results = results_of(program, equation, values)
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(values, x) for x in program.outvars], rows


def _run_call(
    equation: Any, operands: Sequence[Any], here: Place, uses: Known
) -> tuple[list[Any], dict[Place, Array]]:
    inner, constants = _inner(equation)
    return _run(inner, constants, operands, here, uses)


def _run_loop(
    equation: Any, operands: Sequence[Any], here: Place, uses: Known
) -> tuple[list[Any], dict[Place, Array]]:
    """The results of a scan and the rows of its body, which leave it as further results."""
    params, (inner, consts) = equation.params, _inner(equation)
    constants, carried = _loop_sizes(equation)
    fixed, start = operands[:constants], operands[constants : constants + carried]

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], Any]:
        results, rows = _run(inner, consts, [*fixed, *carry, *slices], here, uses)
        return results[:carried], (results[carried:], rows)

    carry, (stacked, rows) = lax.scan(
        body,
        list(start),
        list(operands[constants + carried :]),
        length=params["length"],
        reverse=params["reverse"],
    )

    def of_use(place: Place, x: Array) -> Array:
        if here in uses[place][0].kernel.loops:
            return x  # [length, ..., rows, in], a matrix for each step
        # All steps multiply by the same kernel: theirs are further rows.
        moved = jnp.moveaxis(x, 0, -3)
        return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])

    return [*carry, *stacked], {place: of_use(place, x) for place, x in rows.items()}
