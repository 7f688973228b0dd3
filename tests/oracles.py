"""Dense reference computations on a network of about 100 parameters, in float64 NumPy and JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pm_jax.types import Batch

FEATURES, HIDDEN, CLASSES = 5, 8, 4


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["w"] + params["b"][None, :])
    return hidden @ params["v"]


def problem(examples=13, seed=0, dtype=np.float32):
    """Parameters, a direction and labelled examples; 80 parameters."""
    rng = np.random.default_rng(seed)

    def tree(scale):
        return {
            "w": jnp.asarray(scale * rng.normal(size=(FEATURES, HIDDEN)), dtype),
            "b": jnp.asarray(scale * rng.normal(size=HIDDEN), dtype),
            "v": jnp.asarray(scale * rng.normal(size=(HIDDEN, CLASSES)), dtype),
        }

    params, direction = tree(0.7), tree(0.3)
    inputs = jnp.asarray(rng.normal(size=(examples, FEATURES)), dtype)
    labels = jnp.asarray(rng.integers(CLASSES, size=examples))
    return params, direction, Batch(inputs, labels)


def losses(params, batch):
    """Cross-entropy written out, not through the library."""
    logits = network(params, batch.inputs)
    log_probabilities = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.take_along_axis(log_probabilities, batch.labels[:, None], axis=1)[:, 0]


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def _flat_function(params, function):
    vector, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), params))
    return vector, lambda v: function(unravel(v))


def _float64(batch):
    return Batch(batch.inputs.astype(jnp.float64), batch.labels)


def dense_hessian(params, batch):
    with jax.enable_x64(True):
        vector, fn = _flat_function(params, lambda p: losses(p, _float64(batch)).mean())
        return np.asarray(jax.hessian(fn)(vector))


def logit_jacobian(params, batch):
    """Jacobian [N, C, P] and softmax probabilities [N, C]."""
    with jax.enable_x64(True):
        vector, fn = _flat_function(params, lambda p: network(p, _float64(batch).inputs))
        return np.asarray(jax.jacobian(fn)(vector)), np.asarray(jax.nn.softmax(fn(vector)))


def dense_gauss_newtons(params, batch):
    """One matrix per example, [N, P, P]."""
    jacobian, p = logit_jacobian(params, batch)
    inner = np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("ncp,ncd,ndq->npq", jacobian, inner, jacobian)


def dense_gauss_newton(params, batch):
    return dense_gauss_newtons(params, batch).mean(axis=0)


def per_example_gradients(params, batch):
    with jax.enable_x64(True):
        vector, fn = _flat_function(params, lambda p: losses(p, _float64(batch)))
        return np.asarray(jax.jacobian(fn)(vector))
