"""Curvature from the second moments of the inputs of dense kernels, and how it is measured.

For a kernel W [in, out] with rows of inputs x it is `A (x) I`, with `A = mean_n sum_t x_nt x_nt^T`
over examples n and their rows t. A displacement D has the curvature `tr(D^T A D)`: the mean square
by which it moves the outputs of the layer. Other leaves have none.

It needs one forward pass and no labels. A sum of Kronecker products is not one in general, but
`sum_i A_i (x) I = (sum_i A_i) (x) I`: sums over tasks are exact and of one size. Its scale is that
of the layers' outputs and not of the loss, which it says nothing about.

References:
    Jin et al., `Dataless Knowledge Fusion by Merging Weights of Language Models
    <https://arxiv.org/abs/2212.09849>`_, ICLR 2023 (RegMean), whose objective it is
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature.kernel_inputs import kernel_inputs
from pm_jax.curvature.kernels import Axes, axes_of
from pm_jax.curvature.measures import (
    Given,
    Measure,
    Measurement,
    MeasureState,
    add_by_chunks,
    remembered,
)
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.types import Array, Batch, InvalidInput, LogitsFn, Params, PyTree


@flax.struct.dataclass
class InputMoment(Curvature):
    """The matrix `A (x) I` of every dense kernel, and 0 for the other leaves.

    Attributes:
        moments: `{path of a kernel (in) x (out): A, float32 [in, in]}`; [*stacked, in, in] for a
            kernel that stacks matrices.
        outputs: static; `((path, number of the kernel's outputs), ...)`.

    Example:
        >>> curvature = InputMoment({"w": jnp.diag(jnp.asarray([1.0, 2.0]))}, (("w", 3),))
        >>> direction = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        >>> float(curvature.along(direction)), float(curvature.trace())  # 3 (1 + 2) both
        (9.0, 9.0)
    """

    moments: dict[str, Array]
    outputs: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)

    leafwise = True
    of_loss = False

    def times(self, direction: PyTree) -> PyTree:
        """`H d`: `A d` for a kernel."""
        product = {
            path: _times(self.moments[path], leaf)
            if path in self.moments
            else jnp.zeros_like(leaf, trees.compute_dtype(leaf))
            for path, leaf in trees.leaves_by_path(direction).items()
        }
        return trees.replace(direction, product)

    def plus(self, other: InputMoment) -> InputMoment:
        """The sum of two; raises InvalidInput where they are of different kernels."""
        if self.outputs != other.outputs:
            ours, theirs = (", ".join(path for path, _ in x.outputs) for x in (self, other))
            raise InvalidInput(
                f"kernels={theirs}: were measured, and the memory is of {ours}; give the measure "
                "and InputMomentQuadratic.zero the same kernels"
            )
        return dataclasses.replace(self, moments=jax.tree.map(jnp.add, self.moments, other.moments))

    def scaled(self, factor: Array | float) -> InputMoment:
        """The matrix times a number."""
        return dataclasses.replace(self, moments=jax.tree.map(lambda x: factor * x, self.moments))

    def trace(self) -> Array:
        """Trace of H, scalar."""
        traces = [
            count * jnp.sum(jnp.trace(self.moments[path], axis1=-2, axis2=-1))
            for path, count in self.outputs
        ]
        return functools.reduce(jnp.add, traces, jnp.zeros(()))


@flax.struct.dataclass
class InputMomentQuadratic(Quadratic):
    """A quadratic whose curvature is `A (x) I` of every dense kernel.

    For the sum over tasks, A is `S = sum_i A_i` and `gradient` is `sum_i A_i (center - W_i*)`.

    Attributes:
        curvature: H, second moments of the inputs, by kernel.

    Example:
        >>> center = {"kernel": jnp.zeros((1, 2))}
        >>> one = InputMomentQuadratic.at(center, {"kernel": jnp.ones((1, 1))})
        >>> both = InputMomentQuadratic.zero(center).plus(one).plus(one)
        >>> float(both.value({"kernel": jnp.ones((1, 2))}))  # 1/2 (1 + 1) (1^2 + 1^2)
        2.0
    """

    curvature: InputMoment

    @classmethod
    def at(cls, center: Params, moments: dict[str, Array]) -> InputMomentQuadratic:  # type: ignore[override]
        """The quadratic of one task, from moments as `InputMoment` explains them."""
        leaves = trees.select(trees.floating(center), tuple(moments))
        sizes = {path: math.prod(moment.shape[:-1]) for path, moment in moments.items()}
        outputs = tuple((path, leaves[path].size // sizes[path]) for path in sorted(moments))
        return super().at(center, InputMoment(moments, outputs))

    @classmethod
    def zero(
        cls, center: Params, kernels: Sequence[str] | str | None = None
    ) -> InputMomentQuadratic:
        """The quadratic that is 0 everywhere.

        Args:
            center: the parameters.
            kernels: as for `input_moment`.

        Raises:
            InvalidInput: no kernels, or one that is not known to be which matrix.
        """
        leaves = trees.leaves_by_path(trees.floating(center))
        moments = {}
        for path, axes in kernel_axes(center, kernels).items():
            stacked, inputs, _ = axes.split(leaves[path].shape)
            width = math.prod(inputs)
            moments[path] = jnp.zeros((*stacked, width, width), trees.compute_dtype(leaves[path]))
        return cls.at(center, moments)


def kernel_axes(params: Params, kernels: Sequence[str] | str | None = None) -> dict[str, Axes]:
    """The dense kernels of a model, and how their axes divide.

    Args:
        params: pytree of arrays or shapes.
        kernels: paths of kernels or a pattern of `trees.match_paths`; `None` for all leaves that
            are named "kernel", as those of linen and nnx are, but those whose shape, with that of
            the bias beside it, does not tell inputs from outputs.

    Raises:
        InvalidInput: no kernels, or one that is named and is not known to be which matrix.

    Example:
        >>> kernel_axes({"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        {'a/kernel': Axes(stacked=0, inputs=1)}
    """
    leaves = trees.leaves_by_path(trees.floating(params))
    if kernels is None:
        found = {}
        for path in leaves:
            try:
                if path.rpartition("/")[2] == "kernel":
                    found[path] = axes_of(leaves, path)
            except InvalidInput:
                continue
        if not found:
            raise InvalidInput(
                "kernels=None: no leaf is a dense kernel named kernel; name the kernels [in, out] "
                "by their paths or a pattern"
            )
        return found
    try:
        paths = trees.select(leaves, kernels if isinstance(kernels, str) else tuple(kernels))
    except ValueError as error:
        raise InvalidInput(f"kernels={kernels}: {error}") from None
    if not paths:
        raise InvalidInput("kernels=(): name at least one kernel, or leave it out for all")
    try:
        return {path: axes_of(leaves, path) for path in paths}
    except InvalidInput as error:
        raise InvalidInput(f"kernels: cannot have {error}") from None


def _times(moment: Array, kernel: Array) -> Array:
    """`A D` for a displacement D of a kernel, in its shape."""
    matrix = jnp.asarray(kernel, moment.dtype).reshape(*moment.shape[:-1], -1)
    # Without the highest precision TPUs multiply in bfloat16.
    return jnp.matmul(moment, matrix, precision="highest").reshape(kernel.shape)


@remembered
def input_moment(
    logits_fn: LogitsFn, kernels: Sequence[str] | str | None = None, *, chunk_size: int = 32
) -> Measure:
    """Second moments of the inputs of dense kernels, `A = mean_n sum_t x_nt x_nt^T`, as `A (x) I`.

    One forward pass, in which labels have no part. Layers are found in the traced program of any
    model; a layer that is called several times has the rows of all its calls, and one that is not
    called has none. In a sequence with weights of its T tokens, the rows of a layer that sees T of
    them have these weights. A convolution's rows are what lies under its window.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.
        kernels: paths of kernels or a pattern of `trees.match_paths`; `None` for all leaves that
            are named "kernel", as those of linen and nnx are, but those whose shape, with that of
            the bias beside it, does not tell inputs from outputs.
        chunk_size: examples whose inputs of all layers are in memory at a time.

    Returns:
        A `Measure`; its quadratic is an `InputMomentQuadratic`.

    Raises:
        ValueError: chunk_size below 1; in `init` no kernels, in `update` one that is read in
            another way than by a product with inputs, as by batched products for each head.

    References:
        Jin et al., `Dataless Knowledge Fusion by Merging Weights of Language Models
        <https://arxiv.org/abs/2212.09849>`_, ICLR 2023

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> examples = (jnp.asarray([[1.0, 2.0], [3.0, 0.0]]), jnp.zeros(2, int))
        >>> measure = input_moment(lambda p, x: x @ p["kernel"])
        >>> measure_all(measure, params, examples).quadratic.curvature.moments["kernel"].tolist()
        [[5.0, 1.0], [1.0, 2.0]]
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")

    def add_chunk(state: MeasureState, chunk: Batch) -> MeasureState:
        inputs = kernel_inputs(
            state.bound(logits_fn), state.params, chunk.inputs, kernel_axes(state.params, kernels)
        )
        total = {
            path: functools.reduce(
                jnp.add, (_moments(x, chunk, moment.dtype) for x in inputs[path]), moment
            )
            for path, moment in state.total.items()
        }
        values = None
        if state.direction is not None:
            values = _along(inputs, state.total, state.direction, chunk)
        return state._replace(total=total).plus(values, losses.weights_of(chunk))

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = MeasureState.start(Given(*args, **kwargs))
        zero = InputMomentQuadratic.zero(state.params, kernels)
        return state._replace(total=zero.curvature.moments)

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        return add_by_chunks(add_chunk, chunk_size, state, batch)

    def finalize(state: MeasureState) -> Measurement:
        moments = state.average(state.total)
        return state.measurement(InputMomentQuadratic.at(state.params, moments))

    return Measure(init, update, finalize, logits_fn)


def _moments(x: Array, batch: Batch, dtype: Any) -> Array:
    """`sum_n weight_n sum_t x_nt x_nt^T` of inputs [N, *stacked, rows, in]."""
    x = x.astype(dtype)
    weights = losses.weights_of(batch).astype(dtype).reshape(-1, *[1] * (x.ndim - 1))
    scaled = weights * _row_weights(x, batch) * x
    return jnp.einsum("n...ti,n...tj->...ij", scaled, x, precision="highest")


def _along(
    inputs: dict[str, list[Array]], like: dict[str, Array], direction: PyTree, batch: Batch
) -> Array:
    """`d^T H_n d` of N examples: the squares by which d moves the outputs of layers, [N]."""
    steps = trees.leaves_by_path(direction)
    values = jnp.zeros(len(batch.labels), trees.compute_dtype(*like.values()))
    for path, uses in inputs.items():
        moment = like[path]
        step = steps[path].astype(moment.dtype).reshape(*moment.shape[:-1], -1)
        for x in uses:
            x = x.astype(moment.dtype)
            moves = jnp.einsum("n...ti,...io->n...to", x, step, precision="highest")
            squares = _row_weights(x, batch) * moves**2
            values = values + jnp.sum(squares, axis=tuple(range(1, squares.ndim)))
    return values


def _row_weights(x: Array, batch: Batch) -> Array | float:
    """Weights within the examples of the rows of inputs [N, *stacked, rows, in]."""
    weights = losses.token_weights(batch)
    if weights.ndim == 1 or weights.shape[1] != x.shape[-2]:
        return 1.0
    return weights.reshape(len(weights), *[1] * (x.ndim - 3), -1, 1).astype(x.dtype)
