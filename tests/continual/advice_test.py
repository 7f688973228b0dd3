"""Doubts about merges: when there is one, what it means, and what to do about it."""

import dataclasses
import re

import pytest

from experiments.flags import parse_setting
from pm_jax.continual import Config
from pm_jax.continual.merging import trust
from pm_jax.continual.report import advice

PREDICTION = "predicted_loss_change", "actual_loss_change"
WARNINGS = {
    "3.1 times too much": (
        dict(zip(PREDICTION, (0.031, 0.01), strict=True)),
        ["the quadratic model over-predicted the rise of the task's own loss by 3.1 x "
         "(0.031 predicted, 0.01 measured)"],
    ),
    "2.9 times too much": (dict(zip(PREDICTION, (0.029, 0.01), strict=True)), []),
    "4 times too little": (
        dict(zip(PREDICTION, (0.005, 0.02), strict=True)),
        ["the quadratic model under-predicted the rise of the task's own loss by 4.0 x "
         "(0.005 predicted, 0.02 measured)"],
    ),
    "nothing predicted": (
        dict(zip(PREDICTION, (0.0, 0.02), strict=True)),
        ["the quadratic model under-predicted the rise of the task's own loss by more than "
         "1,000 x (0 predicted, 0.02 measured)"],
    ),
    "a fall of which too little was predicted": (
        dict(zip(PREDICTION, (-0.01, -0.04), strict=True)),
        ["the quadratic model under-predicted the fall of the task's own loss by 4.0 x "
         "(-0.01 predicted, -0.04 measured)"],
    ),
    "a fall": (
        dict(zip(PREDICTION, (0.02, -0.015), strict=True)),
        ["the task's own loss fell by 0.015 although a rise by 0.02 was predicted"],
    ),
    "a rise": (
        dict(zip(PREDICTION, (-0.02, 0.3), strict=True)),
        ["the task's own loss rose by 0.3 although a fall by 0.02 was predicted"],
    ),
    "far too small to matter": (dict(zip(PREDICTION, (1e-6, 9e-4), strict=True)), []),
    "nothing known of the prediction": (dict(zip(PREDICTION, (None, 2.0), strict=True)), []),
    "nothing known of the loss": (dict(zip(PREDICTION, (2.0, None), strict=True)), []),
    "clipped": (
        {"alpha": 0.0, "alpha_raw": -0.25, "standard_error": 0.1},
        ["the quadratic model's minimum is at -0.25, outside [0, 1], and was clipped to 0.00"],
    ),
    "beyond, without clipping": (
        {"alpha": 1.5, "alpha_raw": 1.5},
        ["the quadratic model's minimum is at 1.50, outside [0, 1], and was used as it is"],
    ),
    "just within": ({"alpha": 0.02, "alpha_raw": 0.02}, []),
    "just below": (
        {"alpha": 0.019, "alpha_raw": 0.019},
        ["the merge, with the coefficient 0.019, kept almost nothing of the new task"],
    ),
    "a coefficient that is only set": ({"alpha": 1.0, "alpha_raw": 1.0, "numerator": None}, []),
    "no minimum": (
        {"alpha": 1 / 3, "alpha_raw": 1 / 3, "degenerate": 1.0, "standard_error": None},
        ["the curvature gave no minimum along the task vector; the coefficient 0.33 was used for "
         "want of one"],
    ),
    "uncertain": (
        {"standard_error": 0.26},
        ["the coefficient 0.5 is uncertain: its standard error 0.26 is more than half of it"],
    ),
    "certain": ({"standard_error": 0.24}, []),
    "regret": (
        {"alpha": 0.1, "most_accurate_alpha": 0.35, "regret_accuracy": 0.023},
        ["a coefficient of 0.35 instead of 0.10 would have been 2.3 points better on validation "
         "data"],
    ),
    "little regret": ({"most_accurate_alpha": 0.35, "regret_accuracy": 0.0099}, []),
}  # fmt: skip


SOUND = {"alpha": 0.5, "alpha_raw": 0.5, "numerator": 1.0, "degenerate": 0.0}


@pytest.mark.parametrize("case", WARNINGS)
def test_doubts_about_a_merge(case):
    own, texts = WARNINGS[case]
    assert list(trust.of_merge({**SOUND, **own}).values()) == texts


def runs_of(*merges):
    """Results of seeds whose merges are sound but for what is given, by task from the first on."""
    return [
        {"seed": seed, "merges": [{**SOUND, **own} for own in each]}
        for seed, each in enumerate(merges)
    ]


REGRET = {"most_accurate_alpha": 0.35, "regret_accuracy": 0.023}
CLIPPED = {"alpha": 0.0, "alpha_raw": -0.25}
UNDER = dict(zip(PREDICTION, (0.001, 0.1), strict=True))


def test_a_warning_says_where_what_it_means_and_what_to_do():
    # The first merge has no earlier model, so nothing is said of it.
    regret, outside = advice.warnings_of(runs_of([CLIPPED, REGRET, {}], [{}, {}, REGRET | CLIPPED]))
    assert [text.split(":")[0] for text in regret.merges] == ["Seed 0, task 2", "Seed 1, task 3"]
    assert [text.split(":")[0] for text in outside.merges] == ["Seed 1, task 3"]
    assert all(each.meaning and "--" in each.remedy for each in (regret, outside))
    assert advice.warnings_of(runs_of([CLIPPED, {}, UNDER])) == []
    (alone,) = advice.warnings_of(runs_of([{}, REGRET]))
    assert alone.merges[0].startswith("Task 2: a coefficient of 0.35 instead of 0.50")


def test_the_end_of_a_run_names_its_warnings(tmp_path, monkeypatch):
    results = dict(enumerate(runs_of([{}, REGRET, {}], [{}, REGRET, CLIPPED])))
    monkeypatch.setattr(
        advice, "read_results", lambda path: results[int(path.parent.name.removeprefix("seed_"))]
    )
    regret, outside = advice.in_short(tmp_path, (0, 1))
    assert regret.startswith("warning, at 2 of 4 merges: Another coefficient would have been")
    assert outside.startswith("warning, at 1 of 4 merges: The quadratic model's minimum lies out")
    assert "--trust=shrink" in outside
    results[1] = results[0] = runs_of([{}, {}, UNDER])[0]
    assert advice.in_short(tmp_path, (0, 1)) == []


@pytest.mark.parametrize("kind", advice.TEXTS)
def test_what_a_warning_says_to_do_are_flags_that_exist(kind):
    *_, remedy = advice.TEXTS[kind]
    fields = {field.name for field in dataclasses.fields(Config)} | {"rules"}
    names = re.findall(r"--(\w+)", remedy)
    assert names and set(names) <= fields
    for name, value in re.findall(r"--(\w+)=([\w=]+)", remedy):
        if name not in ("rules", "curvature"):
            parse_setting(name, value)


def test_a_prediction_that_is_off_is_explained_with_the_regret_and_no_warning():
    assert advice.remark_on_predictions(runs_of([UNDER, {}])) is None
    unknown = advice.remark_on_predictions(runs_of([{}, UNDER, SOUND | {PREDICTION[0]: 0.1}]))
    assert unknown.heading == "The predicted loss change is off at 1 of 2 merges"
    assert "--landscape_points=21" in unknown.meaning and not unknown.remedy
    small = {**UNDER, "regret_accuracy": 0.004}
    harmless = advice.remark_on_predictions(runs_of([{}, small, {**small, "regret_accuracy": 0}]))
    assert "0.2 points more accurate in the mean, 0.4 at most" in harmless.meaning
    assert harmless.meaning.endswith("so nothing is to be done.")
    large = advice.remark_on_predictions(runs_of([{}, {**UNDER, **REGRET}]))
    assert large.meaning.endswith("see the warning above.")
