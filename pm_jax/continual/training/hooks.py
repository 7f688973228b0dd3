"""How the hook of a merge rule takes part in training; nothing happens without one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pm_jax.continual.placement.devices import Devices
from pm_jax.continual.training.partition import Trainable
from pm_jax.continual.training.purpose_keys import REFRESH, purpose_key
from pm_jax.continual.training.snapshots import snapshot_step
from pm_jax.rules import TrainingHook
from pm_jax.types import Array, Key, PyTree


def at_onset(hook: TrainingHook | None, rule_state: PyTree, trainable: Trainable) -> Trainable:
    """What trains, as the hook wants it before the first step of a task.

    Args:
        hook: of the merge rule.
        rule_state: of the merge rule.
        trainable: fresh.

    Returns:
        The same structure.

    Example:
        >>> at_onset(None, None, Trainable({}, {"w": 1.0}, {})).direct
        {'w': 1.0}
    """
    if hook is None or hook.onset is None:
        return trainable
    return trainable.moved(hook.onset(rule_state, trainable.moving))


def projected(
    hook: TrainingHook | None, rule_state: PyTree, changes: Trainable, takes_part: Array
) -> Trainable:
    """Gradients or updates, projected by the hook.

    Args:
        hook: of the merge rule.
        rule_state: of the merge rule.
        changes: of the structure of what trains.
        takes_part: scalar, above 0 where the hook projects (see `projects`).

    Returns:
        The same structure.

    Example:
        >>> projected(None, None, Trainable({}, {"w": 1.0}, {}), jnp.asarray(1)).direct
        {'w': 1.0}
    """
    if hook is None or hook.project is None:
        return changes
    project = functools.partial(hook.project, rule_state)
    return changes.moved(jax.lax.cond(takes_part > 0, project, lambda same: same, changes.moving))


def refresh_fn(
    hook: TrainingHook | None, optimizer: optax.GradientTransformation, devices: Devices
) -> Callable[..., tuple[Trainable, PyTree]]:
    """The hook's refresh between epochs, with the optimiser's moments of what it renews cleared.

    Args:
        hook: of the merge rule.
        optimizer: whose state it is.
        devices: of the run.

    Returns:
        `refresh(key, trainable, optimizer_state, task, step, rule_state) -> (trainable,
        optimizer_state)`, with the key of the run; what it gives back is donated. It is not to be
        called without such a hook.

    Example:
        >>> refresh_fn(None, optax.sgd(0.1), Devices.of())
        <PjitFunction of <function refresh_fn.<locals>.refresh at ...>>
    """

    @functools.partial(devices.jit, donate_argnums=(1, 2))
    def refresh(
        key: Key,
        trainable: Trainable,
        optimizer_state: PyTree,
        task: Array,
        step: Array,
        rule_state: PyTree,
    ):
        assert hook and hook.refresh
        own_key = purpose_key(key, REFRESH, task, step)
        moving, renewed = hook.refresh(rule_state, own_key, trainable.moving)
        head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), trainable.head)
        cleared = optax.tree_utils.tree_map_params(
            optimizer,
            lambda moment, anew: jnp.where(anew, jnp.zeros_like(moment), moment),
            optimizer_state,
            trainable._replace(head=head).moved(renewed),
        )
        return trainable.moved(moving), cleared

    return refresh


def projects(hook: TrainingHook | None, step: int, total: int) -> bool:
    """Whether the hook projects at a step of a task.

    Args:
        hook: of the merge rule.
        step: from 0.
        total: steps of the task.

    Returns:
        A Python bool.

    Example:
        >>> [projects(TrainingHook(project_until=0.5), step, 4) for step in range(4)]
        [True, True, False, False]
    """
    return hook is not None and step < snapshot_step(hook.project_until, total)


def refreshes(hook: TrainingHook | None, step: int, per_epoch: int, epochs: int) -> bool:
    """Whether the hook refreshes after so many steps of a task: between epochs, not at the end.

    Args:
        hook: of the merge rule.
        step: steps made, from 1.
        per_epoch: steps of an epoch.
        epochs: of the task.

    Returns:
        A Python bool.

    Example:
        >>> hook = TrainingHook(refresh=lambda state, key, moving: (moving, moving))
        >>> [step for step in range(1, 7) if refreshes(hook, step, 2, 3)]
        [2, 4]
    """
    if hook is None or hook.refresh is None or step == epochs * per_epoch:
        return False
    return step % (per_epoch * hook.refresh_every) == 0
