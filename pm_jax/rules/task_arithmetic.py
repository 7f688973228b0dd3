"""Task arithmetic: the sum of all task vectors."""

import jax
import jax.numpy as jnp

from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_running_task_vector, require


def task_arithmetic(*, scale: float = 0.3) -> MergeRule:
    """Move the pre-trained model by the scaled sum of all task vectors.

        theta_hat_t = theta_0 + scale sum_{i<=t} (theta_i* - theta_0)

    Tasks are trained one after the other; merging is for inference.

    Args:
        scale: of every task vector, above 0; it does not fall with the number of tasks.

    Returns:
        A `MergeRule` that needs no evidence.

    Raises:
        ValueError: scale out of range.

    References:
        Ilharco et al., `Editing Models with Task Arithmetic
        <https://arxiv.org/abs/2212.04089>`_, ICLR 2023

    Example:
        >>> rule = task_arithmetic(scale=0.5)
        >>> state = rule.init(jnp.zeros(1))
        >>> for trained in (1.0, 3.0):
        ...     trained = jnp.full(1, trained)
        ...     merged, state, _ = rule.update(state, previous=None, trained=trained)
        >>> merged.tolist()
        [2.0]
    """
    require("scale", scale, scale > 0, "above 0")

    def add(old, new, tasks, key):
        del tasks, key
        return jax.tree.map(jnp.add, old, new)

    return merge_running_task_vector(add, scale)
