"""RegMean and Fisher averaging on input moments: by hand, and as least squares on the inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import pm_jax
from pm_jax import rules
from pm_jax.curvature import (
    DiagonalQuadratic,
    InputMomentQuadratic,
    KroneckerQuadratic,
    fisher_exact,
    input_moment,
)
from pm_jax.rules import Evidence
from pm_jax.types import InvalidInput
from tests.small_runs import slow

INPUTS, OUTPUTS = 4, 3


def stream(rule, origin, tasks):
    """Merged models and infos of tasks `(trained, quadratic)`."""
    state, previous, merged, infos = rule.init(origin), origin, [], []
    update = jax.jit(rule.update)
    for trained, quadratic in tasks:
        previous, state, info = update(
            state, previous=previous, trained=trained, evidence=Evidence(quadratic)
        )
        merged.append(previous)
        infos.append(info)
    return merged, infos, state


def by_hand(rule):
    def model(kernel, bias):
        return {"kernel": jnp.asarray(kernel)[:, None], "bias": jnp.asarray([bias])}

    def task(trained, *diagonal):
        moments = {"kernel": jnp.diag(jnp.asarray(diagonal))}
        return trained, InputMomentQuadratic.at(trained, moments)

    tasks = [task(model([1.0, 2.0], 1.0), 3.0, 1.0), task(model([5.0, 0.0], 4.0), 1.0, 1.0)]
    return stream(rule, model([0.0, 0.0], 0.0), tasks)


def test_two_tasks_by_hand():
    merged, infos, state = by_hand(rules.regmean(ridge=0.1))
    assert merged[0]["kernel"].tolist() == [[1.0], [2.0]] and float(infos[0].alpha) == 1.0
    # S = diag(4, 2), lam = 0.1 * 3: (3 * 1 + 1 * 5 + .3 * 1) / 4.3, (1 * 2 + 1 * 0 + .3 * 2) / 2.3.
    np.testing.assert_allclose(merged[1]["kernel"][:, 0], [8.3 / 4.3, 2.6 / 2.3], rtol=1e-6)
    assert merged[1]["bias"].tolist() == [2.5]
    # Shares of the traces, 2 of 6, for two entries, and 1/2 for one.
    np.testing.assert_allclose(infos[1].alpha, (2 / 3 + 1 / 2) / 3, rtol=1e-6)
    assert float(infos[1].degenerate) == 0.0
    np.testing.assert_allclose(state.memory.gradient["kernel"][:, 0], [-8.0, -2.0], rtol=1e-6)


def test_fisher_averaging_of_moments_by_hand():
    rule = rules.fisher_averaging(memory=InputMomentQuadratic.zero)
    merged, infos, _ = by_hand(rule)
    np.testing.assert_allclose(merged[1]["kernel"][:, 0], [2.0, 1.0], rtol=1e-6)
    assert merged[1]["bias"].tolist() == [2.5] and float(infos[1].alpha) == pytest.approx(7 / 18)


def linear_tasks(seed, rank=INPUTS, count=4):
    """Inputs and kernels of linear models, the inputs of a task in a subspace of some rank."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(count, rank, INPUTS))
    inputs = [rng.normal(size=(30 + 5 * t, rank)) @ basis[t] for t in range(count)]
    kernels = rng.normal(size=(count + 1, INPUTS, OUTPUTS))
    return inputs, kernels


def measured(x, kernel):
    """A trained model with a bias, and its quadratic, measured on inputs."""
    trained = {"a": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(OUTPUTS)}}

    def logits_fn(params, inputs):
        return inputs @ params["a"]["kernel"] + params["a"]["bias"][None]

    batch = (jnp.asarray(x, jnp.float32), np.zeros(len(x), np.int32))
    return trained, pm_jax.measure_all(input_moment(logits_fn), trained, batch, 16).quadratic


@pytest.mark.slow
def test_the_merge_solves_the_tasks_least_squares_with_a_ridge():
    """Rows of inputs in float64, no normal equations and no running sums."""
    inputs, kernels = linear_tasks(0)
    tasks = [measured(x, kernel) for x, kernel in zip(inputs, kernels[1:], strict=True)]
    merged, _, state = stream(rules.regmean(ridge=0.01), measured(inputs[0], kernels[0])[0], tasks)
    previous = kernels[1]
    for last in range(1, len(tasks)):
        rows = [x / np.sqrt(len(x)) for x in inputs[: last + 1]]
        ridge = 0.01 * sum((x**2).sum() for x in rows) / INPUTS
        sides = [x @ kernel for x, kernel in zip(rows, kernels[1:], strict=False)]
        left = np.concatenate([*rows, np.sqrt(ridge) * np.eye(INPUTS)])
        right = np.concatenate([*sides, np.sqrt(ridge) * previous])
        previous = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(merged[last]["a"]["kernel"], previous, rtol=1e-4, atol=1e-5)
    total = sum(x.T @ x / len(x) for x in inputs)
    np.testing.assert_allclose(state.memory.curvature.moments["a/kernel"], total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, INPUTS])
def test_fisher_averaging_solves_them_without_one_and_leaves_what_no_input_reaches(rank):
    inputs, kernels = linear_tasks(1, rank, count=2)
    tasks = [measured(x, kernel) for x, kernel in zip(inputs, kernels[1:], strict=True)]
    rule = rules.fisher_averaging(memory=InputMomentQuadratic.zero)
    merged, _, _ = stream(rule, measured(inputs[0], kernels[0])[0], tasks)
    rows = [x / np.sqrt(len(x)) for x in inputs]
    residual = rows[1] @ (kernels[2] - kernels[1])
    left = np.concatenate(rows)
    # The shortest step from the first task's model to a minimum.
    right = np.concatenate([np.zeros((len(rows[0]), OUTPUTS)), residual])
    wanted = kernels[1] + np.linalg.lstsq(left, right, rcond=1e-6)[0]
    np.testing.assert_allclose(merged[1]["a"]["kernel"], wanted, rtol=2e-4, atol=2e-5)
    if rank == 1:
        outside = scipy.linalg.null_space(left)
        kept = outside.T @ (np.asarray(merged[1]["a"]["kernel"], np.float64) - kernels[1])
        np.testing.assert_allclose(kept, np.zeros_like(kept), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regmean", "fisher_averaging"])
def test_kernels_of_more_axes_merge_as_their_matrices(name):
    """Attention's kernel of two input axes, and a stack of two kernels, beside plain ones."""
    rng = np.random.default_rng(2)
    make = functools.partial(rules.make, name, memory=InputMomentQuadratic.zero)

    def moment(*stack):
        rows = rng.normal(size=(*stack, 9, 4))
        return jnp.asarray(np.swapaxes(rows, -1, -2) @ rows, jnp.float32)

    def models():
        out, stacked = rng.normal(size=(2, 2, 3)), rng.normal(size=(2, 4, 3))
        wide = {"out": {"kernel": out, "bias": np.zeros(3)},
                "stack": {"kernel": stacked, "bias": np.zeros((2, 3))}}  # fmt: skip
        flat = {"out": {"kernel": out.reshape(4, 3)}, "a": {"kernel": stacked[0]},
                "b": {"kernel": stacked[1]}}  # fmt: skip
        return tuple(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), m) for m in (wide, flat))

    tasks = [[], []]
    for _ in range(3):
        wide, flat = models()
        moments = {"out/kernel": moment(), "stack/kernel": moment(2)}
        alone = {"out/kernel": moments["out/kernel"], "a/kernel": moments["stack/kernel"][0],
                 "b/kernel": moments["stack/kernel"][1]}  # fmt: skip
        tasks[0].append((wide, InputMomentQuadratic.at(wide, moments)))
        tasks[1].append((flat, InputMomentQuadratic.at(flat, alone)))
    wide, flat = models()
    found, wanted = stream(make(), wide, tasks[0])[0][-1], stream(make(), flat, tasks[1])[0][-1]
    np.testing.assert_allclose(found["out"]["kernel"].reshape(4, 3), wanted["out"]["kernel"],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    for number, which in enumerate("ab"):
        np.testing.assert_allclose(
            found["stack"]["kernel"][number], wanted[which]["kernel"], rtol=1e-4, atol=1e-5
        )


def test_kernels_without_inputs_are_averaged_and_said_to_be():
    trained = [{"kernel": jnp.full((2, 1), x), "bias": jnp.full(1, x)} for x in (2.0, 6.0)]
    moments = {"kernel": jnp.zeros((2, 2))}
    tasks = [(model, InputMomentQuadratic.at(model, moments)) for model in trained]
    merged, infos, _ = stream(rules.regmean(), trained[0], tasks)
    assert merged[1]["kernel"].tolist() == [[4.0], [4.0]] and merged[1]["bias"].tolist() == [4.0]
    np.testing.assert_allclose([infos[1].alpha, infos[1].degenerate], [0.5, 2 / 3], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_a_common_factor_cancels(factor):
    inputs, kernels = linear_tasks(3)
    tasks = [measured(x, kernel) for x, kernel in zip(inputs, kernels[1:], strict=True)]
    scaled = [(model, quadratic.scaled(factor)) for model, quadratic in tasks]
    start = measured(inputs[0], kernels[0])[0]
    merged, other = (stream(rules.regmean(), start, each)[0][-1] for each in (tasks, scaled))
    np.testing.assert_allclose(other["a"]["kernel"], merged["a"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [slow("perturb_and_merge"), "regmean", slow("fisher_averaging")])
def test_a_loop_of_ones_own_merges_with_moments(name):
    rule = rules.make(name, memory=InputMomentQuadratic.zero)
    inputs, kernels = linear_tasks(4, count=2)
    measure = input_moment(lambda params, x: x @ params["a"]["kernel"])
    models = [{"a": {"kernel": jnp.asarray(kernel, jnp.float32)}} for kernel in kernels]
    merger = pm_jax.merger(rule, measure)
    state = merger.init(models[0])
    for trained, x in zip(models[1:], inputs, strict=True):
        labels = np.zeros(len(x), np.int32)
        params, state, info = merger.finish_task(state, trained, (np.float32(x), labels))
    assert 0 < float(info.alpha) < 1 and float(info.degenerate) == 0
    assert not np.allclose(params["a"]["kernel"], models[-1]["a"]["kernel"])


def test_mistakes():
    with pytest.raises(InvalidInput, match="ridge=0: must be above 0"):
        rules.regmean(ridge=0)
    params = {"kernel": jnp.ones((2, 2))}
    rule = rules.regmean()
    evidence = Evidence(DiagonalQuadratic.at(params, params))
    with pytest.raises(InvalidInput, match="must be a InputMomentQuadratic; measure it by input_m"):
        rule.update(rule.init(params), previous=params, trained=params, evidence=evidence)
    with pytest.raises(InvalidInput, match="kernels=None: no leaf is a dense kernel"):
        rule.init({"w": jnp.ones((2, 2))})
    with pytest.raises(InvalidInput, match="measure=fisher_exact: does not fit .*InputMomentQuadr"):
        logits_fn = lambda p, x: x @ p["kernel"]  # noqa: E731
        pm_jax.merger(rule, fisher_exact(logits_fn)).init(params)
    dense = rules.fisher_averaging(memory=lambda p: KroneckerQuadratic.zero(p, ".*", 2))
    with pytest.raises(InvalidInput, match="memory=KroneckerQuadratic: must be a DiagonalQuadr"):
        dense.init(params)
