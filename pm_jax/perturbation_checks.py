"""Checks of the arguments of a perturbed loss, all of them of structures, shapes and types.

They run while a function is traced, so that compiled programs are the same with and without them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.lora import Adapter
from pm_jax.types import Array, InvalidInput, Params, PyTree


def is_adapter(leaf: Any) -> bool:
    """True for an `Adapter`, which stands in the place of a kernel."""
    return isinstance(leaf, Adapter)


def leaves(tree: PyTree) -> dict[str, Any]:
    """`{path: leaf}` of a tree in which an adapter is one leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_adapter)
    return {trees.path_name(path): leaf for path, leaf in flat}


def check_models(params: Params, base: Params) -> None:
    """Raise `InvalidInput` unless `base` is a model of the structure and shapes of `params`."""
    moving, start = leaves(params), leaves(base)
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params):
        raise InvalidInput(
            "params: has the collections params and batch_stats, and running statistics must not "
            "be displaced; pass variables['params'] and give the others to the loss as arguments"
        )
    if not any(is_adapter(leaf) or trees.is_floating(leaf) for leaf in moving.values()):
        raise InvalidInput("params: has no floating-point leaf, so nothing could be displaced")
    for path, leaf in start.items():
        if is_adapter(leaf):
            raise InvalidInput(
                f"base: has an adapter at {path}; pass the kernels that the adapters are added to"
            )
    for name, model in (("params", params), ("base", base)):
        _check_not_deleted(name, model)
    # An adapter stands in the place of a kernel, so it is left out of the comparison.
    dense = jax.tree_util.tree_map_with_path(
        lambda path, leaf: start.get(trees.path_name(path), leaf) if is_adapter(leaf) else leaf,
        params,
        is_leaf=is_adapter,
    )
    trees.check_alike(base, dense, ("base", "params"))


def _check_not_deleted(name: str, model: Params) -> None:
    for path, leaf in trees.leaves_by_path(model).items():
        # A tracer cannot say whether its array still exists.
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if concrete and leaf.is_deleted():
            raise InvalidInput(
                f"{name}: the array at {path} was deleted, as a jitted function deletes what it is "
                "given in donate_argnums; keep a copy, as jax.tree.map(jnp.copy, params)"
            )


def is_key(value: Any) -> bool:
    """True for one PRNG key: typed, or a legacy uint32 array [2] or [4]."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None:
        return False
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    return dtype == jnp.uint32 and shape in ((2,), (4,))


def check_key(key: Any, params: Params) -> None:
    """Raise `InvalidInput` unless `key` is one PRNG key and `params` is none."""
    order = "the order is (key, params, base, ...), and jax.grad needs argnums=1"
    if is_key(params):
        raise InvalidInput(f"params: is a PRNG key; {order}")
    if is_key(key):
        return
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise InvalidInput(
            f"key: has shape {key.shape}; a call takes one key, as keys[0], or use jax.vmap"
        )
    if any(trees.is_floating(leaf) for leaf in jax.tree.leaves(key)):
        raise InvalidInput(f"key: is a {type(key).__name__} with floating-point leaves; {order}")
    raise InvalidInput(f"key={key!r}: is no PRNG key; make one with jax.random.key(seed)")


def base_and_rest(args: tuple, kwargs: dict[str, Any]) -> tuple[Params, tuple]:
    """Take `base` out of the arguments behind the parameters: by its name, or else the first.

    Raises:
        InvalidInput: there is none.
    """
    if "base" in kwargs:
        return kwargs.pop("base"), args
    if not args:
        raise InvalidInput(
            "base: is missing; pass the model that the task started from, (key, params, base, ...)"
        )
    return args[0], args[1:]


def loss_and_aux(output: Any, has_aux: bool) -> tuple[Array, Any]:
    """Loss and auxiliary outputs of a call of a loss function; `None` for no auxiliary outputs.

    Raises:
        InvalidInput: no pair though `has_aux`, a container though not, or no floating scalar.
    """
    loss, aux = output, None
    if has_aux:
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise InvalidInput(
                f"has_aux=True: loss_fn must return (loss, aux), and returned {_described(output)}"
            )
        loss, aux = output
    elif isinstance(output, (tuple, list, Mapping)):
        raise InvalidInput(
            f"has_aux=False: loss_fn returned {_described(output)}; if that is (loss, aux), pass "
            "has_aux=True to perturbed and to jax.grad"
        )
    if not isinstance(loss, (float, int)) and not hasattr(loss, "dtype"):
        raise InvalidInput(f"loss_fn: returned {_described(loss)} as the loss; return a scalar")
    if jnp.shape(loss) != ():
        raise InvalidInput(
            f"loss_fn: returned a loss of shape {jnp.shape(loss)}; return a scalar, as jnp.mean or "
            "pm_jax.losses.mean make it"
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise InvalidInput(
            f"loss_fn: returned a loss of type {jnp.result_type(loss)}; return a real number"
        )
    return loss, aux


def _described(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return "an array" if isinstance(output, jax.Array) else f"a {type(output).__name__}"
