"""A classifier from class statistics: linear discriminant analysis over all classes seen.

A classifier whose columns are trained task by task never compares classes of different tasks. The
means of the classes and one covariance within them, which add up over tasks and keep no example,
give a classifier that does, in closed form:

    kernel_c = S^-1 m_c,    bias_c = log(pi_c) - 1/2 m_c^T S^-1 m_c

with the class means m_c [D], shares pi_c and the covariance S [D, D] within classes, shrunk towards
a multiple of the identity (oracle approximating shrinkage, for many features).

References:
    Hayes and Kanan, `Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis
    <https://arxiv.org/abs/1909.01520>`_, 2020; Chen et al., `Shrinkage Algorithms for MMSE
    Covariance Estimation <https://arxiv.org/abs/0907.4698>`_, 2010
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax.losses import MASKED_LOGIT
from pm_jax.types import Array


class ClassStatistics(NamedTuple):
    """Counts, means and scatter of the features of all examples seen; float32.

    Attributes:
        counts: examples of each class, [C].
        means: of their features, [C, D]; 0 for classes without examples.
        scatter: sum of `(x - m_c)(x - m_c)^T`, [D, D].

    Example:
        >>> statistics = ClassStatistics.zero(2, 1)
        >>> features, labels = jnp.asarray([[1.0], [3.0], [9.0]]), jnp.asarray([0, 0, 1])
        >>> statistics = statistics.plus(features, labels, jnp.ones(3))
        >>> statistics.means[:, 0].tolist(), float(statistics.scatter[0, 0])
        ([2.0, 9.0], 2.0)
    """

    counts: Array
    means: Array
    scatter: Array

    @classmethod
    def zero(cls, num_classes: int, width: int) -> "ClassStatistics":
        """The statistics of no examples."""
        return cls(
            jnp.zeros(num_classes), jnp.zeros((num_classes, width)), jnp.zeros((width, width))
        )

    def plus(self, features: Array, labels: Array, weights: Array) -> "ClassStatistics":
        """Add N examples, features [N, D], by Chan's update: exact for any grouping.

        A weight of 0 marks padding.
        """
        member = jax.nn.one_hot(labels, self.counts.shape[0]) * weights[:, None]
        count = member.sum(axis=0)
        mean = _matmul(member.T, features) / jnp.maximum(count, 1)[:, None]
        # The root, because the offset appears twice in the scatter.
        offset = (features - mean[labels]) * jnp.sqrt(weights)[:, None]
        total = self.counts + count
        shift = mean - self.means
        pull = jnp.sqrt(self.counts * count / jnp.maximum(total, 1))[:, None] * shift
        return ClassStatistics(
            total,
            self.means + shift * (count / jnp.maximum(total, 1))[:, None],
            self.scatter + _matmul(offset.T, offset) + _matmul(pull.T, pull),
        )

    def classifier(self) -> tuple[Array, Array]:
        """Kernel [D, C] and bias [C] whose logits are log posteriors up to a constant.

        Classes without examples have the logit -1e30.
        """
        seen = self.counts > 0
        precision_means = jnp.linalg.solve(self.covariance(), self.means.T)
        # 1 instead of 0 for classes without examples: their logarithm is computed and not used.
        shares = jnp.where(seen, self.counts, 1.0) / jnp.maximum(self.counts.sum(), 1.0)
        quadratic = jnp.sum(self.means.T * precision_means, axis=0)
        bias = jnp.where(seen, jnp.log(shares) - 0.5 * quadratic, MASKED_LOGIT)
        return jnp.where(seen, precision_means, 0.0), bias

    def covariance(self) -> Array:
        """Covariance within classes [D, D], shrunk the more, the fewer the examples are.

        It is the identity where the examples have no spread.
        """
        width, examples = self.scatter.shape[0], jnp.maximum(self.counts.sum(), 1.0)
        plain = self.scatter / examples
        # Equation 23 of Chen et al. without its terms of order 1 / D.
        trace, square = jnp.trace(plain), jnp.sum(plain**2)
        wanted, excess = square + trace**2, (examples + 1) * (square - trace**2 / width)
        share = jnp.where(wanted < excess, wanted / jnp.where(excess > 0, excess, 1.0), 1.0)
        scale = jnp.where(trace > 0, trace / width, 1.0)
        return (1 - share) * plain + share * scale * jnp.eye(width)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")
