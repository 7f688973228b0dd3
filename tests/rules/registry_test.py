import functools
import re

import jax
import pytest

from pm_jax import rules
from pm_jax.continual import Config
from pm_jax.continual.merging.programs import StreamShape, programs_of
from pm_jax.rules import MergeRule, registry
from pm_jax.types import InvalidInput


def factory(
    *, on: str = "averaging", scale: float = 0.5, keep: int = 2, fast: bool = True,
    weights: tuple[float, ...] = (), max_tasks: int = 10,
) -> MergeRule:  # fmt: skip
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale}: must lie in (0, 1]")
    return MergeRule(lambda _: (on, scale, keep, fast, weights, max_tasks), lambda: None)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry.REGISTRY, "example", factory)


def test_settings_are_read_by_the_type_of_their_defaults():
    rule = rules.make("example", "on=ties, scale=1/4,keep=3,fast=False,weights=1/2:0.5")
    assert rule.init(None) == ("ties", 0.25, 3, False, (0.5, 0.5), 10)
    assert rules.make("example").init(None) == ("averaging", 0.5, 2, True, (), 10)
    assert rules.make("example", max_tasks=4, other=1).init(None)[-1] == 4


@pytest.mark.parametrize(
    "settings, pattern",
    {
        "scal=0.5": "rule_settings=scal=0.5: scal is not a setting",
        "scale": "rule_settings=scale: scale is not a setting",
        "scale=2": r"rule_settings=scale=2.0: must lie in \(0, 1\]",
        "scale=much": "rule_settings=scale=much: must be a number or fraction",
        "keep=1.5": "rule_settings=keep=1.5: must be a whole number",
        "fast=maybe": "rule_settings=fast=maybe: must be true or false",
        "weights=1:x": "rule_settings=weights=1:x: must be numbers or fractions separated by col",
        "weights=1/0": "rule_settings=weights=1/0: must be",
        "max_tasks=3": "rule_settings=max_tasks=3: max_tasks is set by the run",
    }.items(),
)
def test_a_wrong_setting_is_one_line_that_lists_the_rules_settings(settings, pattern):
    with pytest.raises(InvalidInput) as refused:
        rules.make("example", settings, max_tasks=5)
    line = str(refused.value)
    assert re.match(pattern, line) and "\n" not in line
    assert line.endswith(
        "example takes on=averaging, scale=0.5, keep=2, fast=true, weights= by default"
    )


def test_unknown_rules_and_rules_without_settings():
    with pytest.raises(InvalidInput, match="rule=x: must be one of perturb_and_merge, "):
        rules.make("x")
    with pytest.raises(InvalidInput, match="scale is not a setting.*; frozen takes no settings"):
        rules.make("frozen", "scale=2")


def test_a_configuration_refuses_settings_that_its_rule_does_not_have():
    with pytest.raises(InvalidInput, match="rule_settings=clip=false: .*averaging takes power"):
        Config(rule="averaging", rule_settings="clip=false")
    assert Config(rule_settings="clip=false").merge_rule.needs.evidence
    exact = functools.partial(Config, curvature="exact_current", perturbation="none")
    for settings in ({"rule": "cofima"}, {"rule_settings": "per=block"}):
        with pytest.raises(InvalidInput, match="curvature=exact_current: rule=.* takes no curvat"):
            exact(**settings)
    assert (
        exact().merge_rule.needs.evidence and not exact(rule="sequential").merge_rule.needs.evidence
    )
    for kind in ({"curvature": "kronecker"}, {"stored_curvature": "low_rank"}):
        settings = {"curvature": "exact_current", **kind}
        assert exact(**settings).merge_rule.needs.evidence
        with pytest.raises(InvalidInput, match="curvature=.*: rule=cofima takes curvature entry"):
            exact(**settings, rule="cofima")
    for name in ("curvature_rank", "curvature_slots"):
        with pytest.raises(InvalidInput, match=f"{name}=0: must be at least 1"):
            Config(**{name: 0})
    with pytest.raises(InvalidInput, match="landscape_points=1: must be 0, or at least 2"):
        Config(landscape_points=1)
    with pytest.raises(InvalidInput, match="memory=x: memory is set by the run"):
        Config(rule_settings="memory=x")


def test_the_key_of_a_merge_is_given_where_it_is_needed_and_is_the_tasks_own():
    def measure(rule, task, seed=0):
        run = programs_of(Config(rule=rule, perturbation="none"), StreamShape(10, (8, 8, 1), 9, 10))
        return run.evidence(None, jax.random.key(seed), {}, {}, task)

    assert measure("averaging", 0).key is None
    keys = [measure("random_mix", *which) for which in ((0,), (1,), (0, 1))]
    assert all(evidence.quadratic is None for evidence in keys)
    data = [tuple(jax.random.key_data(evidence.key).tolist()) for evidence in keys]
    assert len(set(data)) == 3
    again = jax.random.key_data(measure("random_mix", 0).key)
    assert tuple(again.tolist()) == data[0]
