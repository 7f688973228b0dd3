"""Measures: how curvature is measured while batches stream by.

A `Measure` is a triple of pure functions in the manner of a gradient transformation:

    state = measure.init(params, direction, key)
    state = measure.update(state, batch)          # once per batch, in any batch size
    result = measure.finalize(state)

The result is a mean over all examples seen, whatever the batch size, and comes with the curvature
along one direction and the standard error of that over the examples.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.types import Array, Batch, Key, Params, PyTree


class Measurement(NamedTuple):
    """The result of a measure.

    Attributes:
        quadratic: at the parameters; `None` for measures along a direction.
        along: `d^T H d` of the mean loss, scalar; NaN where no direction was given.
        standard_error: of `along`, over the examples (0 for a single one).
        examples: number of examples, the sum of their weights.
        left_out: the same fields measured without each of K groups of examples, stacked [K, ...];
            `None` unless the measure runs `in_groups`.
    """

    quadratic: Quadratic | None
    along: Array
    standard_error: Array
    examples: Array
    left_out: "Measurement | None" = None


class MeasureState(NamedTuple):
    """Sums that a measure carries from batch to batch.

    Attributes:
        params: where the curvature is taken.
        direction: d, or `None`.
        key: PRNG key of sampled labels, or `None`.
        total: sum over examples of what the measure adds up, or `None`.
        examples: sum of weights.
        mean: of `d^T H_n d` over the examples so far.
        squares: sum of squared deviations from that mean.
        position: number of rows seen, padding included: the index of the next example.
        stride: from one example's index to the next one's.
    """

    params: Params
    direction: PyTree | None
    key: Key | None
    total: PyTree
    examples: Array
    mean: Array
    squares: Array
    position: Array
    stride: Array

    @classmethod
    def start(
        cls, params: Params, direction: PyTree | None, key: Key | None, total: PyTree
    ) -> "MeasureState":
        """The state before the first batch."""
        zero = jnp.zeros((), trees.compute_dtype(*jax.tree.leaves(params)))
        position, stride = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
        return cls(params, direction, key, total, zero, zero, zero, position, stride)

    def keys(self, examples: int) -> Key | None:
        """Keys of the next examples, [N]; `None` without a key."""
        if self.key is None:
            return None
        # By an example's index, so that its labels do not depend on batch sizes or groups.
        index = self.position + self.stride * jnp.arange(examples)
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key, index)

    def plus(self, values: Array | None, weights: Array) -> "MeasureState":
        """Add `d^T H_n d` of N examples (`None` without a direction) by Chan's update.

        The update is exact, however the examples are grouped into batches.
        """
        weights = weights.astype(self.mean.dtype)
        count = jnp.sum(weights)
        # Padding repeats an example whose value may be infinite, and infinity times 0 is NaN.
        values = jnp.where(weights > 0, jnp.nan if values is None else values, 0)
        mean = jnp.sum(weights * values) / jnp.maximum(count, 1)
        squares = jnp.sum(weights * (values - mean) ** 2)
        total = self.examples + count
        shift = mean - self.mean
        fraction = count / jnp.maximum(total, 1)
        return self._replace(
            examples=total,
            mean=self.mean + shift * fraction,
            squares=self.squares + squares + shift**2 * self.examples * fraction,
            position=self.position + self.stride * weights.shape[0],
        )

    def average(self, sums: PyTree) -> PyTree:
        """Means from sums over the examples; 0 if all examples were padding."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.examples, 1), sums)

    def measurement(self, quadratic: Quadratic | None) -> Measurement:
        """The result so far, with the quadratic that the total stands for."""
        variance = self.squares / jnp.maximum(self.examples - 1, 1)
        # The error of a mean: the deviation of the examples over the root of their number.
        error = jnp.sqrt(variance / jnp.maximum(self.examples, 1))
        return Measurement(quadratic, self.mean, error, self.examples)


class Measure(NamedTuple):
    """A way to measure curvature.

    Attributes:
        init: `init(params, direction=None, key=None) -> MeasureState`.
        update: `update(state, batch) -> MeasureState`.
        finalize: `finalize(state) -> Measurement`.
    """

    init: Callable[..., MeasureState]
    update: Callable[[MeasureState, Batch], MeasureState]
    finalize: Callable[[MeasureState], Measurement]


SUMS = ("total", "examples", "mean", "squares")
"""Fields of `MeasureState` that add up over the examples."""


def in_groups(measure: Measure, groups: int) -> Measure:
    """Let a measure also report its result without each of K groups of examples, in `left_out`.

    The n-th example belongs to group n modulo K, so examples should come in random order. Every
    example is measured once, in batches a K-th as large, and K sums are in memory instead of one.
    The result over all examples stays the same.

    Raises:
        ValueError: fewer than two groups.

    Example:
        >>> from pm_jax.curvature import diagonal
        >>> examples = Batch(jnp.asarray([[1.0], [3.0], [2.0]]), jnp.zeros(3, int))
        >>> measure = diagonal.fisher_empirical(lambda w, batch: batch.inputs @ w)
        >>> result = measure_all(in_groups(measure, 2), jnp.zeros(1), examples, 3)
        >>> result.left_out.quadratic.diagonal.tolist()  # of the second alone, and of the others
        [[9.0], [2.5]]
    """
    if groups < 2:
        raise ValueError(f"groups={groups}: must be at least 2")

    def init(params: Params, direction: PyTree | None = None, key: Key | None = None):
        state = measure.init(params, direction, key)
        return state._replace(
            **jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, *x.shape)), _sums(state))
        )

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        batch = batch._replace(weights=losses.weights_of(batch))
        size = batch.labels.shape[0]
        # The first row of a group k in this batch is the first one whose index is k modulo K.
        first = (jnp.arange(groups) - state.position) % groups
        rows = first[:, None] + groups * jnp.arange(-(-size // groups))[None, :]

        def measured_group(group: tuple[dict[str, PyTree], Array]) -> dict[str, PyTree]:
            sums, rows = group
            # Groups have equal shapes; rows beyond the batch repeat its last one, with weight 0.
            members = jax.tree.map(lambda leaf: leaf[jnp.minimum(rows, size - 1)], batch)
            members = members._replace(weights=members.weights * (rows < size))
            index = {"position": state.position + rows[0], "stride": groups * state.stride}
            return _sums(measure.update(state._replace(**sums, **index), members))

        # One group at a time, not a vmap: K batches of gradients would be in memory together.
        sums = jax.lax.map(measured_group, (_sums(state), rows))
        return state._replace(**sums, position=state.position + size)

    def finalize(state: MeasureState) -> Measurement:
        start = measure.init(state.params, state.direction, state.key).total

        def result_for(members: Array) -> Measurement:
            """The result for the groups whose entry in `members` [K] is 1."""

            def total(initial: Array, sums: Array) -> Array:
                # Leaves that are not sums, such as a key, are the same for every group.
                if not jnp.issubdtype(initial.dtype, jnp.inexact):
                    return initial
                # Initial values, such as test directions, count once and not for every group.
                steps = sums - initial[None]
                return initial + jnp.tensordot(members, steps, 1, precision="highest")

            examples = members * state.examples
            mean = jnp.sum(examples * state.mean) / jnp.maximum(jnp.sum(examples), 1)
            # Chan's update again: deviations within groups, and those of the groups' means.
            squares = members * state.squares + examples * (state.mean - mean) ** 2
            return measure.finalize(
                state._replace(
                    total=jax.tree.map(total, start, state.total),
                    examples=jnp.sum(examples),
                    mean=mean,
                    squares=jnp.sum(squares),
                )
            )

        others = 1 - jnp.eye(groups, dtype=state.examples.dtype)
        left_out = jax.lax.map(result_for, others)
        return result_for(jnp.ones_like(others[0]))._replace(left_out=left_out)

    return Measure(init, update, finalize)


def _sums(state: MeasureState) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in SUMS}


def measure_all(
    measure: Measure,
    params: Params,
    examples: Batch,
    batch_size: int,
    direction: PyTree | None = None,
    key: Key | None = None,
) -> Measurement:
    """Run a measure over all examples, in batches of one size.

    Args:
        measure: how curvature is measured.
        params: where it is taken.
        examples: N examples.
        batch_size: examples per update.
        direction: d, of the structure of the parameters, or `None`.
        key: PRNG key, for sampled labels.

    Returns:
        The `Measurement`, the same for every batch size up to rounding.

    Raises:
        ValueError: no examples, batch size below 1, or a direction that is needed and missing.

    Example:
        >>> from pm_jax.curvature import diagonal
        >>> examples = Batch(jnp.asarray([[1.0], [3.0]]), jnp.zeros(2, int))
        >>> measure = diagonal.fisher_empirical(lambda w, batch: batch.inputs @ w)
        >>> float(measure_all(measure, jnp.zeros(1), examples, 2, jnp.ones(1)).along)
        5.0
    """

    def step(state, batch):
        return measure.update(state, batch), None

    # A scan compiles one update, whatever the number of batches.
    batches = losses.in_batches(examples, batch_size)
    state, _ = jax.lax.scan(step, measure.init(params, direction, key), batches)
    return measure.finalize(state)
