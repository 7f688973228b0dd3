"""Task arithmetic: the sum of all task vectors."""

import jax
import jax.numpy as jnp

from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_running_task_vector, weight_of
from pm_jax.types import Array, Key, PyTree, require


def task_arithmetic(*, scale: float = 0.3, model_weights: tuple[float, ...] = ()) -> MergeRule:
    """Move the pre-trained model by the scaled sum of all task vectors.

        theta_hat_t = theta_0 + scale sum_{i<=t} w_i (theta_i* - theta_0)

    Args:
        scale: coefficient of every task vector, above 0; it does not fall with the number of tasks.
        model_weights: w, one for each task; a weight below 0 takes a task away. Empty for ones.

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

    def accumulate(old: PyTree, new: PyTree, tasks: Array, key: Key | None) -> PyTree:
        del key
        if not model_weights:
            return jax.tree.map(jnp.add, old, new)
        weight = weight_of(model_weights, tasks)
        return jax.tree.map(lambda x, y: x + weight.astype(y.dtype) * y, old, new)

    return merge_running_task_vector(accumulate, scale)
