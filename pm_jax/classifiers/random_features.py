"""Second moments of random features of the examples, which add up over tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax.classifiers import checks
from pm_jax.classifiers.base import Statistics, product
from pm_jax.types import Array, InvalidInput, Key

RECENT = 2_000
"""Examples of the current task that are kept, on which the strength is chosen."""


class Recent(NamedTuple):
    """At most R examples of those observed since `init`, thinned evenly.

    Attributes:
        features: [R, D].
        labels: int32 [R].
        priorities: [R] in [0, 1); -1 where there is no example.
        observed: number of examples observed, float32 scalar.
    """

    features: Array
    labels: Array
    priorities: Array
    observed: Array


class RandomFeatureStatistics(NamedTuple):
    """Moments of `h = relu(f W)` over all examples seen, and some examples of the current task.

    Attributes:
        projection: W, [D, M].
        gram: sum of `h^T h`, [M, M].
        sums: sum of `h^T onehot`, [M, C].
        counts: examples of each class, [C].
        recent: examples of the newest statistics that were added.
    """

    projection: Array
    gram: Array
    sums: Array
    counts: Array
    recent: Recent


def random_features(count: int) -> Statistics:
    """Statistics of `count` random features, for `ridge`.

    The projection W is drawn from the key of `init`, from a standard normal distribution. `plus`
    keeps the recent examples of the newer statistics, since those of earlier tasks are not to be
    kept: make the statistics of every task anew by `init`, and add them.

    Args:
        count: M.

    Returns:
        `Statistics` that no map of the features can move.
    """

    def init(num_classes: int, width: int, key: Key) -> RandomFeatureStatistics:
        if key is None:
            raise InvalidInput(
                "key=None: the projection is drawn; give a PRNG key, the same for every task"
            )
        return RandomFeatureStatistics(
            jax.random.normal(key, (width, count)),
            jnp.zeros((count, count)),
            jnp.zeros((count, num_classes)),
            jnp.zeros(num_classes),
            Recent(
                jnp.zeros((RECENT, width)),
                jnp.zeros(RECENT, jnp.int32),
                jnp.full(RECENT, -1.0, jnp.float32),
                jnp.zeros(()),
            ),
        )

    return Statistics(f"random_features_{count}", init, _observe, _plus)


def expand(projection: Array, features: Array) -> Array:
    """Random features `relu(f W)`, float32 [N, M], of features [N, D]."""
    return jax.nn.relu(product(features.astype(jnp.float32), projection))


def _observe(
    state: RandomFeatureStatistics, features: Array, labels: Array, weights: Array
) -> RandomFeatureStatistics:
    width, classes = state.projection.shape[0], state.counts.shape[0]
    features, labels, weights = checks.examples(features, labels, weights, classes, width)
    expanded = expand(state.projection, features)
    member = jax.nn.one_hot(labels, classes) * weights[:, None]
    return RandomFeatureStatistics(
        state.projection,
        state.gram + product((expanded * weights[:, None]).T, expanded),
        state.sums + product(expanded.T, member),
        state.counts + member.sum(axis=0),
        _keep(state.recent, features, labels, weights > 0),
    )


def _plus(
    state: RandomFeatureStatistics, other: RandomFeatureStatistics
) -> RandomFeatureStatistics:
    for name in ("projection", "sums"):
        one, two = getattr(state, name).shape, getattr(other, name).shape
        if one != two:
            raise InvalidInput(f"other: has {name} {two}, and state {one}; they must be alike")
    return RandomFeatureStatistics(
        state.projection,
        state.gram + other.gram,
        state.sums + other.sums,
        state.counts + other.counts,
        other.recent,
    )


def _keep(recent: Recent, features: Array, labels: Array, counted: Array) -> Recent:
    """Keep the examples with the highest priorities; those that do not count have none."""
    numbers = (recent.observed + jnp.cumsum(counted) - 1).astype(jnp.uint32)
    # Multiples of the golden ratio's fraction spread evenly in [0, 1), so that the largest of them
    # belong to examples that are evenly spaced in the order of observation.
    spread = (numbers * jnp.uint32(2_654_435_769) >> 8).astype(jnp.float32) / 2**24
    priorities = jnp.concatenate([recent.priorities, jnp.where(counted, spread, -1.0)])
    priorities, kept = jax.lax.top_k(priorities, recent.priorities.shape[0])
    return Recent(
        jnp.concatenate([recent.features, features])[kept],
        jnp.concatenate([recent.labels, labels.astype(jnp.int32)])[kept],
        priorities,
        recent.observed + counted.sum(),
    )
