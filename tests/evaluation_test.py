import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import curvature, losses, measures, trees
from pm_jax.continual import Learner, training
from pm_jax.continual.evaluation import accuracy_fn, mean_loss_fn
from pm_jax.types import Batch
from tests.small_runs import BY_CLASS, SMALL, VIT


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        BY_CLASS,
        VIT,
        dataclasses.replace(SMALL, temperature=3.0),
        dataclasses.replace(BY_CLASS, curvature="exact_current", temperature=3.0),
    ],
    ids=["domain", "class", "lora", "temperature", "exact"],
)
def test_evidence_is_the_curvature_of_the_tasks_own_loss_over_dense_weights(config):
    config = dataclasses.replace(config, curvature_memory_mb=0.05)
    learner = Learner(config, seed=0, quiet=True)
    run, stream = learner._programs, learner.stream
    previous = learner.params
    trained = jax.tree.map(lambda x: x + 0.01 * jnp.ones_like(x), previous)
    task = 1
    got = run.measure(learner._key, trained, previous, learner._train, np.asarray(task, np.int32))
    rows = stream.train.rows()[task]
    leaves = trees.select(trained, run.merging)
    model, mask = config.network(10), jnp.asarray(stream.class_masks[task])

    def logits_fn(leaves, inputs):
        logits = training.logits_of(model, trees.replace(trained, leaves), inputs, mask)
        return jnp.where(mask[None, :], logits / config.temperature, -1e30)

    measure = functools.partial(
        measures.measure_all,
        params=leaves,
        examples=Batch(jnp.asarray(stream.inputs[rows]), jnp.asarray(stream.labels[rows])),
        batch_size=50,
        direction=jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), leaves),
    )
    exact = config.curvature == "exact_current"
    empirical = curvature.fisher_empirical(losses.cross_entropy(logits_fn))
    direct = measure(curvature.fisher_exact(logits_fn) if exact else empirical)
    for a, b in zip(jax.tree.leaves(got.quadratic.diagonal),
                    jax.tree.leaves(direct.quadratic.diagonal), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    along = measure(curvature.gauss_newton(logits_fn)) if exact else direct
    np.testing.assert_allclose(got.curvature_error, along.standard_error, rtol=1e-4)
    assert exact or got.curvature_along is None
    if exact:
        np.testing.assert_allclose(got.curvature_along, along.along, rtol=1e-4)
        assert abs(float(direct.along / along.along) - 1) > 0.1


def test_accuracy_and_loss_do_not_depend_on_the_batch_size_and_count_every_example():
    learner = Learner(BY_CLASS, seed=0, quiet=True)
    model, stream = BY_CLASS.network(10), learner.stream
    seen = stream.class_masks[:2].any(axis=0)
    found = [
        np.asarray(accuracy_fn(model, size)(learner.params, learner._held_out, seen, 2))
        for size in (1, 7, 256)
    ]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])
    assert (found[0][:, 2:] == 0).all()
    for task, rows in enumerate(stream.test.rows()[:2]):
        logits = np.array(training.logits_of(
            model, learner.params, jnp.asarray(stream.inputs[rows]), jnp.ones(10)))  # fmt: skip
        for row, mask in enumerate((seen, stream.class_masks[task])):
            guess = np.where(mask, logits, -np.inf).argmax(axis=1)
            wanted = np.mean(guess == stream.labels[rows])
            np.testing.assert_allclose(found[0][row, task], wanted, rtol=1e-6)
    losses_found = [
        float(mean_loss_fn(model, size)(learner.params, learner._train, np.asarray(1, np.int32)))
        for size in (1, 50, 1000)
    ]
    np.testing.assert_allclose(losses_found, losses_found[0], rtol=1e-5)
