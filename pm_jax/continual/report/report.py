"""The report of a finished run: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax.continual.report import advice, along, figures, sentences
from pm_jax.continual.report.finished_run import FinishedRun, read_run, training_losses
from pm_jax.continual.report.page import Captioned, capitalized, captioned, render, spread, table
from pm_jax.continual.report.results import (
    COLUMNS,
    Results,
    has_coefficient,
    of_merges,
    summarize,
    view,
)
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import SPLITS
from pm_jax.continual.storage import logs, manifest
from pm_jax.continual.storage.workdir import RESULTS_FILE, saved_form, write_text
from pm_jax.data.several import title_of
from pm_jax.types import InvalidInput

FILE = "report.html"
METRICS = {
    "final_average_accuracy": "final average accuracy, over the tasks after the last one",
    "average_incremental_accuracy": "average incremental accuracy, over the tasks seen, over time",
    "learning_accuracy": "learning accuracy, of a task right after its merge",
    "forgetting": "forgetting, the drop from a task's best accuracy",
    "backward_transfer": "backward transfer, the change since a task's merge",
    "forward_transfer": "forward transfer, the change of a task before its training",
    "mean_regret_accuracy": "regret against the best coefficients, on validation data",
}
MERGES = {
    "alpha": "coefficient",
    "alpha_raw": "coefficient before clipping",
    "numerator": "numerator of the closed form",
    "denominator": "denominator of the closed form",
    "standard_error": "standard error of the coefficient",
    "predicted_loss_change": "predicted change of the task's loss",
    "actual_loss_change": "measured change of the task's loss",
    "loss_change_ratio": "measured over predicted change",
    "degenerate": "share of coefficients without a minimum",
    "oracle_alpha": "coefficient of the least validation loss",
    "regret_loss": "regret, loss",
    "most_accurate_alpha": "coefficient of the best validation accuracy",
    "regret_accuracy": "regret, accuracy",
}
PHASES = {
    **logs.PHASES,
    "landscape": "measuring along the merges",
    "this_process": "in all (the last process)",
}


def write_report(workdir: Path, split: str | None = None) -> Path:
    """Write the report of a run, and of the baseline in `workdir/baseline`, if there is one.

    Without a split, it shows the one that the run was started with.

    Raises:
        InvalidInput: the directory has no finished run, a damaged file, or no figures on the split.
        ImportError: matplotlib is not installed.
    """
    try:
        runs = [read_run(workdir, split=split)]
        if any((workdir / "baseline").glob(f"seed_*/{RESULTS_FILE}")):
            runs.append(read_run(workdir / "baseline", " (baseline)", runs[0].split))
        page = _page(runs)
        with manifest.covering(workdir, FILE):
            write_text(workdir / FILE, page)
    except OSError as error:
        raise InvalidInput(
            f"workdir={workdir}: {error.filename or FILE} cannot be read or written "
            f"({error.strerror}); set its permissions right, make room or move it away"
        ) from error
    return workdir / FILE


def _page(runs: Sequence[FinishedRun]) -> str:
    """Fill the template; its names are the keys of the dicts put together here."""
    run = runs[0]
    return render(
        "report.html.jinja",
        **_heading(runs),
        **settings({run.label: run.config for run in runs}),
        **_metrics(runs),
        **_accuracy(runs),
        classifiers=_classifiers(runs),
        warnings=advice.warnings_of(run.results),
        remark=advice.remark_on_predictions(run.results),
        merges=_merges(run),
        merges_in_numbers=_merges_in_numbers(run),
        landscape=along.charts(run),
        costs=_costs(runs),
        seed=run.results[0]["seed"],
        examples=examples(run.results[0]),
        environment=environment(run.results[0]),
        JSONL_FILE=logs.JSONL_FILE,
    )


def _heading(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    run = runs[0]
    # The sentences know rules by their names.
    summaries = {
        each.config["rule"] + " (baseline)" * number: summarize(each.results)
        for number, each in enumerate(runs)
    }
    title = f"{capitalized(run.label)} on {title_of(run.config['dataset'])}"
    return {
        "title": title,
        "headline": [
            text for text in (sentences.gain(summaries), sentences.method(summaries)) if text
        ],
        "introduction": f"{introduction(run.config, run.results)} Accuracies: {run.shown}.",
    }


def introduction(config: Mapping[str, Any], results: Sequence[Results]) -> str:
    """Say in a sentence what was run: tasks, model and seeds."""
    seeds = [str(content["seed"]) for content in results]
    several = len(seeds) > 1
    shown = "mean ± standard deviation over them" if several else "no spread is known"
    return (
        f"{len(results[0]['accuracy_matrix'])} tasks, "
        f"{str(config.get('scenario')).replace('_', '-')}; model {config.get('model')}; "
        f"seed{'s' if several else ''} {', '.join(seeds)}: {shown}."
    )


def _metrics(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Lay out the metrics that all runs have; those of the first one alone become texts."""
    rows = [
        [words, *(spread([result.get(name) for result in run.results], 100) for run in runs)]
        for name, words in METRICS.items()
    ]
    if runs[0].config.get("scenario") == "class_incremental":
        name = "final_average_accuracy"
        aware = [[result["task_aware"][name] for result in run.results] for run in runs]
        rows.append(["final average accuracy among the classes of the task alone"])
        rows[-1] += [spread(values, 100) for values in aware]
    heading = [f"percent, {runs[0].shown}", *(run.label for run in runs)]
    return {
        "metrics": table(heading, [row for row in rows if "-" not in row]),
        "metrics_of_first": [
            f"{words}: {first}" for words, first, *rest in rows if first != "-" and "-" in rest
        ],
        "first": runs[0].label,
    }


def _classifiers(runs: Sequence[FinishedRun]) -> Any:
    """Lay out the figures of every classifier on every split; `None` where a run has not all."""
    scores = [content.get("scores", {}) for run in runs for content in run.results]
    if any(name not in each for each in scores for name in runs[0].classifiers):
        return None
    metrics = dict(list(COLUMNS.items())[:3])
    rows = []
    for name in runs[0].classifiers:
        for split in SPLITS:
            views = [[view(content, name, split) for content in run.results] for run in runs]
            values = (
                spread([content[metric] for content in contents], 100)
                for metric in metrics.values()
                for contents in views
            )
            rows.append([f"{name}, {split}", *values])
    several = len(runs) > 1
    heading = [
        f"{metric}, {run.label}" if several else metric for metric in metrics for run in runs
    ]
    return table(["percent", *heading], rows)


def settings(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Lay out settings by label beside the defaults: those that differ, and all."""
    heading = ["setting", *configs, "default"]
    columns = [*configs.values(), saved_form(Config())]
    rows = [[name, *(_shown(c.get(name)) for c in columns)] for name in columns[0]]
    changed = [row for row in rows if len(set(row[1:])) > 1]
    return {
        "changed_settings": table(heading, changed) if changed else None,
        "all_settings": table(heading, rows),
        "number_of_settings": len(rows),
    }


def _accuracy(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    several = len(runs[0].results) > 1
    charts = [
        captioned(
            figures.accuracy_curves({run.label: run.results for run in runs}),
            "Accuracy on the tasks seen",
            f"Mean accuracy on the tasks seen so far, after each task; {runs[0].shown}."
            + (" Bars: a standard deviation." if several else ""),
        ),
        captioned(
            figures.accuracy_matrix(runs[0].results),
            "Accuracy matrix",
            f"Accuracy of {runs[0].label} on each task (column) after each task (row), "
            f"{runs[0].shown}: down a column, a task is forgotten"
            + ("; mean over seeds." if several else "."),
        ),
    ]
    losses = {run.label: read for run in runs if (read := training_losses(run))}
    if losses:
        charts.append(
            captioned(
                figures.training_loss(losses),
                "Training loss",
                "Training loss of each epoch, with the perturbation where training has one."
                + (" Bands: a standard deviation." if several else ""),
            )
        )
    matrices = np.asarray([r["accuracy_matrix"] for r in runs[0].results], np.float64)
    tasks = range(1, matrices.shape[1] + 1)
    # Spaces that do not break keep the narrow columns on one line.
    rows = []
    for t in tasks:
        cells = [spread(matrices[:, t - 1, i - 1], 100) for i in tasks]
        rows.append([f"after\u00a0task\u00a0{t}", *cells])
    heading = [f"percent, {runs[0].shown}", *(f"task\u00a0{task}" for task in tasks)]
    return {
        "accuracy": charts,
        "has_losses": bool(losses),
        "accuracy_matrix": table(heading, rows),
        "class_accuracy": _by_class(runs),
    }


def _by_class(runs: Sequence[FinishedRun]) -> Any:
    """Lay out the final accuracy of each class; `None` where a run has none, as earlier ones."""
    values = [[result.get("class_accuracy") for result in run.results] for run in runs]
    count = len(values[0][0] or ())
    if not count or any(len(each or ()) != count for of_run in values for each in of_run):
        return None
    names = runs[0].results[0]["manifest"].get("class_names") or map(str, range(count))
    rows = [
        [name, *(spread([each[number] for each in of_run if each], 100) for of_run in values)]
        for number, name in enumerate(names)
    ]
    return table([f"class, {runs[0].shown}", *(run.label for run in runs)], rows)


def _merges(run: FinishedRun) -> list[Captioned]:
    charts = []
    # The first task's merge is left out: it has nothing to be merged with.
    coefficients = of_merges(run.results, "alpha")[:, 1:]
    if has_coefficient(run.config) and np.isfinite(coefficients).any():
        mean = "Mean over seeds, dots: single seeds. " if len(run.results) > 1 else ""
        charts.append(
            captioned(
                figures.coefficients(run.results),
                "Merge coefficients",
                f"How far each merge went towards the trained model. {mean}Bars: standard error "
                "over the task's examples, where the rule has one.",
            )
        )
    predicted = of_merges(run.results, "predicted_loss_change")
    actual = of_merges(run.results, "actual_loss_change")
    if np.isfinite(predicted + actual)[:, 1:].any():
        charts.append(
            captioned(
                figures.loss_changes(run.results),
                "Predicted against measured loss change",
                "What a merge did to the loss of the task just trained, on held-out data, and "
                "what the quadratic model said it would; the numbers are tasks.",
            )
        )
    return charts


def _merges_in_numbers(run: FinishedRun) -> dict[int, Any]:
    """Lay out the figures of all merges but the first by seed, each figure that some merge has."""
    by_seed = {}
    for content in run.results:
        merges = content["merges"][1:]
        names = [n for n in content["merges"][0] if any(m[n] is not None for m in merges)]
        if names:
            rows = [
                [f"task {task}", *("-" if merge[n] is None else f"{merge[n]:.4g}" for n in names)]
                for task, merge in enumerate(merges, start=2)
            ]
            words = (MERGES.get(name, name.replace("_", " ")) for name in names)
            by_seed[content["seed"]] = table(["merge of", *words], rows)
    return by_seed


def _costs(runs: Sequence[FinishedRun]) -> Any:
    rows = [
        [
            f"{PHASES.get(name, name)}, seconds",
            *(spread([content["seconds"].get(name) for content in run.results]) for run in runs),
        ]
        for name in runs[0].results[0]["seconds"]
        # Phases that no run had are left out; those that took hardly any time are not.
        if any(content["seconds"].get(name) for run in runs for content in run.results)
    ]
    sizes = [f"{run.results[0]['rule_state_bytes']:,}" for run in runs]
    rows.append(["memory of the rule from task to task, bytes", *sizes])
    return table(["per seed", *(run.label for run in runs)], rows)


def examples(content: Results) -> Any:
    """Lay out the number of classes and examples of each task."""
    splits = ("train", "validation", "test")
    rows = [
        [str(number), str(len(task["classes"])), *(str(task[name]["examples"]) for name in splits)]
        for number, task in enumerate(content["manifest"]["tasks"], start=1)
    ]
    return table(["task", "classes", "training", "validation", "test"], rows)


def environment(content: Results) -> str:
    """Say on what devices and with what versions a seed ran."""
    found = content["environment"]
    versions = {"python": found["python"], **found["packages"]}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{found['devices']} x {found['device']}; {packages}"


def _shown(value: Any) -> str:
    if value in ("", []):
        return "(empty)"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
