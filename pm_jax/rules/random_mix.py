"""Random mix: every entry comes from the task vector of a random task."""

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.rules.base import MergeRule
from pm_jax.rules.building import merge_running_task_vector
from pm_jax.types import require


def random_mix(*, scale: float = 1.0) -> MergeRule:
    """Move the pre-trained model by entries of task vectors, each of a random task.

    The task vector of task t replaces the kept one with probability 1/t, drawn entry by entry, so
    that every task seen has the same chance.

    Args:
        scale: coefficient of the merged task vector, above 0.

    Returns:
        A `MergeRule` that needs `key`; the next task starts from the trained model.

    Raises:
        ValueError: scale out of range.

    References:
        Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual Learning
        <https://arxiv.org/abs/2407.06322>`_, ECCV 2024, a baseline there

    Example:
        >>> random_mix().needs.evidence, random_mix().needs.next_task_from
        (frozenset({'key'}), 'trained')
    """
    require("scale", scale, scale > 0, "above 0")

    def mixed(old, new, tasks, key):
        def leaf(leaf_key, a, b):
            return jnp.where(jax.random.bernoulli(leaf_key, 1 / tasks, a.shape), b, a)

        # A key folded from the leaf's path, so that a leaf's draws do not depend on the others.
        return jax.tree.map(leaf, trees.leaf_keys(key, old), old, new)

    return merge_running_task_vector(mixed, scale, frozenset({"key"}))
