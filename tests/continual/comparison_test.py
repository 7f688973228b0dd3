import math
import re

import pytest

from pm_jax.continual.report import comparison
from pm_jax.types import InvalidInput

# Final accuracies of three rules with three seeds, by hand:
# averages 0.7, 0.6, 0.5; differences to the first -0.2, 0.1, -0.2 and -0.1, -0.3, -0.2.
FINAL = {"good": [0.7, 0.6, 0.8], "fair": [0.5, 0.7, 0.6], "poor": [0.6, 0.3, 0.6]}


def run(seed, final, **changes):
    return {
        "seed": seed, "final_average_accuracy": final, "average_incremental_accuracy": 0.9,
        "forgetting": 0.1, "learning_accuracy": 0.8, "rule_state_bytes": 2000,
        "seconds": {"train": 1.0 + seed, "curvature": 0.5, "merge": 0.25, "evaluate": 9.0},
        **changes,
    }  # fmt: skip


@pytest.fixture
def rows():
    results = {label: [run(seed, value) for seed, value in enumerate(FINAL[label])]
               for label in ("poor", "good", "fair")}  # fmt: skip
    return comparison.compare(results)


def test_ranks_and_paired_differences_by_hand(rows):
    assert [row.rule for row in rows] == ["good", "fair", "poor"]
    # Ranks a seed: good 1 2 1, fair 3 1 2.5, poor 2 3 2.5.
    assert [row.rank for row in rows] == pytest.approx([4 / 3, 6.5 / 3, 7.5 / 3])
    assert [row.difference for row in rows] == pytest.approx([0, -0.1, -0.2])
    # Variances of the differences: ((.1)^2 + (.2)^2 + (.1)^2) / 2 = .03 and (.1^2 + .1^2) / 2.
    errors = [0, math.sqrt(0.03 / 3), math.sqrt(0.01 / 3)]
    assert [row.difference_error for row in rows] == pytest.approx(errors)
    assert rows[0].seconds == 2.75 and rows[0].state_bytes == 2000


def test_pairing_removes_what_a_seed_does_to_both():
    hard = comparison.paired_differences([[0.9, 0.5, 0.1], [0.8, 0.4, 0.0]], 0)
    assert hard[0] == pytest.approx([0, -0.1]) and hard[1] == pytest.approx([0, 0])


def test_bounds_are_shown_apart_and_never_the_best():
    accuracies = {"bound": 0.9, "poor": 0.5, "good": 0.75}
    results = {label: [run(seed, accuracy) for seed in (0, 1)]
               for label, accuracy in accuracies.items()}  # fmt: skip
    rows = comparison.compare(results, ["bound"])
    assert [row.rule for row in rows] == ["good", "poor", "bound"]
    assert [row.rank for row in rows[:2]] == [1, 2] and math.isnan(rows[2].rank)
    assert [row.difference for row in rows] == pytest.approx([0, -0.25, 0.15])
    assert " -     15.0 +- 0.0" in comparison.as_text(rows).splitlines()[3]


def test_the_renderings_hold_the_same_numbers(rows):
    text, latex, table = (f(rows) for f in (comparison.as_text, comparison.as_latex,
                                            comparison.as_csv))  # fmt: skip
    assert text.splitlines()[2].split("  ")[0] == "fair"
    for cell in ("60.0 +- 10.0", "2.2", "-10.0 +- 10.0", "2.0 kB"):
        assert cell in text.splitlines()[2]
        assert cell.replace("+-", r"$\pm$") in latex.splitlines()[5]
    assert latex.startswith(r"\begin{tabular}{lrrrrrrrr}") and latex.endswith(r"\end{tabular}")
    assert all(line.count(" & ") == 8 for line in latex.splitlines() if line.endswith(r"\\"))
    names, _, fair, _ = (line.split(",") for line in table.splitlines())
    found = dict(zip(names, fair, strict=True))
    assert float(found["final_average_accuracy_mean"]) == pytest.approx(0.6)
    assert float(found["final_average_accuracy_standard_deviation"]) == pytest.approx(0.1)
    assert float(found["difference_standard_error"]) == pytest.approx(0.1)


def test_one_seed_has_no_spread_and_what_is_not_known_is_a_dash():
    old = run(0, 0.5, forgetting=None)
    del old["rule_state_bytes"]
    row, = comparison.compare({"a_rule": [old]})  # fmt: skip
    text, latex, table = (f([row]) for f in (comparison.as_text, comparison.as_latex,
                                             comparison.as_csv))  # fmt: skip
    assert "+-" not in text and text.splitlines()[1].split()[-1] == "-"
    assert text.splitlines()[1].split()[3] == "-"
    assert r"a\_rule & 50.0 & 90.0 & - &" in re.sub(" +", " ", latex)
    assert "nan" not in table and ",," in table
    assert math.isnan(row.difference_error) and row.rank == 1


def test_other_seeds_cannot_be_paired():
    with pytest.raises(InvalidInput, match=r"seeds=0,2: of b, those of a are 0,1"):
        comparison.compare({"a": [run(0, 0.5), run(1, 0.5)], "b": [run(0, 0.5), run(2, 0.5)]})


def test_labels_with_settings_are_escaped_in_latex(rows):
    odd = rows[0]._replace(rule="ties+keep=50%_a&b")
    assert r"ties+keep=50\%\_a\&b & " in comparison.as_latex([odd])


def test_regret_is_a_column_where_a_run_has_it():
    assert "regret" not in comparison.as_text(comparison.compare({"a": [run(0, 0.5)]}))
    without = run(0, 0.25, mean_regret_accuracy=None)
    rows = comparison.compare({"a": [run(0, 0.5, mean_regret_accuracy=0.0125)], "b": [without]})
    heading, first, second = comparison.as_text(rows).splitlines()
    place = heading.index("regret")
    assert first[place:].split()[0] == "1.2" and second[place:].split()[0] == "-"
    assert comparison.as_records(rows)[0]["mean_regret_accuracy_mean"] == 0.0125


def with_scores(seed, final, other):
    """A run that shows the classifier trained, with the figures of a second one."""
    return run(seed, final, scores={"discriminant": {"test": {"final_average_accuracy": other}}})


def test_every_classifier_has_a_column_and_the_first_one_orders_the_rules():
    results = {
        "a": [with_scores(0, 0.5, 0.9), with_scores(1, 0.6, 0.8)],
        "b": [with_scores(0, 0.7, 0.6), with_scores(1, 0.6, 0.7)],
        "c": [run(0, 0.1), run(1, 0.1)],
    }
    rows = comparison.compare(results, classifiers=("trained", "discriminant"))
    assert [row.rule for row in rows] == ["b", "a", "c"]
    heading, _, second, third = comparison.as_text(rows).splitlines()
    assert heading.startswith("rule  final accuracy, test: trained  final, discriminant  AAA  ")
    place = heading.index("final, discriminant")
    assert second[place:].startswith("85.0 +- 7.1") and "55.0 +- 7.1" in second[:place]
    assert third[place:].startswith("- ")
    record = comparison.as_records(rows)[1]
    assert record["final_average_accuracy_discriminant_mean"] == pytest.approx(0.85)
    assert record["final_average_accuracy_trained_mean"] == pytest.approx(0.55)
    assert (record["split"], record["classifier"]) == ("test", "trained")
    assert "final, discriminant" in comparison.as_latex(rows)
    assert comparison.caption(rows) == (
        "Accuracies in percent on test data; AAA and what follows are with the classifier trained."
    )


def test_the_split_is_named_wherever_an_accuracy_stands(rows):
    assert "final accuracy, test" in comparison.as_text(rows).splitlines()[0]
    validated = comparison.compare({"a": [run(0, 0.5)]}, split="validation")
    for text in (comparison.as_text(validated), comparison.as_latex(validated)):
        assert "final accuracy, validation" in text
    assert comparison.as_records(validated)[0]["split"] == "validation"
    assert comparison.caption(validated) == "Accuracies in percent on validation data."
    assert comparison.file_stem("comparison", "test") == "comparison"
    assert comparison.file_stem("comparison", "validation") == "comparison_validation"
