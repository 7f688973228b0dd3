"""Keys of random numbers: one for each purpose and place in the stream."""

import jax
from jax.typing import ArrayLike

from pm_jax.types import Key

# Each is folded into the run's key first.
INITIALIZE, ADAPTERS, SHUFFLE, STEP, CURVATURE, AUGMENT, MERGE, EXAMPLES, REFRESH = range(9)


def purpose_key(key: Key, purpose: int, *counters: ArrayLike) -> Key:
    """The key of one purpose and place in the stream, by `fold_in`.

    Args:
        key: of the run.
        purpose: one of the constants of this module.
        *counters: task, epoch or step.

    Returns:
        A PRNG key.

    Example:
        >>> key = jax.random.key(0)
        >>> bool(purpose_key(key, STEP, 1) == purpose_key(key, STEP, 2))
        False
    """
    for value in (purpose, *counters):
        key = jax.random.fold_in(key, value)
    return key
