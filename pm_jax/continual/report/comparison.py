"""Merge rules side by side over the same seeds: ranks, paired differences, and tables of them.

References:
    Demsar, `Statistical Comparisons of Classifiers over Multiple Data Sets
    <https://jmlr.org/papers/v7/demsar06a.html>`_, JMLR 2006 (ranks with ties)
"""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pm_jax.types import InvalidInput

FIGURES = {
    "final_average_accuracy": "final accuracy",
    "average_incremental_accuracy": "AAA",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
}
"""Figures of a run that are compared, and their headings; fractions."""
MEASURED_ON_DEMAND = {"mean_regret_accuracy": "regret"}
"""The same of runs that were made with landscapes; compared where one of them was."""
LEARNING_PHASES = ("train", "curvature", "merge", "classifier")
NAN = float("nan")


class Comparison(NamedTuple):
    """A merge rule beside the others.

    Attributes:
        rule: its label.
        figures: `{name: values over the seeds}`, fractions, NaN where a figure does not apply.
        rank: mean over the seeds of its rank by final accuracy, 1 for the best; NaN for what is
            shown apart.
        difference: mean over the seeds of its final accuracy less that of the best ranked rule.
        difference_error: standard error of that mean; NaN for one seed.
        seconds: median over the seeds of training, measuring curvature and merging a whole stream,
            as if the rule were run by itself. The first seed of a rule also compiles.
        state_bytes: what the rule carries at the end of the stream; NaN if it is not known.
    """

    rule: str
    figures: dict[str, list[float]]
    rank: float
    difference: float
    difference_error: float
    seconds: float
    state_bytes: float


def ranks(accuracies) -> np.ndarray:
    """Rank of each rule for each seed, 1 for the highest accuracy; ties share their mean rank.

    Args:
        accuracies: [R, S].

    Returns:
        float64 [R, S].

    Example:
        >>> ranks([[0.9, 0.5], [0.8, 0.5], [0.7, 0.6]]).tolist()
        [[1.0, 2.5], [2.0, 2.5], [3.0, 1.0]]
    """
    from scipy.stats import rankdata

    return rankdata(-np.asarray(accuracies, np.float64), axis=0)


def paired_differences(accuracies, best: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences to one of the rules, seed by seed: their mean and its error.

    Args:
        accuracies: [R, S]; a column holds the same seed of every rule.
        best: the row to compare with.

    Returns:
        Mean [R] and its standard error [R], the sample standard deviation of the differences over
        sqrt(S); NaN for one seed.

    Example:
        >>> mean, error = paired_differences([[0.5, 0.5], [0.5, 0.25]], 0)
        >>> mean.tolist(), error.tolist()
        ([0.0, -0.125], [0.0, 0.125])
    """
    values = np.asarray(accuracies, np.float64)
    differences = values - values[best]
    return differences.mean(axis=1), np.asarray([_standard_error(row) for row in differences])


def compare(
    results: Mapping[str, Sequence[Mapping[str, Any]]], apart: Collection[str] = ()
) -> list[Comparison]:
    """The rules from the highest mean final accuracy to the lowest.

    Args:
        results: for each label the contents of `results.json`, of the same seeds in the same order.
        apart: labels of bounds that are no methods: last, without a rank, and never the best.

    Returns:
        One `Comparison` each.

    Raises:
        InvalidInput: rules whose seeds are not the same.

    Example:
        >>> run = dict.fromkeys(FIGURES, 0.5) | {"seed": 0, "seconds": {"train": 1.0}}
        >>> first, second = compare({"a": [run], "b": [run | {"final_average_accuracy": 0.75}]})
        >>> first.rule, second.rank, second.difference
        ('b', 2.0, -0.25)
    """
    seeds = {label: [run["seed"] for run in runs] for label, runs in results.items()}
    for label, own in seeds.items():
        if own != next(iter(seeds.values())):
            raise InvalidInput(
                f"seeds={_joined(own)}: of {label}, those of {next(iter(seeds))} are "
                f"{_joined(next(iter(seeds.values())))}; only the same ones can be compared"
            )
    final = [[run["final_average_accuracy"] for run in runs] for runs in results.values()]
    labels = list(results)
    ranked = [row for row, label in enumerate(labels) if label not in apart] or range(len(labels))
    values = np.asarray(final, np.float64)
    rank = np.full(len(labels), NAN)
    rank[ranked] = ranks(values[ranked]).mean(axis=1)
    best = max(ranked, key=lambda row: values[row].mean())
    difference, error = paired_differences(values, best)
    runs_of_all = [run for runs in results.values() for run in runs]
    names = [*FIGURES, *(name for name in MEASURED_ON_DEMAND
                         if any(run.get(name) is not None for run in runs_of_all))]  # fmt: skip
    found = [
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
    return sorted(
        found, key=lambda row: (row.rank != row.rank, -_mean(row.figures["final_average_accuracy"]))
    )


def as_text(rows: Sequence[Comparison]) -> str:
    """A table to read; percent, mean +- standard deviation over the seeds.

    Args:
        rows: of `compare`.

    Returns:
        Lines of text.

    Example:
        >>> figures = dict.fromkeys(FIGURES, [0.5, 0.75])
        >>> print(as_text([Comparison("magmax", figures, 1.5, -0.25, 0.125, 3.25, 2.5e6)]))
        rule    final accuracy  AAA          forgetting   ... rank  to the best    seconds  state
        magmax  62.5 +- 17.7    62.5 +- 17.7 62.5 +- 17.7 ... 1.5   -25.0 +- 12.5  3.2      2.5 MB
    """
    cells = _cells(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def as_latex(rows: Sequence[Comparison]) -> str:
    r"""The same table as a LaTeX `tabular`; it needs no package.

    Args:
        rows: of `compare`.

    Returns:
        Lines of LaTeX.

    Example:
        >>> figures = dict.fromkeys(FIGURES, [0.5])
        >>> row = Comparison("perturb_and_merge", figures, 1.0, 0.0, NAN, 3.0, 10.0)
        >>> print(as_latex([row]).splitlines()[4])
        perturb\_and\_merge & 50.0 & 50.0 & 50.0 & 50.0 & 1.0 & 0.0 & 3.0 & 10 B \\
    """
    special = {"\\": r"\textbackslash{}", **{mark: f"\\{mark}" for mark in "_%&#${}"}}

    def line(cells: Sequence[str]) -> str:
        escaped = ("".join(special.get(mark, mark) for mark in cell) for cell in cells)
        return " & ".join(escaped).replace("+-", r"$\pm$") + r" \\"

    head, *body = (line(cells) for cells in _cells(rows))
    columns = "l" + "r" * head.count(" & ")
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline"]
        + [r"\end{tabular}"]
    )


def as_records(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The numbers of the table, for JSON; fractions, seconds and bytes.

    Args:
        rows: of `compare`.

    Returns:
        One flat dict a rule.

    Example:
        >>> figures = dict.fromkeys(FIGURES, [0.5, 0.75])
        >>> record, = as_records([Comparison("magmax", figures, 1.5, -0.25, 0.125, 3.25, 8.0)])
        >>> record["forgetting_mean"], record["rank"], record["difference_standard_error"]
        (0.625, 1.5, 0.125)
    """
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
    """The numbers of `as_records` with a line of names; empty where a number does not apply.

    Args:
        rows: of `compare`.

    Returns:
        Lines of CSV.

    Example:
        >>> figures = dict.fromkeys(FIGURES, [0.5])
        >>> as_csv([Comparison("magmax", figures, 1.0, 0.0, NAN, 3.0, 8.0)]).splitlines()[1]
        'magmax,0.5,,0.5,,0.5,,0.5,,1.0,0.0,,3.0,8.0'
    """
    records = as_records(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(records[0])
    for record in records:
        writer.writerow("" if value != value else value for value in record.values())
    return text.getvalue()


def _cells(rows: Sequence[Comparison]) -> list[list[str]]:
    headings = FIGURES | MEASURED_ON_DEMAND
    names = (headings[name] for name in rows[0].figures)
    head = ["rule", *names, "rank", "to the best", "seconds", "state"]
    return [head] + [
        [
            row.rule,
            *(_percent(_mean(values), _deviation(values)) for values in row.figures.values()),
            f"{row.rank:.1f}" if np.isfinite(row.rank) else "-",
            _percent(row.difference, row.difference_error),
            f"{row.seconds:.1f}",
            _size(row.state_bytes),
        ]
        for row in rows
    ]


def _percent(mean: float, spread: float) -> str:
    if not np.isfinite(mean):
        return "-"
    return f"{100 * mean:.1f}" + (f" +- {100 * spread:.1f}" if np.isfinite(spread) else "")


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


def _standard_error(values: Sequence[float]) -> float:
    return _deviation(values) / len(values) ** 0.5


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
