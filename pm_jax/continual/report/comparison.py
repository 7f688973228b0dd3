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
    results: Mapping[str, Sequence[Mapping[str, Any]]], apart: Collection[str] = ()
) -> list[Comparison]:
    """Order rules from the highest mean final accuracy to the lowest, the bounds `apart` last.

    Raises:
        InvalidInput: the rules were not run with the same seeds.
    """
    seeds = {label: [run["seed"] for run in runs] for label, runs in results.items()}
    reference, seeds_of_reference = next(iter(seeds.items()))
    for label, seeds_of_rule in seeds.items():
        if seeds_of_rule != seeds_of_reference:
            raise InvalidInput(
                f"seeds={_joined(seeds_of_rule)}: of {label}, those of {reference} are "
                f"{_joined(seeds_of_reference)}; only the same ones can be compared"
            )
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
            seconds=float(np.median([_learning_seconds(run) for run in runs])),
            state_bytes=float(np.mean([_number(run.get("rule_state_bytes")) for run in runs])),
        )
        for row, (label, runs) in enumerate(results.items())
    ]
    # Rules without a rank, whose rank is NaN and so differs from itself, come last.
    return sorted(
        comparisons,
        key=lambda row: (row.rank != row.rank, -_mean(row.figures["final_average_accuracy"])),
    )


def as_text(rows: Sequence[Comparison]) -> str:
    """Lay the rules out for a terminal; percent, mean +- standard deviation over the seeds."""
    return tables.as_text(_cells(rows))


def as_latex(rows: Sequence[Comparison]) -> str:
    """Write the same table as a LaTeX `tabular`, which needs no package."""
    return tables.as_latex(_cells(rows))


def as_records(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the numbers of the table, a flat dict a rule; fractions, seconds and bytes."""
    return [
        {
            "rule": row.rule,
            **{
                f"{name}_{statistic}": function(values)
                for name, values in row.figures.items()
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


def _cells(rows: Sequence[Comparison]) -> list[list[str]]:
    headings = FIGURES | MEASURED_ON_DEMAND
    names = (headings[name] for name in rows[0].figures)
    head = ["rule", *names, "rank", "to the best", "seconds", "state"]
    return [head] + [
        [
            row.rule,
            *(tables.percent(_mean(values), _deviation(values)) for values in row.figures.values()),
            f"{row.rank:.1f}" if np.isfinite(row.rank) else "-",
            tables.percent(row.difference, row.difference_error),
            f"{row.seconds:.1f}",
            _size(row.state_bytes),
        ]
        for row in rows
    ]


def _size(number: float) -> str:
    if not np.isfinite(number):
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def _learning_seconds(run: Mapping[str, Any]) -> float:
    return sum(run["seconds"].get(phase, 0.0) for phase in LEARNING_PHASES)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else NAN


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
