"""Checkpoints that are written while the run goes on, and how many of them are kept."""

import contextlib
import errno
import functools
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax.continual import Learner, RunOptions, interruption
from pm_jax.continual.interruption import Interrupted, StopRequests
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.types import InvalidInput
from tests.continual.stop_requests_test import asked_to_end
from tests.small_runs import QUIET, SMALL, comparable, leaves_equal

TREE = {"w": jnp.arange(3.0)}


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def covered_steps(directory):
    """Steps that the manifest speaks of, all of whose files are as it says."""
    files = manifest.read_or_empty(directory).files
    assert manifest.damage(directory, files) == []
    return sorted({int(name.split("/")[0]) for name in files})


def test_what_is_saved_is_what_was_there_though_it_is_donated_and_overwritten(tmp_path):
    """On a CPU, Orbax writes from the very buffers: donating them has to make new ones."""
    size = 4_000_000
    device, host = jnp.arange(size, dtype=jnp.float32), np.arange(size, dtype=np.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(x):
        return -x

    with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, {"device": device, "host": host})
            wanted = {"device": np.abs(np.array(device)), "host": host.copy()}
            for _ in range(2):
                device = step(device)
            device.block_until_ready()
            host += 1
            found = checkpoints.restore(number, wanted)
            assert leaves_equal(found, wanted)


def test_the_manifest_speaks_of_a_checkpoint_once_it_is_whole(tmp_path):
    with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
        for step, before in [(1, []), (2, [1]), (3, [1, 2]), (4, [2, 3])]:
            checkpoints.save(step, TREE)
            assert covered_steps(tmp_path) == before
    assert covered_steps(tmp_path) == steps_in(tmp_path) == [3, 4]


def test_of_a_kill_after_writing_a_whole_checkpoint_is_left(tmp_path):
    with Checkpoints(tmp_path / "run", asynchronous=True) as checkpoints:
        checkpoints.save(1, TREE)
        checkpoints.save(2, TREE)
        checkpoints._manager.wait_until_finished()
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
    assert covered_steps(tmp_path / "killed") == [1]
    with Checkpoints(tmp_path / "killed", asynchronous=True) as checkpoints:
        step, tree, warnings = checkpoints.newest(lambda step: checkpoints.restore(step, TREE))
    assert (step, warnings) == (2, []) and leaves_equal(tree, TREE)
    assert covered_steps(tmp_path / "killed") == [1, 2]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_asked_for(keep, tmp_path):
    with Checkpoints(tmp_path, keep, asynchronous=True) as checkpoints:
        for step in range(5):
            checkpoints.save(step, TREE)
    with Checkpoints(tmp_path, keep) as checkpoints:
        assert checkpoints.latest() == 4
    assert covered_steps(tmp_path) == steps_in(tmp_path) == list(range(5 - keep, 5))


def test_none_kept_is_refused_before_anything_is_made():
    with pytest.raises(InvalidInput, match="keep_checkpoints=0: must be at least 1"):
        RunOptions(keep_checkpoints=0)


@contextlib.contextmanager
def no_large_files():
    """As a disk that is full: what is written past 100 kB of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LARGE = {"w": np.random.default_rng(0).normal(size=100_000)}


def test_a_failure_beside_the_run_is_raised_by_the_next_save(tmp_path):
    with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
        checkpoints.save(1, LARGE)
        checkpoints.finish()
        with no_large_files():
            checkpoints.save(2, LARGE)
            with pytest.raises(OSError) as caught:
                checkpoints.save(3, TREE)
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "2")
        assert covered_steps(tmp_path) == steps_in(tmp_path) == [1]
        checkpoints.save(4, LARGE)  # there is room again
    assert covered_steps(tmp_path) == steps_in(tmp_path) == [1, 4]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failure_of_the_last_save_is_raised_at_the_end(asynchronous, tmp_path):
    with no_large_files(), pytest.raises(OSError, match="File too large"):
        with Checkpoints(tmp_path, asynchronous=asynchronous) as checkpoints:
            checkpoints.save(1, LARGE)
            assert asynchronous
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(lambda step: step) == (0, None, [])
    assert [path.name for path in tmp_path.iterdir()] == [manifest.FILE]


@pytest.mark.slow
def test_a_run_whose_save_fails_ends_and_goes_on_once_there_is_room(tmp_path):
    straight = Learner(SMALL, 0, options=QUIET)
    wanted = straight.run()
    learner = Learner(SMALL, 0, tmp_path, RunOptions(checkpoint_every=10, quiet=True))
    merge, merged = learner.merging.merge, []

    def failing_save(*arguments):
        merged.append(1)
        if len(merged) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        return merge(*arguments)

    learner.merging.merge = failing_save
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as caught:
            learner.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    again = Learner(
        SMALL, 0, tmp_path, RunOptions(checkpoint_every=10, keep_checkpoints=1, quiet=True)
    )
    assert comparable(again.run()) == comparable(wanted)
    assert leaves_equal(again.params, straight.params)
    assert covered_steps(tmp_path / "checkpoints") == [straight.total_steps]


def test_a_request_to_end_waits_for_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "SECONDS", 0.0)  # one step at a time
    with StopRequests() as stop, pytest.raises(Interrupted) as caught:
        asked_to_end(Learner(SMALL, 0, tmp_path, RunOptions(quiet=True, stop=stop)), 3).run()
    assert caught.value.signal_number == signal.SIGTERM
    assert covered_steps(tmp_path / "checkpoints") == [3]
