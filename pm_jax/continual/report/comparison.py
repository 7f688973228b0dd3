"""Comparison of merge rules over the same seeds: ranks, paired differences, and tables of them.

References:
    Demsar, `Statistical Comparisons of Classifiers over Multiple Data Sets
    <https://jmlr.org/papers/v7/demsar06a.html>`_, JMLR 2006 (ranks with ties)
"""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pm_jax.continual.report import tables
from pm_jax.types import InvalidInput

FIGURES = {
    "final_average_accuracy": "final accuracy",
    "average_incremental_accuracy": "AAA",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
}
"""Figures that are compared, by their headings; fractions."""
MEASURED_ON_DEMAND = {"mean_regret_accuracy": "regret"}
"""Figures of runs with landscapes; compared if one of the runs has them."""
LEARNING_PHASES = ("train", "curvature", "merge", "classifier")
"""Seconds of these phases count; those of evaluation and analysis do not."""
NAN = float("nan")
Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Contents of results.json by rule, one a seed."""


class Comparison(NamedTuple):
    """Figures of one merge rule, beside those of the others."""

    rule: str
    # Values over the seeds by name; fractions, NaN where a figure does not apply.
    figures: dict[str, list[float]]
    # Mean over the seeds of its rank by final accuracy, 1 for the best; NaN for a bound.
    rank: float
    # Mean over the seeds of its final accuracy less that of the best ranked rule.
    difference: float
    # Standard error of that mean; NaN for one seed.
    difference_error: float
    # Median over the seeds of training, measuring curvature and merging a whole stream, as if the
    # rule ran alone. The first seed of a rule also compiles.
    seconds: float
    # Size of what the rule carries at the end of the stream; NaN if unknown.
    state_bytes: float
    # Split that all accuracies are of, and the classifier that all but `by_classifier` are of.
    split: str = "test"
    classifier: str = "trained"
    # Final accuracy of each classifier over the seeds; fractions, NaN where a run lacks it.
    by_classifier: Mapping[str, list[float]] = {}


def ranks(accuracies) -> np.ndarray:
    """Rank the rules for each seed, [R, S]: 1 for the highest accuracy, the mean rank for ties."""
    from scipy.stats import rankdata

    return rankdata(-np.asarray(accuracies, np.float64), axis=0)


def paired_differences(accuracies, best: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare accuracies [R, S] with row `best`: mean difference over seeds and its error, [R]."""
    values = np.asarray(accuracies, np.float64)
    differences = values - values[best]
    deviations = np.asarray([_deviation(row) for row in differences])
    return differences.mean(axis=1), deviations / values.shape[1] ** 0.5


def compare(
    results: Results,
    apart: Collection[str] = (),
    *,
    split: str = "test",
    classifiers: Sequence[str] = ("trained",),
) -> list[Comparison]:
    """Order rules from the highest mean final accuracy to the lowest, the bounds `apart` last.

    The figures at the top of the results are those of a split and of the first of the classifiers.

    Raises:
        InvalidInput: the rules were not run with the same seeds.
    """
    _check_seeds(results)
    final = [[run["final_average_accuracy"] for run in runs] for runs in results.values()]
    labels = list(results)
    # Where there are bounds only, they are ranked among themselves.
    ranked = [row for row, label in enumerate(labels) if label not in apart] or range(len(labels))
    values = np.asarray(final, np.float64)
    rank = np.full(len(labels), NAN)
    rank[ranked] = ranks(values[ranked]).mean(axis=1)
    best = max(ranked, key=lambda row: values[row].mean())
    difference, error = paired_differences(values, best)
    measured = {
        name
        for runs in results.values()
        for run in runs
        for name in MEASURED_ON_DEMAND
        if run.get(name) is not None
    }
    names = [*FIGURES, *(name for name in MEASURED_ON_DEMAND if name in measured)]
    comparisons = [
        Comparison(
            rule=label,
            figures={name: [_number(run.get(name)) for run in runs] for name in names},
            rank=float(rank[row]),
            difference=float(difference[row]),
            difference_error=float(error[row]),
            seconds=median_seconds(runs),
            state_bytes=float(np.mean([_number(run.get("rule_state_bytes")) for run in runs])),
            split=split,
            classifier=classifiers[0],
            by_classifier={
                classifiers[0]: [run["final_average_accuracy"] for run in runs],
                **{c: [final_accuracy(run, c, split) for run in runs] for c in classifiers[1:]},
            },
        )
        for row, (label, runs) in enumerate(results.items())
    ]
    # Rules without a rank, whose rank is NaN and so differs from itself, come last.
    return sorted(
        comparisons,
        key=lambda row: (row.rank != row.rank, -_mean(row.figures["final_average_accuracy"])),
    )


def final_accuracy(run: Mapping[str, Any], classifier: str, split: str) -> float:
    """Return a run's final accuracy with one of its classifiers; NaN for one that it has not."""
    scores = run.get("scores", {}).get(classifier, {}).get(split)
    return _number(scores["final_average_accuracy"]) if scores else NAN


def file_stem(name: str, split: str) -> str:
    """Return the name of a file about a split; those about test data are the plain ones."""
    return name if split == "test" else f"{name}_{split}"


def caption(rows: Sequence[Comparison]) -> str:
    """Say in a sentence of which split and classifier the figures of a table are."""
    split, classifier, several = rows[0].split, rows[0].classifier, len(rows[0].by_classifier) > 1
    of_first = f"; AAA and what follows are with the classifier {classifier}" if several else ""
    return f"Accuracies in percent on {split} data{of_first}."


def all_figures(row: Comparison) -> dict[str, list[float]]:
    """Return the figures of a row, with the final accuracy of each of several classifiers."""
    several = row.by_classifier if len(row.by_classifier) > 1 else {}
    by_name = {f"final_average_accuracy_{name}": values for name, values in several.items()}
    return {**row.figures, **by_name}


def as_text(rows: Sequence[Comparison]) -> str:
    """Lay the rules out for a terminal; percent, mean +- standard deviation over the seeds."""
    return tables.as_text(cells(rows))


def as_latex(rows: Sequence[Comparison]) -> str:
    """Write the same table as a LaTeX `tabular`, which needs no package."""
    return tables.as_latex(cells(rows))


def as_records(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the numbers of the table, a flat dict a rule; fractions, seconds and bytes."""
    return [
        {
            "rule": row.rule,
            "split": row.split,
            "classifier": row.classifier,
            **{
                f"{name}_{statistic}": function(values)
                for name, values in all_figures(row).items()
                for statistic, function in (("mean", _mean), ("standard_deviation", _deviation))
            },
            "rank": row.rank,
            "difference_to_best": row.difference,
            "difference_standard_error": row.difference_error,
            "seconds": row.seconds,
            "rule_state_bytes": row.state_bytes,
        }
        for row in rows
    ]


def as_csv(rows: Sequence[Comparison]) -> str:
    """Write the numbers of `as_records` as CSV; empty where a number does not apply."""
    records = as_records(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(records[0])
    for record in records:
        # Only NaN differs from itself.
        writer.writerow("" if value != value else value for value in record.values())
    return text.getvalue()


def _headings(row: Comparison) -> dict[str, str]:
    """Return the headings of a table by the names in `all_figures`."""
    first, others = f"final accuracy, {row.split}", FIGURES | MEASURED_ON_DEMAND
    classifiers = {f"final_average_accuracy_{name}": name for name in row.by_classifier}
    if len(classifiers) < 2:
        return {name: others[name] for name in row.figures} | {"final_average_accuracy": first}
    # The column of the first classifier stands for the final accuracy.
    columns = list(classifiers)
    return {
        columns[0]: f"{first}: {row.classifier}",
        **{name: f"final, {classifiers[name]}" for name in columns[1:]},
        **{name: others[name] for name in row.figures if name != "final_average_accuracy"},
    }


def cells(rows: Sequence[Comparison]) -> list[list[str]]:
    """Lay the rules out as rows of text below a heading."""
    headings = _headings(rows[0])
    head = ["rule", *headings.values(), "rank", "to the best", "seconds", "state"]
    return [head] + [
        [
            row.rule,
            *(
                tables.percent(_mean(values), _deviation(values))
                for values in map(all_figures(row).__getitem__, headings)
            ),
            f"{row.rank:.1f}" if np.isfinite(row.rank) else "-",
            tables.percent(row.difference, row.difference_error),
            f"{row.seconds:.1f}",
            _size(row.state_bytes),
        ]
        for row in rows
    ]


def _check_seeds(results: Results) -> None:
    seeds = {label: [run["seed"] for run in runs] for label, runs in results.items()}
    reference, seeds_of_reference = next(iter(seeds.items()))
    for label, seeds_of_rule in seeds.items():
        if seeds_of_rule != seeds_of_reference:
            raise InvalidInput(
                f"seeds={_joined(seeds_of_rule)}: of {label}, those of {reference} are "
                f"{_joined(seeds_of_reference)}; only the same ones can be compared"
            )


def _size(number: float) -> str:
    if not np.isfinite(number):
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def median_seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds in which a rule learns a whole stream, the median over the seeds."""
    phases = [[run["seconds"].get(phase, 0.0) for phase in LEARNING_PHASES] for run in runs]
    return float(np.median(np.sum(phases, axis=1)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else NAN


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
