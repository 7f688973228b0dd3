"""Whatever describes a model, as a `pm_jax.models.Model`."""

import sys
from typing import Any

import flax.linen as nn

from pm_jax.integrations import linen
from pm_jax.models.model import Model
from pm_jax.types import InvalidInput

NEEDED = ("init", "apply", "classifier")


def as_model(thing: Any) -> Model:
    """Make a `Model` of a linen module, an nnx module or a function of `nnx.Rngs` to one.

    A `Model` is returned as it is. The classifier of a module is its submodule `head`; call
    `linen.model` or `nnx_model.model` for another.

    Raises:
        InvalidInput: none of these.

    Example:
        >>> as_model(nn.Dense(3)).classifier
        'head'
    """
    if isinstance(thing, nn.Module):
        return linen.model(thing)
    # A class has all attributes of its objects, and is no model yet.
    is_class = isinstance(thing, type)
    if not is_class and all(hasattr(thing, name) for name in NEEDED):
        return thing
    # Only a program that has imported nnx can have made a module of it.
    nnx = sys.modules.get("flax.nnx")
    if nnx and (isinstance(thing, nnx.Module) or _makes_module(thing, nnx)):
        from pm_jax.integrations import nnx_model

        return nnx_model.model(thing)
    what = f"the class {thing.__name__}" if is_class else f"a {type(thing).__name__}"
    raise InvalidInput(
        f"model={what}: must be a linen module, an nnx module, a function of nnx.Rngs to one, or "
        f"an object with {', '.join(NEEDED)}, see pm_jax.models.Model"
    )


def _makes_module(thing: Any, nnx: Any) -> bool:
    if isinstance(thing, type):
        return issubclass(thing, nnx.Module)
    return callable(thing) and not hasattr(thing, "init")
