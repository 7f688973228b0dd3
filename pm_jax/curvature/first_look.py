"""A look at the model on a few examples before it is measured, for mistakes that give numbers.

Curvature is measured example by example, so that a model whose logits of an example depend on the
other examples, as in BatchNorm's training mode, is another model when it is measured.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import losses
from pm_jax.curvature.static_leaves import Frame
from pm_jax.types import Array, Batch, InvalidInput, Params, PyTree

ROWS = 8
"""Examples that are looked at."""
SMALLEST_DIFFERENCE = 0.02
"""As a share of the largest logit: bfloat16 rounds logits of a deep model by less."""
LARGEST_LOGIT = 1e20
"""Logits beyond it are masks."""


def check_arity(function: Callable[..., Any], model_state: PyTree, inputs: str) -> None:
    """Hold a `LogitsFn` or `LossesFn`, whose second argument is `inputs`, against its arguments.

    Raises:
        InvalidInput: it does not take as many.
    """
    arguments = ["params", inputs] + ([] if model_state is None else ["model_state"])
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        remedy = "give measure_all a model_state, or let the function take no state"
        if model_state is not None:
            remedy = f"let it take the state, as in lambda params, {inputs}, state: ..."
        kind = "logits_fn" if inputs == "inputs" else "losses_fn"
        raise InvalidInput(
            f"{kind}={getattr(function, '__name__', function)}: is called with "
            f"({', '.join(arguments)}) and does not take them ({error}); {remedy}"
        ) from None
    except ValueError:
        # Some functions written in C have no signature.
        pass


def outputs_shape(
    logits_fn: Callable[..., Any] | None,
    losses_fn: Callable[..., Any] | None,
    params: Params,
    batch: Batch,
    model_state: PyTree,
    stacklevel: int,
) -> tuple[int, ...] | None:
    """Look at a model's outputs on a batch; returns the shape of its logits where it has some.

    Args:
        logits_fn: the model, or `None`.
        losses_fn: looked at where there is no `logits_fn`; or `None`.
        params: its parameters.
        batch: the first examples, with weights.
        model_state: its state, or `None`.
        stacklevel: of the warnings.

    Raises:
        InvalidInput: a function of another arity, or outputs of another shape.
    """
    function = logits_fn or losses_fn
    if function is None:
        return None
    check_arity(function, model_state, "inputs" if logits_fn else "batch")
    arrays, frame = Frame.split((params, model_state))
    few = jax.tree.map(lambda leaf: leaf[:ROWS], batch)
    outputs = _outputs(function, bool(logits_fn), frame, arrays, few)
    # Copies of one example: whatever another company does to it, this one does most.
    copies = jax.tree.map(lambda leaf: leaf[np.zeros(len(leaf), np.int32)], few)
    of_copies = _outputs(function, bool(logits_fn), frame, arrays, copies)
    _compare(
        np.asarray(outputs, np.float32),
        np.asarray(of_copies, np.float32),
        "logits_fn" if logits_fn else "losses_fn",
        stacklevel + 1,
    )
    return outputs.shape if logits_fn else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outputs(
    function: Callable[..., Any], are_logits: bool, frame: Frame, arrays: list[Array], batch: Batch
) -> Array:
    """Logits or losses of a batch, with their shape checked."""
    params, model_state = frame.joined(arrays)
    examples = batch.inputs if are_logits else batch
    outputs = losses.with_state(function, model_state)(params, examples)
    name = "logits_fn" if are_logits else "losses_fn"
    if not hasattr(outputs, "shape"):
        raise InvalidInput(
            f"{name}: returns a {type(outputs).__name__}; it must return one array, "
            + ("the logits [N, C] (without the state that `apply(..., mutable=...)` adds)"
               if are_logits else "the losses [N]")
        )  # fmt: skip
    count = len(batch.labels)
    wanted = (2, 3) if are_logits else (1,)
    if outputs.ndim not in wanted or outputs.shape[0] != count:
        shapes = "logits [N, C], or [N, T, C] of tokens" if are_logits else "one loss each, [N]"
        raise InvalidInput(
            f"{name}: returns shape {outputs.shape} for {count} examples; it must return {shapes}"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise InvalidInput(
            f"{name}: returns {outputs.dtype}; it must return floating-point numbers"
        )
    return outputs


def _compare(outputs: np.ndarray, of_copies: np.ndarray, name: str, stacklevel: int) -> None:
    """Warn where an example's outputs depend on the rest of its batch, or on its place there.

    `of_copies` are the outputs of as many copies of the first example.
    """
    unmasked = np.where(abs(outputs) < LARGEST_LOGIT, abs(outputs), 0)
    bound = SMALLEST_DIFFERENCE * float(np.nan_to_num(unmasked).max(initial=0))
    what = "logits" if name == "logits_fn" else "losses"

    def share(differences: np.ndarray) -> float:
        largest = float(np.nan_to_num(abs(differences)).max(initial=0))
        return SMALLEST_DIFFERENCE * largest / bound if bound and largest > bound else 0.0

    if noise := share(of_copies - of_copies[:1]):
        warnings.warn(
            f"{name}: the {what} of one example, given twice in a batch, differ by {noise:.0%} of "
            "the largest, as with dropout; measure without it (train=False, or deterministic=True)",
            stacklevel=stacklevel,
        )
    elif change := share(of_copies[:1] - outputs[:1]):
        warnings.warn(
            f"{name}: the {what} of an example change by {change:.0%} of the largest with the "
            "other examples of its batch, as with BatchNorm in training mode, and curvature is "
            "that of single examples; evaluate with running statistics (train=False, and "
            "model_state=batch_stats)",
            stacklevel=stacklevel,
        )
