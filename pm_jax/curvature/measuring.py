"""How a measure runs over examples in any form: compiled, looked after, and with progress.

The programs take the measure as a static argument and everything else as arrays: parameters,
direction, key and model state of later tasks run through the program of the first one.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import losses, trees
from pm_jax.curvature import examples as examples_
from pm_jax.curvature import first_look
from pm_jax.curvature.program_keys import Program
from pm_jax.curvature.static_leaves import Frame
from pm_jax.types import Array, Batch, InvalidInput, Key, Params, PyTree

if TYPE_CHECKING:
    from pm_jax.curvature.measures import Measure, Measurement


class Given(NamedTuple):
    """The arguments of `Measure.init`."""

    params: Params
    direction: PyTree | None = None
    key: Key | None = None
    model_state: PyTree | None = None


def run(
    measure: Measure, given: Given, examples: Any, batch_size: int, progress: bool
) -> Measurement:
    """Run a measure over all examples (see `measures.measure_all`)."""
    _check_arguments(measure, given, batch_size)
    if examples_.are_traced((given, examples if examples_.are_arrays(examples) else ())):
        if not examples_.are_arrays(examples):
            raise InvalidInput(
                f"examples={type(examples).__name__}: inside a compiled function they must be one "
                "Batch or tuple of arrays; call measure_all outside of jax.jit"
            )
        return _traced(measure, given, examples_.as_batch(examples, "examples"), batch_size)
    arrays, frame = Frame.split(given)
    _refuse_not_finite(given)
    if progress or not examples_.are_arrays(examples):
        items = [examples] if examples_.are_arrays(examples) else examples
        return _streamed(measure, frame, arrays, items, batch_size, progress)
    batch = examples_.as_batch(examples, "examples")
    count = len(batch.labels)
    if not count:
        raise InvalidInput("examples: has no examples; give one at least")
    size = examples_.smaller(batch_size, count)
    look = _look(measure, given, batch, "examples", frames=3)
    number = -(-count // size)
    rows = size * examples_.rounded_up(number)
    program = Program(measure, look.computation)
    found, has_nan = _measured(
        program, frame, size, arrays, examples_.padded(batch, rows), np.int32(number)
    )
    _refuse_nan_inputs(has_nan)
    _check_found(found, stacklevel=4)
    return found


def check_parameters(name: str, params: Any) -> None:
    """Raise InvalidInput for what holds more than parameters: an nnx module or a `TrainState`."""
    kind = type(params).__name__
    nnx = sys.modules.get("flax.nnx")  # loaded already if there is a module of it
    if nnx is not None and isinstance(params, nnx.Module):
        raise InvalidInput(
            f"{name}={kind}: is a module, with its statistics and keys; give its parameters, "
            "pm_jax.integrations.nnx.snapshot(module)"
        )
    if hasattr(params, "apply_gradients") and hasattr(params, "params"):
        raise InvalidInput(
            f"{name}={kind}: has the optimiser's moments as well; give its parameters, state.params"
        )


def _check_arguments(measure: Any, given: Given, batch_size: Any) -> None:
    """Raise InvalidInput for arguments that no measure can use."""
    if not hasattr(measure, "finalize"):
        name = getattr(measure, "__name__", type(measure).__name__)
        call = f"{name}(logits_fn)" if callable(measure) else "pm_jax.fisher_exact(logits_fn)"
        raise InvalidInput(f"measure={name}: must be a Measure; call its factory, as in {call}")
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise InvalidInput(f"batch_size={batch_size}: must be a whole number, at least 1")
    check_parameters("params", given.params)
    if not jax.tree.leaves(trees.floating(given.params)):
        raise InvalidInput(
            "params: has no floating-point leaf; give the parameters of the model, a pytree"
        )
    if given.direction is not None:
        trees.check_alike(given.direction, given.params, ("direction", "params"))


def _look(measure: Measure, given: Given, batch: Batch, name: str, frames: int) -> first_look.Look:
    """Look at the model and the labels on a first batch.

    Warnings are those of the caller of `measure_all`, so many frames above the one that looks.
    """
    look = first_look.look_at(
        measure.logits_fn,
        measure.losses_fn,
        given.params,
        batch,
        given.model_state,
        stacklevel=2 + frames,
    )
    if look.logits is not None:
        examples_.check_labels(batch, look.logits, name)
    return look


def _traced(measure: Measure, given: Given, examples: Batch, batch_size: int) -> Measurement:
    """Measure inside a function that is being compiled: a scan, and no look at any value."""
    # NumPy's arrays cannot be indexed by traced numbers.
    batches = losses.in_batches(jax.tree.map(jnp.asarray, examples), batch_size)
    state = measure.init(*given)

    def step(moving, batch):
        return measure.update(state._replace(**moving), batch).moving(), None

    # A scan compiles one update, whatever the number of batches.
    moving, _ = jax.lax.scan(step, state.moving(), batches)
    return measure.finalize(state._replace(**moving))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(
    program: Program,
    frame: Frame,
    size: int,
    arrays: list[Array],
    examples: Batch,
    number: Array,
) -> tuple[Measurement, Array]:
    """Measure the first `number` batches of examples; returns also whether NaN is among inputs."""
    measure = program.owner
    state = measure.init(*frame.joined(arrays))
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), examples)

    def step(index, moving):
        batch = jax.tree.map(lambda leaf: leaf[index], batches)
        return measure.update(state._replace(**moving), batch).moving()

    # The number of batches is an argument: tasks of other sizes are measured by the same program.
    moving = jax.lax.fori_loop(0, number, step, state.moving())
    return measure.finalize(state._replace(**moving)), _has_nan(examples.inputs)


def _streamed(
    measure: Measure,
    frame: Frame,
    arrays: list[Array],
    items: Iterable[Any],
    batch_size: int,
    progress: bool,
) -> Measurement:
    """Measure batch by batch, as an iterable gives them."""
    given = Given(*frame.joined(arrays))
    moving, look, flags = None, first_look.Look(), []
    for name, batch in _shown(items, batch_size, progress):
        if moving is None:
            look = _look(measure, given, batch, name, frames=4)
            program = Program(measure, look.computation)
            moving = _start_compiled(program, frame, arrays)
        elif look.logits is not None:
            examples_.check_labels(batch, look.logits, name)
        moving, has_nan = _update_compiled(program, frame, arrays, moving, batch)
        flags.append((name, has_nan))
    for name, has_nan in flags:
        # Read at the end: a look at every batch would wait for it before the next one is made.
        _refuse_nan_inputs(has_nan, name)
    found = _end_compiled(program, frame, arrays, moving)
    _check_found(found, stacklevel=5)
    return found


def _shown(items: Iterable[Any], batch_size: int, progress: bool) -> Iterator[tuple[str, Batch]]:
    """The batches of `examples.batches_of`, with a progress bar if asked for."""
    if not progress:
        yield from examples_.batches_of(items, batch_size)
        return
    import tqdm  # here, because most measurements show none

    only: Any = items[0] if isinstance(items, list) and len(items) == 1 else None
    total = len(only[1]) if examples_.are_arrays(only) else None
    with tqdm.tqdm(total=total, desc="curvature", unit="example") as bar:
        for name, batch in examples_.batches_of(items, batch_size):
            yield name, batch
            bar.update(int(np.sum(np.asarray(losses.weights_of(batch)) > 0)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start_compiled(program: Program, frame: Frame, arrays: list[Array]) -> dict[str, PyTree]:
    return program.owner.init(*frame.joined(arrays)).moving()


# The sums are written where the old ones were; parameters are the caller's, and no part of them.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _update_compiled(
    program: Program, frame: Frame, arrays: list[Array], moving: dict[str, PyTree], batch: Batch
) -> tuple[dict[str, PyTree], Array]:
    state = program.owner.init(*frame.joined(arrays))._replace(**moving)
    return program.owner.update(state, batch).moving(), _has_nan(batch.inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _end_compiled(
    program: Program, frame: Frame, arrays: list[Array], moving: dict[str, PyTree]
) -> Measurement:
    return program.owner.finalize(program.owner.init(*frame.joined(arrays))._replace(**moving))


def _has_nan(tree: PyTree) -> Array:
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(
        jnp.logical_or, (jnp.isnan(x).any() for x in floating), jnp.asarray(False)
    )


_has_nan_compiled = jax.jit(_has_nan)


@jax.jit
def _which_are_not_finite(leaves: dict[str, Array]) -> Array:
    def wrong(path: str, leaf: Array) -> Array:
        # A model's state may have infinities, as a mask that is added to logits.
        if path.startswith("model_state"):
            return jnp.isnan(leaf).any()
        return ~jnp.isfinite(leaf).all()

    return jnp.stack([wrong(path, leaf) for path, leaf in leaves.items()])


def _refuse_not_finite(given: Given) -> None:
    """Raise InvalidInput for NaN or infinity in parameters, direction or the model's state."""
    leaves = {
        path: leaf
        for path, leaf in trees.leaves_by_path(given._asdict()).items()
        if trees.is_floating(leaf)
    }
    if not leaves:
        return
    flags = np.asarray(_which_are_not_finite(leaves))
    wrong = [path for path, flag in zip(leaves, flags, strict=True) if flag]
    if wrong:
        raise InvalidInput(
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}: has numbers that are not "
            "finite, and so would the curvature; look at the loss of the training before this"
        )


def _refuse_nan_inputs(has_nan: Array, name: str = "examples") -> None:
    if bool(has_nan):
        raise InvalidInput(f"{name}: has NaN among its inputs, and so would the curvature")


def _check_found(found: Measurement, stacklevel: int) -> None:
    """Raise InvalidInput for a measurement of nothing, and warn of one that is undefined."""
    if float(found.examples) == 0:
        raise InvalidInput("examples: all weights are 0, which is padding; give one example more")
    if bool(_has_nan_compiled(found.quadratic)):
        warnings.warn(
            "measure_all: the curvature has NaN, although parameters and inputs have none; look "
            "for an overflow, or a gradient that is undefined, in the model",
            stacklevel=stacklevel,
        )
