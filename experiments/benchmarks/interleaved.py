"""What the benchmarks share: timing in turns, and data that mean nothing."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.continual import Config
from pm_jax.continual.training import DeviceData


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate, measured in turns after one warm-up call."""
    for call in candidates.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            clock = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_data(config: Config, shape: tuple[int, ...], examples: int) -> DeviceData:
    """One task of random images after another that is empty of meaning: task 1 is perturbed."""
    rng = np.random.default_rng(0)
    return DeviceData(
        jnp.asarray(rng.integers(256, size=(examples, *shape)), jnp.uint8),
        jnp.asarray(rng.integers(10, size=examples), jnp.int32),
        jnp.tile(jnp.arange(examples, dtype=jnp.int32)[None], (2, 1)),
        jnp.full(2, examples, jnp.int32),
        jnp.ones((2, 10), bool),
    )
