"""Kronecker-factored curvature of dense kernels, and how its factors are measured.

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

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature import diagonal, products, squared_gradients
from pm_jax.curvature.dense_layers import layer_of, refuse_padding
from pm_jax.curvature.kernels import axes_of
from pm_jax.curvature.measures import Given, Measure, Measurement, MeasureState, remembered
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.curvature.squared_gradients import OutputsFn, PassesFn
from pm_jax.curvature.taps import tapped
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, InvalidInput, Key, LogitsFn, Params, PyTree

POWER_STEPS = 50
"""Steps of the power iteration for a 2 x 2 matrix, whose two eigenvalues may lie close together."""


@flax.struct.dataclass
class Kronecker(Curvature):
    """Kronecker factors for dense kernels, a diagonal for the other leaves.

    A sum of Kronecker products is no Kronecker product, so the factors of every task fill a slot of
    a preallocated axis. Tasks beyond the slots share the last one, as the Kronecker product that is
    nearest to their sum in the Frobenius norm. What this loses moves the slopes of a sum about
    another center by several per cent; about the first one they are exact.

    Attributes:
        inputs: `{path of a kernel (in) x (out): A, float32 [slots, in, in]}`.
        outputs: `{path: G, float32 [slots, out, out]}`.
        diagonal: `{path of another leaf: diagonal of H}`, summed over the tasks.
        tasks: int32 scalar, tasks summed.

    References:
        Van Loan and Pitsianis, `Approximation with Kronecker Products
        <https://doi.org/10.1007/978-94-015-8196-7_17>`_, 1993

    Example:
        >>> factors = {"w": jnp.full((1, 1, 1), 2.0)}, {"w": jnp.full((1, 1, 1), 3.0)}
        >>> float(Kronecker(*factors, {}, jnp.ones((), jnp.int32)).trace())
        6.0
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    diagonal: dict[str, Array]
    tasks: Array

    leafwise = True
    sum_is_exact_about = "first"

    def times(self, direction: PyTree) -> PyTree:
        """`H d`: `sum_slots A d G` for a kernel."""
        product = {
            path: _between(self.inputs[path], leaf, self.outputs[path])
            if path in self.inputs
            else self.diagonal[path] * leaf
            for path, leaf in trees.leaves_by_path(direction).items()
        }
        return trees.replace(direction, product)

    def plus(self, other: Kronecker) -> Kronecker:
        """The sum with the curvature of one task, whose factors fill one slot."""
        inputs, outputs = {}, {}
        for path, slots in self.inputs.items():
            last = len(slots) - 1
            slot = jnp.minimum(self.tasks, last)
            new = other.inputs[path][0], other.outputs[path][0]
            # Computed for every task and used where no slot is free: the number of tasks is traced.
            shared = _nearest((slots[last], self.outputs[path][last]), new)
            full = self.tasks > last
            inputs[path], outputs[path] = (
                side.at[slot].set(jnp.where(full, both, alone))
                for side, both, alone in zip((slots, self.outputs[path]), shared, new, strict=True)
            )
        diagonal = jax.tree.map(jnp.add, self.diagonal, other.diagonal)
        return Kronecker(inputs, outputs, diagonal, self.tasks + 1)

    def scaled(self, factor: Array | float) -> Kronecker:
        """The matrix times a number: one factor of each product, and the diagonal."""
        # Not the outputs as well, or the products would be multiplied twice.
        inputs, diagonal = jax.tree.map(lambda x: factor * x, (self.inputs, self.diagonal))
        return Kronecker(inputs, self.outputs, diagonal, self.tasks)

    @in_full_precision
    def trace(self) -> Array:
        """Trace of H, scalar; that of a Kronecker product is the product of its factors' traces."""
        traces = jax.tree.map(lambda x: jnp.trace(x, axis1=1, axis2=2), (self.inputs, self.outputs))
        kernels = jax.tree.leaves(jax.tree.map(jnp.vdot, *traces))
        others = [jnp.sum(leaf) for leaf in self.diagonal.values()]
        return functools.reduce(jnp.add, [*kernels, *others], jnp.zeros(()))


@flax.struct.dataclass
class KroneckerQuadratic(Quadratic):
    """A quadratic with Kronecker-factored curvature; center and gradient are one tree each.

    Attributes:
        curvature: H, two factors for each dense kernel.

    Example:
        >>> factors = {"w": jnp.full((1, 1, 1), 2.0)}, {"w": jnp.full((1, 1, 1), 3.0)}
        >>> one = KroneckerQuadratic.at({"w": jnp.zeros((1, 1))}, *factors, {})
        >>> both = KroneckerQuadratic.zero(one.center, ("w",), slots=2).plus(one).plus(one)
        >>> float(both.value({"w": jnp.ones((1, 1))}))  # 2 (1/2 1 2 1 3)
        6.0
    """

    curvature: Kronecker

    @classmethod
    def at(  # type: ignore[override]
        cls,
        center: Params,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        diagonal: dict[str, Array],
    ) -> KroneckerQuadratic:
        """The quadratic of one task: factors of one slot, as `Kronecker` explains them."""
        one = jnp.ones((), jnp.int32)
        return super().at(center, Kronecker(inputs, outputs, diagonal, one))

    @classmethod
    def zero(cls, center: Params, kernels: Sequence[str] | str, slots: int) -> KroneckerQuadratic:
        """The quadratic that is 0 everywhere, with room for the factors of some tasks."""
        leaves = trees.leaves_by_path(trees.floating(center))
        one = Factors.zero(center, _kernels(center, kernels))
        inputs, outputs = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape)), tuple(one))
        rest = {path: x for path, x in leaves.items() if path not in inputs}
        none = jnp.zeros((), jnp.int32)
        return super().at(center, Kronecker(inputs, outputs, trees.zeros_like(rest), none))


def _kernels(params: Params, kernels: Sequence[str] | str) -> dict[str, Array]:
    """The kernels that paths or a pattern name."""
    try:
        return trees.select(params, kernels if isinstance(kernels, str) else tuple(kernels))
    except ValueError as error:
        raise InvalidInput(f"kernels={kernels}: {error}") from None


def _between(inputs: Array, kernel: Array, outputs: Array) -> Array:
    """`sum_slots A D G` for a displacement D of a kernel."""

    def add(slot: Array, total: Array) -> Array:
        # Without the highest precision TPUs multiply in bfloat16.
        product = jnp.matmul(inputs[slot], matrix, precision="highest")
        return total + jnp.matmul(product, outputs[slot], precision="highest")

    # Kernels of more axes are [*inputs, *outputs].
    matrix = kernel.reshape(inputs.shape[-1], outputs.shape[-1])
    # Slot by slot: all at once would hold an array of the kernel's size for every slot.
    product = jax.lax.fori_loop(0, len(inputs), add, jnp.zeros_like(matrix))
    return product.reshape(kernel.shape)


@in_full_precision
def _nearest(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The Kronecker product nearest to the sum of two, for positive semi-definite factors.

    Written as the matrix `sum_i vec(A_i) vec(G_i)^T` of rank 2, the sum is best approximated by its
    first singular pair. All inner products of the factors are at least 0, so the weights of that
    pair are too, and both sides stay positive semi-definite.
    """
    left, right = (jnp.stack(pair) for pair in zip(first, second, strict=True))

    def gram(sides: Array) -> Array:
        return jnp.einsum("iab,jab->ij", sides, sides)

    # The left singular vector is sum_i c_i A_i where c is the first eigenvector of this.
    square = gram(right) @ gram(left)
    # Divisions by the largest entry keep float32 in range; tiny leaves factors that are all 0 at 0.
    square /= jnp.maximum(jnp.max(square), jnp.finfo(square.dtype).tiny)
    # A power iteration, since not all devices have eigenvectors of matrices that are not symmetric.
    # Its entries stay at least 0, and so the factors stay positive semi-definite.
    weights = jnp.ones(2, square.dtype)
    for _ in range(POWER_STEPS):
        weights = square @ weights
        weights /= jnp.maximum(jnp.max(weights), jnp.finfo(square.dtype).tiny)
    inputs = jnp.tensordot(weights, left, 1)
    # The best right side for this left side: the projection of the sum onto it.
    overlaps = jnp.einsum("ab,iab->i", inputs, left)
    norm = jnp.sum(inputs**2)
    outputs = jnp.tensordot(overlaps / jnp.where(norm > 0, norm, 1), right, 1)
    return inputs, outputs


class Factors(NamedTuple):
    """Sums over examples, by the path of a kernel.

    Attributes:
        inputs: `sum_n weight_n mean_t x_nt x_nt^T`, [in, in].
        outputs: `sum_passes sum_n weight_n sum_t g_nt g_nt^T`, [out, out].
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]

    @classmethod
    def zero(cls, params: Params, kernels: Iterable[str]) -> Factors:
        """The sums over no examples for the kernels of some paths.

        Raises:
            InvalidInput: a kernel that is not one matrix, or not known to be which one.
        """
        leaves, sides = trees.leaves_by_path(params), {}
        for path in kernels:
            try:
                axes = axes_of(leaves, path)
            except InvalidInput as error:
                raise InvalidInput(
                    f"kernels={path}: is not known to be one matrix, leave it to the diagonal "
                    f"({error})"
                ) from None
            if axes.stacked:
                raise InvalidInput(
                    f"kernels={path}: of shape {leaves[path].shape} stacks several matrices; leave "
                    "it to the diagonal"
                )
            sides[path] = axes.sides(leaves[path].shape)
        inputs, outputs = (
            {path: jnp.zeros((widths[side],) * 2) for path, widths in sides.items()}
            for side in (0, 1)
        )
        return cls(inputs, outputs)


@in_full_precision
def factors(
    outputs_fn: OutputsFn,
    passes_fn: PassesFn,
    params: Params,
    batch: Batch,
    keys: Key | None = None,
) -> Factors:
    """Sum the Kronecker factors of linen dense kernels, flat `{path: kernel}`, over a batch.

    Kernels of `DenseGeneral` and `Einsum` layers, [*inputs, *outputs], count as matrices.

    Raises:
        InvalidInput: a path that is no kernel of such a layer that is called exactly once, or a
            model that pads its tokens.

    Example:
        >>> import flax.linen as nn
        >>> from pm_jax.curvature.squared_gradients import Passes
        >>> layer, params = nn.Dense(1, use_bias=False), {"kernel": jnp.ones((2, 1))}
        >>> sums = factors(
        ...     lambda p, b: layer.apply({"params": p}, b.inputs)[:, 0],
        ...     lambda outputs, _: Passes(jnp.full((1, 1), 3.0), jnp.ones((1, 1))),
        ...     params, Batch(jnp.asarray([[1.0, 2.0]]), jnp.zeros(1, int)))
        >>> sums.inputs["kernel"].tolist(), sums.outputs["kernel"].tolist()
        ([[1.0, 2.0], [2.0, 4.0]], [[9.0]])
    """
    weights = losses.weights_of(batch)
    names = {path: layer_of(path) for path in params}
    taps = tapped(outputs_fn, params, batch, tuple(dict.fromkeys(names.values())))
    refuse_padding(f"kernels={','.join(names)}", taps.padded)
    for path, name in names.items():
        if taps.contractions[name].axes is None:
            raise InvalidInput(
                f"kernels={path}: has the axes of its outputs before those of its inputs; leave it "
                "to the diagonal"
            )

    def moments(weights: Array, values: Array) -> Array:  # [N, tokens, width]
        values = values.astype(jnp.float32)
        return jnp.einsum("n,nti,ntj->ij", weights, values, values, precision="highest")

    inputs, passed = {}, taps.pull_back(jnp.zeros_like(taps.outputs))
    for path, name in names.items():
        x, _ = passed[name]
        shares = _token_shares(batch, x.shape[1])
        # A mean over tokens on this side and a sum on the other: the expanding convention.
        inputs[path] = moments(weights, jnp.sqrt(shares)[..., None] * x)

    def add_pass(total, one):
        passed = taps.pull_back(one.cotangents)
        return {
            path: total[path] + moments(one.weights * weights, passed[name][1])
            for path, name in names.items()
        }, None

    start = {path: jnp.zeros((params[path].size // inputs[path].shape[0],) * 2) for path in names}
    return Factors(inputs, jax.lax.scan(add_pass, start, passes_fn(taps.outputs, keys))[0])


def _token_shares(batch: Batch, tokens: int) -> Array:
    """Share of each of a layer's tokens in the mean over an example's tokens, [N, tokens].

    A layer that sees the tokens that have labels leaves out those of padding.
    """
    weights = losses.token_weights(batch)
    if weights.shape != (len(batch.labels), tokens):
        return jnp.full((len(batch.labels), tokens), 1 / tokens)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


@remembered
def fisher_kronecker(
    logits_fn: LogitsFn,
    kernels: Sequence[str] | str,
    *,
    num_samples: int | None = None,
    chunk_size: int = 32,
    dense_layers: Sequence[str] | None = None,
) -> Measure:
    """Fisher in Kronecker factors for linen Dense kernels, in its diagonal for other leaves.

    The curvature along the direction is exact, by jvp, because the factors say nothing about
    single examples.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`, which applies a linen module.
        kernels: paths of kernels "a/b/kernel" of Dense layers that are called exactly once, or a
            pattern of `trees.match_paths`; the parameters are any tree.
        num_samples: as for `fisher_exact`.
        chunk_size: for the other leaves, as for `fisher_exact`.
        dense_layers: for the other leaves, as for `fisher_exact`.

    Returns:
        A `Measure`; its quadratic is a `KroneckerQuadratic`. Sampling needs a key in `init`.

    Raises:
        ValueError: as `fisher_exact`; in `update`, a kernel of no such layer.

    Example:
        >>> import flax.linen as nn
        >>> from pm_jax.curvature.measures import measure_all
        >>> layer, params = nn.Dense(2, use_bias=False), {"kernel": jnp.zeros((1, 2))}
        >>> examples = Batch(jnp.full((1, 1), 2.0), jnp.zeros(1, int))
        >>> logits_fn = lambda p, inputs: layer.apply({"params": p}, inputs)
        >>> measure = fisher_kronecker(logits_fn, ("kernel",))
        >>> fisher = measure_all(measure, params, examples, 1).quadratic.curvature
        >>> fisher.inputs["kernel"].tolist(), fisher.outputs["kernel"].tolist()
        ([[[4.0]]], [[[0.25, -0.25], [-0.25, 0.25]]])
    """
    passes = squared_gradients.label_passes(num_samples)
    if not kernels:
        raise InvalidInput("kernels=(): name at least one kernel, or use fisher_exact")

    def parts(state: MeasureState) -> tuple[dict[str, Array], dict[str, Array], OutputsFn]:
        """Kernels, other leaves, and the outputs as a function of some of either."""
        chosen = _kernels(state.params, kernels)
        if others := [path for path in chosen if path.rpartition("/")[2] != "kernel"]:
            raise InvalidInput(
                f"kernels={others[0]}: is no kernel of a linen layer, whose path ends in kernel; "
                "leave it out, and its diagonal is measured"
            )
        rest = {
            x: leaf for x, leaf in trees.leaves_by_path(state.params).items() if x not in chosen
        }

        def outputs(some: Params, batch: Batch) -> Array:
            params = trees.replace(state.params, some)
            return losses.with_weighted_gradients(
                state.bound(logits_fn)(params, batch.inputs), batch
            )

        return chosen, rest, outputs

    def update_diagonal(state: MeasureState, batch: Batch) -> dict[str, Array]:
        """Add a batch to the sums of the other leaves."""
        _, leaves, outputs = parts(state)
        rest = diagonal.diagonal_measure(outputs, passes, chunk_size, dense_layers)
        # Both parts sample the same labels, also where `in_groups` has moved the indices.
        before = rest.init(leaves, None, state.key)._replace(
            total=state.total[1], position=state.position, stride=state.stride
        )
        return rest.update(before, batch).total

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = MeasureState.start(Given(*args, **kwargs))
        chosen, rest, _ = parts(state)
        return state._replace(total=(Factors.zero(state.params, chosen), trees.zeros_like(rest)))

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        weights = losses.weights_of(batch)
        chosen, rest, outputs = parts(state)
        added = factors(outputs, passes, chosen, batch, state.keys(weights.shape[0]))
        sums = jax.tree.map(jnp.add, state.total[0], added)
        others = update_diagonal(state, batch) if rest else {}
        values = None
        if state.direction is not None:
            values = products.gauss_newton_along(
                state.bound(logits_fn), state.params, state.direction, batch
            )
        return state._replace(total=(sums, others)).plus(values, weights)

    def finalize(state: MeasureState) -> Measurement:
        sums, others = state.average(state.total)
        # One task fills one slot.
        inputs, outputs = jax.tree.map(lambda x: x[None], tuple(sums))
        return state.measurement(KroneckerQuadratic.at(state.params, inputs, outputs, others))

    return Measure(init, update, finalize, logits_fn)
