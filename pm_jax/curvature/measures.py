"""Measures: how curvature is measured while batches stream by.

A `Measure` is a triple of pure functions in the manner of a gradient transformation:

    state = measure.init(params, direction, key, model_state)
    state = measure.update(state, batch)          # once per batch, in any batch size
    result = measure.finalize(state)

The result is a mean over all examples seen, whatever the batch size, and comes with the curvature
along one direction and the standard error of that over the examples. `measure_all` does the three
steps for examples in any form, compiled.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature import measuring
from pm_jax.curvature.measuring import Given
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.types import Array, Batch, Key, LogitsFn, LossesFn, Params, PyTree


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
        params: where the curvature is taken, the floating-point leaves; `None` for the others.
        direction: d, likewise, or `None`.
        key: PRNG key of sampled labels, or `None`.
        total: sum over examples of what the measure adds up, or `None`.
        examples: sum of weights.
        mean: of `d^T H_n d` over the examples so far.
        squares: sum of squared deviations from that mean.
        position: number of rows seen, padding included: the index of the next example.
        stride: from one example's index to the next one's.
        model_state: state of the model, which its functions take as a third argument; or `None`.
        others: the whole parameters, where some of their leaves are not floating point; or `None`.
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
    model_state: PyTree | None = None
    others: Params | None = None

    @classmethod
    def start(cls, given: Given) -> "MeasureState":
        """The state before the first batch, with `None` for the total."""
        zero = jnp.zeros((), trees.compute_dtype(*jax.tree.leaves(given.params)))
        position, stride = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
        params, direction = trees.floating(given.params), trees.floating(given.direction)
        figures = (zero, zero, zero, position, stride)
        others = None if trees.same_structure(params, given.params) else given.params
        return cls(params, direction, given.key, None, *figures, given.model_state, others)

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A `LogitsFn` or `LossesFn` of the floating-point leaves, with all else that it reads."""
        function = losses.with_state(function, self.model_state)
        if self.others is None:
            return function
        return lambda params, inputs: function(trees.with_floating(self.others, params), inputs)

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

    def moving(self) -> dict[str, PyTree]:
        """The fields that an update changes."""
        return {**_sums(self), "position": self.position}

    def measurement(self, quadratic: Quadratic | None) -> Measurement:
        """The result so far, with the quadratic that the total stands for."""
        variance = self.squares / jnp.maximum(self.examples - 1, 1)
        # The error of a mean: the deviation of the examples over the root of their number.
        error = jnp.sqrt(variance / jnp.maximum(self.examples, 1))
        return Measurement(quadratic, self.mean, error, self.examples)


class Measure(NamedTuple):
    """A way to measure curvature; measures of one factory with equal arguments are equal.

    Attributes:
        init: `init(params, direction=None, key=None, model_state=None) -> MeasureState`.
        update: `update(state, batch) -> MeasureState`.
        finalize: `finalize(state) -> Measurement`.
        logits_fn: the model, for a first look at its logits; `None` where it is not known.
        losses_fn: likewise the loss.
        made_from: what the measure is remembered by: factory and arguments.
        along_is_exact: whether `Measurement.along` is measured apart, as by `with_along`.
    """

    init: Callable[..., MeasureState]
    update: Callable[[MeasureState, Batch], MeasureState]
    finalize: Callable[[MeasureState], Measurement]
    logits_fn: LogitsFn | None = None
    losses_fn: LossesFn | None = None
    made_from: tuple[Any, ...] | None = None
    along_is_exact: bool = False

    def _identity(self) -> tuple[Any, ...]:
        return self.made_from or (self.init, self.update, self.finalize)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Measure) and self._identity() == other._identity()

    def __ne__(self, other: object) -> bool:  # a tuple has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self._identity())


Arguments = ParamSpec("Arguments")


def remembered(factory: Callable[Arguments, Measure]) -> Callable[Arguments, Measure]:
    """Let measures that a factory makes of equal arguments be equal.

    A program that was compiled for one of them then serves the others, such as those that a loop
    over tasks makes anew for every task.
    """

    @functools.wraps(factory)
    def make(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Measure:
        values = [tuple(x) if isinstance(x, list) else x for x in (*args, *kwargs.values())]
        made_from = (factory, len(args), tuple(kwargs), *values)
        try:
            hash(made_from)
        except TypeError:
            # A measure of arguments without a hash is equal to itself only.
            return factory(*args, **kwargs)
        return factory(*args, **kwargs)._replace(made_from=made_from)

    return make


def add_by_chunks(
    add_chunk: Callable[[MeasureState, Batch], MeasureState],
    chunk_size: int,
    state: MeasureState,
    batch: Batch,
) -> MeasureState:
    """Add a batch to a measurement, at most `chunk_size` examples in memory at a time."""
    # Chunks are padded, and padding must not move the indices of the next batch's examples.
    position = state.position + state.stride * batch.labels.shape[0]
    chunks = losses.in_batches(batch, min(chunk_size, batch.labels.shape[0]))
    # Only the sums are carried: leaves of the parameters may be no arrays.
    moving, _ = jax.lax.scan(
        lambda moving, chunk: (add_chunk(state._replace(**moving), chunk).moving(), None),
        state.moving(),
        chunks,
    )
    return state._replace(**{**moving, "position": position})


SUMS = ("total", "examples", "mean", "squares")
"""Fields of `MeasureState` that add up over the examples."""


@remembered
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

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        state = measure.init(*args, **kwargs)
        return state._replace(
            **jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, *x.shape)), _sums(state))
        )

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        batch = losses.with_weights(batch)
        size = batch.labels.shape[0]
        # The first row of a group k in this batch is the first one whose index is k modulo K.
        first = (jnp.arange(groups) - state.position) % groups
        rows = first[:, None] + groups * jnp.arange(-(-size // groups))[None, :]

        def measured_group(group: tuple[dict[str, PyTree], Array]) -> dict[str, PyTree]:
            sums, rows = group
            # Groups have equal shapes; rows beyond the batch repeat its last one, with weight 0.
            members = jax.tree.map(lambda leaf: leaf[jnp.minimum(rows, size - 1)], batch)
            members = losses.weighted(members, rows < size)
            index = {"position": state.position + rows[0], "stride": groups * state.stride}
            return _sums(measure.update(state._replace(**sums, **index), members))

        # One group at a time, not a vmap: K batches of gradients would be in memory together.
        sums = jax.lax.map(measured_group, (_sums(state), rows))
        return state._replace(**sums, position=state.position + size)

    def finalize(state: MeasureState) -> Measurement:
        given = (state.params, state.direction, state.key, state.model_state)
        start = measure.init(*given).total

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

    return measure._replace(init=init, update=update, finalize=finalize)


@remembered
def with_along(measure: Measure, along: Measure) -> Measure:
    """A measure's quadratic with the curvature along the direction of another measure.

    A merge then weighs the current task's displacement by its exact curvature, and remembers the
    task by a quadratic that can be kept.

    Args:
        measure: gives the quadratic.
        along: measures along the direction alone, such as `gauss_newton(logits_fn)`.

    Example:
        >>> from pm_jax import curvature
        >>> logits_fn = lambda w, x: x * w[None]
        >>> both = with_along(curvature.fisher_exact(logits_fn), curvature.gauss_newton(logits_fn))
        >>> examples = (jnp.ones((1, 1)), jnp.zeros(1, int))
        >>> found = measure_all(both, jnp.zeros(2), examples, direction=jnp.asarray([1.0, -1.0]))
        >>> float(found.along), float(found.quadratic.curvature_along(jnp.asarray([1.0, -1.0])))
        (1.0, 0.5)
    """

    def init(*args: Any, **kwargs: Any) -> MeasureState:
        along.init(*args, **kwargs)  # raises where there is no direction
        return measure.init(*args, **kwargs)

    def update(state: MeasureState, batch: Batch) -> MeasureState:
        # Without a direction, along which the measure would only measure in vain.
        measured = measure.update(state._replace(direction=None), batch)
        return along.update(state, batch)._replace(total=measured.total)

    return measure._replace(init=init, update=update, along_is_exact=True)


def _sums(state: MeasureState) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in SUMS}


def measure_all(
    measure: Measure,
    params: Params,
    examples: Batch | tuple[Any, ...] | Iterable[Any],
    batch_size: int = 256,
    direction: PyTree | None = None,
    key: Key | None = None,
    *,
    model_state: PyTree | None = None,
    progress: bool = False,
) -> Measurement:
    """Run a measure over all examples, in batches of one size, compiled.

    It compiles once for a measure and the shapes of a batch, so that later tasks compile nothing;
    what differs between tasks, such as a class mask or batch statistics, belongs into
    `model_state`. Examples are measured one by one, and the model should be in evaluation mode: a
    first look at a few of them warns where the logits of an example depend on the others
    (BatchNorm in training mode) or on chance (dropout).

    Args:
        measure: how curvature is measured.
        params: where it is taken.
        examples: a `Batch`; a tuple of arrays `(inputs, labels)` or `(inputs, labels, weights)`; or
            any iterable of either, each a batch of any length: a list, a generator, a `DataLoader`.
            Leaves are anything that `np.asarray` reads.
        batch_size: examples per update, at least 1.
        direction: d, of the structure of the parameters, or `None`.
        key: PRNG key, for sampled labels.
        model_state: given to the model as its third argument, unless it is `None`.
        progress: show a progress bar.

    Returns:
        The `Measurement`, the same for every batch size up to rounding, and for every way to cut
        the examples into the batches of an iterable.

    Raises:
        InvalidInput: no examples; one that is no tuple or `Batch`, or unlike the others; labels
            that are no numbers of classes; NaN in parameters, state or inputs; a model that gives
            no logits [N, C] or [N, T, C]; a batch size below 1.
        ValueError: a direction or key that the measure needs and that is missing.

    Example:
        >>> from pm_jax.curvature import diagonal
        >>> measure = diagonal.fisher_empirical(lambda w, batch: batch.inputs @ w)
        >>> inputs, labels = jnp.asarray([[1.0], [3.0]]), jnp.zeros(2, int)
        >>> float(measure_all(measure, jnp.zeros(1), (inputs, labels), 2, jnp.ones(1)).along)
        5.0
        >>> batches = ((inputs[n : n + 1], labels[n : n + 1]) for n in range(2))
        >>> measure_all(measure, jnp.zeros(1), batches).quadratic.diagonal.tolist()
        [5.0]
    """
    given = Given(params, direction, key, model_state)
    return measuring.run(measure, given, examples, batch_size, progress)
