"""The dense layers of a linen model: what reaches them, what leaves them, and their kernels.

All that looks inside a linen model goes through `visiting`, which calls back whenever the model
applies a layer. Layers are named by the path of their module, "a/b" for the kernel "a/b/kernel".
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.types import Array, Batch, Params, PyTree


class LayerCall(NamedTuple):
    """One application of a layer while a model runs.

    Attributes:
        name: path of the layer, "a/b"; "" for a model that is one layer.
        layer: the linen module.
        inputs: its first argument.
        output: the result.
    """

    name: str
    layer: nn.Module
    inputs: Any
    output: Any

    @property
    def kernel(self) -> str:
        """Path of the layer's kernel, if it has one."""
        return f"{self.name}/kernel".lstrip("/")


def visiting(
    visit: Callable[[LayerCall], Array | None], kind: type[nn.Module] = nn.Dense
) -> AbstractContextManager:
    """Context in which a linen model calls back at every layer of a kind that it applies.

    Args:
        visit: is given the `LayerCall`; where it returns an array, this takes the place of the
            layer's output.
        kind: class of the layers.

    Returns:
        A context manager around `module.apply` or `module.init`.

    Example:
        >>> layer, seen = nn.Dense(1), []
        >>> params = {"params": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
        >>> with visiting(lambda call: 2 * call.output):
        ...     layer.apply(params, jnp.ones((1, 2))).tolist()
        [[4.0]]
    """

    def interceptor(next_fn, args, kwargs, context):
        output = next_fn(*args, **kwargs)
        # Modules have other methods, such as `setup`, which compute no outputs.
        if context.method_name != "__call__" or not isinstance(context.module, kind):
            return output
        inputs = args[0] if args else None
        call = LayerCall("/".join(context.module.path), context.module, inputs, output)
        replaced = visit(call)
        return output if replaced is None else replaced

    return nn.intercept_methods(interceptor)


def layers_called_once(module: nn.Module, inputs: PyTree) -> tuple[str, ...]:
    """Names of the dense layers that a model calls exactly once.

    Args:
        module: linen module.
        inputs: of the module; arrays or shapes.

    Returns:
        Paths of layers, in the order of the calls.

    Example:
        >>> from pm_jax.models import MLP
        >>> layers_called_once(MLP(10, (5,)), jnp.ones((1, 4)))
        ('hidden_0', 'head')
    """
    calls: list[str] = []
    with visiting(lambda call: calls.append(call.name)):
        # Only shapes are needed, so nothing is computed.
        jax.eval_shape(module.init, jax.random.key(0), inputs)
    return tuple(name for name in dict.fromkeys(calls) if calls.count(name) == 1)


def kernel_paths(params: Params) -> tuple[str, ...]:
    """Paths of the dense kernels [in, out] of a parameter tree, by linen's names.

    Args:
        params: any parameter tree.

    Returns:
        Paths that end in "kernel", of two axes.

    Example:
        >>> kernel_paths({"fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        ('fc/kernel',)
    """
    leaves = trees.leaves_by_path(params)
    return tuple(p for p, x in leaves.items() if p.split("/")[-1] == "kernel" and x.ndim == 2)


def leaf_paths(params: PyTree, layers: Collection[str]) -> tuple[str, ...]:
    """Paths among `params` of the kernels and biases of some layers.

    Args:
        params: flat `{path: leaf}`, or any other pytree.
        layers: names of layers.

    Returns:
        Paths of leaves, in the tree's order.

    Example:
        >>> leaf_paths({"fc/kernel": 0, "fc/bias": 0, "norm/bias": 0}, ("fc",))
        ('fc/bias', 'fc/kernel')
    """
    return tuple(
        path
        for path in trees.leaves_by_path(params)
        if layer_of(path) in layers and path.rpartition("/")[2] in ("kernel", "bias")
    )


def layer_of(path: str) -> str:
    """Name of the layer that a leaf belongs to.

    Args:
        path: of a leaf.

    Returns:
        The path without its last part.

    Example:
        >>> layer_of("encoder/key/kernel"), layer_of("kernel")
        ('encoder/key', '')
    """
    return path.rpartition("/")[0]


def inputs_of(apply: Callable[[], Any], layer: str) -> Array:
    """The inputs of one dense layer of a model.

    Args:
        apply: runs the model, which calls the layer.
        layer: its name.

    Returns:
        float32 array; of the first call, if there are several.

    Raises:
        ValueError: the model calls no dense layer of that name.

    Example:
        >>> params = {"params": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
        >>> inputs_of(lambda: nn.Dense(1).apply(params, jnp.ones((1, 2))), "").tolist()
        [[1.0, 1.0]]
    """
    seen: dict[str, Array] = {}

    def remember(call: LayerCall) -> None:
        seen.setdefault(call.name, call.inputs)

    with visiting(remember):
        apply()
    if layer not in seen:
        raise ValueError(f"layer={layer!r}: no Dense layer of the model that is called")
    return seen[layer].astype(jnp.float32)


def input_moments(
    apply: Callable[[], Any], paths: Collection[str], weights: Array
) -> dict[str, tuple[Array, Array]]:
    """Sums of the outer products of dense layers' inputs over a batch and over token axes.

    Args:
        apply: runs the model on N examples.
        paths: of the layers' kernels.
        weights: of the examples, [N].

    Returns:
        `{path: (sum_n weight_n x_n x_n^T [in, in], sum of the weights)}`, float32. A layer that is
        called more than once counts all its calls.

    Raises:
        ValueError: a kernel of no dense layer that the model calls.

    Example:
        >>> params, x = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}, jnp.asarray([[1., 2.]])
        >>> found = input_moments(
        ...     lambda: nn.Dense(1).apply({"params": params}, x), ["kernel"], jnp.ones(1))
        >>> found["kernel"][0].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    found: dict[str, tuple[Array, Array]] = {}

    def add(call: LayerCall) -> None:
        path = call.kernel
        if path not in paths:
            return
        x = jnp.asarray(call.inputs, jnp.float32)
        by_example = weights.reshape(-1, *[1] * (x.ndim - 1))
        rows = (x * by_example).reshape(-1, x.shape[-1])
        products = jnp.matmul(rows.T, x.reshape(rows.shape), precision="highest")
        count = jnp.sum(jnp.broadcast_to(by_example, (*x.shape[:-1], 1)))
        total, examples = found.get(path, (0.0, 0.0))
        found[path] = total + products, examples + count

    with visiting(add):
        apply()
    if missing := [path for path in paths if path not in found]:
        raise ValueError(f"paths={missing}: no Dense layer of the model that is called")
    return {path: found[path] for path in paths}


class Tapped(NamedTuple):
    """A batch on its way through dense layers, and the way back to them.

    Attributes:
        outputs: of the model, [N, ...].
        inputs: `{layer: its inputs [N, ..., in]}`.
        pull_back: from cotangents of the model's outputs to `{layer: gradients of the layer's
            outputs [N, ..., out]}`.
    """

    outputs: Array
    inputs: dict[str, Array]
    pull_back: Callable[[Array], dict[str, Array]]


def tapped(
    outputs_fn: Callable[[Params, Batch], Array],
    params: Params,
    batch: Batch,
    layers: Collection[str],
) -> Tapped:
    """Run a model so that gradients with respect to its dense layers' outputs can be had.

    A tap is a zero that is added to a layer's output: the gradient with respect to the tap is the
    gradient with respect to that output, for every example by itself.

    Args:
        outputs_fn: `outputs_fn(params, batch) -> [N, ...]`, which applies a linen module.
        params: of the model.
        batch: N examples.
        layers: names of dense layers that the model calls exactly once.

    Returns:
        `Tapped`.

    Raises:
        ValueError: a name of no such layer.

    Example:
        >>> layer, params = nn.Dense(1), {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
        >>> found = tapped(lambda p, b: layer.apply({"params": p}, b.inputs)[:, 0],
        ...                params, Batch(jnp.asarray([[3.0]]), jnp.zeros(1, int)), [""])
        >>> found.inputs[""].tolist(), found.pull_back(jnp.full(1, 2.0))[""].tolist()
        ([[3.0]], [[2.0]])
    """

    def run(taps: dict[str, Array] | None) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        seen: dict[str, tuple[Array, Array]] = {}

        def add_tap(call: LayerCall) -> Array | None:
            if call.name not in layers:
                return None
            if call.name in seen:
                name = call.name
                raise ValueError(f"dense_layers={name}: is called more than once; leave it out")
            seen[call.name] = call.inputs, call.output
            return None if taps is None else call.output + taps[call.name]

        with visiting(add_tap):
            outputs = outputs_fn(params, batch)
        return outputs, seen

    # The shapes of the taps are those of the layers' outputs, known only after a first run.
    shapes = jax.eval_shape(lambda: run(None)[1])
    if missing := sorted(set(layers) - set(shapes)):
        raise ValueError(
            f"dense_layers={missing}: are no linen Dense layers of the model that is applied"
        )
    taps = {name: jnp.zeros(output.shape, output.dtype) for name, (_, output) in shapes.items()}
    outputs, pull_back, seen = jax.vjp(run, taps, has_aux=True)
    inputs = {name: x for name, (x, _) in seen.items()}
    return Tapped(outputs, inputs, lambda cotangents: pull_back(cotangents)[0])
