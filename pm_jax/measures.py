"""The grammar of measures: what they find, and how they stream over batches.

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
from pm_jax.quadratics import Quadratic
from pm_jax.types import Array, Batch, Key, Params, PyTree


class Measurement(NamedTuple):
    """What a measure finds.

    Attributes:
        quadratic: at the parameters; `None` for measures along a direction.
        along: `d^T H d` of the mean loss, scalar; NaN where no direction was given.
        standard_error: of `along`, over the examples (0 for a single one).
        examples: number of examples, the sum of their weights.
    """

    quadratic: Quadratic | None
    along: Array
    standard_error: Array
    examples: Array


class MeasureState(NamedTuple):
    """What a measure carries from batch to batch.

    Attributes:
        params: where the curvature is taken.
        direction: d, or `None`.
        key: PRNG key of sampled labels, or `None`.
        total: sum over examples of what the measure adds up, or `None`.
        examples: sum of weights.
        mean: of `d^T H_n d` over the examples so far.
        squares: sum of squared deviations from that mean.
        position: number of rows seen, padding included: the index of the next example.
    """

    params: Params
    direction: PyTree | None
    key: Key | None
    total: PyTree
    examples: Array
    mean: Array
    squares: Array
    position: Array

    @classmethod
    def start(
        cls, params: Params, direction: PyTree | None, key: Key | None, total: PyTree
    ) -> "MeasureState":
        """Nothing seen yet."""
        zero = jnp.zeros((), trees.compute_dtype(*jax.tree.leaves(params)))
        return cls(params, direction, key, total, zero, zero, zero, jnp.zeros((), jnp.int32))

    def keys(self, examples: int) -> Key | None:
        """A key for each of the next examples, by its index; `None` without a key."""
        if self.key is None:
            return None
        index = self.position + jnp.arange(examples)
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key, index)

    def plus(self, values: Array, weights: Array) -> "MeasureState":
        """With some examples' `d^T H_n d`, [N], by Chan's update: exact for any grouping."""
        weights = weights.astype(self.mean.dtype)
        count = jnp.sum(weights)
        values = jnp.where(weights > 0, values, 0)
        mean = jnp.sum(weights * values) / jnp.maximum(count, 1)
        squares = jnp.sum(weights * (values - mean) ** 2)
        total = self.examples + count
        shift = mean - self.mean
        fraction = count / jnp.maximum(total, 1)
        return self._replace(
            examples=total,
            mean=self.mean + shift * fraction,
            squares=self.squares + squares + shift**2 * self.examples * fraction,
            position=self.position + values.shape[0],
        )

    def measurement(self, quadratic: Quadratic | None) -> Measurement:
        """What was found, with the quadratic that the total stands for."""
        variance = self.squares / jnp.maximum(self.examples - 1, 1)
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
        >>> import jax.numpy as jnp
        >>> examples = Batch(jnp.asarray([[1.0], [3.0]]), jnp.zeros(2, int))
        >>> from pm_jax import curvature
        >>> measure = curvature.fisher_empirical(lambda w, batch: batch.inputs @ w)
        >>> float(measure_all(measure, jnp.zeros(1), examples, 2, jnp.ones(1)).along)
        5.0
    """

    def step(state, batch):
        return measure.update(state, batch), None

    batches = losses.in_batches(examples, batch_size)
    state, _ = jax.lax.scan(step, measure.init(params, direction, key), batches)
    return measure.finalize(state)
