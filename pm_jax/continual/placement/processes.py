"""A run in several processes with devices of their own: how they agree, and which one writes.

All processes run the same program and see the same work directory; the first one writes into it.
With one process, these functions do nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def several() -> bool:
    """Tell whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """Return the number that the first process has; all must call, with numbers below 2**31."""
    if not several():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number, np.int32)))


def largest(number: int) -> int:
    """Return the largest number that a process has; all must call, with numbers below 2**31."""
    if not several():
        return number
    return int(jnp.max(multihost_utils.process_allgather(np.asarray(number, np.int32))))


def wait_for_all(name: str) -> None:
    """Wait until every process has come to the place of this name."""
    if several():
        multihost_utils.sync_global_devices(name)
