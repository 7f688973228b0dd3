import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax.classifiers import drift


def test_the_size_of_a_drift_is_its_square_over_the_scatter_however_it_is_batched():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 33, 4)) + [[[5.0]], [[2.0]]]
    wanted = np.sum((after - before) ** 2) / np.sum((before - before.mean(axis=0)) ** 2)
    state = drift.init(4)
    for rows in (slice(0, 7), slice(7, 32), slice(32, 33)):
        given = (jnp.asarray(x[rows], jnp.float32) for x in (before, after))
        state = drift.observe(state, *given, jnp.ones(len(before[rows])))
    assert float(drift.size(state)) == pytest.approx(wanted, rel=1e-5)


def test_what_does_not_move_has_no_drift_and_equal_features_no_scatter():
    features = jnp.arange(12.0).reshape(6, 2)
    assert float(drift.size(drift.observe(drift.init(2), features, features, jnp.ones(6)))) == 0
    equal = jnp.ones((6, 2))
    assert float(drift.size(drift.observe(drift.init(2), equal, features, jnp.ones(6)))) == 0
