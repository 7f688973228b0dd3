"""Curvature of low rank: a quadratic that keeps what is correlated across all of the model.

`H = sum_k b_k b_k^T` with K columns b of the size of the model. The columns of one task come from
products of its curvature with a few directions; those of a sum of tasks are its leading ones.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, task_vectors, trees
from pm_jax.curvature import matrix_products
from pm_jax.curvature.measures import Measure, Measurement, MeasureState
from pm_jax.curvature.quadratics import StoredQuadratic
from pm_jax.types import Array, Batch, Key, LogitsFn, Params, PyTree

SMALLEST_EIGENVALUE = 1e-5
"""Over the largest one: below it, float32 leaves nothing of a direction's curvature."""


@flax.struct.dataclass
class LowRankQuadratic(StoredQuadratic):
    """A quadratic with curvature of rank K.

    A sum keeps the K leading eigenvectors of the two; it is exact while their ranks are at most K
    together. What the smaller ones say about slopes so far stays exact at the newest center.

    Attributes:
        center: pytree of float32 arrays, where the expansion is taken.
        columns: b, of the structure of the center, leaves [K, ...].
        gradient: at the center, of its structure.
        constant: value at the center, scalar.

    Example:
        >>> one = LowRankQuadratic.zero(jnp.zeros(2), 1).replace(columns=jnp.asarray([[1.0, 2.0]]))
        >>> float(one.value(jnp.ones(2)))  # 1/2 (1 + 2)^2
        4.5
    """

    center: Params
    columns: PyTree
    gradient: PyTree
    constant: Array

    @classmethod
    def zero(cls, center: Params, rank: int) -> LowRankQuadratic:
        """The quadratic that is 0 everywhere, with room for some columns."""
        center = jax.tree.map(jnp.asarray, center)
        zero = task_vectors.difference(center, center)
        columns = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), x.dtype), zero)
        return cls(center, columns, zero, trees.inner(zero, zero))

    @classmethod
    def of_products(cls, center: Params, tests: PyTree, products: PyTree) -> LowRankQuadratic:
        """The quadratic of one task from `products = H tests`, leaves [K, ...] both.

        It has these products itself, but for eigenvalues of `tests^T H tests` below
        `SMALLEST_EIGENVALUE` of the largest, which are left out.
        """
        core = _inner_products(tests, products)
        values, vectors = jnp.linalg.eigh((core + core.T) / 2)
        kept = values > SMALLEST_EIGENVALUE * jnp.maximum(values[-1], 0)
        weights = vectors * jnp.where(kept, jnp.where(kept, values, 1) ** -0.5, 0)[None, :]
        found = cls.zero(center, len(values))
        return dataclasses.replace(found, columns=_combined(weights, products))

    def products(self, lefts, rights) -> Array:
        """`l_i^T H r_j`, [K, L]."""
        left = [self._along_columns(each) for each in lefts]
        right = left if lefts is rights else [self._along_columns(each) for each in rights]
        return jnp.matmul(jnp.stack(left), jnp.stack(right).T, precision="highest")

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        step = task_vectors.difference(theta, self.center)
        along = self._along_columns(step)
        return self.constant + trees.inner(self.gradient, step) + 0.5 * jnp.sum(along**2)

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`direction . grad Q(theta)`, scalar."""
        step = task_vectors.difference(theta, self.center)
        return trees.inner(self.gradient, direction) + self.products([step], [direction])[0, 0]

    def scaled(self, factor: Array | float) -> LowRankQuadratic:
        """This function times a number, at least 0."""
        root = trees.safe_sqrt(jnp.asarray(factor, self.constant.dtype))
        return LowRankQuadratic(
            self.center,
            jax.tree.map(lambda x: root * x, self.columns),
            jax.tree.map(lambda x: factor * x, self.gradient),
            factor * self.constant,
        )

    def trace(self) -> Array:
        """Trace of H, scalar."""
        return trees.inner(self.columns, self.columns)

    def plus(self, other: LowRankQuadratic) -> LowRankQuadratic:
        """The sum with another one, about the other's center."""
        rank = len(jax.tree.leaves(self.columns)[0])
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self.columns, other.columns)
        vectors = jnp.linalg.eigh(_inner_products(both, both))[1]
        step = task_vectors.difference(other.center, self.center)
        along = self._along_columns(step)
        return LowRankQuadratic(
            other.center,
            _combined(vectors[:, -rank:], both),
            jax.tree.map(
                lambda mine, columns, new: mine + _weighted(along, columns) + new,
                self.gradient,
                self.columns,
                other.gradient,
            ),
            self.value(other.center) + other.constant,
        )

    def _along_columns(self, direction: PyTree) -> Array:
        """`b_k . d`, [K]."""
        return _inner_products(self.columns, jax.tree.map(lambda x: x[None], direction))[:, 0]


def gauss_newton_low_rank(logits_fn: LogitsFn, *, rank: int = 16) -> Measure:
    """Gauss-Newton matrix of low rank, by its products with some directions.

    One of these is that of the measure, where one is given: the quadratic is exact along it. The
    others are random, and the quadratic is `Y (O^T Y)^+ O^T` of `Y = G O` (Nystrom).

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.
        rank: number of directions, each of which takes a jvp and a vjp.

    Returns:
        A `Measure`; its quadratic is a `LowRankQuadratic`. Its `init` needs a key for rank above 1.

    Raises:
        ValueError: rank below 1; in `init`, no key.

    References:
        Tropp et al., `Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming
        Data <https://arxiv.org/abs/1706.05736>`_, 2017

    Example:
        >>> from pm_jax.curvature.measures import measure_all
        >>> examples = Batch(jnp.ones((1, 1)), jnp.zeros(1, int))
        >>> measure = gauss_newton_low_rank(lambda w, x: x * w[None], rank=1)
        >>> found = measure_all(measure, jnp.zeros(2), examples, 1, jnp.asarray([1.0, 3.0]))
        >>> round(float(found.quadratic.curvature_along(jnp.asarray([1.0, 3.0]))), 5)
        1.0
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")

    def init(params: Params, direction: PyTree | None = None, key: Key | None = None):
        tests = _test_directions(params, direction, key, rank)
        sums = jax.tree.map(jnp.zeros_like, tests)
        return MeasureState.start(params, direction, key, (tests, sums))

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        weights = losses.weights_of(batch)
        tests, sums = state.total
        products = matrix_products.gauss_newton_times(
            logits_fn, state.params, tests, batch.inputs, weights
        )
        values = jnp.full(weights.shape, jnp.nan)
        if state.direction is not None:
            values = matrix_products.gauss_newton_along(
                logits_fn, state.params, state.direction, batch.inputs
            )
        total = (tests, jax.tree.map(jnp.add, sums, products))
        return state._replace(total=total).plus(values, weights)

    def finalize(state: MeasureState) -> Measurement:
        tests, sums = state.total
        products = state.average(sums)
        return state.measurement(LowRankQuadratic.of_products(state.params, tests, products))

    return Measure(init, update, finalize)


def _test_directions(
    params: Params, direction: PyTree | None, key: Key | None, count: int
) -> PyTree:
    """Directions to multiply with, [K, ...]: the one given, then standard normal ones.

    All have one norm, or the largest would decide which eigenvalues are left out.
    """
    given = 0 if direction is None else 1
    if key is None and count > given:
        raise ValueError("key=None: random directions need a PRNG key in Measure.init")
    zero = task_vectors.difference(params, params)
    rows = []
    if direction is not None:
        size = sum(leaf.size for leaf in jax.tree.leaves(zero))
        norm = trees.norm(direction)
        scale = jnp.where(norm > 0, size**0.5 / jnp.where(norm > 0, norm, 1), 0)
        rows.append(jax.tree.map(lambda x, z: (scale * x).astype(z.dtype), direction, zero))
    if key is not None:
        keys = [jax.random.fold_in(key, number) for number in range(count - given)]
        rows += [trees.gaussian_like(each, zero) for each in keys]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _inner_products(left: PyTree, right: PyTree) -> Array:
    """Of stacked trees [K, ...] and [L, ...], [K, L]."""

    def of_leaf(a: Array, b: Array) -> Array:
        return jnp.matmul(a.reshape(len(a), -1), b.reshape(len(b), -1).T, precision="highest")

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaf, left, right)))


def _combined(weights: Array, stacked: PyTree) -> PyTree:
    """`sum_k weights_kj x_k`, leaves [J, ...]."""
    return jax.tree.map(
        lambda x: jnp.tensordot(weights, x, ((0,), (0,)), precision="highest"), stacked
    )


def _weighted(weights: Array, stacked: Array) -> Array:
    return jnp.tensordot(weights, stacked, 1, precision="highest")
