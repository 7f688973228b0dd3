"""Weights of models in the rules that take them, and the names that others have for settings."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules
from pm_jax.offline.interpolation import slerp
from pm_jax.types import InvalidInput
from tests.rules.rules_golden_test import moved, stream


def test_averaging_with_weights_is_their_sum():
    rule = rules.averaging(model_weights=(0.0, 0.5, 0.2, 0.3))
    found = moved(rule, [9, 9], [1, 0], [0, 5], [-1, 10])
    np.testing.assert_allclose(found, [0.5 - 0.3, 1.0 + 3.0], rtol=1e-6)


def test_task_arithmetic_with_weights_adds_and_takes_away():
    rule = rules.task_arithmetic(scale=0.5, model_weights=(1.0, -2.0))
    assert moved(rule, [4, 2], [1, 1]) == [1, 0]


def test_ties_weighs_before_it_elects_and_in_the_mean():
    rule = rules.ties(scale=1.0, keep=1.0, model_weights=(0.75, 0.25))
    # Elected: 2 against -1; -1 against 2, as 0.75 weighs more than 0.5; the mean of 1 and 3.
    np.testing.assert_allclose(moved(rule, [2, -1, 1], [-1, 2, 3]), [2, -1, 1.5], rtol=1e-6)
    equal = rules.ties(scale=1.0, keep=0.5, model_weights=(2.0, 2.0))
    np.testing.assert_allclose(
        moved(equal, [2, -1, 1, 0], [-1, 2, 3, 0]),
        moved(rules.ties(scale=1.0, keep=0.5), [2, -1, 1, 0], [-1, 2, 3, 0]),
        rtol=1e-6,
    )


@pytest.mark.parametrize("on", ["averaging", "task_arithmetic", "ties"])
def test_dare_hands_weights_on(on):
    weights = (0.25, 0.75)
    rule = rules.dare(on=on, drop=0.0, model_weights=weights)
    inner = rules.REGISTRY[on](model_weights=weights)
    np.testing.assert_allclose(moved(rule, [2, -4], [1, 8]), moved(inner, [2, -4], [1, 8]))


def test_more_models_than_weights_give_nan_and_not_a_number_that_looks_right():
    for rule in (rules.averaging, rules.task_arithmetic, rules.ties):
        assert all(map(math.isnan, moved(rule(model_weights=(0.5, 0.5)), [1], [2], [3])))


@pytest.mark.parametrize(
    ("make", "weights", "pattern"),
    [
        (rules.averaging, (1.0, 2.0), "model_weights=1:2: must be at least 0 and of sum 1; divide"),
        (rules.averaging, (2.0, -1.0), "must be at least 0 and of sum 1"),
        (rules.ties, (1.0, -1.0), "model_weights=1:-1: must be at least 0, and one of them above"),
    ],
)
def test_weights_out_of_range_are_refused(make, weights, pattern):
    with pytest.raises(InvalidInput, match=pattern):
        make(model_weights=weights)


def test_density_is_the_share_that_is_kept():
    assert rules.with_own_names("ties", "density=0.25, scale=1") == "keep=0.25,scale=1"
    assert rules.with_own_names("dare", "on=ties,density=1/4") == "on=ties,drop=0.75"
    for text in ("density=0", "density=x", "density=1.5"):
        with pytest.raises(InvalidInput, match=f"rule_settings={text}: must be a number or fract"):
            rules.make("ties", text)
    with pytest.raises(InvalidInput, match="density=0.5: says what keep says too"):
        rules.make("ties", "density=0.5,keep=0.5")
    with pytest.raises(InvalidInput, match="density is not a setting of the rule"):
        rules.make("averaging", "density=0.5")


def test_slerp_keeps_the_length_on_the_arc_and_falls_back_to_the_line():
    low, high = np.asarray([3.0, 0.0]), np.asarray([0.0, 3.0])
    merged, info = stream(slerp(t=1 / 3), np.zeros(2), [low, high])
    wanted = 3 * np.asarray([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    np.testing.assert_allclose(merged[-1], wanted, rtol=1e-6)
    assert float(info.alpha) == pytest.approx(1 / 3)
    for pair in ([low, 2 * low], [low, -low], [low, 0 * low]):
        merged, _ = stream(slerp(t=0.25), np.zeros(2), pair)
        np.testing.assert_allclose(merged[-1], 0.75 * pair[0] + 0.25 * pair[1], rtol=1e-6)
    leaf = jnp.ones(2, jnp.bfloat16)
    rule = slerp()
    assert rule.update(rule.init(leaf), previous=leaf, trained=leaf)[0].dtype == jnp.bfloat16
