"""Linear discriminant analysis over all classes seen."""

import jax.numpy as jnp

from pm_jax.classifiers.base import Classifier, Columns, Linear
from pm_jax.classifiers.class_statistics import (
    CLASS_STATISTICS,
    ClassStatistics,
    covariance,
    remarks_on_shrinkage,
    shrinkage,
)
from pm_jax.types import Key


def discriminant() -> Classifier:
    """Compare the classes by their means and one covariance within them, in closed form.

        kernel_c = S^-1 m_c,    bias_c = log(pi_c) - 1/2 m_c^T S^-1 m_c

    with the class means m_c [D], shares pi_c and the covariance S [D, D] within classes, shrunk
    towards a multiple of the identity. The logits are log posteriors up to a constant. Columns that
    are trained task by task never compare classes of different tasks; these do.

    Returns:
        A `Classifier` whose predictor is `Linear`. Its figure `shrinkage` is 1 where only a
        multiple of the identity is left of the covariance, as with too few examples.

    References:
        Hayes and Kanan, `Lifelong Machine Learning with Deep Streaming Linear Discriminant
        Analysis <https://arxiv.org/abs/1909.01520>`_, 2020; Chen et al., `Shrinkage Algorithms for
        MMSE Covariance Estimation <https://arxiv.org/abs/0907.4698>`_, 2010

    Example:
        >>> statistics = discriminant().statistics
        >>> features = jnp.asarray([[0.0, 1.0], [0.0, 3.0], [1.0, 1.0], [1.0, 3.0]])
        >>> state = statistics.init(3, 2, None)
        >>> state = statistics.observe(state, features, jnp.asarray([0, 0, 2, 2]), jnp.ones(4))
        >>> logits = discriminant().fit(state, None, None)(jnp.asarray([[0.1, 9.0], [0.8, 9.0]]))
        >>> logits.argmax(axis=1).tolist()
        [0, 2]
    """
    return Classifier(
        "discriminant", CLASS_STATISTICS, _fit, True, False, shrinkage, remarks_on_shrinkage
    )


def _fit(state: ClassStatistics, columns: Columns | None = None, key: Key | None = None) -> Linear:
    del columns, key
    seen = state.counts > 0
    kernel = jnp.linalg.solve(covariance(state)[0], state.means.T)
    # 1 instead of 0 for classes without examples: their logarithm is computed and not used.
    shares = jnp.where(seen, state.counts, 1.0) / jnp.maximum(state.counts.sum(), 1.0)
    bias = jnp.log(shares) - 0.5 * jnp.sum(state.means.T * kernel, axis=0)
    return Linear.of_seen(kernel, bias, seen)
