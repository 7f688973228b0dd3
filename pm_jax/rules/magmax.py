"""MagMax: every entry comes from the task vector with the largest magnitude there."""

import jax
import jax.numpy as jnp

from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_running_task_vector
from pm_jax.types import require


def magmax(*, scale: float = 0.5) -> MergeRule:
    """Move the pre-trained model by the entries of largest magnitude among all task vectors.

        theta_hat_t = theta_0 + scale tau,   tau[p] = tau_k[p],   k = argmax_i |tau_i[p]|

    with `tau_i = theta_i* - theta_0`; of equal magnitudes the later task's counts. The state is the
    running tau, not a list.

    Args:
        scale: coefficient of the merged task vector, above 0.

    Returns:
        A `MergeRule` that needs no evidence; the next task starts from the trained model.

    Raises:
        ValueError: scale out of range.

    References:
        Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual Learning
        <https://arxiv.org/abs/2407.06322>`_, ECCV 2024; tie order and scale as in its code

    Example:
        >>> rule = magmax(scale=1.0)
        >>> state = rule.init(jnp.zeros(2))
        >>> for trained in (jnp.asarray([3.0, 1.0]), jnp.asarray([-3.0, -0.5])):
        ...     merged, state, _ = rule.update(state, previous=None, trained=trained)
        >>> merged.tolist()
        [-3.0, 1.0]
    """
    require("scale", scale, scale > 0, "above 0")

    def larger(old, new, *_):
        # At least, not above: of equal magnitudes the later task's entry wins.
        return jax.tree.map(lambda a, b: jnp.where(jnp.abs(b) >= jnp.abs(a), b, a), old, new)

    return merge_running_task_vector(larger, scale)
