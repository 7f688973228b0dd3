"""How the hook of a merge rule takes part in training; nothing happens without one."""

import functools

import jax
import jax.numpy as jnp
import optax

from pm_jax.continual.training.partition import Trainable
from pm_jax.continual.training.snapshots import snapshot_step
from pm_jax.rules import TrainingHook
from pm_jax.types import Array, Key, PyTree


def at_onset(hook: TrainingHook | None, rule_state: PyTree, trainable: Trainable) -> Trainable:
    """Let the hook change the trainable leaves before the first step of a task."""
    if hook is None or hook.onset is None:
        return trainable
    return trainable.moved(hook.onset(rule_state, trainable.moving))


def projected(
    hook: TrainingHook | None, rule_state: PyTree, changes: Trainable, takes_part: Array
) -> Trainable:
    """Project gradients or updates by the hook where `takes_part` (a scalar) is above 0."""
    if hook is None or hook.project is None:
        return changes
    # A cond, as the same compiled step serves before and after `project_until`.
    project = functools.partial(hook.project, rule_state)
    return changes.moved(jax.lax.cond(takes_part > 0, project, lambda same: same, changes.moving))


def refreshed(
    hook: TrainingHook | None,
    optimizer: optax.GradientTransformation,
    key: Key,
    trainable: Trainable,
    optimizer_state: PyTree,
    rule_state: PyTree,
) -> tuple[Trainable, PyTree]:
    """Refresh the trainable leaves by the hook, and zero the moments of all renewed entries."""
    assert hook and hook.refresh
    moving, renewed = hook.refresh(rule_state, key, trainable.moving)
    # The optimiser also has moments of the head, which no hook renews.
    head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), trainable.head)
    cleared = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, anew: jnp.where(anew, jnp.zeros_like(moment), moment),
        optimizer_state,
        trainable._replace(head=head).moved(renewed),
    )
    return trainable.moved(moving), cleared


def projects(hook: TrainingHook | None, step: int, total: int) -> bool:
    """Tell whether the hook projects at a step of a task, counted from 0."""
    return hook is not None and step < snapshot_step(hook.project_until, total)


def refreshes(hook: TrainingHook | None, step: int, per_epoch: int, epochs: int) -> bool:
    """Tell whether the hook refreshes after `step` steps: between epochs, not at the task's end."""
    if hook is None or hook.refresh is None or step == epochs * per_epoch:
        return False
    return step % (per_epoch * hook.refresh_every) == 0
