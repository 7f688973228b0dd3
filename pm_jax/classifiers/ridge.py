"""Ridge regression on random features."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

from pm_jax.classifiers.base import Classifier, Columns, product
from pm_jax.classifiers.random_features import (
    RandomFeatureStatistics,
    expand,
    random_features,
)
from pm_jax.losses import MASKED_LOGIT
from pm_jax.types import Array, Key, require

STRENGTHS = tuple(10.0 ** (0.5 * power) for power in range(-6, 7))
"""The grid of lambda, in units of the mean `|h|^2` of an example: .001 to 1000."""

EVERY = 5
"""One of so many of the recent examples is held out."""

TRIES = 8
"""Attempts to factor, with tenfold strengths; more would only find numbers that are not finite."""


class RandomFeatureRidge(NamedTuple):
    """A `Predictor` that is linear in random features, `relu(f projection) kernel + bias`.

    Attributes:
        projection: [D, M].
        kernel: [M, C].
        bias: [C], 0, or -1e30 for classes without examples.
        strength: lambda of the regression, scalar.
        growth: how many times the lambda that was chosen it is, 1 where that could be factored.
    """

    projection: Array
    kernel: Array
    bias: Array
    strength: Array
    growth: Array

    def __call__(self, features: Array, /) -> Array:
        """Logits [N, C]."""
        return product(expand(self.projection, features), self.kernel) + self.bias[None]


def ridge(*, features: int = 0, strength: float = 0.0) -> Classifier:
    """Regress the classes on many random features, in closed form over all tasks.

        h = relu(f W),   kernel = (G + lambda I)^-1 C,   G = sum h^T h,   C = sum h^T onehot

    with W [D, M] drawn once from a standard normal distribution, and without an intercept: it is
    scikit-learn's `Ridge(alpha=lambda, fit_intercept=False)` on h and labels of 0 and 1. Lambda is
    the one of a grid with the smallest squared error on every fifth of at most 2,000 examples of
    the current task, of a regression on the others. Where float32 cannot factor G + lambda I,
    lambda grows tenfold until it can.

    Args:
        features: M; 0 for 10,000 on an accelerator and 2,000 on a CPU.
        strength: lambda; 0 for the grid.

    Returns:
        A `Classifier` whose predictor is not linear in the features. Its figures are
        `strength`, lambda, and `strength_growth`, how many times the one that was chosen it is.

    Raises:
        InvalidInput: a setting out of range.

    References:
        McDonnell et al., `RanPAC: Random Projections and Pre-trained Models for Continual Learning
        <https://arxiv.org/abs/2307.02251>`_, NeurIPS 2023

    Example:
        >>> classifier = ridge(features=50)
        >>> state = classifier.statistics.init(2, 1, jax.random.key(0))
        >>> features, labels = jnp.asarray([[-1.0], [-2.0], [3.0]]), jnp.asarray([0, 0, 1])
        >>> state = classifier.statistics.observe(state, features, labels, jnp.ones(3))
        >>> predictor = jax.jit(classifier.fit)(state, None, None)
        >>> predictor(features).argmax(axis=1).tolist()
        [0, 0, 1]
    """
    require("features", features, features >= 0, "at least 0, where 0 is the platform's number")
    require("strength", strength, strength >= 0, "at least 0, where 0 chooses from a grid")
    count = features or (2_000 if jax.default_backend() == "cpu" else 10_000)

    def fit(
        state: RandomFeatureStatistics, columns: Columns | None = None, key: Key | None = None
    ) -> RandomFeatureRidge:
        del columns, key
        chosen = jnp.asarray(strength, jnp.float32) if strength else chosen_strength(state)
        kernel, used = _regression(state, chosen)
        bias = jnp.where(state.counts > 0, 0.0, MASKED_LOGIT)
        return RandomFeatureRidge(state.projection, kernel, bias, used, used / chosen)

    return Classifier("ridge", random_features(count), fit, False, False, _figures, _remarks)


def _figures(state: Any, predictor: RandomFeatureRidge) -> dict[str, Array]:
    del state
    return {"strength": predictor.strength, "strength_growth": predictor.growth}


def _remarks(figures: dict[str, Any]) -> tuple[str, ...]:
    if not figures["strength_growth"] > 1:
        return ()
    return (
        f"the strength of the ridge grew {figures['strength_growth']:.0f} times, to "
        f"{figures['strength']:.3g}: float32 cannot factor the features' moments with less",
    )


def chosen_strength(state: RandomFeatureStatistics) -> Array:
    """The lambda of the grid with the smallest error on held-out recent examples, scalar.

    The regression on n < M examples is solved in its dual, `alpha = (K + lambda I)^-1 onehot` with
    the kernel matrix K [n, n] of the examples.
    """
    recent, classes = state.recent, state.counts.shape[0]
    present = (recent.priorities >= 0).astype(jnp.float32)
    expanded = expand(state.projection, recent.features) * present[:, None]
    targets = jax.nn.one_hot(recent.labels, classes) * present[:, None]
    # The examples are in the first places, in an order that has nothing to do with their classes.
    places = np.arange(recent.labels.shape[0])
    last = places % EVERY == EVERY - 1
    held_out, fitted = places[last], places[~last]
    kernel = product(expanded[fitted], expanded[fitted].T)
    across = product(expanded[held_out], expanded[fitted].T)
    scale = jnp.sum(expanded**2) / jnp.maximum(present.sum(), 1.0)
    strengths = jnp.asarray(STRENGTHS) * jnp.where(scale > 0, scale, 1.0)

    def error(strength: Array) -> Array:
        # A factorization for each: one eigendecomposition for all takes several times as long.
        dual = _solved(kernel, strength, targets[fitted])
        wrong = jnp.sum((product(across, dual) - targets[held_out]) ** 2)
        # Not a number where float32 cannot factor the matrix.
        return jnp.where(jnp.isfinite(wrong), wrong, jnp.inf)

    errors = jax.lax.map(error, strengths)
    # Without a held-out example all errors are 0: the middle of the grid.
    some = present[held_out].sum() > 0
    return strengths[jnp.where(some, jnp.argmin(errors), len(STRENGTHS) // 2)]


def _solved(matrix: Array, strength: Array, right: Array) -> Array:
    """`(matrix + strength I)^-1 right`, not finite where float32 cannot factor the matrix."""
    diagonal = jnp.arange(matrix.shape[0])
    # LAPACK reads columns: the transpose of a symmetric matrix saves a copy of it.
    factor = cho_factor(matrix.T.at[diagonal, diagonal].add(strength), lower=True)
    return cho_solve(factor, right)


def _regression(state: RandomFeatureStatistics, strength: Array) -> tuple[Array, Array]:
    """Kernel [M, C] of a strength, or of the next tenfold one that float32 can factor; and it."""

    def unsolved(carry: tuple[Array, Array, Array]) -> Array:
        tries, kernel, _ = carry
        return (tries < TRIES) & ~jnp.isfinite(kernel).all()

    def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries = carry[0]
        used = strength * 10.0**tries
        return tries + 1, _solved(state.gram, used, state.sums), used

    # The first attempt is one of the loop's, so that the program has its code once.
    start = (jnp.zeros(()), jnp.full_like(state.sums, jnp.nan), strength)
    _, kernel, used = jax.lax.while_loop(unsolved, attempt, start)
    return kernel, used
