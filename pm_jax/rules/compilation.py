"""Compiling a merge so that it needs little memory beyond what it is given."""

from collections.abc import Callable
from typing import Any

import jax


def jit_merge(update: Callable[..., Any]) -> jax.stages.Wrapped:
    """Compiles a function that takes a rule's state to the next one.

    The buffers of the state that it is given are donated, so that state cannot be used again. To be
    written into without a copy, the next state must be the first of the results.

    Args:
        update: pure function `(state, ...) -> (next state, ...)`.

    Returns:
        The compiled function, for the default backend.

    Example:
        >>> import jax.numpy as jnp
        >>> from pm_jax import rules
        >>> rule = rules.averaging()
        >>> @jit_merge
        ... def merge(state, previous, trained):
        ...     merged, state, info = rule.update(state, previous=previous, trained=trained)
        ...     return state, merged
        >>> state, merged = merge(rule.init(jnp.zeros(1)), jnp.zeros(1), jnp.ones(1))
        >>> merged.tolist()
        [1.0]
    """
    options = None
    if jax.default_backend() == "cpu":
        # XLA's usual schedule for CPUs begins with all leaves at once; this one ends each in turn.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return jax.jit(update, donate_argnums=0, compiler_options=options)
