"""Exact curvature of a loss on stored examples: Gauss-Newton matrix or Hessian.

Nothing is approximated and nothing but the examples is stored: every question streams over them
with jvp, vjp or hvp products. It serves tasks whose data may be stored (the current one), analysis,
and tests. `gauss_newton` and `hessian` measure the same matrices along one direction, batch by
batch, and store no examples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature import products, squared_gradients
from pm_jax.curvature.measures import Given, Measure, MeasureState, remembered
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, LogitsFn, LossesFn, Params, PyTree


class Point(NamedTuple):
    """The parameters and the examples that an exact curvature belongs to.

    Attributes:
        center: the parameters, the floating-point leaves; `None` for the others.
        examples: `Batch` of N examples; the matrix is a mean over them, by their weights.
        factor: scalar that the matrix is multiplied by.
        model_state: state of the model, its third argument; or `None`.
        others: the whole parameters, where some of their leaves are not floating point; or `None`.
    """

    center: Params
    examples: Batch
    factor: Array | float = 1.0
    model_state: PyTree | None = None
    others: Params | None = None

    def bound(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model as a function of the floating-point leaves and inputs alone."""
        state = MeasureState.start(Given(self.center, model_state=self.model_state))
        return state._replace(others=self.others).bound(model)


@flax.struct.dataclass
class Exact(Curvature):
    """Sum over points of `factor mean_n H_n`, with the matrix H_n of example n's loss.

    Attributes:
        points: one for each task that is summed.
        model: static; the `LogitsFn` for Gauss-Newton, the `LossesFn` for the Hessian.
        matrix: static; "gauss_newton" or "hessian".
        batch_size: static; examples in memory at a time.

    Example:
        >>> examples = Batch(jnp.ones((3, 1)), jnp.zeros(3, int))
        >>> exact = Exact((Point(jnp.zeros(2), examples),), lambda w, x: x * w[None])
        >>> exact.times(jnp.asarray([1.0, 3.0])).tolist(), float(exact.trace())
        ([-0.5, 0.5], 0.5)
    """

    points: tuple[Point, ...]
    model: Any = flax.struct.field(pytree_node=False)
    matrix: str = flax.struct.field(pytree_node=False, default="gauss_newton")
    batch_size: int = flax.struct.field(pytree_node=False, default=64)

    def __post_init__(self):
        if self.matrix not in ("gauss_newton", "hessian"):
            raise ValueError(f"matrix={self.matrix!r}: must be 'gauss_newton' or 'hessian'")

    def times(self, direction: PyTree) -> PyTree:
        """`H d`: a jvp and a vjp per batch, of the gradient for the Hessian."""

        def of_batch(model: Any, center: Params, batch: Batch) -> PyTree:
            if self.matrix == "hessian":
                return products.hessian_vector_product(
                    lambda p, some: jnp.sum(losses.weights_of(some) * model(p, some)),
                    center,
                    direction,
                    batch,
                )
            # An axis for one direction; its tangents must have the parameters' type.
            one = jax.tree.map(lambda d, p: jnp.asarray(d, p.dtype)[None], direction, center)
            product = products.gauss_newton_times(model, center, one, batch)
            return jax.tree.map(lambda leaf: leaf[0], product)

        return self._sum_of_means(of_batch)

    def along(self, direction: PyTree) -> Array:
        """`d^T H d`, scalar: one jvp per batch, two nested ones for the Hessian."""

        def of_batch(model: Any, center: Params, batch: Batch) -> Array:
            hessian = self.matrix == "hessian"
            along = products.hessian_along if hessian else products.gauss_newton_along
            return jnp.sum(losses.weights_of(batch) * along(model, center, direction, batch))

        return self._sum_of_means(of_batch)

    def joins(self, other: Curvature) -> bool:
        """True for the same matrix of the same model."""
        return isinstance(other, Exact) and self._static() == other._static()

    def plus(self, other: Exact) -> Exact:
        """The sum, which keeps the examples of both; they need one model, matrix and batch size."""
        if not self.joins(other):
            raise ValueError(
                f"other={type(other).__name__}: must have the same model, matrix and batch size; "
                "make a SumQuadratic of them"
            )
        return dataclasses.replace(self, points=self.points + other.points)

    def scaled(self, factor: Array | float) -> Exact:
        """The matrix times a number."""
        points = tuple(p._replace(factor=factor * p.factor) for p in self.points)
        return dataclasses.replace(self, points=points)

    def trace(self) -> Array:
        """Trace of the Gauss-Newton matrix, scalar, from the gradients of every label."""
        if self.matrix == "hessian":
            raise ValueError(
                "matrix='hessian': its trace takes a product for every parameter; use "
                "matrix='gauss_newton'"
            )

        def of_batch(model: Any, center: Params, batch: Batch) -> Array:
            # The trace is the sum of the diagonal, which is the exact Fisher's.
            squares = squared_gradients.by_vmap(
                lambda params, some: losses.with_weighted_gradients(
                    model(params, some.inputs), some
                ),
                squared_gradients.label_passes(None),
                center,
                batch,
            ).total
            return functools.reduce(jnp.add, map(jnp.sum, jax.tree.leaves(squares)))

        return self._sum_of_means(of_batch)

    def _static(self) -> tuple[Any, ...]:
        return self.model, self.matrix, self.batch_size

    @in_full_precision
    def _sum_of_means(self, of_batch: Callable[[Any, Params, Batch], PyTree]) -> PyTree:
        """`sum_points factor sum_batches of_batch(model, center, batch) / sum of the weights`."""

        def of_point(point: Point) -> PyTree:
            batches = losses.in_batches(point.examples, self.batch_size)
            model = point.bound(self.model)
            first = jax.tree.map(lambda leaf: leaf[0], batches)
            # The sums of a scan need their shapes before the first batch.
            zeros = trees.zeros_like(
                jax.eval_shape(functools.partial(of_batch, model), point.center, first)
            )

            def add(total, batch):
                return jax.tree.map(jnp.add, total, of_batch(model, point.center, batch)), None

            total, _ = jax.lax.scan(add, zeros, batches)
            weights = jax.vmap(losses.weights_of)(batches)
            weight = jnp.sum(weights, dtype=trees.compute_dtype(weights))
            # A point whose examples are all padding has no curvature, not an undefined one.
            factor = point.factor / jnp.where(weight > 0, weight, 1)
            return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), total)

        terms = [of_point(point) for point in self.points]
        return functools.reduce(functools.partial(jax.tree.map, jnp.add), terms)


@flax.struct.dataclass
class ExactQuadratic(Quadratic):
    """A quadratic with exact curvature, which stores the examples of its tasks.

    Attributes:
        curvature: H, the stored examples.

    Example:
        >>> examples = Batch(jnp.ones((3, 1)), jnp.zeros(3, int))
        >>> q = ExactQuadratic.at(jnp.zeros(2), examples, lambda w, x: x * w[None])
        >>> float(q.curvature_along(jnp.asarray([1.0, 3.0])))
        1.0
    """

    curvature: Exact

    @classmethod
    def at(  # type: ignore[override]
        cls,
        center: Params,
        examples: Batch,
        model: LogitsFn | LossesFn,
        matrix: str = "gauss_newton",
        batch_size: int = 64,
        model_state: PyTree | None = None,
    ) -> ExactQuadratic:
        """The quadratic of one task; the arguments are explained at `Exact` and `Point`."""
        floating = jax.tree.map(jnp.asarray, trees.floating(center))
        others = None if trees.same_structure(floating, center) else center
        point = Point(floating, examples, model_state=model_state, others=others)
        return super().at(center, Exact((point,), model, matrix, batch_size))


@flax.struct.dataclass
class AlongDirection(Curvature):
    """Curvature along one direction only: `H = value d d^T / (d^T d)^2`, with `d^T H d = value`.

    A merge rule that only asks about the task vector gets the exact curvature along it.

    Attributes:
        direction: d; where it is 0, so is H.
        value: `d^T H d`, scalar.

    Example:
        >>> curvature = AlongDirection(jnp.asarray([3.0, 4.0]), jnp.asarray(2.0))
        >>> round(float(curvature.along(jnp.asarray([6.0, 8.0]))), 5)
        8.0
    """

    direction: PyTree
    value: Array

    def times(self, direction: PyTree) -> PyTree:
        """`H x` for a direction x."""
        # Divided twice by d^T d: its square would underflow for short directions.
        weight = self._share(direction) * self.value / self._square()
        return jax.tree.map(lambda leaf: weight * leaf, self.direction)

    def along(self, direction: PyTree) -> Array:
        """`x^T H x`, scalar."""
        return self.value * self._share(direction) ** 2

    def joins(self, other: Curvature) -> bool:
        """False: two directions have no sum of this form."""
        return False

    def plus(self, other: AlongDirection) -> AlongDirection:
        """Raise ValueError: two directions have no sum of this form."""
        raise ValueError("AlongDirection: two of them have no sum; make a SumQuadratic of them")

    def scaled(self, factor: Array | float) -> AlongDirection:
        """Scale the value along the direction."""
        return AlongDirection(self.direction, factor * self.value)

    def trace(self) -> Array:
        """Trace of H, scalar."""
        return self._share(self.direction) * self.value / self._square()

    def _share(self, direction: PyTree) -> Array:
        """`d . x / d . d`, the component of x along d."""
        return trees.inner(self.direction, direction) / self._square()

    def _square(self) -> Array:
        """`d . d`, or 1 where that is 0 and H is 0 as well."""
        square = trees.inner(self.direction, self.direction)
        return jnp.where(square > 0, square, 1.0)


@remembered
def gauss_newton(logits_fn: LogitsFn) -> Measure:
    """Exact Gauss-Newton curvature along a direction, one jvp per batch.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.

    Returns:
        A `Measure` whose `init` needs a direction and whose quadratic is `None`.

    References:
        Schraudolph, `Fast Curvature Matrix-Vector Products
        <https://doi.org/10.1162/08997660260028683>`_, 2002

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> examples = Batch(jnp.ones((1, 1)), jnp.zeros(1, int))
        >>> measure = gauss_newton(lambda w, x: x * w[None])
        >>> float(measure_all(measure, jnp.zeros(2), examples, 1, jnp.asarray([1.0, 3.0])).along)
        1.0
    """
    return _directional_measure(products.gauss_newton_along, logits_fn)._replace(
        logits_fn=logits_fn
    )


@remembered
def hessian(losses_fn: LossesFn) -> Measure:
    """Exact Hessian curvature along a direction, forward-over-forward.

    Args:
        losses_fn: `losses_fn(params, batch) -> [N]`.

    Returns:
        A `Measure` whose `init` needs a direction and whose quadratic is `None`.

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> examples = Batch(jnp.asarray([1.0, 3.0]), jnp.zeros(2, int))
        >>> measure = hessian(lambda w, batch: batch.inputs * w**2)
        >>> float(measure_all(measure, 5.0, examples, 2, 1.0).along)
        4.0
    """
    return _directional_measure(products.hessian_along, losses_fn)._replace(
        logits_fn=getattr(losses_fn, "logits_fn", None), losses_fn=losses_fn
    )


def _directional_measure(along: Callable[..., Array], function: Callable[..., Any]) -> Measure:
    """Accumulate `along(function, params, direction, batch)`, one value each, and no quadratic."""

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        given = Given(*args, **kwargs)
        if given.direction is None:
            raise ValueError("direction=None: this measure needs the direction to measure along")
        return MeasureState.start(given)

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        values = along(state.bound(function), state.params, state.direction, batch)
        return state.plus(values, losses.weights_of(batch))

    return Measure(init, update, lambda state: state.measurement(None))
