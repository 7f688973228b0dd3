"""Products with curvature matrices that are never formed: Hessian and Gauss-Newton.

The Gauss-Newton matrix is that of softmax cross-entropy, `G = mean_n J_n^T (diag(p_n) - p_n p_n^T)
J_n` with `J_n = d logits_n / d params` and `p_n` the softmax of the logits that the loss sees. For
sequences, whose loss is a sum over tokens, so is their matrix G_n, with the tokens' weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, LogitsFn, LossesFn, LossFn, Params, PyTree


@in_full_precision
def directional_derivative(
    fn: Callable[[Params], Array], params: Params, direction: PyTree
) -> tuple[Array, Array]:
    """`(fn(params), d/da fn(params + a direction) at a = 0)`, by one jvp; `fn` gives any array.

    Only floating-point leaves move.
    """
    moving, direction = trees.floating(params), trees.floating(direction)
    # Task vectors are float32, and a jvp wants tangents of the parameters' own type.
    tangent = jax.tree.map(lambda p, d: jnp.asarray(d, jnp.result_type(p)), moving, direction)
    return jax.jvp(lambda p: fn(trees.with_floating(params, p)), (moving,), (tangent,))


@in_full_precision
def hessian_vector_product(
    loss_fn: LossFn, params: Params, direction: PyTree, batch: Batch
) -> PyTree:
    """`H d`, forward-over-reverse, with H the Hessian of `loss_fn(params, batch) -> scalar`.

    Example:
        >>> hessian_vector_product(lambda w, _: w**3, 2.0, 1.0, None).item()
        12.0
    """

    def loss(moving: Params) -> Array:
        return loss_fn(trees.with_floating(params, moving), batch)

    return directional_derivative(jax.grad(loss), trees.floating(params), direction)[1]


@in_full_precision
def hessian_along(losses_fn: LossesFn, params: Params, direction: PyTree, batch: Batch) -> Array:
    """`d^T H_n d` of N examples, float32 [N]; their mean is that of the mean loss, of either sign.

    Forward-over-forward: there is no backward pass, and nothing is stored for one.

    Example:
        >>> batch = Batch(jnp.asarray([1.0, 2.0]), jnp.zeros(2, int))
        >>> hessian_along(lambda w, b: b.inputs * w**2, 3.0, 1.0, batch).tolist()
        [2.0, 4.0]
    """

    def slopes(p: Params) -> Array:
        return directional_derivative(lambda q: losses_fn(q, batch), p, direction)[1]

    return directional_derivative(slopes, params, direction)[1]


@in_full_precision
def gauss_newton_along(
    logits_fn: LogitsFn, params: Params, direction: PyTree, batch: Batch
) -> Array:
    """`d^T G_n d` of N examples by one jvp, `sum_c p_nc ((J_n d)_c - sum_k p_nk (J_n d)_k)^2`.

    float32 [N], at least 0; their mean is `d^T G d`.

    References:
        Schraudolph, `Fast Curvature Matrix-Vector Products
        <https://doi.org/10.1162/08997660260028683>`_, 2002

    Example:
        >>> gauss_newton_along(lambda w, x: x * w[None], jnp.zeros(2), jnp.asarray([1., 3.]),
        ...                    Batch(jnp.ones((1, 1)), jnp.zeros(1, int))).tolist()
        [1.0]
    """
    logits, tangents = directional_derivative(
        lambda p: logits_fn(p, batch.inputs), params, direction
    )
    probabilities = jax.nn.softmax(logits)
    values = jnp.sum(probabilities * _centred(tangents, probabilities) ** 2, axis=-1)
    if values.ndim == 1:
        return values
    return jnp.sum(losses.token_weights(batch) * values, axis=1)


@in_full_precision
def gauss_newton_times(
    logits_fn: LogitsFn, params: Params, directions: PyTree, batch: Batch
) -> PyTree:
    """`sum_n weight_n G_n d_k` for K directions, leaves [K, ...]: one jvp and one vjp for a d_k.

    Example:
        >>> gauss_newton_times(lambda w, x: x * w[None], jnp.zeros(2), jnp.asarray([[1.0, 3.0]]),
        ...                    Batch(jnp.ones((1, 1)), jnp.zeros(1, int))).tolist()
        [[-0.5, 0.5]]
    """
    # Linearized once: all directions share one forward pass and its activations.
    moving = trees.floating(params)
    logits, forward = jax.linearize(
        lambda p: logits_fn(trees.with_floating(params, p), batch.inputs), moving
    )
    backward = jax.linear_transpose(forward, moving)
    probabilities = jax.nn.softmax(logits)
    weights = losses.weights_of(batch)
    if logits.ndim == 3:
        weights = weights[:, None] * losses.token_weights(batch)

    def product(direction: PyTree) -> PyTree:
        tangents = _centred(forward(direction), probabilities)
        return backward(weights[..., None] * probabilities * tangents)[0]

    # One direction at a time, not a vmap: the tangents of all of them would be in memory together.
    return jax.lax.map(product, directions)


def _centred(tangents: Array, probabilities: Array) -> Array:
    """Tangents of logits [..., C] minus their mean under the softmax.

    The squares of the centred form are at least 0; the difference of two sums, `sum p t^2 -
    (sum p t)^2`, may come out negative in float32.
    """
    return tangents - jnp.sum(probabilities * tangents, axis=-1, keepdims=True)
