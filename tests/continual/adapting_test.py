import math

import pytest

from pm_jax.continual.report import adapting

TASKS = [{"test": {"examples": 100}, "validation": {"examples": 25}},
         {"test": {"examples": 50}, "validation": {"examples": 10}}]  # fmt: skip


def run(seed, final, seconds=10.0, **by_classifier):
    """A run of two tasks whose final accuracies lie .1 around their mean, on test data."""
    figures = {"trained": final, **by_classifier}
    return {
        "seed": seed,
        "final_average_accuracy": final,
        "seconds": {"train": seconds, "classifier": 1.0, "evaluate": 99.0},
        "manifest": {"tasks": TASKS},
        "scores": {
            name: {
                split: {
                    "final_average_accuracy": value - shift,
                    "accuracy_matrix": [[0.5, None], [value - shift - 0.1, value - shift + 0.1]],
                }
                for split, shift in (("test", 0.0), ("validation", 0.25))
            }
            for name, value in figures.items()
        },
    }


def verdict(results, classifiers=("trained",), split="test"):
    adapted = [label for label in results if label not in ("frozen", "joint")]
    frozen = [label for label in results if label == "frozen"]
    return adapting.verdict(results, frozen, adapted, split=split, classifiers=classifiers)


def test_adapting_pays_where_the_paired_difference_is_beyond_its_error():
    # Differences of the better rule: .10, .12, .08, with the standard error .02 / sqrt(3).
    found = verdict({
        "frozen": [run(0, 0.4, 2.0), run(1, 0.5, 2.0), run(2, 0.6, 2.0)],
        "merging": [run(0, 0.5, 20.0), run(1, 0.62, 30.0), run(2, 0.68, 25.0)],
        "sequential": [run(0, 0.3), run(1, 0.4), run(2, 0.5)],
        "joint": [run(0, 0.9), run(1, 0.9), run(2, 0.9)],
    })  # fmt: skip
    assert (found.rule, found.rules, found.pays, found.seeds) == ("merging", 2, True, 3)
    assert found.difference == pytest.approx(0.1)
    assert found.error == pytest.approx(0.02 / math.sqrt(3))
    assert (found.seconds, found.frozen_seconds) == (26, 3)
    assert found.sentence() == (
        "Adapting pays on this stream: merging, the best of 2 adapted rules, has +10.0 +- 1.2 "
        "points over the frozen model with the classifier trained (60.0 against 50.0 on test data; "
        "paired over 3 seeds, standard error), and learns in 26.0 s instead of 3.0 s."
    )
    assert found.as_record()["sentence"] == found.sentence()


def test_adapting_does_not_pay_where_the_frozen_model_is_ahead():
    found = verdict({
        "frozen": [run(0, 0.9), run(1, 0.92)], "merging": [run(0, 0.89), run(1, 0.91)],
    })  # fmt: skip
    assert found.pays is False and found.difference == pytest.approx(-0.01)
    start = "Adapting does not pay on this stream: merging, the adapted rule, has -1.0 +- 0.0"
    assert found.sentence().startswith(start)


def test_a_gain_within_twice_its_error_is_not_called_one():
    # Differences .1 and -.06: mean .02, standard error .08.
    found = verdict({
        "frozen": [run(0, 0.5), run(1, 0.56)], "merging": [run(0, 0.6), run(1, 0.5)],
    })  # fmt: skip
    assert found.error == pytest.approx(0.08) and found.pays is None
    assert found.sentence().startswith("It is not clear whether adapting pays on this stream: ")


def test_one_seed_has_the_binomial_error_of_its_examples():
    found = verdict({"frozen": [run(0, 0.4)], "merging": [run(0, 0.6)]})
    # A mean over two tasks of 100 and 50 examples: variances by hand, of .3, .5 and of .5, .7.
    variance = (0.3 * 0.7 / 100 + 0.5 * 0.5 / 50 + 0.5 * 0.5 / 100 + 0.7 * 0.3 / 50) / 4
    assert found.error == pytest.approx(math.sqrt(variance)) and found.pays
    assert "+20.0 +- 5.9 points" in found.sentence()
    assert "on test data; one seed, binomial error of 150 examples)" in found.sentence()
    other = verdict({"frozen": [run(0, 0.5)], "merging": [run(0, 0.7)]}, split="validation")
    assert other.examples == 35 and "(45.0 against 25.0 on validation data; " in other.sentence()


def test_both_have_the_classifier_with_which_either_is_best():
    names = ("trained", "discriminant")
    # With trained columns adapting gains 30 points, with the discriminant it loses 2.
    results = {
        "frozen": [run(0, 0.5, discriminant=0.92), run(1, 0.5, discriminant=0.94)],
        "merging": [run(0, 0.8, discriminant=0.9), run(1, 0.8, discriminant=0.9)],
        "other": [run(0, 0.7, discriminant=0.91), run(1, 0.7, discriminant=0.91)],
    }
    found = verdict(results, names)
    assert (found.classifier, found.rule, found.pays) == ("discriminant", "other", False)
    assert found.difference == pytest.approx(-0.02)
    assert verdict(results, ("trained",)).pays
    # A classifier that the frozen model lacks decides nothing.
    del results["frozen"][0]["scores"]["discriminant"]
    assert verdict(results, names).classifier == "trained"


def test_without_a_frozen_model_or_a_rule_that_adapts_nothing_is_said():
    assert verdict({"merging": [run(0, 0.5)]}) is None
    assert verdict({"frozen": [run(0, 0.5)], "joint": [run(0, 0.9)]}) is None
