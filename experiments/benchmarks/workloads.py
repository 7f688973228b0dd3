"""Calls that the benchmarks time: the compiled functions of a run on one task of random images."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.continual import Config
from pm_jax.continual.merging.programs import StreamShape, programs_of
from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.data import DeviceData
from pm_jax.continual.training.task_program import Segment

VIT = Config(
    model="vit", patch_size=16, width=192, num_heads=3, adapter="lora", scenario="class_incremental"
)
"""A ViT-Ti/16 with adapters."""


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Measure the median seconds of each candidate, in turns after one warm-up call."""
    for call in candidates.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            clock = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_data(shape: tuple[int, ...], examples: int, num_classes: int = 10) -> DeviceData:
    """Make two tasks of the same random images; timings use the second, which is perturbed."""
    rng = np.random.default_rng(0)
    return DeviceData(
        jnp.asarray(rng.integers(256, size=(examples, *shape), dtype=np.uint8)),
        jnp.asarray(rng.integers(num_classes, size=examples), jnp.int32),
        jnp.tile(jnp.arange(examples, dtype=jnp.int32)[None], (2, 1)),
        jnp.full(2, examples, jnp.int32),
        jnp.ones((2, num_classes), bool),
    )


class Workload:
    """Calls on one task of random images, which are the real, compiled functions of a run.

    If the run has adapters, the calls train what trains after the first task.
    """

    def __init__(self, config: Config, shape: tuple[int, ...], examples: int):
        self.config, self.data = config, random_data(shape, examples)
        self._build = lambda settings: programs_of(settings, StreamShape(10, shape, examples, 10))
        self.run, self.key = self._build(config), jax.random.key(0)
        self.task = number(1)
        self.params = self.run.training.init(self.key)
        self.trained = self.run.training.trained(
            self.params, self.run.training.later.begin(self.key, self.params, self.task)[0]
        )

    def epoch(self, perturbation: str = "symmetric") -> Callable[[], object]:
        """One epoch of training, going on from where the last call ended."""
        program = self._build(
            dataclasses.replace(self.config, perturbation=perturbation)
        ).training.later
        state = list(program.begin(self.key, self.params, self.task))
        segment = Segment.of(1, 0, 0, 1_000_000, 1)

        def call():
            *state[:], losses = program.train(self.key, *state, self.params, self.data, segment)
            return losses

        return call

    def fisher(self) -> object:
        """Curvature of all kernels that merge, on all examples."""
        return self.run.evidence(self.data, self.key, self.trained, self.params, self.task)

    def merging(self) -> Callable[[], object]:
        """The merge of the task, again and again, with what `fisher` finds."""
        evidence = self.fisher()
        leaves = trees.select(self.params, self.run.merging)
        # Copies, because the merge donates its state.
        state = self.config.merge_rule.init(jax.tree.map(jnp.copy, leaves))

        def call():
            nonlocal state
            state, merged, _ = self.run.merge(state, self.params, self.trained, evidence)
            return merged

        return call

    def accuracy(self) -> object:
        """Evaluation of the task's examples, twice: there are two tasks with the same ones."""
        return self.run.training.scores(self.data, self.params, jnp.ones(10, bool), number(2))
