"""Diagonal curvature: one number for each parameter, and the Fishers that measure it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature.dense_layers import layer_of
from pm_jax.curvature.measures import (
    Given,
    Measure,
    Measurement,
    MeasureState,
    add_by_chunks,
    remembered,
)
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.curvature.squared_gradients import (
    Passes,
    PassesFn,
    SquaredGradients,
    by_layers,
    by_program,
    by_vmap,
    label_passes,
)
from pm_jax.types import Array, Batch, InvalidInput, Key, LogitsFn, LossesFn, Params, PyTree


@flax.struct.dataclass
class Diagonal(Curvature):
    """A diagonal matrix; sums are exact and of one size, however many tasks there are.

    Attributes:
        diagonal: pytree of the structure of the parameters, float32.
    """

    diagonal: PyTree

    leafwise = True

    def times(self, direction: PyTree) -> PyTree:
        """`H d`, entry by entry."""
        return jax.tree.map(jnp.multiply, self.diagonal, direction)

    def along(self, direction: PyTree) -> Array:
        """`sum_p diagonal_p d_p^2`, scalar."""
        return trees.inner(direction, direction, self.diagonal)

    def plus(self, other: Diagonal) -> Diagonal:
        """The sum of two diagonals."""
        return Diagonal(jax.tree.map(jnp.add, self.diagonal, other.diagonal))

    def scaled(self, factor: Array | float) -> Diagonal:
        """The diagonal times a number."""
        return Diagonal(jax.tree.map(lambda leaf: factor * leaf, self.diagonal))

    def trace(self) -> Array:
        """Sum of the diagonal, scalar."""
        return trees.inner(self.diagonal, jax.tree.map(jnp.ones_like, self.diagonal))


@flax.struct.dataclass
class DiagonalQuadratic(Quadratic):
    """A quadratic with diagonal curvature: three pytrees, however many tasks it sums.

    For the sum over tasks, `diagonal` is `S = sum_i F_i` and `gradient` is
    `sum_i F_i (center - theta_i*)`: exact, and constant in the number of tasks.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.1;
        the running sums equal its list of one Fisher and one model per task

    Attributes:
        curvature: H, one number for each parameter.

    Example:
        >>> first = DiagonalQuadratic.at(jnp.zeros(2), diagonal=jnp.asarray([1.0, 3.0]))
        >>> second = DiagonalQuadratic.at(jnp.ones(2), diagonal=jnp.asarray([1.0, 1.0]))
        >>> both = first + second
        >>> float(both.value(jnp.ones(2))), float(both.curvature_along(jnp.ones(2)))
        (2.0, 6.0)
    """

    curvature: Diagonal

    @classmethod
    def at(cls, center: Params, diagonal: PyTree) -> DiagonalQuadratic:
        """The quadratic of one task, `1/2 sum_p diagonal_p (theta_p - center_p)^2`."""
        trees.check_alike(diagonal, center, ("diagonal", "center"))
        return super().at(center, Diagonal(trees.floating(diagonal)))

    @classmethod
    def zero(cls, center: Params) -> DiagonalQuadratic:
        """The quadratic that is 0 everywhere: the memory before the first task."""
        return cls.at(center, trees.zeros_like(center))

    @property
    def diagonal(self) -> PyTree:
        """The diagonal of H, of the structure of the center."""
        return self.curvature.diagonal


@remembered
def fisher_empirical(
    losses_fn: LossesFn, *, chunk_size: int = 32, dense_layers: Sequence[str] | None = None
) -> Measure:
    """Diagonal empirical Fisher, `mean_n (d L_n / d theta)^2` with the true labels.

    Per-example gradients are squared, not the gradient of a batch mean.

    Args:
        losses_fn: `losses_fn(params, batch) -> [N]`.
        chunk_size: examples whose gradients are in memory at a time (see `chunk_for_memory`).
        dense_layers: names "a/b" of linen layers that `squared_gradients.by_layers` measures: the
            same numbers, faster. With `None`, `squared_gradients.by_program` finds by itself the
            kernels of convolutions and matrix products for which there is a faster way.

    Returns:
        A `Measure`; its quadratic is diagonal.

    Raises:
        ValueError: chunk_size below 1; in `init`, a name without parameters; in `update`, a name
            that is no such layer.

    References:
        Kunstner et al., `Limitations of the Empirical Fisher Approximation
        <https://arxiv.org/abs/1905.12558>`_, 2019

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> losses_fn = lambda w, batch: batch.inputs @ w
        >>> examples = Batch(jnp.asarray([[1.0, 2.0], [3.0, 0.0]]), jnp.zeros(2, int))
        >>> measure_all(fisher_empirical(losses_fn), jnp.zeros(2), examples, 2).quadratic.diagonal
        Array([5., 2.], dtype=float32)
    """

    def passes(outputs: Array, keys: Key | None) -> Passes:
        del keys
        # The outputs are losses here: the cotangent 1 pulls back their gradients.
        return Passes(jnp.ones_like(outputs)[None], jnp.ones((1, *outputs.shape)))

    measure = diagonal_measure(losses_fn, passes, chunk_size, dense_layers)
    measure = _with_known_layers(measure, dense_layers)
    return measure._replace(logits_fn=getattr(losses_fn, "logits_fn", None), losses_fn=losses_fn)


@remembered
def fisher_exact(
    logits_fn: LogitsFn,
    *,
    num_samples: int | None = None,
    chunk_size: int = 32,
    dense_layers: Sequence[str] | None = None,
) -> Measure:
    """Diagonal Fisher, `mean_n sum_c p_nc (d log p_nc / d theta)^2`: the Gauss-Newton diagonal.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.
        num_samples: `None` for the sum over all labels, C backward passes; otherwise the number of
            labels drawn from the model per example, with the key folded with its index.
        chunk_size: as for `fisher_empirical`.
        dense_layers: as for `fisher_empirical`.

    Returns:
        A `Measure`; its quadratic is diagonal. Sampling needs a key in `init`.

    Raises:
        ValueError: chunk_size or num_samples below 1; in `init`, a name without parameters; in
            `update`, no key, or a name of no layer.

    References:
        Martens, `New Insights and Perspectives on the Natural Gradient Method
        <https://arxiv.org/abs/1412.1193>`_, 2020

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> examples = Batch(jnp.ones((1, 1)), jnp.zeros(1, int))
        >>> measure = fisher_exact(lambda w, x: x * w[None])
        >>> measure_all(measure, jnp.zeros(2), examples, 1).quadratic.diagonal
        Array([0.25, 0.25], dtype=float32)
    """

    def outputs(params: Params, batch: Batch, model_state: PyTree = None) -> Array:
        logits = losses.with_state(logits_fn, model_state)(params, batch.inputs)
        return losses.with_weighted_gradients(logits, batch)

    measure = diagonal_measure(outputs, label_passes(num_samples), chunk_size, dense_layers)
    measure = _with_known_layers(measure, dense_layers)
    return measure._replace(logits_fn=logits_fn)


@remembered
def identity() -> Measure:
    """The identity, whatever the loss: with it, merging is averaging.

    Returns:
        A `Measure`; its quadratic is diagonal, and its error 0.

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> examples = Batch(jnp.ones((2, 1)), jnp.zeros(2, int))
        >>> float(measure_all(identity(), jnp.zeros(2), examples, 1, jnp.asarray([1.0, 3.0])).along)
        10.0
    """

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = MeasureState.start(Given(*args, **kwargs))
        one = jax.tree.map(lambda p: jnp.ones_like(p, trees.compute_dtype(p)), state.params)
        return state._replace(total=one)

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        # `d^T d` is the same for every example: there is no mean to update.
        along = jnp.full_like(state.mean, jnp.nan)
        if state.direction is not None:
            along = trees.inner(state.direction, state.direction)
        examples = state.examples + jnp.sum(losses.weights_of(batch))
        return state._replace(mean=along, examples=examples)

    def finalize(state: MeasureState) -> Measurement:
        return state.measurement(DiagonalQuadratic.at(state.params, state.total))

    return Measure(init, update, finalize)


def chunk_for_memory(params: Params, memory_bytes: float) -> int:
    """Number of per-example gradients that fit into a memory bound.

    Args:
        params: the parameters whose gradients are computed.
        memory_bytes: bound in bytes on the gradients of one chunk.

    Returns:
        A chunk size from 1 to 1024.

    Example:
        >>> chunk_for_memory(jnp.zeros(1000), 8000)
        2
    """
    per_example = sum(
        leaf.size * trees.compute_dtype(leaf).itemsize for leaf in jax.tree.leaves(params)
    )
    return max(1, min(1024, int(memory_bytes // max(per_example, 1))))


def _with_known_layers(measure: Measure, dense_layers: Sequence[str] | None) -> Measure:
    """Let a measure refuse parameters that have none of a layer that was named."""

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = measure.init(*args, **kwargs)
        layers = {layer_of(path) for path in trees.leaves_by_path(state.params)}
        if unknown := sorted(set(dense_layers or ()) - layers):
            raise InvalidInput(
                f"dense_layers={unknown}: have no parameters here; name layers of "
                f"{sorted(layers)}, or leave dense_layers out to have them found"
            )
        return state

    return measure._replace(init=init)


def diagonal_measure(
    outputs_fn: Callable[..., Array],
    passes_fn: PassesFn,
    chunk_size: int,
    dense_layers: Sequence[str] | None,
) -> Measure:
    """Accumulate squared gradients, the diagonal of the matrix that the passes stand for.

    `outputs_fn(params, batch)` gives the model's outputs, and takes its state as a third argument.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")

    def squares_of(state: MeasureState, chunk: Batch) -> SquaredGradients:
        keys, outputs = state.keys(chunk.labels.shape[0]), state.bound(outputs_fn)
        if not dense_layers:
            way = by_program if dense_layers is None else by_vmap
            return way(outputs, passes_fn, state.params, chunk, keys, state.direction)
        leaves = trees.leaves_by_path(state.params)
        along = None if state.direction is None else trees.leaves_by_path(state.direction)
        dense = [
            path
            for path in leaves
            if layer_of(path) in dense_layers and path.rpartition("/")[2] in ("kernel", "bias")
        ]
        rest = [path for path in leaves if path not in dense]
        parts = [
            way(
                # The other leaves are constants here, so no gradients of them are formed.
                lambda some, batch: outputs(trees.replace(state.params, some), batch),
                passes_fn,
                {path: leaves[path] for path in paths},
                chunk,
                keys,
                along and {path: along[path] for path in paths},
            )
            for way, paths in ((by_layers, dense), (by_vmap, rest))
            if paths
        ]
        total = {path: leaf for part in parts for path, leaf in part.total.items()}
        values = [part.along for part in parts if part.along is not None]
        return SquaredGradients(
            trees.replace(state.params, total),
            functools.reduce(jnp.add, values) if values else None,
        )

    def add_chunk(state: MeasureState, chunk: Batch) -> MeasureState:
        squares = squares_of(state, chunk)
        total = jax.tree.map(jnp.add, state.total, squares.total)
        return state._replace(total=total).plus(squares.along, losses.weights_of(chunk))

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = MeasureState.start(Given(*args, **kwargs))
        return state._replace(total=trees.zeros_like(state.params))

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        return add_by_chunks(add_chunk, chunk_size, state, batch)

    def finalize(state: MeasureState) -> Measurement:
        return state.measurement(DiagonalQuadratic.at(state.params, state.average(state.total)))

    return Measure(init, update, finalize)
