"""Task arithmetic: the sum of all task vectors."""

import jax
import jax.numpy as jnp

from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_running_task_vector
from pm_jax.types import require


def task_arithmetic(*, scale: float = 0.3) -> MergeRule:
    """Move the pre-trained model by the scaled sum of all task vectors.

        theta_hat_t = theta_0 + scale sum_{i<=t} (theta_i* - theta_0)

    Args:
        scale: coefficient of every task vector, above 0; it does not fall with the number of tasks.

    Returns:
        A `MergeRule` that needs no evidence; the next task starts from the trained model.

    Raises:
        ValueError: scale out of range.

    References:
        Ilharco et al., `Editing Models with Task Arithmetic
        <https://arxiv.org/abs/2212.04089>`_, ICLR 2023

    Example:
        >>> rule = task_arithmetic(scale=0.5)
        >>> state = rule.init(jnp.zeros(1))
        >>> for trained in (jnp.full(1, 1.0), jnp.full(1, 3.0)):
        ...     merged, state, _ = rule.update(state, previous=None, trained=trained)
        >>> merged.tolist()
        [2.0]
    """
    require("scale", scale, scale > 0, "above 0")
    return merge_running_task_vector(lambda old, new, *_: jax.tree.map(jnp.add, old, new), scale)
