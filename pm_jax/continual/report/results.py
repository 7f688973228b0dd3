"""Reading results: their form is checked before any figure is read from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.continual.report import tables
from pm_jax.continual.storage.workdir import RESULTS_FILE
from pm_jax.types import InvalidInput

Results = Mapping[str, Any]
"""The content of a results.json."""

METRICS = (
    "final_average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "mean_regret_loss",
    "mean_regret_accuracy",
)
NUMBER = (int, float, type(None))
"""A figure that does not apply is `None`."""
FORM = {
    "seed": int,
    "accuracy_matrix": [[NUMBER]],
    "final_average_accuracy": NUMBER,
    "task_aware": {"final_average_accuracy": NUMBER},
    "merges": [{str: NUMBER}],
    "seconds": {str: (int, float)},
    "rule_state_bytes": int,
    "manifest": {"tasks": [{"classes": [int], "train": {"examples": int},
                            "validation": {"examples": int}, "test": {"examples": int}}]},
    "environment": {"python": str, "device": str, "devices": int, "packages": {str: object}},
}  # fmt: skip
"""Fields that every run writes, with their forms as `files.fits` reads them."""
COLUMNS = {
    "final accuracy": "final_average_accuracy",
    "AAA": "average_incremental_accuracy",
    "forgetting": "forgetting",
    "backward transfer": "backward_transfer",
    "learning accuracy": "learning_accuracy",
}
"""Columns of the table of summaries, by their headings."""


def problem_of(content: Any) -> str | None:
    """Say in a few words what is wrong with the content of a results.json; `None` for nothing."""
    if not isinstance(content, dict):
        return "is damaged"
    for name, form in FORM.items():
        if name in content and not files.fits(content[name], form):
            return f"is damaged at {name}"
    if missing := [name for name in FORM if name not in content]:
        return f"lacks {', '.join(missing)}"
    matrix, merges = content["accuracy_matrix"], content["merges"]
    if not matrix or any(len(row) != len(matrix) for row in matrix):
        return "is damaged at accuracy_matrix"
    if len(merges) != len(matrix) or any(merge.keys() != merges[0].keys() for merge in merges):
        return "is damaged at merges"
    for figures in (content, content["task_aware"]):
        for name in METRICS:
            if not files.fits(figures.get(name), NUMBER):
                return f"is damaged at {name}"
    return None


def read_results(path: Path) -> dict[str, Any]:
    """Read the results.json of a finished run.

    Raises:
        InvalidInput: the file is damaged, or a field is missing.
    """
    try:
        content = files.read_json(path)
        problem = problem_of(content)
    except ValueError:
        problem = "is damaged"
    if problem:
        raise InvalidInput(
            f"workdir={path.parent.parent}: {path.parent.name}/{path.name} {problem}; move it away "
            "to have it written again"
        )
    return content


def read_seeds(workdir: Path) -> list[dict[str, Any]]:
    """Read the results of all finished seeds of a work directory; raises `InvalidInput`."""
    results = [read_results(path) for path in sorted(workdir.glob(f"seed_*/{RESULTS_FILE}"))]
    # The names of folders put seed_10 before seed_2.
    return sorted(results, key=lambda content: content["seed"])


def summarize_seeds(workdir: Path) -> dict[str, Any]:
    """Compute summary.json: mean, sample deviation and seed count of every figure."""
    results = read_seeds(workdir)

    def figures(of: Sequence[Results]) -> dict[str, Any]:
        return {name: _spread([result.get(name) for result in of]) for name in METRICS}

    return {
        "seeds": [result["seed"] for result in results],
        **figures(results),
        "task_aware": figures([result["task_aware"] for result in results]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    numbers = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(numbers)) if numbers else float("nan"),
        "standard_deviation": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else float("nan"),
        "n": len(numbers),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out summaries side by side by label, in percent, with the deviation over seeds."""
    cells = [["rule", *COLUMNS]]
    for label, row in rows.items():
        figures = [row[name] for name in COLUMNS.values()]
        percents = (tables.percent(f["mean"], f["standard_deviation"]) for f in figures)
        cells.append([label, *percents])
    return tables.as_text(cells)


def accuracies_after_each_task(runs: Sequence[Results]) -> np.ndarray:
    """Average the accuracy over the tasks seen so far, after each task; float64 [S, T]."""
    matrices = [np.asarray(run["accuracy_matrix"], np.float64) for run in runs]
    return np.asarray(
        [[np.mean(row[: t + 1]) for t, row in enumerate(matrix)] for matrix in matrices]
    )


def of_merges(runs: Sequence[Results], name: str) -> np.ndarray:
    """Collect one figure of all merges, float64 [S, T]; NaN where it does not apply."""
    return np.asarray([[merge.get(name) for merge in run["merges"]] for run in runs], np.float64)
