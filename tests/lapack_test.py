import jax
import jax.numpy as jnp
import pytest
import threadpoolctl

import pm_jax
from pm_jax import lapack, rules
from pm_jax.continual import Learner
from tests.small_runs import QUIET, SMALL


def threads():
    info = threadpoolctl.threadpool_info()
    return {library["num_threads"] for library in info if library["user_api"] == "blas"}


@pytest.fixture
def several():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        yield
        assert threads() == {2}


def test_lapack_has_one_thread_in_a_block_and_all_of_them_afterwards(several):
    jax.block_until_ready(jnp.linalg.svd(jnp.eye(2)))
    with lapack.one_thread():
        assert threads() == {1}
    with pytest.raises(KeyError), lapack.one_thread():
        raise KeyError
    assert threads() == {2}


def test_runs_and_mergers_decompose_on_one_thread(several, monkeypatch):
    found = []
    learner = Learner(SMALL, 0, options=QUIET)
    monkeypatch.setattr(learner, "_run", lambda checkpoints: found.append(threads()) or {})
    learner.run()
    merge = rules.averaging()
    seen = merge._replace(update=lambda *x, **y: found.append(threads()) or merge.update(*x, **y))
    merger, params = pm_jax.merger(seen), {"w": jnp.ones(2)}
    merger.finish_task(merger.init(params), {"w": jnp.zeros(2)})
    assert found == [{1}, {1}]
