"""Curvature of low rank, which keeps correlations between all parameters of the model.

`H = sum_k b_k b_k^T` with K columns b of the size of the model. The columns of one task come from
products of its curvature with a few directions; a sum of tasks keeps its leading eigenvectors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature.measures import Given, Measure, Measurement, MeasureState, remembered
from pm_jax.curvature.products import gauss_newton_along, gauss_newton_times
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.types import Array, Batch, Key, LogitsFn, Params, PyTree

SMALLEST_EIGENVALUE = 1e-5
"""As a share of the largest: float32 resolves no curvature below it."""


@flax.struct.dataclass
class LowRank(Curvature):
    """A matrix of rank K, `H = sum_k b_k b_k^T`.

    A sum keeps the K leading eigenvectors of the two; it is exact while their ranks are at most K
    together. Otherwise its slopes are exact about the newest center, where the curvature that is
    lost no longer matters.

    Attributes:
        columns: b, of the structure of the parameters, leaves [K, ...].

    Example:
        >>> curvature = LowRank(jnp.asarray([[1.0, 2.0]]))
        >>> curvature.times(jnp.ones(2)).tolist(), float(curvature.along(jnp.ones(2)))
        ([3.0, 6.0], 9.0)
    """

    columns: PyTree

    sum_is_exact_about = "newest"

    def times(self, direction: PyTree) -> PyTree:
        """`H d = sum_k (b_k . d) b_k`."""
        return _combined(self._coordinates([direction])[0], self.columns)

    def along(self, direction: PyTree) -> Array:
        """`d^T H d = sum_k (b_k . d)^2`, scalar: never negative."""
        return jnp.sum(self._coordinates([direction]) ** 2)

    def gram(self, directions: Sequence[PyTree]) -> Array:
        """`d_i^T H d_j` for M directions, [M, M]."""
        coordinates = self._coordinates(directions)
        return jnp.matmul(coordinates, coordinates.T, precision="highest")

    def plus(self, other: LowRank) -> LowRank:
        """The leading part of the sum, of this one's rank."""
        rank = len(jax.tree.leaves(self.columns)[0])
        # B v is an eigenvector of B B^T [P, P] for an eigenvector v of B^T B [2K, 2K], and has the
        # root of its eigenvalue for a norm, as a column must.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self.columns, other.columns)
        vectors = jnp.linalg.eigh(_inner_products(both, both))[1]
        # `eigh` sorts by eigenvalue: the last ones lead.
        return LowRank(_combined(vectors[:, -rank:], both))

    def scaled(self, factor: Array | float) -> LowRank:
        """The matrix times a number: its columns times the square root."""
        dtype = trees.compute_dtype(*jax.tree.leaves(self.columns))
        root = trees.safe_sqrt(jnp.asarray(factor, dtype))
        return LowRank(jax.tree.map(lambda x: root * x, self.columns))

    def trace(self) -> Array:
        """Trace of H, scalar."""
        return trees.inner(self.columns, self.columns)

    def _coordinates(self, directions: Sequence[PyTree]) -> Array:
        """`d_m . b_k`, [M, K]."""
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
        return _inner_products(stacked, self.columns)


@flax.struct.dataclass
class LowRankQuadratic(Quadratic):
    """A quadratic with curvature of rank K.

    Attributes:
        curvature: H, the K columns that H is made of.

    Example:
        >>> one = LowRankQuadratic.zero(jnp.zeros(2), 1)
        >>> one = one.replace(curvature=LowRank(jnp.asarray([[1.0, 2.0]])))
        >>> float(one.value(jnp.ones(2)))  # 1/2 (1 + 2)^2
        4.5
    """

    curvature: LowRank

    @classmethod
    def zero(cls, center: Params, rank: int) -> LowRankQuadratic:
        """The quadratic that is 0 everywhere, with room for some columns."""
        columns = jax.tree.map(
            lambda x: jnp.zeros((rank, *jnp.shape(x)), trees.compute_dtype(x)), center
        )
        return cls.at(center, LowRank(columns))

    @classmethod
    def of_products(cls, center: Params, tests: PyTree, products: PyTree) -> LowRankQuadratic:
        """The quadratic of one task with `H tests = products`, leaves [K, ...] both.

        Eigenvalues of `tests^T H tests` below `SMALLEST_EIGENVALUE` of the largest are left out.
        """
        core = _inner_products(tests, products)
        # The products are rounded, so that the core is not quite symmetric.
        values, vectors = jnp.linalg.eigh((core + core.T) / 2)
        kept = values > SMALLEST_EIGENVALUE * jnp.maximum(values[-1], 0)
        # An eigenvalue that is left out may be below 0: 1 takes its place in the root.
        weights = vectors * jnp.where(kept, jnp.where(kept, values, 1) ** -0.5, 0)[None, :]
        return cls.at(center, LowRank(_combined(weights, products)))


@remembered
def gauss_newton_low_rank(logits_fn: LogitsFn, *, rank: int = 16) -> Measure:
    """Gauss-Newton matrix of low rank, `Y (O^T Y)^+ Y^T` of its products `Y = G O` (Nystrom).

    The columns of O are the direction of the measure, where one is given, and random ones: the
    quadratic is exact along the former.

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
        >>> result = measure_all(measure, jnp.zeros(2), examples, 1, jnp.asarray([1.0, 3.0]))
        >>> round(float(result.quadratic.curvature_along(jnp.asarray([1.0, 3.0]))), 5)
        1.0
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = MeasureState.start(Given(*args, **kwargs))
        tests = _test_directions(state.params, state.direction, state.key, rank)
        return state._replace(total=(tests, trees.zeros_like(tests)))

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        tests, sums = state.total
        model = state.bound(logits_fn)
        products = gauss_newton_times(model, state.params, tests, batch)
        values = None
        if state.direction is not None:
            values = gauss_newton_along(model, state.params, state.direction, batch)
        total = (tests, jax.tree.map(jnp.add, sums, products))
        return state._replace(total=total).plus(values, losses.weights_of(batch))

    def finalize(state: MeasureState) -> Measurement:
        tests, sums = state.total
        products = state.average(sums)
        return state.measurement(LowRankQuadratic.of_products(state.params, tests, products))

    return Measure(init, update, finalize, logits_fn)


def _test_directions(
    params: Params, direction: PyTree | None, key: Key | None, count: int
) -> PyTree:
    """Directions to multiply with, [K, ...]: the measure's one, then standard normal ones."""
    zero = trees.zeros_like(params)
    rows: list[PyTree] = []
    if direction is not None:
        size = sum(leaf.size for leaf in jax.tree.leaves(zero))
        # All directions have about one norm, sqrt(P), as standard normal ones do; otherwise the
        # longest would decide which eigenvalues are left out.
        norm = trees.norm(direction)
        scale = jnp.where(norm > 0, size**0.5 / jnp.where(norm > 0, norm, 1), 0)
        rows.append(jax.tree.map(lambda x, z: (scale * x).astype(z.dtype)[None], direction, zero))
    if number := count - len(rows):
        if key is None:
            raise ValueError("key=None: random directions need a PRNG key in Measure.init")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))
        rows.append(_normal_directions(keys, zero))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def _normal_directions(keys: Key, zero: PyTree) -> PyTree:
    """Draw `trees.gaussian_like(key, zero)` for K keys, leaves [K, ...].

    Leaves of one shape are drawn together: a program with as many draws as a model has leaves would
    take a minute to compile.
    """
    leaf_keys = jax.tree.leaves(jax.vmap(trees.leaf_keys, (0, None))(keys, zero))
    leaves, structure = jax.tree.flatten(zero)
    alike: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        alike.setdefault((leaf.shape, leaf.dtype), []).append(number)
    drawn: dict[int, Array] = {}
    for (shape, dtype), numbers in alike.items():

        def draw(key: Key, shape: Any = shape, dtype: Any = dtype) -> Array:
            return jax.random.normal(key, shape, dtype)

        # A map and no vmap, whose program takes ten times longer to compile.
        own = jnp.stack([leaf_keys[number] for number in numbers])
        # Keys that are no typed ones have an axis more.
        flat = own.reshape(-1, *own.shape[2:])
        stacked = jax.lax.map(draw, flat).reshape(*own.shape[:2], *shape)
        drawn |= {number: stacked[place] for place, number in enumerate(numbers)}
    return jax.tree.unflatten(structure, [drawn[number] for number in range(len(leaves))])


def _inner_products(left: PyTree, right: PyTree) -> Array:
    """Inner products of stacked trees [K, ...] and [L, ...], [K, L]."""

    # In bfloat16, as TPUs multiply by default, small eigenvalues would come out negative.
    def in_leaf(a: Array, b: Array) -> Array:
        return jnp.matmul(a.reshape(len(a), -1), b.reshape(len(b), -1).T, precision="highest")

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(in_leaf, left, right)))


def _combined(weights: Array, stacked: PyTree) -> PyTree:
    """`sum_k weights_kj x_k`, leaves [J, ...]; without the axis J for weights [K]."""
    return jax.tree.map(
        lambda x: jnp.tensordot(weights, x, ((0,), (0,)), precision="highest"), stacked
    )
