"""Products with curvature matrices that are never formed: Hessian and Gauss-Newton.

The Gauss-Newton matrix is that of softmax cross-entropy, `G = mean_n J_n^T (diag(p_n) - p_n p_n^T)
J_n` with `J_n = d logits_n / d params` and `p_n` the softmax of the logits that the loss sees.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax.types import Array, Batch, LogitsFn, LossesFn, LossFn, Params, PyTree


def directional_derivative(
    fn: Callable[[Params], Array], params: Params, direction: PyTree
) -> tuple[Array, Array]:
    """Value and slope of a function along a direction, by one jvp.

    Args:
        fn: function of the parameters, to an array of any shape.
        params: pytree of floating-point arrays.
        direction: displacement of the same structure; cast to the parameters' type.

    Returns:
        `(fn(params), d/da fn(params + a direction) at a = 0)`.

    Example:
        >>> _, slope = directional_derivative(lambda w: w**2, 3.0, 1.0)
        >>> float(slope)
        6.0
    """
    tangent = jax.tree.map(lambda p, d: jnp.asarray(d, jnp.result_type(p)), params, direction)
    return jax.jvp(fn, (params,), (tangent,))


def hessian_vector_product(
    loss_fn: LossFn, params: Params, direction: PyTree, batch: Batch
) -> PyTree:
    """`H d`, forward-over-reverse, with H the Hessian of a scalar loss.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`.
        params: pytree of floating-point arrays.
        direction: d, of the same structure.
        batch: what the loss is taken on.

    Returns:
        Pytree of the same structure.

    Example:
        >>> hessian_vector_product(lambda w, _: w**3, 2.0, 1.0, None).item()
        12.0
    """
    return directional_derivative(lambda p: jax.grad(loss_fn)(p, batch), params, direction)[1]


def hessian_along(losses_fn: LossesFn, params: Params, direction: PyTree, batch: Batch) -> Array:
    """`d^T H_n d` of every example, forward-over-forward: no backward pass, nothing stored.

    Args:
        losses_fn: `losses_fn(params, batch) -> [N]`.
        params: pytree of floating-point arrays.
        direction: d, of the same structure.
        batch: N examples.

    Returns:
        float32 [N]; their mean is `d^T H d` of the mean loss. May be negative.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = Batch(jnp.asarray([1.0, 2.0]), jnp.zeros(2, int))
        >>> hessian_along(lambda w, b: b.inputs * w**2, 3.0, 1.0, batch).tolist()
        [2.0, 4.0]
    """

    def slopes(p: Params) -> Array:
        return directional_derivative(lambda q: losses_fn(q, batch), p, direction)[1]

    return directional_derivative(slopes, params, direction)[1]


def centred_logit_tangents(
    logits_fn: LogitsFn, params: Params, direction: PyTree, inputs: PyTree
) -> tuple[Array, Array]:
    """Softmax probabilities, and `J_n d` minus its mean under them: one jvp.

    The centred form is what keeps `d^T G d` from coming out negative in float32.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.
        params: pytree of floating-point arrays.
        direction: d, of the same structure.
        inputs: of N examples.

    Returns:
        `(p, t)`, both [N, C], with `t_nc = (J_n d)_c - sum_k p_nk (J_n d)_k`.

    Example:
        >>> import jax.numpy as jnp
        >>> direction = jnp.asarray([1.0, 3.0])
        >>> centred_logit_tangents(lambda w, x: x * w[None], jnp.zeros(2), direction, 1.0)[1]
        Array([[-1.,  1.]], dtype=float32)
    """
    logits, tangents = directional_derivative(lambda p: logits_fn(p, inputs), params, direction)
    probabilities = jax.nn.softmax(logits)
    means = jnp.sum(probabilities * tangents, axis=-1, keepdims=True)
    return probabilities, tangents - means


def gauss_newton_along(
    logits_fn: LogitsFn, params: Params, direction: PyTree, inputs: PyTree
) -> Array:
    """`d^T G_n d` of every example by one jvp: `sum_c p_nc ((J_n d)_c - m_n)^2`.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.
        params: pytree of floating-point arrays.
        direction: d, of the same structure.
        inputs: of N examples.

    Returns:
        float32 [N], at least 0; their mean is `d^T G d`.

    References:
        Schraudolph, `Fast Curvature Matrix-Vector Products
        <https://doi.org/10.1162/08997660260028683>`_, 2002

    Example:
        >>> import jax.numpy as jnp
        >>> gauss_newton_along(lambda w, x: x * w[None], jnp.zeros(2), jnp.asarray([1., 3.]),
        ...                    jnp.ones((1, 1))).tolist()
        [1.0]
    """
    probabilities, tangents = centred_logit_tangents(logits_fn, params, direction, inputs)
    return jnp.sum(probabilities * tangents**2, axis=-1)


def gauss_newton_times(
    logits_fn: LogitsFn, params: Params, directions: PyTree, inputs: PyTree, weights: Array
) -> PyTree:
    """`sum_n weight_n G_n d_k` for K directions, one jvp and one vjp each.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [N, C]`.
        params: pytree of floating-point arrays.
        directions: of the structure of the parameters, leaves [K, ...].
        inputs: of N examples.
        weights: of the examples, [N].

    Returns:
        As `directions`.

    Example:
        >>> import jax.numpy as jnp
        >>> gauss_newton_times(lambda w, x: x * w[None], jnp.zeros(2), jnp.asarray([[1.0, 3.0]]),
        ...                    jnp.ones((1, 1)), jnp.ones(1)).tolist()
        [[-0.5, 0.5]]
    """
    logits, forward = jax.linearize(lambda p: logits_fn(p, inputs), params)
    backward = jax.linear_transpose(forward, params)
    probabilities = jax.nn.softmax(logits)

    def product(direction: PyTree) -> PyTree:
        tangents = forward(direction)
        means = jnp.sum(probabilities * tangents, axis=-1, keepdims=True)
        return backward(weights[:, None] * probabilities * (tangents - means))[0]

    return jax.lax.map(product, directions)
