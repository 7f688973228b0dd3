"""The dense layers of a linen model: their calls, their inputs and their kernels.

Everything that looks inside a linen model goes through `visiting`, which calls back whenever the
model applies a layer, or `lending`, which lets layers find further variables. Layers are named by
the path of their module, "a/b" for "a/b/kernel".
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pm_jax import trees
from pm_jax.curvature.kernels import Contraction, Convolution, Shape, shape_of
from pm_jax.types import Array, InvalidInput, Params, PyTree

DENSE = (nn.Dense, nn.DenseGeneral, nn.Einsum)
"""Layers that are one contraction of their inputs with a kernel."""

WITH_KERNEL = (*DENSE, nn.Conv)
"""All layers of linen that pm_jax knows to be linear in their kernel."""


PADDING = "pm_jax:padding"
"""Name in a traced program of an array that a model has padded with tokens that do not count."""


class LayerCall(NamedTuple):
    """One application of a layer while a model runs.

    Attributes:
        name: path of the layer, "a/b"; "" for a model that is one layer.
        layer: the linen module.
        inputs: its first argument.
        output: the result.
        equation: second argument of an `Einsum` layer, if it has one.
    """

    name: str
    layer: nn.Module
    inputs: Any
    output: Any
    equation: str | None = None

    @property
    def kernel(self) -> str:
        """Path of the layer's kernel, if it has one."""
        return f"{self.name}/kernel".lstrip("/")

    @property
    def compiled(self) -> bool:
        """Whether the layer is within `nn.jit`, which compiles it once for all later calls."""
        # Flax writes down which transformations a module is within.
        scope = self.layer.scope
        return scope is not None and any("jit(" in part for part in scope.debug_path)

    @property
    def kernel_shape(self) -> Shape:
        """Shape of the kernel that the layer sees: one layer's where `nn.scan` stacks them."""
        return shape_of(self.layer.get_variable("params", "kernel"))

    @property
    def linear_map(self) -> Contraction | Convolution | None:
        """The product of inputs and kernel that the layer computes; `None` for an unknown layer."""
        layer, ndim = self.layer, jnp.ndim(self.inputs)
        match kind_of(layer):
            case nn.Dense:
                return Contraction.general(ndim, (-1,), (), 1)
            case nn.DenseGeneral:
                axis, batch, features = (
                    (value,) if isinstance(value, int) else tuple(value)
                    for value in (layer.axis, layer.batch_dims, layer.features)
                )
                return Contraction.general(ndim, axis, batch, len(features))
            case nn.Einsum:
                return Contraction.einsum(self.equation or layer.einsum_str, ndim)
            case nn.Conv:
                return Convolution.of(layer)
        return None


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The class of `WITH_KERNEL` that a layer computes as; `None` for any other layer.

    A subclass that computes its output or its kernel in another way is another layer.

    Example:
        >>> kind_of(nn.Dense(3)).__name__, kind_of(nn.LayerNorm())
        ('Dense', None)
    """
    for kind in WITH_KERNEL:
        if isinstance(layer, kind):
            mro = type(layer).__mro__
            # This also leaves out the outer of the two calls that transformed layers make, as
            # `nn.remat(nn.Dense)`: theirs is a subclass with a `__call__` around the layer's.
            changed = (vars(cls).keys() & {"__call__", "param"} for cls in mro[: mro.index(kind)])
            return None if any(changed) else kind
    return None


def visiting(
    visit: Callable[[LayerCall], Array | None],
    kinds: tuple[type[nn.Module], ...] | None = (nn.Dense,),
) -> AbstractContextManager:
    """Context in which a linen model calls `visit` at every layer of some kinds that it applies.

    The kinds are classes of `WITH_KERNEL`, or `None` for all modules. An array that `visit` returns
    replaces the layer's output.

    Example:
        >>> layer, params = nn.Dense(1, use_bias=False), {"params": {"kernel": jnp.ones((2, 1))}}
        >>> with visiting(lambda call: 2 * call.output):
        ...     layer.apply(params, jnp.ones((1, 2))).tolist()
        [[4.0]]
    """

    def interceptor(next_fn, args, kwargs, context):
        output = next_fn(*args, **kwargs)
        # Modules have other methods, such as `setup`, which compute no outputs.
        layer = context.module
        if context.method_name != "__call__" or (kinds and kind_of(layer) not in kinds):
            return output
        # All layers of `WITH_KERNEL` give their arguments these names.
        inputs = args[0] if args else kwargs.get("inputs")
        equation = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        call = LayerCall("/".join(layer.path), layer, inputs, output, equation)
        replacement = visit(call)
        if replacement is None:
            return output
        if call.compiled:
            # The changed program would stay in flax's memory after the context has ended.
            raise InvalidInput(
                f"{call.kernel}: belongs to a layer within nn.jit, which cannot be changed for one "
                "call; leave nn.jit out and compile the call of the model"
            )
        return replacement

    return nn.intercept_methods(interceptor)


def lending(values: Mapping[str, PyTree]) -> AbstractContextManager:
    """Context in which a linen model finds further variables `{path: value}` in its "params".

    `nn.scan` and `nn.vmap` hand a layer its slice of what lies in a collection. A value that an
    interceptor closes over would not be sliced.

    Example:
        >>> class Layer(nn.Module):
        ...     @nn.compact
        ...     def __call__(self):
        ...         return self.get_variable("params", "more")
        >>> with lending({"more": 3.0}):
        ...     Layer().apply({"params": {"kernel": jnp.ones(2)}})
        3.0
    """
    if not values:
        return contextlib.nullcontext()
    within = False

    def interceptor(next_fn, args, kwargs, context):
        nonlocal within
        # The outermost call lends to all calls within it; `setup` may come before it.
        if within or context.method_name == "setup":
            return next_fn(*args, **kwargs)
        module = context.module

        def add(variables):
            params = variables.get("params", {})
            for path, value in values.items():
                params = _with_entry(params, path.split("/"), list(module.path), value)
            return {**variables, "params": params}

        def run(module, *args, **kwargs):
            # `next_fn` belongs to the module without the variables.
            return getattr(module, context.method_name)(*args, **kwargs)

        within = True
        try:
            # While a model is initialised there are no variables to add to.
            if module.is_initializing():
                return next_fn(*args, **kwargs)
            return nn.map_variables(run, "params", trans_in_fn=add)(module, *args, **kwargs)
        finally:
            within = False

    return nn.intercept_methods(interceptor)


def _with_entry(params: Mapping[str, Any], path: list[str], within: list[str], value: PyTree):
    """The collection of the module at the path `within`, with an entry if it has the place."""
    if path[: len(within)] != within:
        return params
    name, *deeper = path[len(within) :]
    if not deeper:
        return {**params, name: value}
    if not isinstance(params.get(name), Mapping):
        return params
    return {**params, name: _with_entry(params[name], deeper, [], value)}


def layers_called_once(
    module: nn.Module, inputs: PyTree, kinds: tuple[type[nn.Module], ...] = (nn.Dense,)
) -> tuple[str, ...]:
    """Names of the dense layers that a module calls exactly once, in the order of the calls.

    A layer in a loop (`nn.scan`) or under `nn.vmap` is called more than once.
    """
    calls = traced_calls(module.init, jax.random.key(0), inputs, kinds=kinds)
    return tuple(name for name, calls in calls.items() if len(calls) == 1 and calls[0].once)


class TracedCall(NamedTuple):
    """One call of a layer, as a trace of the model shows it.

    Attributes:
        linear_map: what the layer does with its kernel.
        inputs: shape and type of its inputs.
        output: shape and type of its output.
        kernel_shape: shape of its kernel.
        once: whether the call runs exactly once when the model does, on all examples together.
        padded: whether the model pads its tokens.
    """

    linear_map: Contraction | Convolution | None
    inputs: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct
    kernel_shape: Shape
    once: bool
    padded: bool = False


def traced_calls(
    run: Callable[..., Any], *args: Any, kinds: tuple[type[nn.Module], ...]
) -> dict[str, list[TracedCall]]:
    """Calls of layers while `run(*args)` applies a linen model, by the names of the layers.

    Nothing is computed. Layers may be under `nn.remat`, whose values cannot leave its body.
    """
    calls: dict[str, list[TracedCall]] = {}

    def mark(call: LayerCall) -> Array | None:
        inputs, output = (
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (jnp.asarray(call.inputs), call.output)
        )
        traced = TracedCall(call.linear_map, inputs, output, call.kernel_shape, False)
        calls.setdefault(call.name, []).append(traced)
        if call.compiled:
            return None
        # A name in the program, by which the call is found again below.
        return checkpoint_name(call.output, f"pm_jax:{len(calls[call.name]) - 1}:{call.name}")

    with visiting(mark, kinds):
        # A new function, because jax remembers the traces of one that it has seen.
        program = jax.make_jaxpr(lambda *args: run(*args))(*args)
    times: dict[str, list[tuple[Shape, bool]]] = {}
    for marker, shape, looped in _markers(program.jaxpr):
        times.setdefault(marker, []).append((shape, looped))
    return {
        name: [
            call._replace(
                # Another shape has an axis of `vmap`, over which the layer runs many times.
                once=times.get(f"pm_jax:{number}:{name}") == [(call.output.shape, False)],
                padded=PADDING in times,
            )
            for number, call in enumerate(of_layer)
        ]
        for name, of_layer in calls.items()
    }


def refuse_padding(argument: str, padded: bool) -> None:
    """Refuse to count the rows of layers' inputs in a model that pads its tokens.

    Raises:
        InvalidInput: it does; the message names the argument.
    """
    if padded:
        raise InvalidInput(
            f"{argument}: of a model that pads its tokens, whose rows would count as inputs of "
            "layers; make the model with pad_tokens=1 for this measure"
        )


def has_padding(jaxpr: Any) -> bool:
    """Tell whether an open program pads tokens and says so by `PADDING`."""
    return any(name == PADDING for name, _, _ in _markers(jaxpr))


def _markers(jaxpr: Any, looped: bool = False) -> Iterator[tuple[str, Shape, bool]]:
    """Names in a program, with the shapes that they are given to and whether they are in a loop."""
    for equation in jaxpr.eqns:
        primitive = equation.primitive.name
        if primitive == "name":
            yield equation.params["name"], equation.outvars[0].aval.shape, looped
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                # Closed programs hold an open one.
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _markers(inner, looped or primitive in ("scan", "while"))


def kernel_paths(params: Params) -> tuple[str, ...]:
    """Paths of the dense kernels [in, out] of a parameter tree, by linen's names."""
    leaves = trees.leaves_by_path(params)
    # Kernels of convolutions have the same name and more axes.
    return tuple(p for p, x in leaves.items() if p.split("/")[-1] == "kernel" and x.ndim == 2)


def layer_of(path: str) -> str:
    """Name of the layer that a leaf belongs to: "a/b" for "a/b/kernel", "" for "kernel"."""
    return path.rpartition("/")[0]


def inputs_of(apply: Callable[[], Any], layer: str) -> Array:
    """Inputs of one dense layer while `apply()` runs the model, float32; those of its first call.

    Raises:
        ValueError: the model calls no dense layer of that name.
    """
    inputs: dict[str, Array] = {}

    # No lambda: an array that it returned would replace the layer's output.
    def remember(call: LayerCall) -> None:
        inputs.setdefault(call.name, call.inputs)

    with visiting(remember):
        apply()
    if layer not in inputs:
        raise ValueError(f"layer={layer!r}: no Dense layer of the model that is called")
    return inputs[layer].astype(jnp.float32)


def input_moments(
    apply: Callable[[], Any], paths: Collection[str], weights: Array
) -> dict[str, tuple[Array, Array]]:
    """Sum the outer products of dense layers' inputs over the N examples that `apply` runs on.

    By path of a kernel these are `sum_n weight_n x_n x_n^T` [in, in], over token axes and all calls
    of a layer, and the sum of the weights.

    Raises:
        ValueError: a kernel of no dense layer that the model calls.
    """
    moments: dict[str, tuple[Array, Array]] = {}

    def add(call: LayerCall) -> None:
        path = call.kernel
        if path not in paths:
            return
        # Layers may compute in bfloat16, in which sums over a batch lose their small terms.
        x = jnp.asarray(call.inputs, jnp.float32)
        by_example = weights.reshape(-1, *[1] * (x.ndim - 1))
        rows = (x * by_example).reshape(-1, x.shape[-1])
        products = jnp.matmul(rows.T, x.reshape(rows.shape), precision="highest")
        # A token counts as an example of its own.
        count = jnp.sum(jnp.broadcast_to(by_example, (*x.shape[:-1], 1)))
        total, examples = moments.get(path, (0.0, 0.0))
        moments[path] = total + products, examples + count

    with visiting(add):
        apply()
    if missing := [path for path in paths if path not in moments]:
        raise ValueError(f"paths={missing}: no Dense layer of the model that is called")
    # In the order of `paths`, which does not depend on the order of the calls.
    return {path: moments[path] for path in paths}
