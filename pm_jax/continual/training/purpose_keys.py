"""Keys of random numbers: one for each purpose and place in the stream."""

import jax
from jax.typing import ArrayLike

from pm_jax.types import Key

# The order is part of every saved run: another one would change all random numbers.
INITIALIZE, ADAPTERS, SHUFFLE, STEP, CURVATURE, AUGMENT, MERGE, EXAMPLES, REFRESH = range(9)
MODEL, STATISTICS, CLASSIFIERS = 9, 10, 11


def purpose_key(key: Key, purpose: int, *counters: ArrayLike) -> Key:
    """Fold a purpose, and counters such as task, epoch or step, into the run's key."""
    for value in (purpose, *counters):
        key = jax.random.fold_in(key, value)
    return key
