"""The class whose mean is nearest."""

import jax.numpy as jnp

from pm_jax.classifiers.base import Classifier, Columns, Linear
from pm_jax.classifiers.class_statistics import CLASS_STATISTICS, ClassStatistics
from pm_jax.types import Key


def nearest_mean() -> Classifier:
    """Choose the class whose mean is nearest to the features.

        kernel_c = m_c,    bias_c = -1/2 |m_c|^2

    which is minus half the squared distance to the mean m_c, but for a term that all classes share.

    Returns:
        A `Classifier` whose predictor is `Linear`.

    References:
        Rebuffi et al., `iCaRL: Incremental Classifier and Representation Learning
        <https://arxiv.org/abs/1611.07725>`_, CVPR 2017, which stores examples to measure the means

    Example:
        >>> statistics = nearest_mean().statistics
        >>> features, labels = jnp.asarray([[0.0], [2.0], [9.0]]), jnp.asarray([0, 0, 1])
        >>> state = statistics.observe(statistics.init(2, 1, None), features, labels, jnp.ones(3))
        >>> nearest_mean().fit(state, None, None)(jnp.asarray([[2.0]])).tolist()
        [[1.5, -22.5]]
    """
    return Classifier("nearest_mean", CLASS_STATISTICS, _fit, True, False)


def _fit(state: ClassStatistics, columns: Columns | None = None, key: Key | None = None) -> Linear:
    del columns, key
    bias = -0.5 * jnp.sum(state.means**2, axis=1)
    return Linear.of_seen(state.means.T, bias, state.counts > 0)
