"""The quadratic model of its loss that a finished task leaves behind.

    Q(theta) = constant + gradient . (theta - center) + 1/2 (theta - center)^T H (theta - center)

    theta      a point: the leaves of the model that merge, a pytree of P numbers in all
    center     the point about which Q is expanded, of the structure of theta; `theta_i*` for task i
    gradient   slope of Q at the center, of the structure of theta; 0 for one task, whose expansion
               has no linear term in Perturb-and-Merge
    constant   value of Q at the center, a scalar
    H          curvature [P, P], symmetric, positive semi-definite unless it is a Hessian; it is
               never formed: a `Curvature` answers questions about it
    d, Delta   a direction, of the structure of theta, such as a task vector

Center, gradient and curvature have `None` in place of leaves that are not floating point; theta and
d may have anything there.

A `Curvature` has one verb for each question (`times`, `along`, `gram`, `by_leaf`, `trace`) and two
that make a new one (`plus`, `scaled`). A `Quadratic` adds center, gradient and constant, which are
the same for every kind. Quadratics of one kind add up to one of that kind, whose size does not grow
with the tasks: that sum is all the memory that a curvature-based merge rule needs.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.types import Array, Params, PyTree


class Curvature(abc.ABC):
    """The matrix H of a quadratic; a subclass is a `flax.struct` dataclass of the arrays it needs.

    A new kind gives `times`, `plus`, `scaled` and `trace`; the other verbs follow from `times`, and
    are overridden where a kind has a cheaper or more precise answer.

    Attributes:
        leafwise: whether H has no entries between one leaf and another.
        sum_is_exact_about: the center about which slopes of a sum are exact, although `plus` may
            lose some of H: "any" where it loses nothing, "first" for the center of the left side,
            "newest" for the center of the right side.
        of_loss: whether H is that of the loss, so that `d^T H d / 2` predicts a change of it.
    """

    leafwise = False
    sum_is_exact_about = "any"
    of_loss = True

    @abc.abstractmethod
    def times(self, direction: PyTree) -> PyTree:
        """`H d`, of the structure of d."""

    @abc.abstractmethod
    def plus(self, other: Any) -> Self:
        """The sum with another one of the same kind, in arrays of the same shapes as this one's."""

    @abc.abstractmethod
    def scaled(self, factor: Array | float) -> Self:
        """`factor H`, for a factor of at least 0."""

    @abc.abstractmethod
    def trace(self) -> Array:
        """Trace of H, scalar."""

    def along(self, direction: PyTree) -> Array:
        """`d^T H d`, scalar."""
        return trees.inner(direction, self.times(direction))

    def gram(self, directions: Sequence[PyTree]) -> Array:
        """`d_i^T H d_j` for K directions, [K, K]."""
        columns = [self.times(direction) for direction in directions]
        return jnp.stack(
            [jnp.stack([trees.inner(left, column) for column in columns]) for left in directions]
        )

    def by_leaf(self, direction: PyTree) -> Array:
        """The parts of L leaves in `d^T H d`, [L]; their sum where H is leafwise."""
        return _inner_by_leaf(direction, self.times(direction))

    def joins(self, other: Curvature) -> bool:
        """True if `plus` can add the other one."""
        return isinstance(other, type(self))


@flax.struct.dataclass
class Quadratic:
    """A quadratic function of a model's parameters (see the module's docstring).

    Attributes:
        center: pytree of floating-point arrays.
        gradient: of the same structure, float32 (float64 for float64 leaves).
        constant: scalar.
        curvature: H.

    Example:
        >>> from pm_jax.curvature.diagonal import Diagonal
        >>> q = Quadratic.at(jnp.zeros(2), Diagonal(jnp.asarray([1.0, 3.0])))
        >>> float(q.value(jnp.ones(2))), float(q.gradient_along(jnp.ones(2), jnp.ones(2)))
        (2.0, 4.0)
    """

    center: Params
    gradient: PyTree
    constant: Array
    curvature: Curvature

    @classmethod
    def at(cls, center: Params, curvature: Curvature) -> Self:
        """The quadratic of one task, `1/2 (theta - center)^T H (theta - center)`."""
        # A new tree: an nnx state is made of mutable variables, which go on training.
        center = jax.tree.map(jnp.asarray, trees.floating(center))
        zero = trees.zeros_like(center)
        return cls(center, zero, trees.inner(zero, zero), curvature)

    @property
    def leafwise(self) -> bool:
        """True if H has no entries between one leaf and another."""
        return self.curvature.leafwise

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        step = self._step_to(theta)
        slope = trees.inner(self.gradient, step)
        return self.constant + slope + 0.5 * self.curvature.along(step)

    def gradient_at(self, theta: Params) -> PyTree:
        """`grad Q(theta)`, of the structure of the center."""
        return jax.tree.map(jnp.add, self.gradient, self.curvature.times(self._step_to(theta)))

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`d . grad Q(theta)`, scalar."""
        return trees.inner(self.gradient_at(theta), direction)

    def curvature_along(self, direction: PyTree) -> Array:
        """`d^T H d`, scalar."""
        return self.curvature.along(self._along(direction))

    def gram(self, directions: Sequence[PyTree]) -> Array:
        """`d_i^T H d_j` for K directions, [K, K]."""
        return self.curvature.gram([self._along(direction) for direction in directions])

    def by_leaf(self, theta: Params, direction: PyTree) -> tuple[Array, Array]:
        """The parts of L leaves in the slope at theta and in the curvature along d, both [L]."""
        direction = self._along(direction)
        slopes = _inner_by_leaf(self.gradient_at(theta), direction)
        return slopes, self.curvature.by_leaf(direction)

    def recentered(self, center: Params) -> Self:
        """Expand this function of theta about another center."""
        center = trees.floating(center)
        # Without this barrier XLA shares the differences and products of gradient and value, and so
        # keeps them for all leaves at the same time.
        apart, point = jax.lax.optimization_barrier((self, center))
        return dataclasses.replace(
            self, center=center, gradient=self.gradient_at(center), constant=apart.value(point)
        )

    def plus(self, other: Quadratic) -> Self:
        """The sum with a quadratic of the same kind, about the center where it is exact.

        A lossy sum of curvatures answers for slopes exactly at one center only. The gradient of the
        side that has this center is used as it is, and the other side is moved there before
        anything of its curvature is lost.
        """
        newest = self.curvature.sum_is_exact_about == "newest"
        stays, moves = (other, self) if newest else (self, other)
        moved = moves.recentered(stays.center)
        return dataclasses.replace(
            self,
            center=stays.center,
            gradient=jax.tree.map(jnp.add, stays.gradient, moved.gradient),
            constant=stays.constant + moved.constant,
            curvature=self.curvature.plus(other.curvature),
        )

    def scaled(self, factor: Array | float) -> Self:
        """This function times a number, at least 0."""
        return dataclasses.replace(
            self,
            gradient=jax.tree.map(lambda leaf: factor * leaf, self.gradient),
            constant=factor * self.constant,
            curvature=self.curvature.scaled(factor),
        )

    def trace(self) -> Array:
        """Trace of H, scalar."""
        return self.curvature.trace()

    def _step_to(self, theta: Params) -> PyTree:
        trees.check_alike(theta, self.center, ("theta", "center"))
        return task_vectors.difference(theta, self.center)

    def _along(self, direction: PyTree) -> PyTree:
        trees.check_alike(direction, self.center, ("direction", "center"))
        return trees.floating(direction)

    def __add__(self, other: Quadratic | SumQuadratic) -> Quadratic | SumQuadratic:
        """The sum of two quadratics, as one where both are of the same kind."""
        if isinstance(other, Quadratic) and self.curvature.joins(other.curvature):
            return self.plus(other)
        return SumQuadratic((self, other))


@flax.struct.dataclass
class SumQuadratic:
    """The sum of quadratics of different kinds; its answers are the sums of the terms' answers.

    Attributes:
        terms: the quadratics.

    Example:
        >>> from pm_jax.curvature.diagonal import DiagonalQuadratic
        >>> one = DiagonalQuadratic.at(jnp.zeros(1), diagonal=jnp.ones(1))
        >>> float(SumQuadratic((one, one)).value(jnp.ones(1)))
        1.0
    """

    terms: tuple[Quadratic | SumQuadratic, ...]

    @property
    def leafwise(self) -> bool:
        """True if no term has entries between one leaf and another."""
        return all(term.leafwise for term in self.terms)

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        return _sum(term.value(theta) for term in self.terms)

    def gradient_at(self, theta: Params) -> PyTree:
        """`grad Q(theta)`, of the structure of theta."""
        return _sum(term.gradient_at(theta) for term in self.terms)

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`d . grad Q(theta)`, scalar."""
        return _sum(term.gradient_along(theta, direction) for term in self.terms)

    def curvature_along(self, direction: PyTree) -> Array:
        """`d^T H d`, scalar."""
        return _sum(term.curvature_along(direction) for term in self.terms)

    def gram(self, directions: Sequence[PyTree]) -> Array:
        """`d_i^T H d_j` for K directions, [K, K]."""
        return _sum(term.gram(directions) for term in self.terms)

    def by_leaf(self, theta: Params, direction: PyTree) -> tuple[Array, Array]:
        """The parts of L leaves in the slope at theta and in the curvature along d, both [L]."""
        return _sum(term.by_leaf(theta, direction) for term in self.terms)

    def trace(self) -> Array:
        """Trace of H, scalar."""
        return _sum(term.trace() for term in self.terms)

    def __add__(self, other: Quadratic | SumQuadratic) -> SumQuadratic:
        """The sum with one more quadratic."""
        return SumQuadratic((*self.terms, other))


def _inner_by_leaf(left: PyTree, right: PyTree) -> Array:
    return jnp.stack(jax.tree.leaves(jax.tree.map(trees.inner, left, right)))


def _sum(answers: Iterable[Any]) -> Any:
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), answers)
