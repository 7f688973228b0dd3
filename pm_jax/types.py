"""Types of the values that the functions of pm_jax exchange."""

import textwrap
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
"""An array of any shape; docstrings say which one, as in [N, C]."""
Key: TypeAlias = jax.Array
"""A typed PRNG key, as made by `jax.random.key`."""

PyTree: TypeAlias = Any
"""Containers of arrays within one another, as `jax.tree` takes them."""
Params: TypeAlias = Any
"""Any pytree of arrays: linen params, `nnx.split` state, a plain dict, a whole train state.

Leaves that are not floating point (steps, PRNG keys, ids, text) do not merge and stay as they are.
"""


class InvalidInput(ValueError):
    """A mistake of the user's; its one line names the argument, its value and the remedy."""

    def __init__(self, message: str):
        # Names quoted from a file may hold line breaks.
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


def require(name: str, value: float | str, holds: bool, wanted: str) -> None:
    """Raise InvalidInput where a setting's value does not hold, and say what would be right."""
    if not holds:
        raise InvalidInput(f"{name}={value}: must be {wanted}")


def cause(error: Exception) -> str:
    """Type and message of a library's error, cut to a phrase for the line of an `InvalidInput`."""
    # Messages of file readers may have many lines and quote the file.
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


class Batch(NamedTuple):
    """Labelled examples; every leaf has the example axis first.

    Attributes:
        inputs: pytree of arrays [N, ...], what the model reads.
        labels: int32 [N], the class of each example; [N, T] for sequences, the class of each token.
        weights: float32 [N], 1 for an example and 0 for padding; for sequences also [N, T], one for
            each token (`losses` says what they mean); `None` means all ones.
    """

    inputs: PyTree
    labels: Array
    weights: Array | None = None


class LogitsFn(Protocol):
    """Logits float32 [N, C] exactly as the loss sees them: mask and temperature applied.

    Sequences have logits [N, T, C]. Each row may depend on its own example only; a masked logit is
    a finite -1e30. A model with state (batch statistics, a class mask, frozen parameters) takes it
    as a third argument, `logits_fn(params, inputs, model_state)`, where a `model_state` is given to
    the measure.
    """

    # `Any` leaves the third argument open, which only a model with state has.
    def __call__(self, params: Params, inputs: PyTree, /, *args: Any, **kwargs: Any) -> Array:
        """Logits [N, C]."""
        ...


class LossesFn(Protocol):
    """One loss per example, float32 [N], from parameters and a `Batch`.

    A third argument is the model's state, as for a `LogitsFn`. The loss of a sequence is the sum
    over its tokens.
    """

    # `Any` leaves the third argument open, which only a model with state has.
    def __call__(self, params: Params, batch: Batch, /, *args: Any, **kwargs: Any) -> Array:
        """Losses [N]."""
        ...


class LossFn(Protocol):
    """A scalar loss of parameters and whatever else the caller passes on."""

    def __call__(self, params: Params, /, *args: Any) -> Array:
        """The loss."""
        ...
