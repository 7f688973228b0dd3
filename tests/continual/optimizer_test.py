import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax.continual import Config
from pm_jax.continual.training import optimizer
from pm_jax.continual.training.partition import Trainable


@pytest.mark.parametrize(
    "settings,progress,wanted",
    [
        ({"schedule": "constant"}, [0.0, 0.5, 0.99], [1, 1, 1]),
        ({"schedule": "cosine"}, [0.0, 0.5, 0.75], [1, 0.5, 0.5 * (1 - 0.5**0.5)]),
        ({"schedule": "linear"}, [0.0, 0.25, 0.9], [1, 0.75, 0.1]),
        ({"schedule": "milestones"}, [0.0, 0.49, 0.51, 0.79, 0.81], [1, 1, 0.1, 0.1, 0.01]),
        ({"schedule": "linear", "warmup_fraction": 0.2}, [0.0, 0.1, 0.2, 0.6], [0, 0.5, 1, 0.5]),
        (
            {"schedule": "milestones", "warmup_fraction": 0.1},
            [0.05, 0.3, 0.49, 0.51, 0.81],
            [0.5, 1, 1, 0.1, 0.01],
        ),
    ],
)
def test_schedules_over_a_task(settings, progress, wanted):
    rate = optimizer.schedule(Config(**settings))
    found = [float(rate(jnp.asarray(p, jnp.float32))) for p in progress]
    # The schedule is read at a resolution of 1e-4 of the task.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_rates_of_classifier_and_body_and_columns_of_other_tasks():
    config = Config(learning_rate=0.5, head_learning_rate=0.25)
    updates = Trainable(
        {"k": jnp.ones(1)},
        {"fc/bias": jnp.ones(1), "head/bias": jnp.ones(2)},
        {"head/kernel": jnp.asarray([[1.0, jnp.inf]])},
    )
    mask = jnp.asarray([True, False])
    found = optimizer.scaled(config, updates, jnp.asarray(0.5), mask)
    assert float(found.adapters["k"][0]) == 0.25 and float(found.direct["fc/bias"][0]) == 0.25
    assert found.direct["head/bias"].tolist() == [0.125, 0.125]
    assert found.head["head/kernel"].tolist() == [[0.125, 0.0]]
    same = optimizer.scaled(
        dataclasses.replace(config, head_learning_rate=0.0), updates, jnp.asarray(1.0), mask
    )
    assert same.head["head/kernel"].tolist() == [[0.5, 0.0]]
