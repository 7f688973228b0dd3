"""Kronecker-factored curvature of dense kernels: a quadratic, and its factors from batches.

For a kernel W [in, out] with inputs x and per-example output gradients g, the Fisher matrix is
`E[x x^T (x) g g^T]`, approximated by `A (x) G`: exact for one example and one label, and where x
and g are independent. A displacement D of the kernel has the curvature `tr(D^T A D G)`, for which
no matrix of the size of `A (x) G` is formed.

Token axes follow the expanding convention: tokens count as independent examples, so that
`A = mean_nt x_nt x_nt^T` and `G = mean_n sum_t g_nt g_nt^T`.

References:
    Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
    <https://arxiv.org/abs/1503.05671>`_, ICML 2015; Eschenhagen et al., `Kronecker-Factored
    Approximate Curvature for Modern Neural Network Architectures
    <https://arxiv.org/abs/2311.00636>`_, NeurIPS 2023 (token axes)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import squared_gradients, task_vectors, trees
from pm_jax.quadratics import Quadratic
from pm_jax.squared_gradients import OutputsFn, PassesFn
from pm_jax.types import Array, Batch, Key, Params, PyTree


@flax.struct.dataclass
class KroneckerQuadratic(Quadratic):
    """A quadratic with Kronecker-factored curvature for dense kernels, diagonal for other leaves.

    A sum of Kronecker products is none, so every task keeps its own factors, in a slot of a
    preallocated axis; center and gradient are one tree each, however many tasks are summed.

    Attributes:
        center: pytree of float32 arrays, where the expansion is taken.
        inputs: `{path of a kernel [in, out]: A, float32 [slots, in, in]}`.
        outputs: `{path: G, float32 [slots, out, out]}`.
        diagonal: `{path of another leaf: diagonal of H}`, summed over the tasks.
        gradient: at the center, of the structure of the center.
        constant: value at the center, scalar.
        tasks: int32 scalar, slots in use.

    Example:
        >>> factors = {"w": jnp.full((1, 1, 1), 2.0)}, {"w": jnp.full((1, 1, 1), 3.0)}
        >>> one = KroneckerQuadratic.at({"w": jnp.zeros((1, 1))}, *factors, {})
        >>> both = KroneckerQuadratic.zero(one.center, ("w",), slots=2).plus(one).plus(one)
        >>> float(both.value({"w": jnp.ones((1, 1))}))  # 2 (1/2 1 2 1 3)
        6.0
    """

    center: Params
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    diagonal: dict[str, Array]
    gradient: PyTree
    constant: Array
    tasks: Array

    @classmethod
    def at(
        cls,
        center: Params,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        diagonal: dict[str, Array],
    ) -> KroneckerQuadratic:
        """The quadratic of one task: factors of one slot."""
        center = jax.tree.map(jnp.asarray, center)
        zero = task_vectors.difference(center, center)
        one = jnp.ones((), jnp.int32)
        return cls(center, inputs, outputs, diagonal, zero, trees.inner(zero, zero), one)

    @classmethod
    def zero(cls, center: Params, kernels: Sequence[str], slots: int) -> KroneckerQuadratic:
        """The quadratic that is 0 everywhere, with room for the factors of some tasks."""
        leaves = trees.leaves_by_path(center)
        inputs, outputs = (
            {path: jnp.zeros((slots, *(leaves[path].shape[axis],) * 2)) for path in kernels}
            for axis in (0, 1)
        )
        rest = {path: x for path, x in leaves.items() if path not in inputs}
        found = cls.at(center, inputs, outputs, task_vectors.difference(rest, rest))
        return dataclasses.replace(found, tasks=jnp.zeros((), jnp.int32))

    def products(self, lefts: Sequence[PyTree], rights: Sequence[PyTree]) -> Array:
        """`l_i^T H r_j`, [K, L]."""
        columns = [self._times(right) for right in rights]
        return jnp.stack(
            [jnp.stack([trees.inner(left, column) for column in columns]) for left in lefts]
        )

    def value(self, theta: Params) -> Array:
        """`Q(theta)`, scalar."""
        step = task_vectors.difference(theta, self.center)
        slope = trees.inner(self.gradient, step)
        return self.constant + slope + 0.5 * trees.inner(step, self._times(step))

    def gradient_along(self, theta: Params, direction: PyTree) -> Array:
        """`direction . grad Q(theta)`, scalar."""
        return trees.inner(self._gradient_at(theta), direction)

    def plus(self, other: KroneckerQuadratic) -> KroneckerQuadratic:
        """The sum with the quadratic of one task, about this one's center.

        There is no more room than slots: everything is NaN beyond.
        """
        slots = min((len(own) for own in self.inputs.values()), default=None)
        room = 1.0 if slots is None else jnp.where(self.tasks < slots, 1.0, jnp.nan)

        def kept(own: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
            return {path: x.at[self.tasks].set(new[path][0]) for path, x in own.items()}

        return KroneckerQuadratic(
            self.center,
            kept(self.inputs, other.inputs),
            kept(self.outputs, other.outputs),
            jax.tree.map(jnp.add, self.diagonal, other.diagonal),
            jax.tree.map(jnp.add, self.gradient, other._gradient_at(self.center)),
            room * (self.constant + other.value(self.center)),
            self.tasks + 1,
        )

    def _gradient_at(self, theta: Params) -> PyTree:
        step = self._times(task_vectors.difference(theta, self.center))
        return jax.tree.map(jnp.add, self.gradient, step)

    def _times(self, direction: PyTree) -> PyTree:
        """`H d`, of the structure of d."""
        found = {}
        for path, leaf in trees.leaves_by_path(direction).items():
            if path in self.inputs:
                # By slots, or the intermediate would be as large as all of them.
                factors = (self.inputs[path], self.outputs[path])
                found[path] = jax.lax.fori_loop(
                    0,
                    len(factors[0]),
                    lambda slot, total, leaf=leaf, factors=factors: (
                        total + _between(factors[0][slot], leaf, factors[1][slot])
                    ),
                    jnp.zeros_like(leaf),
                )
            else:
                found[path] = self.diagonal[path] * leaf
        return trees.replace(direction, found)


def _between(left: Array, middle: Array, right: Array) -> Array:
    product = jnp.matmul(left, middle, precision="highest")
    return jnp.matmul(product, right, precision="highest")


class Factors(NamedTuple):
    """Sums over examples, by the path of a kernel.

    Attributes:
        inputs: `sum_n weight_n mean_t x_nt x_nt^T`, [in, in].
        outputs: `sum_passes sum_n weight_n sum_t g_nt g_nt^T`, [out, out].
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]


def factors(
    outputs_fn: OutputsFn,
    passes_fn: PassesFn,
    params: Params,
    batch: Batch,
    *,
    weights: Array,
    keys: Key | None = None,
) -> Factors:
    """What a batch adds to the Kronecker factors of linen Dense kernels.

    Args:
        outputs_fn: of the model, which applies a linen module.
        passes_fn: of the matrix that is measured.
        params: flat `{path: kernel [in, out]}` of Dense layers of that module.
        batch: N examples.
        weights: of the examples, [N].
        keys: one per example, or `None`.

    Returns:
        `Factors`, float32.

    Raises:
        ValueError: a path that is no kernel of a Dense layer that is called exactly once.

    Example:
        >>> import flax.linen as nn
        >>> from pm_jax.squared_gradients import Passes
        >>> layer, params = nn.Dense(1, use_bias=False), {"kernel": jnp.ones((2, 1))}
        >>> found = factors(
        ...     lambda p, b: layer.apply({"params": p}, b.inputs)[:, 0],
        ...     lambda outputs, _: Passes(jnp.full((1, 1), 3.0), jnp.ones((1, 1))),
        ...     params, Batch(jnp.asarray([[1.0, 2.0]]), jnp.zeros(1, int)), weights=jnp.ones(1))
        >>> found.inputs["kernel"].tolist(), found.outputs["kernel"].tolist()
        ([[1.0, 2.0], [2.0, 4.0]], [[9.0]])
    """
    found = squared_gradients.layer_passes(outputs_fn, passes_fn, params, batch, keys)
    names = {path: path.rpartition("/")[0] for path in params}

    def by_token(values: Array) -> Array:  # [N, tokens, width]
        return values.astype(jnp.float32).reshape(len(weights), -1, values.shape[-1])

    def moments(weights: Array, values: Array) -> Array:
        return jnp.einsum("n,nti,ntj->ij", weights, values, values, precision="highest")

    inputs = {}
    for path, name in names.items():
        x = by_token(found.inputs[name])
        inputs[path] = moments(weights / x.shape[1], x)

    def add_pass(total, one):
        gradients = found.pull_back(one.cotangents)
        return {
            path: total[path] + moments(one.weights * weights, by_token(gradients[name]))
            for path, name in names.items()
        }, None

    start = {path: jnp.zeros((params[path].shape[1],) * 2) for path in params}
    return Factors(inputs, jax.lax.scan(add_pass, start, found.passes)[0])
