"""The standard error over the examples of all tasks: groups left out one after another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import curvature, rules, task_vectors, trees
from pm_jax.coefficients import jackknife_error
from pm_jax.continual import Config, Learner
from pm_jax.continual.merging.programs import programs_of
from pm_jax.curvature import DiagonalQuadratic, kronecker, low_rank, measures
from pm_jax.curvature.measures import Measurement
from pm_jax.types import Batch, InvalidInput
from tests import oracles
from tests.coefficients_test import dense_tasks
from tests.curvature import kronecker_test
from tests.curvature.quadratics_test import random_tree
from tests.small_runs import QUIET, SMALL, slow


def measure_of(kind, logits_fn):
    match kind:
        case "fisher_exact":
            return curvature.fisher_exact(logits_fn, num_samples=1, chunk_size=2)
        case "kronecker":
            return kronecker.fisher_kronecker(logits_fn, kronecker_test.KERNELS, num_samples=1)
    return low_rank.gauss_newton_low_rank(logits_fn, rank=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fisher_exact", slow("kronecker"), slow("low_rank")])
def test_leaving_a_group_out_is_measuring_without_it(kind):
    """Against the same measure, with the same labels drawn, on examples of weight 0."""
    groups, size = 3, 11
    params, examples = kronecker_test.problem(size, 2)
    leaves = trees.leaves_by_path(params)
    directions = [jax.tree.map(lambda x, f=f: f(1.0 + x), leaves) for f in (jnp.cos, jnp.sin)]
    measure = measure_of(
        kind,
        lambda some, x: kronecker_test.outputs_of(params)(some, Batch(x, examples.labels)),
    )

    def answers(found):
        quadratic = found.quadratic
        own = found.along, found.standard_error, found.examples
        return *own, quadratic.gram(directions), quadratic.trace()

    def measured(measure, weights):
        batch = examples._replace(weights=weights)
        return measures.measure_all(measure, leaves, batch, 4, directions[0], jax.random.key(1))

    @jax.jit
    def grouped(weights):
        found = measured(measures.in_groups(measure, groups), weights)
        return answers(found), jax.lax.map(answers, found.left_out)

    whole, each = grouped(jnp.ones(size))
    plain = jax.jit(lambda weights: answers(measured(measure, weights)))
    for group in range(groups + 1):
        weights = (jnp.arange(size) % groups != group).astype(jnp.float32)
        got = whole if group == groups else [x[group] for x in each]
        for a, b in zip(got, plain(weights), strict=True):
            # Entries of a Gram matrix beside a larger diagonal.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(b))))


def merges_of(rule, tasks, previous, measure, exact=None):
    """Infos of a stream that a rule merges with groups left out, and what it merged into."""
    state, found = rule.init(previous), []

    @jax.jit
    def merge(state, previous, params, batch):
        delta = task_vectors.difference(params, previous)
        own = measures.measure_all(measure, params, batch, 5, delta)
        evidence = rules.Evidence(own.quadratic, own.standard_error, left_out=own.left_out)
        if exact:
            other = measures.measure_all(exact, params, batch, 5, delta)
            left_out = own.left_out._replace(along=other.left_out.along)
            evidence = evidence._replace(curvature_along=other.along, left_out=left_out)
        return rule.update(state, previous=previous, trained=params, evidence=evidence)

    for params, batch in tasks:
        start = previous
        previous, state, info = merge(state, start, params, batch)
        found.append((info, start))
    return found


def alpha_by_hand(vectors, matrices, own, start):
    """The paper's formula over the tasks so far; `own` is the newest one's curvature."""
    step = vectors[-1] - start
    slopes = [(v - start) @ m @ step for v, m in zip(vectors, matrices, strict=True)]
    curvatures = [step @ m @ step for m in matrices]
    slopes[-1] = curvatures[-1] = step @ own @ step
    return sum(slopes) / sum(curvatures)


@pytest.mark.slow
@pytest.mark.parametrize("exact_over_trace", [False, True])
def test_the_error_is_that_of_coefficients_without_each_group(float64, exact_over_trace):
    """Dense matrices of three tasks; the groups do not divide their numbers of examples."""
    groups, counts = 4, (13, 14, 19)
    problems = [oracles.problem(19, seed, np.float64) for seed in range(3)]
    tasks = [
        (params, batch._replace(weights=(jnp.arange(19) < count).astype(jnp.float64)))
        for (params, _, batch), count in zip(problems, counts, strict=True)
    ]
    measure = measures.in_groups(curvature.fisher_exact(oracles.network), groups)
    settings, exact = {"clip": False}, None
    if exact_over_trace:
        settings |= {"normalize": "trace"}
        exact = measures.in_groups(curvature.gauss_newton(oracles.network), groups)
    start = problems[0][1]
    found = merges_of(
        rules.perturb_and_merge(jackknife=groups, **settings), tasks, start, measure, exact
    )
    plain = merges_of(rules.perturb_and_merge(**settings), tasks, start, measure, exact)
    dense = [oracles.dense_gauss_newtons(*t)[:n] for t, n in zip(tasks, counts, strict=True)]
    vectors = [oracles.flat(params) for params, _ in tasks]
    assert float(found[0][0].figures["jackknife_error"]) == 0
    for last in (1, 2):
        info, start = found[last]
        alphas = []
        for group in range(groups):
            means = [g[np.arange(len(g)) % groups != group].mean(axis=0) for g in dense[: last + 1]]
            scales = [1 / np.trace(m) if exact_over_trace else 1.0 for m in means]
            matrices = [s * np.diag(np.diag(m)) for s, m in zip(scales, means, strict=True)]
            own = scales[-1] * means[-1] if exact_over_trace else matrices[-1]
            alphas.append(alpha_by_hand(vectors[: last + 1], matrices, own, oracles.flat(start)))
        wanted = np.sqrt((groups - 1) / groups * np.sum((alphas - np.mean(alphas)) ** 2))
        np.testing.assert_allclose(info.figures["jackknife_error"], wanted, rtol=1e-7)
        assert wanted > 1e-3
        np.testing.assert_allclose(info.alpha, plain[last][0].alpha, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kronecker", "low_rank", "input_moment"])
def test_every_memory_keeps_one_sum_for_each_group(float64, kind):
    """The coefficients are those of rules that were given one group's evidence each."""
    drawn, memory = dense_tasks(kind, np.random.default_rng(11), 6)
    origin = previous = random_tree(np.random.default_rng(12), np.float64)
    together = rules.perturb_and_merge(jackknife=2, memory=memory)
    alone = rules.perturb_and_merge(memory=memory)
    update, update_alone = jax.jit(together.update), jax.jit(alone.update)
    state, states = together.init(origin), [alone.init(origin)] * 2
    for (whole, _, star), *others in (drawn[:3], drawn[3:]):
        each = [dataclasses.replace(quadratic, center=star) for quadratic, _, _ in others]
        alphas = []
        for group, quadratic in enumerate(each):
            _, states[group], info = update_alone(
                states[group], previous=previous, trained=star, evidence=rules.Evidence(quadratic)
            )
            alphas.append(info.alpha_raw)
        nans = jnp.full(2, jnp.nan)
        left_out = Measurement(jax.tree.map(lambda *x: jnp.stack(x), *each), nans, nans, nans)
        evidence = rules.Evidence(whole, left_out=left_out)
        previous, state, info = update(state, previous=previous, trained=star, evidence=evidence)
    error = jackknife_error(jnp.stack(alphas))
    np.testing.assert_allclose(info.figures["jackknife_error"], error, rtol=1e-6)
    assert error > 1e-3


@pytest.mark.slow
def test_the_error_is_the_spread_over_resampled_data_of_all_tasks():
    """Fresh samples of three tasks' data; the error given the earlier tasks is too small."""
    groups, repeats, size = 10, 300, 120
    models = [oracles.problem(1, seed)[0] for seed in range(3)]
    middle = jax.tree.map(lambda *x: sum(x) / 3, *models)
    measure = measures.in_groups(curvature.fisher_empirical(oracles.losses), groups)
    rule = rules.perturb_and_merge(jackknife=groups, clip=False)

    @jax.jit
    def one(inputs, labels):
        state = rule.init(middle)
        for params, x, y in zip(models, inputs, labels, strict=True):
            # Every sample is merged into the same model.
            delta = task_vectors.difference(params, middle)
            found = measures.measure_all(measure, params, Batch(x, y), size, delta)
            evidence = rules.Evidence(
                found.quadratic, found.standard_error, left_out=found.left_out
            )
            _, state, info = rule.update(state, previous=middle, trained=params, evidence=evidence)
        return info.alpha_raw, info.figures["jackknife_error"], info.standard_error

    rng = np.random.default_rng(0)
    found = np.asarray([
        one(
            jnp.asarray(rng.normal(size=(3, size, oracles.FEATURES)), jnp.float32),
            jnp.asarray(rng.integers(oracles.CLASSES, size=(3, size))),
        )
        for _ in range(repeats)
    ])  # fmt: skip
    alphas, errors, of_the_last = found.T
    spread = np.std(alphas, ddof=1)
    # 300 repeats know a standard deviation to 4.1 %; three times that.
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), spread, rtol=0.125)
    assert np.mean(of_the_last) < 0.8 * spread


# In the learner.


SEVERAL_BATCHES = dataclasses.replace(SMALL, curvature_memory_mb=0.05)


@pytest.mark.slow
def test_a_run_with_a_jackknife_merges_as_without():
    config = dataclasses.replace(SEVERAL_BATCHES, rule_settings="jackknife=4")
    learner = Learner(config, 0, options=QUIET)
    found = learner.run()["merges"]
    plain = Learner(SEVERAL_BATCHES, 0, options=QUIET).run()["merges"]
    assert learner.programs.merge._cache_size() == 1
    assert found[0]["jackknife_error"] == 0 and "jackknife_error" not in plain[0]
    for merge, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(merge["alpha_raw"], other["alpha_raw"], rtol=1e-5)
        np.testing.assert_allclose(merge["standard_error"], other["standard_error"], rtol=1e-4)
        assert merge is found[0] or 0 < merge["jackknife_error"] < 1
    programs_of.cache_clear()


def test_groups_are_even_on_as_many_examples_as_an_error_takes():
    config = dataclasses.replace(
        SEVERAL_BATCHES, rule_settings="jackknife=7", curvature="exact_current", curvature_error=0.2
    )
    learner = Learner(config, 0, options=QUIET)
    trained = jax.tree.map(lambda x: x + 0.01, learner.params)
    task = np.asarray(1, np.int32)
    found = learner.programs.evidence(
        learner.training_data, learner.key, trained, learner.params, task
    )
    others = np.asarray(found.left_out.examples)
    count = others.sum() / 6
    assert 32 <= count < learner.stream.train.sizes[1]
    sizes = count - others
    assert sizes.max() - sizes.min() <= 1
    whole, each = (
        [*jax.tree.leaves(quadratic.diagonal), along]
        for quadratic, along in (
            (found.quadratic, found.curvature_along),
            (found.left_out.quadratic, found.left_out.along),
        )
    )
    for a, b in zip(whole, each, strict=True):
        mean = np.tensordot(others / others.sum(), b, 1)
        np.testing.assert_allclose(a, mean, rtol=1e-4, atol=1e-6 * float(a.max()))
    programs_of.cache_clear()


def test_what_a_jackknife_cannot_do_is_refused():
    for wrong in ("jackknife=1", "jackknife=-2", "jackknife=8,per=block"):
        with pytest.raises(InvalidInput, match="rule_settings=(jackknife|per)=.*: must be"):
            Config(rule_settings=wrong)
    with pytest.raises(ValueError, match="groups=1: must be at least 2"):
        measures.in_groups(curvature.identity(), 1)
    with pytest.raises(ValueError, match="rule: needs no quadratic"):
        rules.jackknifed(rules.averaging(), 3)
    rule, params = rules.perturb_and_merge(jackknife=3), jnp.zeros(2)
    quadratic, ones = DiagonalQuadratic.at(params, params), jnp.ones(2)
    for groups, left_out in ((0, None), (2, Measurement(quadratic, ones, ones, ones))):
        evidence = rules.Evidence(quadratic, left_out=left_out)
        with pytest.raises(ValueError, match=f"has {groups} groups and jackknife=3 needs as many"):
            rule.update(rule.init(params), previous=params, trained=params, evidence=evidence)


def test_a_coefficient_that_one_group_decides_has_no_error():
    """Without it there is no curvature along the task vector."""
    rule, ones = rules.perturb_and_merge(jackknife=2), jnp.ones(1)
    state = rule.init(jnp.zeros(1))
    whole, some, none = (DiagonalQuadratic.at(ones, f * ones) for f in (1.0, 2.0, 0.0))
    left_out = Measurement(jax.tree.map(lambda *x: jnp.stack(x), some, none), *[jnp.ones(2)] * 3)
    evidence = rules.Evidence(whole, left_out=left_out)
    for task, error in enumerate((0.0, np.nan)):
        previous = jnp.full(1, float(task) / 2)
        _, state, info = rule.update(state, previous=previous, trained=ones, evidence=evidence)
        np.testing.assert_equal(float(info.figures["jackknife_error"]), error)
        assert float(info.alpha) == 1.0
