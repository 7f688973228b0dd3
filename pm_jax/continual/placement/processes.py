"""A run in several processes, each with its own devices: what they agree on, and which one writes.

All of them run the same program and see the same work directory; the first one writes into it. With
one process, everything here does nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def several() -> bool:
    """Whether there are other processes.

    Returns:
        A Python bool.

    Example:
        >>> several()
        False
    """
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes.

    Returns:
        A Python bool.

    Example:
        >>> is_first()
        True
    """
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """A number that processes may have different ones of: that of the first.

    Args:
        number: from 0 to 2**31 - 1.

    Returns:
        The same in all.

    Example:
        >>> agreed(3)
        3
    """
    if not several():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number, np.int32)))


def largest(number: int) -> int:
    """The largest of the numbers that processes have.

    Args:
        number: from 0 to 2**31 - 1.

    Returns:
        The same in all.

    Example:
        >>> largest(3)
        3
    """
    if not several():
        return number
    return int(jnp.max(multihost_utils.process_allgather(np.asarray(number, np.int32))))


def wait_for_all(name: str) -> None:
    """Wait until every process is here.

    Args:
        name: of the place, for messages.

    Example:
        >>> wait_for_all("the end")
    """
    if several():
        multihost_utils.sync_global_devices(name)
