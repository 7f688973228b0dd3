"""Counts, means and common scatter of the features of classes, which add up over tasks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax.classifiers import checks
from pm_jax.classifiers.base import FeatureMap, Statistics, product
from pm_jax.types import Array, InvalidInput, Key


class ClassStatistics(NamedTuple):
    """Counts, means and scatter of the features of all examples seen; float32.

    Attributes:
        counts: examples of each class, [C].
        means: of their features, [C, D]; 0 for classes without examples.
        scatter: sum of `(x - m_c)(x - m_c)^T`, [D, D].
    """

    counts: Array
    means: Array
    scatter: Array


def init(num_classes: int, width: int, key: Key | None = None) -> ClassStatistics:
    """The statistics of no examples; nothing is drawn."""
    del key
    return ClassStatistics(
        jnp.zeros(num_classes), jnp.zeros((num_classes, width)), jnp.zeros((width, width))
    )


def observe(
    state: ClassStatistics, features: Array, labels: Array, weights: Array
) -> ClassStatistics:
    """Add N examples, features [N, D]; exact for any grouping. A weight of 0 marks padding.

    Raises:
        InvalidInput: shapes do not fit, or values that are known are wrong.

    Example:
        >>> features, labels = jnp.asarray([[1.0], [3.0], [9.0]]), jnp.asarray([0, 0, 1])
        >>> state = observe(init(2, 1), features, labels, jnp.ones(3))
        >>> state.means[:, 0].tolist(), float(state.scatter[0, 0])
        ([2.0, 9.0], 2.0)
    """
    features, labels, weights = checks.examples(features, labels, weights, *state.means.shape)
    member = jax.nn.one_hot(labels, state.counts.shape[0]) * weights[:, None]
    count = member.sum(axis=0)
    # Not 1 as the least divisor: weights may be fractions.
    mean = product(member.T, features) / jnp.where(count > 0, count, 1.0)[:, None]
    # The root, because the offset appears twice in the scatter.
    offset = (features - mean[labels]) * jnp.sqrt(weights)[:, None]
    return plus(state, ClassStatistics(count, mean, product(offset.T, offset)))


def plus(state: ClassStatistics, other: ClassStatistics) -> ClassStatistics:
    """Statistics of two sets of examples together, by Chan's update.

    Raises:
        InvalidInput: they are of other numbers of classes or features.

    Example:
        >>> one = ClassStatistics(jnp.ones(1), jnp.asarray([[1.0]]), jnp.zeros((1, 1)))
        >>> both = plus(one, one._replace(means=jnp.asarray([[3.0]])))
        >>> both.means.tolist(), round(float(both.scatter[0, 0]), 6)
        ([[2.0]], 2.0)
    """
    if state.means.shape != other.means.shape:
        raise InvalidInput(
            f"other: has means {other.means.shape}, and state {state.means.shape}; both need the "
            "same classes and features"
        )
    total = state.counts + other.counts
    divisor = jnp.where(total > 0, total, 1.0)
    shift = other.means - state.means
    # A class has the scatter n m / (n + m) of its two means about the common one.
    pull = jnp.sqrt(state.counts * other.counts / divisor)[:, None] * shift
    return ClassStatistics(
        total,
        state.means + shift * (other.counts / divisor)[:, None],
        state.scatter + other.scatter + product(pull.T, pull),
    )


def moved(state: ClassStatistics, feature_map: FeatureMap) -> ClassStatistics:
    """Statistics of the mapped features: `m_c -> (m_c - before) M + after, S -> M^T S M`.

    Args:
        state: the statistics.
        feature_map: the map of the features, such as the drift that `drift.fit` finds.

    Returns:
        Those of the same examples after the map. Classes without examples keep the mean 0.

    Example:
        >>> one = ClassStatistics(jnp.ones(1), jnp.asarray([[3.0]]), jnp.asarray([[1.0]]))
        >>> double = FeatureMap(jnp.ones(1), jnp.asarray([[2.0]]), jnp.zeros(1))
        >>> new = moved(one, double)
        >>> new.means.tolist(), new.scatter.tolist()
        ([[4.0]], [[4.0]])
    """
    means = jnp.where((state.counts > 0)[:, None], feature_map(state.means), 0.0)
    matrix = feature_map.matrix
    return ClassStatistics(state.counts, means, product(product(matrix.T, state.scatter), matrix))


CLASS_STATISTICS = Statistics("class_statistics", init, observe, plus, moved)
"""Counts, means and common scatter, which `discriminant` and its like are made of."""


def covariance(state: ClassStatistics) -> tuple[Array, Array]:
    """Covariance within classes, shrunk the more, the fewer the examples are.

        (1 - share) S / N + share tr(S / N) / D I

    with the share of oracle approximating shrinkage, for many features.

    Args:
        state: the statistics.

    Returns:
        The covariance [D, D] and the share, 1 where only the trace is left of the scatter. It is
        the identity where the examples have no spread.

    References:
        Chen et al., `Shrinkage Algorithms for MMSE Covariance Estimation
        <https://arxiv.org/abs/0907.4698>`_, 2010, equation 23

    Example:
        >>> state = ClassStatistics(jnp.asarray([4.0]), jnp.zeros((1, 2)), jnp.diag(jnp.ones(2)))
        >>> covariance(state)[0].tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """
    width, examples = state.scatter.shape[0], jnp.maximum(state.counts.sum(), 1.0)
    plain = state.scatter / examples
    # Without the terms of order 1 / D of the equation.
    trace, square = jnp.trace(plain), jnp.sum(plain**2)
    wanted, excess = square + trace**2, (examples + 1) * (square - trace**2 / width)
    share = jnp.where(wanted < excess, wanted / jnp.where(excess > 0, excess, 1.0), 1.0)
    scale = jnp.where(trace > 0, trace / width, 1.0)
    return (1 - share) * plain + share * scale * jnp.eye(width), share


def shrinkage(state: ClassStatistics, predictor: Any) -> dict[str, Array]:
    """The share of shrinkage, as a figure: 1 where only the mean variance is used."""
    del predictor
    return {"shrinkage": covariance(state)[1]}


def remarks_on_shrinkage(figures: dict[str, Any]) -> tuple[str, ...]:
    """Say that only the mean variance is used, where that is so."""
    if not figures["shrinkage"] >= 1:
        return ()
    return (
        "the covariance within classes is shrunk to a multiple of the identity (shrinkage 1), as "
        "for too few examples: classes are compared by the distance to their means",
    )
