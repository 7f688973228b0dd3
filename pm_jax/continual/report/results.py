"""Reading results: their form is checked before any figure is read from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax import files, rules
from pm_jax.continual.report import tables
from pm_jax.continual.settings.settings import SPLITS
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
SCORES = {
    "accuracy_matrix": [[NUMBER]],
    "task_aware": {"final_average_accuracy": NUMBER},
    **dict.fromkeys(METRICS[:6], NUMBER),
}
"""The form of the figures of one classifier on one split."""
COLUMNS = {
    "final accuracy": "final_average_accuracy",
    "AAA": "average_incremental_accuracy",
    "forgetting": "forgetting",
    "backward transfer": "backward_transfer",
    "learning accuracy": "learning_accuracy",
}
"""Columns of the table of summaries, by their headings."""
MERGE_NOTHING = ("frozen", "first_session", "sequential", "joint")
"""Rules after which the model is one that was trained, or the one before it."""


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
    by_class = content.get("class_accuracy", [])
    if not files.fits(by_class, [NUMBER]):
        return "is damaged at class_accuracy"
    names = content["manifest"].get("class_names", [])
    if not files.fits(names, [str]) or (names and by_class and len(names) != len(by_class)):
        return "is damaged at class_names"
    return _problem_of_scores(content)


def _problem_of_scores(content: Results) -> str | None:
    """Say what is wrong with the figures by classifier and split; earlier versions wrote none."""
    scores, config = content.get("scores", {}), content.get("config", {})
    if not files.fits(scores, {str: {split: SCORES for split in SPLITS}}):
        return "is damaged at scores"
    size = len(content["accuracy_matrix"])
    matrices = (part["accuracy_matrix"] for parts in scores.values() for part in parts.values())
    if any([len(row) for row in matrix] != [size] * size for matrix in matrices):
        return "is damaged at scores"
    if not files.fits(config, {str: object}) or not files.fits(config.get("classifier", ""), str):
        return "is damaged at config"
    names = content.get("classifiers", [*scores, "trained"][:1])
    if not files.fits(names, [str]) or not names or (scores and list(scores) != names):
        return "is damaged at classifiers"
    splits = [each.get("evaluate_on", "test") for each in (content, config)]
    if any(split not in SPLITS for split in splits):
        return "is damaged at evaluate_on"
    return None


class Shown(NamedTuple):
    """The figures at the top of a content: those of a classifier on a split."""

    classifier: str
    split: str

    @classmethod
    def of(cls, content: Results) -> "Shown":
        """Read them from a content; that of an earlier version has them in its settings."""
        config = content.get("config", {})
        return cls(
            content.get("classifiers", [config.get("classifier", "trained")])[0],
            content.get("evaluate_on", config.get("evaluate_on", "test")),
        )


def classifiers_of(content: Results) -> list[str]:
    """List the classifiers whose figures a content has, the first of which is shown."""
    return list(content.get("classifiers", [Shown.of(content).classifier]))


def view(
    content: Results, classifier: str | None = None, split: str | None = None
) -> dict[str, Any]:
    """Return results that show a classifier on a split: the figures at their top are its own.

    `None` leaves what is shown as it is.

    Raises:
        InvalidInput: these results do not have such figures.
    """
    before = Shown.of(content)
    wanted = Shown(classifier or before.classifier, split or before.split)
    names = classifiers_of(content)
    order = [wanted.classifier, *(name for name in names if name != wanted.classifier)]
    named = {"classifiers": order, "evaluate_on": wanted.split}
    if wanted == before:
        return {**content, **named}
    figures = content.get("scores", {}).get(wanted.classifier, {}).get(wanted.split)
    if figures is None:
        seed = content.get("seed")
        if wanted.classifier not in names:
            raise InvalidInput(
                f"classifiers={wanted.classifier}: seed {seed} has figures of {', '.join(names)} "
                "only; choose of them, or run it with this one in another work directory"
            )
        raise InvalidInput(
            f"evaluate_on={wanted.split}: seed {seed} has figures on {before.split} data only, as "
            "an earlier version measured them; show these, or run it in another work directory"
        )
    return {**content, **figures, **named}


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


def summarize_seeds(workdir: Path, split: str | None = None) -> dict[str, Any]:
    """Compute summary.json: mean, sample deviation and seed count of every figure.

    Raises:
        InvalidInput: a file is damaged, or has no figures on that split.
    """
    return summarize([view(result, split=split) for result in read_seeds(workdir)])


def summarize(results: Sequence[Results]) -> dict[str, Any]:
    """Compute mean, sample deviation and count of every figure of some seeds, as they are shown.

    `alpha` has the lowest and the highest merge coefficient of a task after the first.
    """

    def figures(of: Sequence[Results]) -> dict[str, Any]:
        aware = [result["task_aware"] for result in of]
        return {
            **{name: _spread([result.get(name) for result in of]) for name in METRICS},
            "task_aware": {n: _spread([result.get(n) for result in aware]) for n in METRICS},
        }

    alphas = of_merges(results, "alpha")[:, 1:]
    alphas = alphas[np.isfinite(alphas)]
    return {
        "seeds": [result["seed"] for result in results],
        "evaluate_on": Shown.of(results[0]).split,
        "classifiers": classifiers_of(results[0]),
        "alpha": [float(f(alphas)) for f in (np.min, np.max)] if len(alphas) else None,
        **figures(results),
        "scores": {
            name: {
                split: figures([result["scores"][name][split] for result in results])
                for split in SPLITS
            }
            for name in classifiers_of(results[0])
            if all(name in result.get("scores", {}) for result in results)
        },
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    numbers = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(numbers)) if numbers else float("nan"),
        "standard_deviation": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else float("nan"),
        "n": len(numbers),
        "values": list(values),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out summaries side by side by label, in percent, with the deviation over seeds.

    The corner names the split, and the classifier where there are several; each of the others has
    a column of its final accuracy. A row that shows something else says so.
    """
    shown = [_shown(row) for row in rows.values()]
    others = dict.fromkeys(
        name
        for row in rows.values()
        for name in row.get("scores", {})
        if name not in row["classifiers"][:1]
    )
    alike = len(set(shown)) == 1
    final, *rest = COLUMNS
    corner = f"rule ({shown[0]})" if alike else "rule"
    cells = [[corner, final, *(f"final, {name}" for name in others), *rest]]
    for (label, row), what in zip(rows.items(), shown, strict=True):
        own = row["evaluate_on"] if "evaluate_on" in row else None
        by_name = {name: splits.get(own, {}) for name, splits in row.get("scores", {}).items()}
        first, *more = [row[name] for name in COLUMNS.values()]
        figures = [first, *(by_name.get(n, {}).get(COLUMNS[final]) for n in others), *more]
        percents = (
            tables.percent(f["mean"], f["standard_deviation"]) if f else "-" for f in figures
        )
        cells.append([label if alike else f"{label} ({what})", *percents])
    return tables.as_text(cells)


def _shown(summary: Mapping[str, Any]) -> str:
    """Say what a summary shows; that of an earlier version says nothing of it."""
    names = summary.get("classifiers", [])
    split = f"{summary['evaluate_on']} split" if "evaluate_on" in summary else "split not known"
    return ", ".join([split, *(names[:1] if len(names) > 1 else ())])


def has_coefficient(config: Mapping[str, Any]) -> bool:
    """Return whether the rule of a run merges by coefficients, so that its alphas compare.

    Others keep a model as it is, or scale a task vector that starts from the pre-trained model.
    """
    try:
        needs = rules.make(config.get("rule", ""), config.get("rule_settings", "")).needs
    except InvalidInput:
        return False
    return needs.next_task_from == "merged" and config["rule"] not in MERGE_NOTHING


def accuracies_after_each_task(runs: Sequence[Results]) -> np.ndarray:
    """Average the accuracy over the tasks seen so far, after each task; float64 [S, T]."""
    matrices = [np.asarray(run["accuracy_matrix"], np.float64) for run in runs]
    return np.asarray(
        [[np.mean(row[: t + 1]) for t, row in enumerate(matrix)] for matrix in matrices]
    )


def of_merges(runs: Sequence[Results], name: str) -> np.ndarray:
    """Collect one figure of all merges, float64 [S, T]; NaN where it does not apply."""
    return np.asarray([[merge.get(name) for merge in run["merges"]] for run in runs], np.float64)
