"""How features drift when a backbone is merged, as an affine map that statistics can follow.

The statistics of earlier classes were taken from an earlier backbone. On the current task's inputs
the features before and after the merge are both known, f and g. The map between them,

    x -> (x - mean f) M + mean g,    M = I + D,
    D = argmin ||d_c - f_c D||^2 + rho tr(f_c^T f_c) / d ||D||^2,    d = g - f,

(c: centred) moves the statistics of earlier classes with `Statistics.moved`. It is fitted from
moments [d, d] in one pass; rho is chosen on every fifth example, which does not take part in the
fit. The moments are of f and of the difference d, because the moments of f and g would cancel.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pm_jax.classifiers import checks
from pm_jax.classifiers.base import FeatureMap, product
from pm_jax.types import Array, InvalidInput

STRENGTHS = tuple(10.0 ** (0.5 * power) for power in range(-6, 5))
"""The grid of rho: .001 to 100."""

EVERY = 5
"""One of so many examples is held out."""


class Moments(NamedTuple):
    """Moments of features and their drift over a set of examples; float32, centred at the means.

    Attributes:
        weight: sum of the weights, scalar.
        features: mean of f, [D].
        drift: mean of d = g - f, [D].
        features_features: sum of `f_c^T f_c`, [D, D].
        features_drift: sum of `f_c^T d_c`, [D, D].
        drift_square: sum of `|d_c|^2`, scalar.
    """

    weight: Array
    features: Array
    drift: Array
    features_features: Array
    features_drift: Array
    drift_square: Array


class DriftStatistics(NamedTuple):
    """Moments of paired features of one task, which add up.

    Attributes:
        examples: number of examples seen, float32 scalar.
        fitting: moments of the examples that the map is fitted to.
        held_out: moments of every fifth example, which chooses the strength.
    """

    examples: Array
    fitting: Moments
    held_out: Moments


class Figures(NamedTuple):
    """Figures of a fitted drift; float32 scalars.

    Attributes:
        explained: share of the held-out drift `sum |d|^2` that the map explains, at the strength
            chosen and fitted without these examples; 0 where the map is the identity.
        strength: rho; infinite where the map is a shift alone, or the identity.
        explained_by_shift: share that the shift of the mean explains alone; may be negative.
    """

    explained: Array
    strength: Array
    explained_by_shift: Array


def init(width: int) -> DriftStatistics:
    """The statistics of no examples of features [N, width]."""

    def nothing() -> Moments:
        # An array each, because buffers that are donated cannot be shared.
        return Moments(
            weight=jnp.zeros(()),
            features=jnp.zeros(width),
            drift=jnp.zeros(width),
            features_features=jnp.zeros((width, width)),
            features_drift=jnp.zeros((width, width)),
            drift_square=jnp.zeros(()),
        )

    return DriftStatistics(jnp.zeros(()), nothing(), nothing())


def observe(state: DriftStatistics, before: Array, after: Array, weights: Array) -> DriftStatistics:
    """Add the features of N examples before and after a merge.

    Args:
        state: the statistics so far.
        before: f, [N, D].
        after: g of the same examples, [N, D].
        weights: [N]; 0 marks padding.

    Returns:
        The next statistics. Which examples are held out depends on their order alone, not on the
        batches that they come in.

    Raises:
        InvalidInput: shapes do not fit; where values are known, features that are not finite.

    Example:
        >>> before, after = jnp.zeros((5, 2)), jnp.ones((5, 2))
        >>> state = observe(init(2), before, after, jnp.ones(5))
        >>> float(state.fitting.weight), float(state.held_out.weight)
        (4.0, 1.0)
    """
    before, after, weights = map(jnp.asarray, (before, after, weights))
    width = state.fitting.features.shape[0]
    for name, features in (("before", before), ("after", after)):
        checks.check_features(name, features, width)
    if not before.shape[:1] == after.shape[:1] == weights.shape:
        raise InvalidInput(
            f"after: {after.shape[0]} examples and weights of shape {weights.shape}, but before "
            f"has {before.shape[0]}; give the features of the same examples"
        )
    weights = weights.astype(jnp.float32)
    checks.check_weights(weights)
    counted = weights > 0
    # Padding may hold NaN, which a product with the weight 0 would keep.
    features = jnp.where(counted[:, None], before.astype(jnp.float32), 0.0)
    drift = jnp.where(counted[:, None], after.astype(jnp.float32), 0.0) - features
    checks.check_finite("before", features)
    checks.check_finite("after", drift)
    # Numbered from 0; those of padding do not matter.
    numbers = state.examples + jnp.cumsum(counted) - 1
    held_out = jnp.mod(numbers, EVERY) == EVERY - 1
    return DriftStatistics(
        state.examples + counted.sum(),
        _sum(state.fitting, _moments(features, drift, jnp.where(held_out, 0.0, weights))),
        _sum(state.held_out, _moments(features, drift, jnp.where(held_out, weights, 0.0))),
    )


def plus(state: DriftStatistics, other: DriftStatistics) -> DriftStatistics:
    """Statistics of both sets of examples.

    Raises:
        InvalidInput: they are of other numbers of features.
    """
    widths = [moments.fitting.features.shape[0] for moments in (state, other)]
    if widths[0] != widths[1]:
        raise InvalidInput(f"other: has {widths[1]} features and state {widths[0]}; give the same")
    return DriftStatistics(
        state.examples + other.examples,
        _sum(state.fitting, other.fitting),
        _sum(state.held_out, other.held_out),
    )


def fit(state: DriftStatistics) -> tuple[FeatureMap, Figures]:
    """Fit the affine map from the features before a merge to those after it.

    The strength rho is the one of a grid from .001 to 100 with the smallest error on the held-out
    examples, where a shift alone counts as the infinite one; the map is then fitted to all
    examples. Where no map has a smaller error than none at all, it is the identity, to the bit.

    Args:
        state: the statistics of at least one example of the current task.

    Returns:
        The map, for `Statistics.moved`, and its figures.

    Example:
        >>> before = jnp.asarray([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
        >>> feature_map, figures = fit(observe(init(1), before, before + 2, jnp.ones(6)))
        >>> feature_map(jnp.asarray([[10.0]])).tolist(), float(figures.explained)
        ([[12.0]], 1.0)
    """
    fitting, held_out = state.fitting, state.held_out
    strengths = jnp.asarray([*STRENGTHS, np.inf], jnp.float32)
    basis, values, target = _regression(fitting)
    shrunk = _inverse(values[None], strengths[:, None])
    # The squared error of D = U w(rho) A on the held-out examples, for all rho at once:
    # |d_c|^2 - 2 tr(D^T S_fd) + tr(D^T S_ff D), and N |difference of the means|^2.
    slope = jnp.sum(target * product(basis.T, held_out.features_drift), axis=1)
    curvature = product(product(basis.T, held_out.features_features), basis) * product(
        target, target.T
    )
    centred = (
        held_out.drift_square
        - 2 * product(shrunk, slope)
        + jnp.sum(product(shrunk, curvature) * shrunk, axis=1)
    )
    offset = product((held_out.features - fitting.features)[None], basis)
    offset = product(offset * shrunk, target) - (held_out.drift - fitting.drift)[None]
    errors = centred + held_out.weight * jnp.sum(offset**2, axis=1)
    total = held_out.drift_square + held_out.weight * jnp.sum(held_out.drift**2)
    explained = jnp.where(total > 0, 1 - errors / jnp.where(total > 0, total, 1.0), 0.0)
    # The largest of equal ones, which changes the least: a drift that is a shift has no slope.
    best = strengths.shape[0] - 1 - jnp.argmax(explained[::-1])
    helps = explained[best] > 0
    strength = jnp.where(helps, strengths[best], np.inf)
    found = _map(_sum(fitting, held_out), strength)
    identity = FeatureMap.identity(fitting.features.shape[0])
    feature_map = FeatureMap(
        *(jnp.where(helps, one, other) for one, other in zip(found, identity, strict=True))
    )
    return feature_map, Figures(jnp.where(helps, explained[best], 0.0), strength, explained[-1])


def size(state: DriftStatistics) -> Array:
    """Return how far the features drifted, over their scatter: `sum |d|^2 / sum |f_c|^2`.

    It is 0 where nothing moved; near 1 the features of an example moved as far as those of another
    example are away, and statistics of earlier features say little about the new ones.

    Args:
        state: the statistics of at least two examples.

    Returns:
        The ratio over all examples, float32 scalar; 0 where the features have no scatter.

    Example:
        >>> before = jnp.asarray([[0.0], [2.0]])
        >>> float(size(observe(init(1), before, before + 3, jnp.ones(2))))
        9.0
    """
    moments = _sum(state.fitting, state.held_out)
    moved = moments.drift_square + moments.weight * jnp.sum(moments.drift**2)
    scatter = jnp.trace(moments.features_features)
    return jnp.where(scatter > 0, moved / jnp.where(scatter > 0, scatter, 1.0), 0.0)


def _moments(features: Array, drift: Array, weights: Array) -> Moments:
    """Moments of N examples."""
    weight = weights.sum()
    divisor = jnp.where(weight > 0, weight, 1.0)
    mean_features = product(weights[None], features)[0] / divisor
    mean_drift = product(weights[None], drift)[0] / divisor
    # The root, because both factors of a product have it.
    roots = jnp.sqrt(weights)[:, None]
    features, drift = roots * (features - mean_features[None]), roots * (drift - mean_drift[None])
    return Moments(
        weight,
        mean_features,
        mean_drift,
        product(features.T, features),
        product(features.T, drift),
        jnp.sum(drift**2),
    )


def _sum(one: Moments, other: Moments) -> Moments:
    """Moments of two sets of examples together, by Chan's update."""
    weight = one.weight + other.weight
    divisor = jnp.where(weight > 0, weight, 1.0)
    share, pull = other.weight / divisor, one.weight * other.weight / divisor
    features, drift = other.features - one.features, other.drift - one.drift
    return Moments(
        weight,
        one.features + share * features,
        one.drift + share * drift,
        one.features_features + other.features_features + pull * jnp.outer(features, features),
        one.features_drift + other.features_drift + pull * jnp.outer(features, drift),
        one.drift_square + other.drift_square + pull * jnp.sum(drift**2),
    )


def _regression(moments: Moments) -> tuple[Array, Array, Array]:
    """Eigenvectors U [D, D], eigenvalues over their mean, and `U^T S_fd` over the same mean."""
    width = moments.features.shape[0]
    mean = jnp.trace(moments.features_features) / width
    mean = jnp.where(mean > 0, mean, 1.0)
    values, basis = jnp.linalg.eigh(moments.features_features / mean)
    # A matrix of fewer examples than features has eigenvalues 0, some below by rounding.
    return basis, jnp.maximum(values, 0.0), product(basis.T, moments.features_drift / mean)


def _inverse(values: Array, strength: Array) -> Array:
    """The shrunk inverse of eigenvalues; the strength is at least .001, so it is finite."""
    return 1 / (values + strength)


def _map(moments: Moments, strength: Array) -> FeatureMap:
    """The map of a strength, fitted to examples."""
    basis, values, target = _regression(moments)
    slope = product(basis * _inverse(values, strength)[None], target)
    matrix = jnp.eye(values.shape[0]) + slope
    return FeatureMap(moments.features, matrix, moments.features + moments.drift)
