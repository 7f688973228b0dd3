"""What a finished task leaves behind: a quadratic model of its loss.

A `Quadratic` stands for

    Q(theta) = constant + gradient . (theta - center) + 1/2 (theta - center)^T H (theta - center)

    theta     point, pytree of the model's merging parameters
    center    where the expansion is taken, `theta_i*` for one task
    gradient  at the center; 0 for one task, whose expansion has no linear term in Perturb-and-Merge
    H         curvature, positive semi-definite unless it is a Hessian

and answers four questions: its value at a point, its slope along a direction, its curvature along
a direction, and the Gram matrix of several directions. Quadratics add up. A `StoredQuadratic` needs
no data, and its sum over the tasks seen is all the memory that a curvature-based merge rule needs.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, task_vectors, trees
from pm_jax.curvature import matrix_products
from pm_jax.types import Array, Batch, Params, PyTree


class Quadratic(abc.ABC):
    """Interface of all quadratics; a subclass gives `products`, `value` and `gradient_along`."""

    @abc.abstractmethod
    def products(self, lefts: Sequence[PyTree], rights: Sequence[PyTree]) -> Array:
        """`l_i^T H r_j` for K and L directions, [K, L]."""

    @abc.abstractmethod
    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""

    @abc.abstractmethod
    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`direction . grad Q(theta)`, scalar."""

    def curvature_along(self, direction: PyTree) -> Array:
        """`direction^T H direction`, scalar."""
        directions = [direction]
        return self.products(directions, directions)[0, 0]

    def gram(self, directions: Sequence[PyTree]) -> Array:
        """`d_i^T H d_j` for K directions, [K, K]."""
        return self.products(directions, directions)

    def __add__(self, other: Quadratic) -> Quadratic:
        """The sum of two quadratics, as one where both are diagonal."""
        return SumQuadratic((self, other))


class StoredQuadratic(Quadratic):
    """A quadratic that is kept when the data of its tasks are gone: the memory of a merge rule."""

    @abc.abstractmethod
    def plus(self, other: Any) -> StoredQuadratic:
        """The sum with another one of the same kind, in arrays of the same shapes as this one's."""

    @abc.abstractmethod
    def scaled(self, factor: Array | float) -> StoredQuadratic:
        """This function times a number, at least 0."""

    @abc.abstractmethod
    def trace(self) -> Array:
        """Trace of H, scalar."""


class LeafwiseQuadratic(StoredQuadratic):
    """A stored quadratic whose H has no entries between one leaf and another."""

    @abc.abstractmethod
    def by_leaf(self, theta: Params, direction: PyTree) -> tuple[Array, Array]:
        """The parts of L leaves in the slope and the curvature along a direction, both [L]."""


@flax.struct.dataclass
class DiagonalQuadratic(LeafwiseQuadratic):
    """A quadratic with diagonal curvature: two pytrees and a center, however many tasks it sums.

    For the sum over tasks, `diagonal` is `S = sum_i F_i` and `gradient` is
    `sum_i F_i (center - theta_i*)`: exact, and constant in the number of tasks.

    Attributes:
        center: pytree of float32 arrays, where the expansion is taken.
        diagonal: the diagonal of H, of the same structure.
        gradient: at the center, of the same structure.
        constant: value at the center, scalar.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.1;
        the running sums equal its list of one Fisher and one model per task

    Example:
        >>> import jax.numpy as jnp
        >>> first = DiagonalQuadratic.at(jnp.zeros(2), diagonal=jnp.asarray([1.0, 3.0]))
        >>> second = DiagonalQuadratic.at(jnp.ones(2), diagonal=jnp.asarray([1.0, 1.0]))
        >>> both = first + second
        >>> float(both.value(jnp.ones(2))), float(both.curvature_along(jnp.ones(2)))
        (2.0, 6.0)
    """

    center: Params
    diagonal: PyTree
    gradient: PyTree
    constant: Array

    @classmethod
    def at(cls, center: Params, diagonal: PyTree) -> DiagonalQuadratic:
        """The quadratic of one task, `1/2 sum_p diagonal_p (theta_p - center_p)^2`."""
        # A new tree: an nnx state is made of mutable variables, which go on training.
        center = jax.tree.map(jnp.asarray, center)
        zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, trees.compute_dtype(leaf)), diagonal)
        return cls(center, diagonal, zero, trees.inner(zero, zero))

    @classmethod
    def zero(cls, center: Params) -> DiagonalQuadratic:
        """The quadratic that is 0 everywhere: the memory before the first task."""
        return cls.at(
            center,
            jax.tree.map(lambda leaf: jnp.zeros_like(leaf, trees.compute_dtype(leaf)), center),
        )

    def products(self, lefts: Sequence[PyTree], rights: Sequence[PyTree]) -> Array:
        """`sum_p diagonal_p l_ip r_jp`, [K, L]."""
        return jnp.stack(
            [
                jnp.stack([trees.inner(left, right, self.diagonal) for right in rights])
                for left in lefts
            ]
        )

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        step = task_vectors.difference(theta, self.center)
        return (
            self.constant
            + trees.inner(self.gradient, step)
            + 0.5 * trees.inner(step, step, self.diagonal)
        )

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`direction . grad Q(theta)`, scalar."""
        return trees.inner(self._gradient_at(theta), direction)

    def by_leaf(self, theta: Params, direction: PyTree) -> tuple[Array, Array]:
        """The parts of L leaves in the slope and the curvature along a direction, both [L]."""
        memory = (self.center, self.diagonal, self.gradient, theta, direction)
        slopes, curvatures = [], []
        for center, diagonal, gradient, point, step in zip(
            *map(jax.tree.leaves, memory), strict=True
        ):
            own = DiagonalQuadratic(center, diagonal, gradient, self.constant)
            slopes.append(own.gradient_along(point, step))
            curvatures.append(own.curvature_along(step))
        return jnp.stack(slopes), jnp.stack(curvatures)

    def _gradient_at(self, theta: Params) -> PyTree:
        step = task_vectors.difference(theta, self.center)
        return jax.tree.map(lambda g, f, x: g + f * x, self.gradient, self.diagonal, step)

    def recentered(self, center: Params) -> DiagonalQuadratic:
        """The same function of theta, expanded about another center."""
        # What gradient and value share would be kept for all leaves at once.
        same, point = jax.lax.optimization_barrier((self, center))
        return DiagonalQuadratic(
            center, self.diagonal, self._gradient_at(center), same.value(point)
        )

    def scaled(self, factor: Array | float) -> DiagonalQuadratic:
        """This function times a number."""
        diagonal, gradient = (
            jax.tree.map(lambda leaf: factor * leaf, tree)
            for tree in (self.diagonal, self.gradient)
        )
        return DiagonalQuadratic(self.center, diagonal, gradient, factor * self.constant)

    def trace(self) -> Array:
        """Trace of H, scalar."""
        return trees.inner(self.diagonal, jax.tree.map(jnp.ones_like, self.diagonal))

    def __add__(self, other: Quadratic) -> Quadratic:
        """The sum: diagonal, about this one's center, where the other is diagonal too."""
        if isinstance(other, DiagonalQuadratic):
            return self.plus(other)
        return SumQuadratic((self, other))

    def plus(self, other: DiagonalQuadratic) -> DiagonalQuadratic:
        """The sum of two diagonal quadratics, about this one's center."""
        moved = other.recentered(self.center)
        return DiagonalQuadratic(
            self.center,
            jax.tree.map(jnp.add, self.diagonal, moved.diagonal),
            jax.tree.map(jnp.add, self.gradient, moved.gradient),
            self.constant + moved.constant,
        )


@flax.struct.dataclass
class ExactQuadratic(Quadratic):
    """The quadratic of one task with its exact curvature on the examples kept in it.

    Nothing is approximated or stored but the examples: every question streams over them with jvp
    or hvp products. For a task whose data may be kept (the current one), or for analysis.

    Attributes:
        center: pytree of float32 arrays, where the curvature is taken.
        examples: `Batch` of N examples.
        model: static; the `LogitsFn` for Gauss-Newton, the `LossesFn` for the Hessian.
        matrix: static; "gauss_newton" or "hessian".
        batch_size: static; examples in memory at a time.

    Example:
        >>> import jax.numpy as jnp
        >>> examples = Batch(jnp.ones((3, 1)), jnp.zeros(3, int))
        >>> q = ExactQuadratic(jnp.zeros(2), examples, lambda w, x: x * w[None])
        >>> float(q.curvature_along(jnp.asarray([1.0, 3.0])))
        1.0
    """

    center: Params
    examples: Batch
    model: Any = flax.struct.field(pytree_node=False)
    matrix: str = flax.struct.field(pytree_node=False, default="gauss_newton")
    batch_size: int = flax.struct.field(pytree_node=False, default=64)

    def __post_init__(self):
        if self.matrix not in ("gauss_newton", "hessian"):
            raise ValueError(f"matrix={self.matrix!r}: must be 'gauss_newton' or 'hessian'")

    def products(self, lefts: Sequence[PyTree], rights: Sequence[PyTree]) -> Array:
        """`l_i^T H r_j`, [K, L]: one jvp per direction, or one hvp per right direction."""
        if self.matrix == "gauss_newton":
            return self._mean(self._gauss_newton_sums(lefts, rights), (len(lefts), len(rights)))
        return self._mean(self._hessian_sums(lefts, rights), (len(lefts), len(rights)))

    def curvature_along(self, direction: PyTree) -> Array:
        """`direction^T H direction`, scalar; the Hessian's by forward-over-forward jvp."""
        if self.matrix == "gauss_newton":
            return super().curvature_along(direction)

        def sums(batch: Batch) -> Array:
            values = matrix_products.hessian_along(self.model, self.center, direction, batch)
            return jnp.sum(losses.weights_of(batch) * values)

        return self._mean(sums, ())

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        return 0.5 * self.curvature_along(task_vectors.difference(theta, self.center))

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`direction . grad Q(theta)`, scalar."""
        return self.products([task_vectors.difference(theta, self.center)], [direction])[0, 0]

    def _gauss_newton_sums(self, lefts, rights):
        def sums(batch: Batch) -> Array:
            values = matrix_products.gauss_newton_products(
                self.model, self.center, lefts, rights, batch.inputs
            )
            return jnp.einsum("n,nkl->kl", losses.weights_of(batch), values, precision="highest")

        return sums

    def _hessian_sums(self, lefts, rights):
        def sum_loss(params: Params, batch: Batch) -> Array:
            return jnp.sum(losses.weights_of(batch) * self.model(params, batch))

        def sums(batch: Batch) -> Array:
            columns = []
            for right in rights:
                product = matrix_products.hessian_vector_product(
                    sum_loss, self.center, right, batch
                )
                columns.append(jnp.stack([trees.inner(left, product) for left in lefts]))
            return jnp.stack(columns, axis=1)

        return sums

    def _mean(self, sums, shape: tuple[int, ...]) -> Array:
        """Sum over the batches of `sums(batch)`, divided by the sum of the weights."""
        batches = losses.in_batches(self.examples, self.batch_size)
        dtype = trees.compute_dtype(*jax.tree.leaves(self.center))

        def step(carry, batch):
            total, weight = carry
            return (total + sums(batch), weight + jnp.sum(batch.weights)), None

        start = (jnp.zeros(shape, dtype), jnp.zeros((), dtype))
        (total, weight), _ = jax.lax.scan(step, start, batches)
        return total / weight


@flax.struct.dataclass
class SumQuadratic(Quadratic):
    """The sum of quadratics of different kinds.

    Attributes:
        terms: the quadratics.

    Example:
        >>> import jax.numpy as jnp
        >>> one = DiagonalQuadratic.at(jnp.zeros(1), diagonal=jnp.ones(1))
        >>> float(SumQuadratic((one, one)).value(jnp.ones(1)))
        1.0
    """

    terms: tuple[Quadratic, ...]

    def products(self, lefts: Sequence[PyTree], rights: Sequence[PyTree]) -> Array:
        """`l_i^T H r_j`, [K, L]."""
        return self._sum(term.products(lefts, rights) for term in self.terms)

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        return self._sum(term.value(theta) for term in self.terms)

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`direction . grad Q(theta)`, scalar."""
        return self._sum(term.gradient_along(theta, direction) for term in self.terms)

    def curvature_along(self, direction: PyTree) -> Array:
        """`direction^T H direction`, scalar."""
        return self._sum(term.curvature_along(direction) for term in self.terms)

    @staticmethod
    def _sum(answers) -> Array:
        return functools.reduce(jnp.add, answers)
