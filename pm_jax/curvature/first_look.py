"""A look at the model on a few examples before it is measured, for mistakes that give numbers.

Curvature is measured example by example, so that a model whose logits of an example depend on the
other examples, as in BatchNorm's training mode, is another model when it is measured.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import losses
from pm_jax.curvature.program_keys import Computation, Program, hashable
from pm_jax.curvature.static_leaves import Frame
from pm_jax.types import Array, Batch, InvalidInput, Params, PyTree, cause

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


class Look(NamedTuple):
    """The findings of a look at a model.

    Attributes:
        logits: shape of its logits; `None` where it has none that are known.
        computation: the model as it computes now; `None` where the measure does not know it.
    """

    logits: tuple[int, ...] | None = None
    computation: Computation | None = None


def look_at(
    logits_fn: Callable[..., Any] | None,
    losses_fn: Callable[..., Any] | None,
    params: Params,
    batch: Batch,
    model_state: PyTree,
    *,
    stacklevel: int,
) -> Look:
    """Look at a model's outputs on a batch, and warn of what curvature cannot be measured with.

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
        return Look()
    check_arity(function, model_state, "inputs" if logits_fn else "batch")
    arrays, frame = Frame.split((params, model_state))
    few = jax.tree.map(lambda leaf: leaf[:ROWS], batch)
    model = _Model(hashable(function), bool(logits_fn), frame)
    computation = _computation(model, arrays, few)
    program = Program(model, computation)
    outputs = _outputs(program, arrays, few)
    # Copies of one example: whatever another company does to it, this one does most.
    copies = jax.tree.map(lambda leaf: leaf[np.zeros(len(leaf), np.int32)], few)
    of_copies = _outputs(program, arrays, copies)
    _compare(
        np.asarray(outputs, np.float32),
        np.asarray(of_copies, np.float32),
        model.name,
        computation.draws,
        stacklevel + 1,
    )
    return Look(outputs.shape if logits_fn else None, computation)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A `LogitsFn` or `LossesFn`, and the structure of its parameters and state."""

    function: Callable[..., Any]
    are_logits: bool
    frame: Frame

    @property
    def name(self) -> str:
        """The name of the function in errors."""
        return "logits_fn" if self.are_logits else "losses_fn"

    def outputs(self, arrays: list[Array], batch: Batch) -> Array:
        """Logits or losses of a batch, with their shape checked."""
        params, model_state = self.frame.joined(arrays)
        examples = batch.inputs if self.are_logits else batch
        outputs = losses.with_state(self.function, model_state)(params, examples)
        name = self.name
        if not hasattr(outputs, "shape"):
            wanted = "losses [N]"
            if self.are_logits:
                wanted = "logits [N, C] (without the state that `apply(..., mutable=...)` adds)"
            kind = type(outputs).__name__
            raise InvalidInput(f"{name}: returns a {kind}; it must return one array, the {wanted}")
        count, ranks = len(batch.labels), (2, 3) if self.are_logits else (1,)
        if outputs.ndim not in ranks or outputs.shape[0] != count:
            wanted = "logits [N, C], or [N, T, C] of tokens" if self.are_logits else "losses [N]"
            found = f"shape {outputs.shape} for {count} examples"
            raise InvalidInput(f"{name}: returns {found}; it must return {wanted}")
        if not jnp.issubdtype(outputs.dtype, jnp.floating):
            raise InvalidInput(f"{name}: returns {outputs.dtype}; it must return floating point")
        return outputs


def _computation(model: _Model, arrays: list[Array], batch: Batch) -> Computation:
    """Trace a model on a batch.

    Raises:
        InvalidInput: it changes variables of an nnx module that it did not make.
    """
    try:
        return Computation.of(model.outputs, arrays, batch)
    except Exception as error:
        # By name, because most users of pm_jax do without nnx.
        if type(error).__name__ != "TraceContextError":
            raise
        raise InvalidInput(
            f"{model.name}: changes variables of an nnx module while it is measured "
            f"({cause(error)}); use model.eval() and pm_jax.integrations.nnx.logits_fn(model)"
        ) from None


@functools.partial(jax.jit, static_argnums=0)
def _outputs(program: Program, arrays: list[Array], batch: Batch) -> Array:
    return program.owner.outputs(arrays, batch)


def _compare(
    outputs: np.ndarray, of_copies: np.ndarray, name: str, draws: bool, stacklevel: int
) -> None:
    """Warn where an example's outputs depend on the rest of its batch, on its place, or on chance.

    `of_copies` are the outputs of as many copies of the first example; `draws` says whether the
    function draws random numbers, of which all examples may have the same.
    """
    unmasked = np.where(abs(outputs) < LARGEST_LOGIT, abs(outputs), 0)
    bound = SMALLEST_DIFFERENCE * float(np.nan_to_num(unmasked).max(initial=0))
    what = "logits" if name == "logits_fn" else "losses"

    def share(left: np.ndarray, right: np.ndarray) -> float:
        # Masks may be infinite, and their difference undefined.
        finite = np.isfinite(left) & np.isfinite(right)
        differences = np.subtract(left, right, out=np.zeros_like(left), where=finite)
        largest = float(abs(differences).max(initial=0))
        return SMALLEST_DIFFERENCE * largest / bound if bound and largest > bound else 0.0

    if noise := share(of_copies, np.broadcast_to(of_copies[:1], of_copies.shape)):
        warnings.warn(
            f"{name}: the {what} of one example, given twice in a batch, differ by {noise:.0%} of "
            "the largest, as with dropout; measure without it (train=False, or deterministic=True)",
            stacklevel=stacklevel,
        )
    elif change := share(of_copies[:1], outputs[:1]):
        warnings.warn(
            f"{name}: the {what} of an example change by {change:.0%} of the largest with the "
            "other examples of its batch, as with BatchNorm in training mode, and curvature is "
            "that of single examples; evaluate with running statistics (train=False, and "
            "model_state=batch_stats)",
            stacklevel=stacklevel,
        )
    elif draws:
        warnings.warn(
            f"{name}: draws random numbers, as dropout does; measure without it (train=False, or "
            "deterministic=True)",
            stacklevel=stacklevel,
        )
