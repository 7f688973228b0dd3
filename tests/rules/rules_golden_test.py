"""Merge rules on task vectors small enough to merge by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules
from pm_jax.curvature import DiagonalQuadratic
from pm_jax.rules import Evidence
from pm_jax.rules.tunable_magmax import assigned, quotas
from pm_jax.types import InvalidInput


def stream(rule, origin, trained_models, fishers=None):
    """Merged models, one for each task, and the last info."""
    origin = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), origin)
    state, previous, merged = rule.init(origin), origin, []
    for task, trained in enumerate(trained_models):
        trained = jax.tree.map(
            lambda o, x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), o.shape), origin, trained
        )
        quadratic = None
        if fishers:
            quadratic = DiagonalQuadratic.at(trained, jnp.asarray(fishers[task], jnp.float32))
        evidence = Evidence(quadratic, key=jax.random.key(task))
        params, state, info = rule.update(
            state, previous=previous, trained=trained, evidence=evidence
        )
        merged.append(params)
        previous = params if rule.needs.next_task_from == "merged" else trained
    return merged, info


def moved(rule, *task_vectors):
    """How far the last merged model is from an origin of ones."""
    trained = [1 + np.asarray(vector, np.float32) for vector in task_vectors]
    merged, _ = stream(rule, np.ones_like(trained[0]), trained)
    return (merged[-1] - 1).tolist()


def test_magmax_takes_the_largest_magnitude_and_the_later_of_equals():
    first, second, third = [2, -1, 0, 3], [-2, 0.5, 1, -4], [1, 1, -1, 4]
    assert moved(rules.magmax(), first) == [1, -0.5, 0, 1.5]
    assert moved(rules.magmax(), first, second) == [-1, -0.5, 0.5, -2]
    assert moved(rules.magmax(), first, second, third) == [-1, 0.5, -0.5, 2]
    assert moved(rules.magmax(scale=2.0), first, second, third) == [-4, 2, -2, 8]


def test_task_arithmetic_adds():
    assert moved(rules.task_arithmetic(scale=0.5), [2, -1], [4, 2], [0, 8]) == [3, 4.5]
    np.testing.assert_allclose(moved(rules.task_arithmetic(), [10]), [3], rtol=1e-6)


FIRST, SECOND, THIRD = [5, -4, 3, 1, 0], [-2, -6, 1, 7, 0], [-5, 1, 2, -2, 2]


def test_ties_trims_elects_and_averages():
    rule = rules.ties(keep=0.4, scale=0.5)
    assert moved(rule, FIRST) == [2.5, -2, 0, 0, 0]
    assert moved(rule, FIRST, SECOND) == [2.5, -2.5, 0, 3.5, 0]
    # The third keeps what equals its second largest, and the first entry's sum is 0: of the other
    # signs three are positive and one is negative.
    assert moved(rule, FIRST, SECOND, THIRD) == [2.5, -2.5, 1, 3.5, 1]


def test_ties_elects_the_negative_sign_where_nothing_decides():
    assert moved(rules.ties(keep=1.0, scale=1.0), [1.0], [-1.0]) == [-1.0]
    assert moved(rules.ties(keep=1.0, scale=1.0), [1.0, -3.0], [-1.0, -3.0]) == [-1.0, -3.0]


def test_a_residue_of_rounding_elects_a_sign_where_a_sum_would_cancel():
    for task_vectors, elected in (([0.3, 0.6, -0.9], 0.45), ([0.25, 0.5, -0.75], -0.75)):
        # From an origin of 0, as 1 + x would round x.
        merged, _ = stream(rules.ties(keep=1.0, scale=1.0), np.zeros(1), task_vectors)
        np.testing.assert_allclose(merged[-1], [elected], rtol=1e-6)


@pytest.mark.parametrize("keep, size, kept", [(0.29, 100, 29), (0.299, 100, 29), (0.001, 100, 1)])
def test_the_share_that_ties_keeps_is_rounded_down_but_for_errors_of_rounding(keep, size, kept):
    vector = np.arange(1, size + 1)
    (merged,), _ = stream(rules.ties(keep=keep, scale=1.0), np.zeros(size), [vector])
    assert np.flatnonzero(merged).tolist() == list(range(size - kept, size))


def test_dare_on_ties_may_leave_the_trimming_out():
    vector = np.arange(1.0, 41.0)
    rule = rules.dare(on="ties", drop=0.5, keep=1.0, scale=1.0)
    (merged,), _ = stream(rule, np.zeros(40), [vector])
    left = np.flatnonzero(merged)
    # Of small entries as of large ones, each doubled.
    assert 8 <= len(left) <= 32 and left.min() < 8
    np.testing.assert_allclose(np.asarray(merged)[left], 2 * vector[left], rtol=1e-6)
    (trimmed,), _ = stream(rules.dare(on="ties", drop=0.5), np.zeros(40), [vector])
    assert np.count_nonzero(trimmed) == 8


def test_ties_trims_by_model_or_by_tensor():
    origin, trained = {"a": np.zeros(2), "b": np.zeros(2)}, {"a": [4.0, 3.0], "b": [1.0, 2.0]}

    def merged(trim):
        (params,), _ = stream(rules.ties(keep=0.5, scale=1.0, trim=trim), origin, [trained])
        return params["a"].tolist(), params["b"].tolist()

    assert merged("global") == ([4, 3], [0, 0])
    assert merged("tensor") == ([4, 0], [0, 2])


def test_coma_steps_from_the_second_task_on():
    merged, info = stream(rules.coma(), np.zeros(1), [2.0, 7.0, -1.0])
    np.testing.assert_allclose(np.ravel(merged), [2, 4, 2], rtol=1e-6)
    assert float(info.alpha) == np.float32(0.4)


def test_cofima_weighs_entries_by_the_last_two_fishers():
    fishers = [[1, 2, 0, 0], [3, 0, 0, 5], [3, 1, 1, 0]]
    trained = [4.0, 8.0, [10, 0, 0, 0]]
    merged, info = stream(rules.cofima(step=0.25), np.zeros(4), trained[:2], fishers)
    # Shares of the new model: .75 / 1.5, 0 / 1.5, the step itself, 1.25 / 1.25.
    np.testing.assert_allclose(merged[1], [6, 4, 5, 8], rtol=1e-6)
    np.testing.assert_allclose([info.alpha, info.degenerate], [0.4375, 0.25], rtol=1e-6)
    merged, _ = stream(rules.cofima(step=0.25), np.zeros(4), trained, fishers)
    np.testing.assert_allclose(merged[2], [7, 0, 0, 8], rtol=1e-6)


def test_cofima_caps_the_fisher_where_asked():
    def merged(cap):
        return stream(rules.cofima(step=0.25, cap=cap), np.zeros(1), [4.0, 8.0], [[4], [100]])[0][
            -1
        ]

    np.testing.assert_allclose(merged(1.0), [5.0], rtol=1e-6)
    np.testing.assert_allclose(merged(0.0), [(3 * 4 + 25 * 8) / 28], rtol=1e-6)


def test_fisher_averaging_is_the_weighted_mean_where_there_is_curvature():
    fishers = [[3, 1, 0, 1e-37], [1, 1, 0, 1e-37]]
    merged, info = stream(rules.fisher_averaging(), np.ones(4), [2.0, 6.0], fishers)
    np.testing.assert_allclose(merged[-1], [3, 4, 1, 1], rtol=1e-6)
    np.testing.assert_allclose([info.alpha, info.degenerate], [0.1875, 0.5], rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-10, 1e10])
def test_a_common_factor_on_all_fishers_cancels(factor):
    rng = np.random.default_rng(0)
    trained = rng.normal(size=(4, 20))
    fishers = rng.gamma(1.0, size=(4, 20))
    for rule in (rules.fisher_averaging(), rules.cofima()):
        plain, _ = stream(rule, np.zeros(20), trained, list(fishers))
        scaled, _ = stream(rule, np.zeros(20), trained, list(factor * fishers))
        np.testing.assert_allclose(plain[-1], scaled[-1], rtol=1e-5, atol=1e-6)
    exact = (fishers * trained).sum(axis=0) / fishers.sum(axis=0)
    plain, _ = stream(rules.fisher_averaging(), np.zeros(20), trained, list(fishers))
    np.testing.assert_allclose(plain[-1], exact, rtol=1e-5, atol=1e-6)


def test_equal_fishers_make_cofima_coma():
    trained = np.random.default_rng(0).normal(size=(3, 5))
    weighted, _ = stream(rules.cofima(), np.zeros(5), trained, [np.full(5, 7.0)] * 3)
    plain, _ = stream(rules.coma(), np.zeros(5), trained)
    np.testing.assert_allclose(weighted[-1], plain[-1], rtol=1e-6)


@pytest.mark.parametrize("on", ["averaging", "task_arithmetic", "ties"])
def test_dare_that_drops_nothing_is_the_rule_it_is_on(on):
    dropping, inner = rules.dare(on=on, drop=0.0), rules.REGISTRY[on]()
    assert dropping.needs.next_task_from == inner.needs.next_task_from
    trained = np.random.default_rng(0).normal(size=(3, 8))
    mine, plain = (stream(rule, np.ones(8), trained)[0] for rule in (dropping, inner))
    assert np.array_equal(mine, plain)


def test_dare_drops_entries_and_rescales_the_rest():
    (merged,), _ = stream(rules.dare(drop=0.75), np.ones(4000), [2.0])
    values, counts = np.unique(merged, return_counts=True)
    assert values.tolist() == [1, 5]
    assert abs(counts[1] - 1000) < 5 * (4000 * 0.75 * 0.25) ** 0.5
    # From the merged model for averaging, from theta_0 for the others.
    merged, _ = stream(rules.dare(drop=0.5), np.zeros(100), [4.0, 4.0])
    base = np.asarray(merged[0])
    assert set((merged[1] - base)[base == 0].tolist()) == {0, 4}
    merged, _ = stream(rules.dare(on="task_arithmetic", scale=0.25), np.zeros(100), [4.0, 4.0])
    assert set(merged[1].tolist()) == {0, 2, 4}


def test_random_mix_gives_every_task_the_same_share():
    merged, _ = stream(rules.random_mix(), np.zeros(9000), [1.0, 2.0, 3.0])
    for task in (1, 2, 3):
        assert abs(int((merged[-1] == task).sum()) - 3000) < 5 * (9000 * 2 / 9) ** 0.5


@pytest.mark.parametrize(
    "size, weights, wanted",
    [
        (8, [0.25, 0.25, 0.5], [2, 2, 4]),
        (8, [1 / 3, 1 / 3, 1 / 3], [3, 3, 2]),
        (49, [48 / 49, 1 / 49], [48, 1]),
        (5, [0, 0, 1], [0, 0, 5]),
        (2, [0.25] * 4, [1, 1, 0, 0]),
    ],
)
def test_quotas_are_rounded_down_and_the_first_tasks_have_the_rest(size, weights, wanted):
    assert quotas(size, np.asarray(weights)).tolist() == wanted


def owners(stacked, quota, seed=0):
    stacked = jnp.asarray(stacked, jnp.float32)
    return assigned(jax.random.key(seed), stacked, jnp.asarray(quota, jnp.int32)).tolist()


def test_tunable_magmax_without_surplus_is_by_magnitude():
    assert owners([[1, 5, 2], [3, 4, 2]], [1, 2]) == [1, 0, 1]
    # A task without a share takes no part.
    assert owners([[9, 9, 9, 9], [1, 2, 8, 1], [2, 1, 1, 7]], [0, 2, 2]) == [2, 1, 1, 2]


def test_tunable_magmax_passes_a_surplus_to_the_largest_of_the_earlier_tasks():
    found = [owners([[1, 5, 1, 5], [5, 1, 5, 1], [9, 9, 9, 9]], [1, 1, 2], s) for s in range(20)]
    mixed = 0
    for each in found:
        passed = [(place % 2, owner) for place, owner in enumerate(each) if owner != 2]
        if {parity for parity, _ in passed} == {0, 1}:
            assert all(owner == 1 - parity for parity, owner in passed)
            mixed += 1
    assert mixed and len(set(map(tuple, found))) > 3


def test_tunable_magmax_gives_the_first_tasks_surplus_to_those_who_are_next_in_magnitude():
    rivals = [2, 1, 1, 2]
    found = [owners([[9] * 4, [1, 2, 8, 1], [2, 1, 1, 7]], [2, 1, 1], s) for s in range(20)]
    mixed = 0
    for each in found:
        given = [place for place, owner in enumerate(each) if owner]
        if {rivals[place] for place in given} == {1, 2}:
            assert all(each[place] == rivals[place] for place in given)
            mixed += 1
    assert mixed and len(set(map(tuple, found))) > 3


def test_tunable_magmax_follows_the_stream_with_the_weights_of_the_tasks_seen():
    rule = rules.tunable_magmax(scale=1.0, preference=(0.0, 0.25, 0.75), max_tasks=3)
    merged, _ = stream(rule, np.zeros(8), [1.0, 2.0, 3.0])
    counts = [[int((params == value).sum()) for value in (1, 2, 3)] for params in merged]
    assert counts == [[8, 0, 0], [0, 8, 0], [0, 2, 6]]
    merged, info = stream(rule, np.zeros(8), [1.0, 2.0, 3.0, 4.0])  # more than there is room for
    assert np.isnan(merged[3]).all() and np.isnan(info.alpha) and np.isfinite(merged[2]).all()


@pytest.mark.parametrize("name", ["magmax", "random_mix", "tunable_magmax", "ties"])
def test_copies_of_one_task_are_one_task(name):
    task = np.random.default_rng(0).normal(size=30)
    merged, _ = stream(rules.make(name), np.zeros(30), [task] * 3)
    if name == "ties":
        np.testing.assert_allclose(merged[2], merged[0], rtol=1e-6)
    else:
        assert np.array_equal(merged[2], merged[0])


@pytest.mark.parametrize(
    "name, settings, range_of_it",
    [
        *((name, "scale=0", "above 0") for name in ("magmax", "task_arithmetic", "random_mix")),
        *((name, "step=1.5", r"in \(0, 1\]") for name in ("coma", "cofima")),
        ("cofima", "cap=-1", "at least 0"),
        ("ties", "keep=0", r"in \(0, 1\]"),
        ("ties", "scale=-1", "above 0"),
        ("ties", "trim=layer", "global or tensor"),
        ("dare", "drop=1", r"in \[0, 1\)"),
        ("dare", "on=magmax", "one of averaging, task_arithmetic, ties"),
        ("dare", "scale=0.5", "averaging has none"),
        ("tunable_magmax", "scale=0", "above 0"),
        ("tunable_magmax", "preference=0.5:0.5", "5 weights, one for each task"),
        ("tunable_magmax", "preference=0.5:0.5:0.5:0:0", "sum to 1"),
        ("tunable_magmax", "preference=1.5:-0.5:0:0:0", "at least 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_range(name, settings, range_of_it):
    with pytest.raises(InvalidInput, match=f"rule_settings=.*{range_of_it}.*takes"):
        rules.make(name, settings, max_tasks=5)


@pytest.mark.parametrize("name", ["dare", "random_mix", "tunable_magmax"])
def test_a_rule_that_draws_refuses_to_do_so_without_a_key(name):
    rule, zero = rules.make(name), jnp.zeros(2)
    with pytest.raises(ValueError, match="evidence.key=None"):
        rule.update(rule.init(zero), previous=zero, trained=zero, evidence=Evidence())
