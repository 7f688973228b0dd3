"""The trained columns, trained again on features drawn from the Gaussians of the classes."""

import jax
import jax.numpy as jnp
import optax

from pm_jax.classifiers import checks
from pm_jax.classifiers.base import Classifier, Columns, Linear, product
from pm_jax.classifiers.class_statistics import (
    CLASS_STATISTICS,
    ClassStatistics,
    covariance,
    remarks_on_shrinkage,
    shrinkage,
)
from pm_jax.losses import mask_logits
from pm_jax.types import Array, InvalidInput, Key, require


def aligned(*, steps: int = 300, batch_size: int = 256, rate: float = 0.03) -> Classifier:
    """Train the columns of all classes together on features drawn from the class Gaussians.

        x ~ N(m_c, S),   c uniform over the classes seen,   minimise -log softmax(x kernel + bias)_c

    with the class means m_c and the shrunk covariance S within classes, one for all classes so that
    memory does not grow with them. Adam begins at the trained columns and works on whitened
    features, in which all directions have the same spread.

    Args:
        steps: steps of Adam, whose rate decays to 0 by a cosine.
        batch_size: features drawn in a step.
        rate: the first step's learning rate.

    Returns:
        A `Classifier` whose predictor is `Linear`. Its figure `shrinkage` is that of
        `discriminant`, which has the same covariance.

    Raises:
        InvalidInput: a setting out of range.

    References:
        Zhang et al., `SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
        Pre-trained Model <https://arxiv.org/abs/2303.05118>`_, ICCV 2023, whose Gaussians have a
        covariance each

    Example:
        >>> statistics = aligned().statistics
        >>> features, labels = jnp.asarray([[0.0], [1.0], [8.0], [9.0]]), jnp.asarray([0, 0, 1, 1])
        >>> state = statistics.observe(statistics.init(2, 1, None), features, labels, jnp.ones(4))
        >>> columns = jnp.zeros((1, 2)), jnp.zeros(2)
        >>> predictor = jax.jit(aligned().fit)(state, columns, jax.random.key(0))
        >>> predictor(features).argmax(axis=1).tolist()
        [0, 0, 1, 1]
    """
    require("steps", steps, steps >= 1, "at least 1")
    require("batch_size", batch_size, batch_size >= 1, "at least 1")
    require("rate", rate, rate > 0, "above 0")

    def fit(state: ClassStatistics, columns: Columns | None, key: Key | None) -> Linear:
        kernel, bias = checks.columns_of(columns, "aligned")
        if kernel.shape != state.means.T.shape:
            raise InvalidInput(
                f"columns: have shape {kernel.shape}; must be {state.means.T.shape}, as the "
                "statistics are"
            )
        if key is None:
            raise InvalidInput("key=None: features are drawn; give a PRNG key")
        seen = state.counts > 0
        root = jnp.linalg.cholesky(covariance(state)[0])
        means = jax.lax.linalg.triangular_solve(root, state.means.T, left_side=True, lower=True).T
        # About the middle of the classes, where the biases hardly depend on the kernel.
        middle = means.sum(axis=0) / jnp.maximum(seen.sum(), 1)
        means = jnp.where(seen[:, None], means - middle[None], 0.0)
        # x = root (u + middle), hence x kernel + bias = u whitened + (bias + middle whitened).
        whitened = product(root.T, kernel)
        bias = bias + product(middle, whitened)
        whitened, bias = _train((whitened, bias), means, seen, key)
        bias = bias - product(middle, whitened)
        kernel = jax.lax.linalg.triangular_solve(
            root, whitened, left_side=True, lower=True, transpose_a=True
        )
        return Linear.of_seen(kernel, bias, seen)

    def _train(columns: Columns, means: Array, seen: Array, key: Key) -> Columns:
        """Train columns on features with identity covariance about the means [C, D]."""
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
        # The classes seen come first; batches take them in turn, so that each is drawn alike often.
        classes = jnp.argsort(~seen, stable=True)
        number = jnp.maximum(seen.sum(), 1)

        def loss(columns: Columns, features: Array, labels: Array) -> Array:
            kernel, bias = columns
            logits = mask_logits(product(features, kernel) + bias[None], seen)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(count: Array, carry: tuple[Columns, optax.OptState]):
            columns, moments = carry
            labels = classes[(count * batch_size + jnp.arange(batch_size)) % number]
            noise = jax.random.normal(jax.random.fold_in(key, count), (batch_size, means.shape[1]))
            gradients = jax.grad(loss)(columns, means[labels] + noise, labels)
            updates, moments = optimizer.update(gradients, moments)
            return optax.apply_updates(columns, updates), moments

        return jax.lax.fori_loop(0, steps, step, (columns, optimizer.init(columns)))[0]

    return Classifier("aligned", CLASS_STATISTICS, fit, True, True, shrinkage, remarks_on_shrinkage)
