import dataclasses
import sys

import jax
import numpy as np
import pytest

from pm_jax.continual import Learner, RunOptions
from pm_jax.continual.placement.data import HostData, place_stream
from pm_jax.continual.placement.data_pass import Batches
from pm_jax.types import InvalidInput
from tests.small_runs import (
    BY_CLASS,
    QUIET,
    VIT,
    comparable,
    different_programs,
    forget_programs,
    leaves_equal,
)

grain = pytest.importorskip("grain", reason="needs the extra 'streaming'")

BUDGET_MB = 0.025  # of 0.115: a window of 8 kB, two batches of 64 images of 64 bytes
AUGMENTED = dataclasses.replace(
    BY_CLASS, augmentation="crop_flip", accumulation_steps=2, curvature_examples=100
)


@different_programs
@pytest.mark.parametrize("config", [AUGMENTED, VIT], ids=["augmented", "lora"])
def test_a_streamed_run_has_the_numbers_of_a_resident_one(config):
    resident = Learner(config, 0, options=RunOptions(checkpoint_every=5, quiet=True))
    wanted = resident.run()
    forget_programs()
    small = dataclasses.replace(config, resident_mb=BUDGET_MB)
    streamed = Learner(small, 0, options=RunOptions(checkpoint_every=5, quiet=True))
    assert isinstance(streamed.training_data, HostData)
    assert comparable(streamed.run()) == comparable(wanted)
    assert leaves_equal(streamed.params, resident.params)
    assert leaves_equal(streamed.state.rule, resident.state.rule)
    run = streamed.programs
    for function in (
        run.training.first.train,
        run.training.first.order,
        run.training.later.train,
        run.evidence_pass.window,
        run.training.mean_loss.window,
        run.training.scores.window,
    ):
        assert function._cache_size() == 1
    assert not run.evidence_pass.resident._cache_size()


def test_stretches_bring_the_examples_of_a_pass_in_its_order():
    config = dataclasses.replace(BY_CLASS, resident_mb=BUDGET_MB)
    stream = config.task_stream(0)
    data = place_stream(config, stream, stream.test)
    rows = np.random.default_rng(0).permutation(len(stream.labels))[:1000].astype(np.int32)
    pieces = list(Batches(data.devices, 64).windows(data, lambda _: rows, 3, 16))
    assert [piece[:2] for piece in pieces] == [(n, min(n + 2, 16)) for n in range(3, 16, 2)]
    for first, stop, part in pieces:
        assert part.inputs.values.nbytes <= data.window_bytes
        for step in range(first, stop):
            places = np.arange(64 * step, 64 * (step + 1))
            wanted = stream.inputs[rows[np.minimum(places, 999)]]
            assert np.array_equal(part.take(data.devices, None, places), wanted)
    # No larger than the pass.
    (piece,) = Batches(data.devices, 8).windows(data, lambda _: rows[:10], 0, 2)
    assert piece[2].inputs.values.shape[:2] == (2, 8)


def test_the_budget_decides_and_by_default_the_devices_memory(monkeypatch):
    stream = BY_CLASS.task_stream(0)

    def kind(budget):
        config = dataclasses.replace(BY_CLASS, resident_mb=budget)
        return type(place_stream(config, stream, stream.train)).__name__

    size = stream.inputs.nbytes / 1e6
    assert kind(0.0) == "DeviceData"  # a CPU does not say
    assert kind(size) == "DeviceData" and kind(0.99 * size) == "HostData"

    class Device:
        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    for limit, wanted in ((2e6 * size, "DeviceData"), (1.9e6 * size, "HostData")):
        monkeypatch.setattr(jax, "local_devices", lambda limit=limit: [Device(limit)])
        assert kind(0.0) == wanted


def test_without_the_loader_a_budget_that_is_too_small_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    config = dataclasses.replace(BY_CLASS, resident_mb=BUDGET_MB)
    with pytest.raises(InvalidInput, match=r"resident_mb=0\.025: .*pip install 'pm_jax\[stream"):
        Learner(config, 0, options=QUIET)
