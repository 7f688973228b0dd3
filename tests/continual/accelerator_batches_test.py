"""Numbers of examples that accelerators take at a time, and that no result depends on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.workloads import VIT, Workload
from pm_jax.continual.merging.evaluation import scores_batch

SMALL = dataclasses.replace(
    VIT, patch_size=8, width=16, num_heads=2, depth=1, lora_rank=2, curvature_memory_mb=0.008
)  # room for the gradients of three examples, or of seven of one kernel


def test_more_examples_are_scored_at_a_time(monkeypatch):
    assert [scores_batch(size) for size in (32, 256)] == [256, 256]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [scores_batch(size) for size in (32, 256)] == [256, 1024]


@pytest.mark.slow
def test_curvature_takes_as_many_as_a_step_and_one_leaf_have_room_for(monkeypatch):
    found, sizes = {}, {}
    for backend in ("cpu", "gpu"):
        # Another seed of the cache of programs, which does not know of backends.
        config = dataclasses.replace(SMALL, num_tasks=2 if backend == "cpu" else 3)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda name=backend: name)
            work = Workload(config, (16, 16, 3), 40)
        sizes[backend] = work.run.evidence_pass.batches.size
        found[backend] = jax.tree.map(np.asarray, work.fisher())
    assert sizes == {"cpu": 3, "gpu": 7}
    cpu, gpu = (evidence.quadratic.curvature.diagonal for evidence in found.values())
    for a, b in zip(jax.tree.leaves(cpu), jax.tree.leaves(gpu), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.max(a)))
