"""The report of a finished run: one HTML file that needs nothing beside it."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.continual.merging import landscape
from pm_jax.continual.merging.trust import warnings_of
from pm_jax.continual.report import figures
from pm_jax.continual.report.page import captioned, details, grid, page, paragraph, table
from pm_jax.continual.report.results import of_merges, read_results
from pm_jax.continual.settings.config import Config
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.logs import JSONL_FILE
from pm_jax.continual.storage.workdir import CONFIG_FILE, RESULTS_FILE, saved_form, write_text
from pm_jax.types import InvalidInput

FILE = "report.html"
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, EOFError, zipfile.BadZipFile)
"""What logs and landscapes raise that are not as they were written."""
SHOWN = 10
"""Warnings before the others are folded away."""
EPOCH = {"task": int, "epoch": int, "loss": (int, float)}
"""Form of a line of the log that tells of an epoch."""
METRICS = {
    "final_average_accuracy": "final average accuracy, over the tasks after the last one",
    "average_incremental_accuracy": "average incremental accuracy, over the tasks seen, over time",
    "learning_accuracy": "learning accuracy, of a task right after its merge",
    "forgetting": "forgetting, the drop from a task's best accuracy",
    "backward_transfer": "backward transfer, the change since a task's merge",
    "forward_transfer": "forward transfer, the change of a task before its training",
    "mean_regret_accuracy": "regret against the best coefficients, on validation data",
}


class _Run(NamedTuple):
    """The finished seeds of a work directory, in their order."""

    directory: Path
    label: str
    config: dict[str, Any]
    results: list[dict[str, Any]]


def write_report(workdir: Path) -> Path:
    """Write the report of a run, and of the baseline in `workdir/baseline`, if there is one.

    Args:
        workdir: of a run of `experiments.train` with at least one finished seed.

    Returns:
        The file, `workdir/report.html`; it is written whole or not at all.

    Raises:
        InvalidInput: a directory without a finished run, or with a damaged file.
        ImportError: matplotlib is not installed.

    Example:
        >>> write_report(Path("/nonexistent"))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: workdir=/nonexistent: has no config.json; give the work ...
    """
    try:
        runs = [_read(workdir)]
        if any((workdir / "baseline").glob(f"seed_*/{RESULTS_FILE}")):
            runs.append(_read(workdir / "baseline", " (baseline)"))
        page = _page(runs)
        with manifest.covering(workdir, FILE):
            write_text(workdir / FILE, page)
    except OSError as error:
        raise InvalidInput(
            f"workdir={workdir}: {error.filename or FILE} cannot be read or written "
            f"({error.strerror}); set its permissions right, make room or move it away"
        ) from error
    return workdir / FILE


def _read(directory: Path, suffix: str = "") -> _Run:
    path = directory / CONFIG_FILE
    if not path.exists():
        raise InvalidInput(
            f"workdir={directory}: has no {CONFIG_FILE}; give the work directory of a run of "
            "experiments.train"
        )
    try:
        config = files.read_json(path, {"rule": str, "dataset": str})
    except ValueError:
        raise InvalidInput(
            f"workdir={directory}: its {CONFIG_FILE} is damaged; take another directory"
        ) from None
    results = [read_results(path) for path in directory.glob(f"seed_*/{RESULTS_FILE}")]
    if not results:
        raise InvalidInput(
            f"workdir={directory}: has no finished seed; run the command that made it to its end"
        )
    results.sort(key=lambda content: content["seed"])
    return _Run(directory, config["rule"] + suffix, config, results)


def _page(runs: Sequence[_Run]) -> str:
    run = runs[0]
    config, seeds = run.config, [content["seed"] for content in run.results]
    several = len(seeds) > 1
    title = f"{run.label} on {Path(config['dataset']).name}"
    spread = "mean ± standard deviation over them" if several else "no spread is known"
    introduction = (
        f"{len(run.results[0]['accuracy_matrix'])} tasks, "
        f"{str(config.get('scenario')).replace('_', '-')}; model {config.get('model')}; "
        f"seed{'s' if several else ''} {', '.join(map(str, seeds))}: {spread}."
    )
    sections = {
        "Result": _metrics(runs),
        "Warnings": _warnings(run),
        "Settings": _settings(runs),
        "Accuracy and training": _accuracy(runs),
        "Merges": _merges(run),
        "Along the merges": _landscape(run),
        "Time and memory": _costs(runs),
        "Data and environment": _origin(run),
    }
    return page(title, introduction, sections)


def _metrics(runs: Sequence[_Run]) -> str:
    rows = [
        [words, *(_spread([result.get(name) for result in run.results], 100) for run in runs)]
        for name, words in METRICS.items()
    ]
    if runs[0].config.get("scenario") == "class_incremental":
        name = "final_average_accuracy"
        aware = [[result["task_aware"][name] for result in run.results] for run in runs]
        rows.append(["final average accuracy among the classes of the task alone"])
        rows[-1] += [_spread(values, 100) for values in aware]
    split = runs[0].config.get("evaluate_on")
    known = [row for row in rows if set(row[1:]) != {"-"}]
    return table([f"percent, {split} split", *(run.label for run in runs)], known)


def _warnings(run: _Run) -> str:
    seed = "seed {}, " if len(run.results) > 1 else ""
    items = [
        f"<li>{seed.format(content['seed'])}{escape(text)}</li>"
        for content in run.results
        for text in warnings_of(content)
    ]
    if not items:
        return paragraph("None: nothing about the merges is conspicuous.")
    first, rest = "".join(items[:SHOWN]), "".join(items[SHOWN:])
    more = details(f"{len(items) - SHOWN} more warnings", f"<ul>{rest}</ul>") if rest else ""
    return f"<ul>{first}</ul>{more}"


def _settings(runs: Sequence[_Run]) -> str:
    default = saved_form(Config())
    header = ["setting", *(run.label for run in runs), "default"]
    rows = [
        [name, *(_shown(config.get(name)) for config in (*(run.config for run in runs), default))]
        for name in runs[0].config
    ]
    own = [row for row in rows if len(set(row[1:])) > 1]
    return (table(header, own) if own else paragraph("All settings are the defaults.")) + details(
        f"All {len(rows)} settings", table(header, rows)
    )


def _accuracy(runs: Sequence[_Run]) -> str:
    several = len(runs[0].results) > 1
    blocks = [
        captioned(
            figures.accuracy_curves({run.label: run.results for run in runs}),
            "Accuracy on the tasks seen",
            "Mean accuracy on the tasks seen so far, after each task."
            + (" Bars: a standard deviation." if several else ""),
        ),
        captioned(
            figures.accuracy_matrix(runs[0].results),
            "Accuracy matrix",
            f"Accuracy of {runs[0].label} on each task (column) after each task (row): down a "
            "column, a task is forgotten" + ("; mean over seeds." if several else "."),
        ),
    ]
    losses = {run.label: found for run in runs if (found := _losses(run))}
    if losses:
        blocks.append(
            captioned(
                figures.training_loss(losses),
                "Training loss",
                "Training loss of each epoch, with the perturbation where training has one."
                + (" Bands: a standard deviation." if several else ""),
            )
        )
    matrices = np.asarray([r["accuracy_matrix"] for r in runs[0].results], np.float64)
    tasks = range(1, matrices.shape[1] + 1)
    rows = [[f"after\u00a0task\u00a0{t}", *(_spread(matrices[:, t - 1, i - 1], 100) for i in tasks)]
            for t in tasks]  # fmt: skip
    numbers = table(["percent", *(f"task\u00a0{task}" for task in tasks)], rows)
    return (
        grid(blocks)
        + ("" if losses else paragraph(f"The training loss is not shown: no {JSONL_FILE}."))
        + details("The accuracy matrix in numbers", numbers)
    )


def _losses(run: _Run) -> tuple[np.ndarray, np.ndarray] | None:
    """When epochs ended, in tasks [E], and their mean losses [S, E]; `None` without logs."""
    by_seed = []
    for content in run.results:
        path = run.directory / f"seed_{content['seed']}" / JSONL_FILE
        if not path.exists():
            return None
        try:
            by_seed.append(_losses_of_epochs(path))
        except (ArithmeticError, ValueError):
            raise InvalidInput(
                f"workdir={run.directory}: {path.parent.name}/{JSONL_FILE} is damaged; move it "
                "away for a report without the training loss"
            ) from None
    keys = sorted(by_seed[0])
    epochs = dict(keys)  # the last of each task
    ends = np.asarray([task - 1 + epoch / epochs[task] for task, epoch in keys])
    return ends, np.asarray([[found.get(key, math.nan) for key in keys] for found in by_seed])


def _losses_of_epochs(path: Path) -> dict[tuple[int, int], float]:
    """Mean loss by task and epoch."""
    found: dict[tuple[int, int], tuple[int, float]] = {}
    before = 0
    for text in path.read_bytes().splitlines():
        line = files.parse_json(text, {"event": str, "step": int})
        # A checkpoint within an epoch splits its line into several.
        if line["event"] == "epoch":
            if not files.fits(line, EPOCH):
                raise ValueError("a figure of an epoch is missing")
            key, steps = (line["task"], line["epoch"]), line["step"] - before
            if min(key) < 1:
                raise ValueError("tasks and epochs are counted from 1")
            earlier, loss = found.get(key, (0, 0.0))
            found[key] = earlier + steps, loss + steps * line["loss"]
        before = line["step"]
    if not found:
        raise ValueError("it has no epochs")
    return {(task, epoch): float(loss / steps) for (task, epoch), (steps, loss) in found.items()}


def _merges(run: _Run) -> str:
    blocks = []
    if np.isfinite(of_merges(run.results, "alpha")[:, 1:]).any():
        mean = "Mean over seeds, dots: single seeds. " if len(run.results) > 1 else ""
        blocks.append(
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
        blocks.append(
            captioned(
                figures.loss_changes(run.results),
                "Predicted against actual loss change",
                "What a merge did to the loss of the task just trained, on held-out data, and "
                "what the quadratic model said it would; the numbers are tasks.",
            )
        )
    tables = ""
    for content in run.results:
        names = list(content["merges"][0])
        rows = [
            [str(task), *("-" if merge[name] is None else f"{merge[name]:.4g}" for name in names)]
            for task, merge in enumerate(content["merges"], start=1)
        ]
        numbers = table(["task", *(name.replace("_", " ") for name in names)], rows)
        tables += details(f"Every merge in numbers, seed {content['seed']}", numbers)
    return grid(blocks) + tables


def _landscape(run: _Run) -> str:
    first = run.results[0]
    path = run.directory / f"seed_{first['seed']}" / landscape.FILE
    if not path.exists():
        return paragraph(
            "Not measured: with --landscape_points=21 and a new work directory, a run also keeps "
            "the losses and accuracies along every merge and the coefficients that were best; "
            "with --plane_points=9, those in the plane of the last two task vectors."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: array.astype(np.float64, casting="same_kind")
                      for name, array in file.items()}  # fmt: skip
        if not np.isfinite(arrays["loss" if "loss" in arrays else "plane_loss"][1:]).any():
            return paragraph("The first task's merge was the only one.")
        along = _along(first, arrays) if "alphas" in arrays else []
        return grid([*along, *(_plane(first, arrays) if "plane_loss" in arrays else [])])
    except DAMAGE:
        raise InvalidInput(
            f"workdir={run.directory}: {path.parent.name}/{path.name} is damaged; move it away for "
            "a report without it"
        ) from None


def _along(first: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    blocks = []
    for name, unit, best in (("loss", 1, "oracle_alpha"), ("accuracy", 100, "most_accurate_alpha")):
        figure = figures.landscape(
            arrays["alphas"],
            unit * arrays[name],
            unit * arrays[f"merged_{name}"],
            *(of_merges([first], key)[0] for key in ("alpha", best)),
        )
        caption = (
            f"Mean validation {name}{', in percent,' if unit > 1 else ''} between the model that a "
            f"task started from (0) and the one that it trained (1), seed {first['seed']}."
        )
        blocks.append(captioned(figure, f"{name.capitalize()} along the merges", caption))
    return blocks


def _plane(first: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    *place, outside = arrays["plane_merged"][-1]
    figure = figures.plane(
        arrays["plane_along"], arrays["plane_across"], arrays["plane_loss"][-1], place
    )
    caption = (
        "Validation loss around the last merge, in the plane of the last two task vectors, seed "
        f"{first['seed']}."
    )
    if outside > 0.01:
        caption += f" {100 * outside:.0f} % of the merge's displacement lie outside of it."
    return [captioned(figure, "Around the last merge", caption)]


def _costs(runs: Sequence[_Run]) -> str:
    rows = [
        [
            f"{'in all (the last process)' if name == 'this_process' else name}, seconds",
            *(_spread([content["seconds"].get(name) for content in run.results]) for run in runs),
        ]
        for name in runs[0].results[0]["seconds"]
    ]
    kept = [f"{run.results[0]['rule_state_bytes']:,}" for run in runs]
    rows.append(["memory of the rule from task to task, bytes", *kept])
    return table(["per seed", *(run.label for run in runs)], rows)


def _origin(run: _Run) -> str:
    first = run.results[0]
    splits = ("train", "validation", "test")
    rows = [
        [str(number), str(len(task["classes"])), *(str(task[name]["examples"]) for name in splits)]
        for number, task in enumerate(first["manifest"]["tasks"], start=1)
    ]
    environment = first["environment"]
    versions = {"python": environment["python"], **environment["packages"]}
    return details(
        f"Examples of each task, seed {first['seed']}",
        table(["task", "classes", "training", "validation", "test"], rows),
    ) + paragraph(
        f"{environment['devices']} x {environment['device']}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}."
    )


def _spread(values: Any, unit: float = 1) -> str:
    """Mean and, of several seeds, standard deviation; a dash for what does not apply."""
    values = unit * np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return "-"
    spread = f"\u00a0±\u00a0{values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
