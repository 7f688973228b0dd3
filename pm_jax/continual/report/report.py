"""The report of a finished run: one HTML file that needs nothing beside it."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pm_jax.continual.merging import landscape
from pm_jax.continual.merging.trust import warnings_of
from pm_jax.continual.report import figures, tables
from pm_jax.continual.report.finished_run import FinishedRun, read_run, training_losses
from pm_jax.continual.report.results import COLUMNS, of_merges, view
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import SPLITS
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.logs import JSONL_FILE
from pm_jax.continual.storage.workdir import RESULTS_FILE, saved_form, write_text
from pm_jax.data.several import title_of
from pm_jax.types import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
TEMPLATE = "report.html.jinja"
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, EOFError, zipfile.BadZipFile)
"""A landscape that is damaged raises one of these, when it is read or when it is drawn."""
SHOWN = 10
"""The page shows this many warnings, and folds the others away."""
METRICS = {
    "final_average_accuracy": "final average accuracy, over the tasks after the last one",
    "average_incremental_accuracy": "average incremental accuracy, over the tasks seen, over time",
    "learning_accuracy": "learning accuracy, of a task right after its merge",
    "forgetting": "forgetting, the drop from a task's best accuracy",
    "backward_transfer": "backward transfer, the change since a task's merge",
    "forward_transfer": "forward transfer, the change of a task before its training",
    "mean_regret_accuracy": "regret against the best coefficients, on validation data",
}


class Captioned(NamedTuple):
    """A figure of the page: its image as a data URI, its name, and what it shows."""

    image: str
    name: str
    caption: str


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
    import jinja2

    run = runs[0]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # A name that the template uses and nobody gives is an error, not an empty text.
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(
        **_heading(run),
        **_settings(runs),
        **_accuracy(runs),
        metrics=_metrics(runs),
        classifiers=_classifiers(runs),
        warnings=_warnings(run),
        merges=_merges(run),
        merges_in_numbers=_merges_in_numbers(run),
        landscape=_landscape(run),
        costs=_costs(runs),
        results=run.results,
        examples=_examples(run),
        environment=_environment(run),
        SHOWN=SHOWN,
        JSONL_FILE=JSONL_FILE,
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from markupsafe import Markup

    # tabulate has escaped the cells already.
    return Markup(tables.as_html(heading, rows))


def _heading(run: FinishedRun) -> dict[str, str]:
    config, seeds = run.config, [content["seed"] for content in run.results]
    several = len(seeds) > 1
    spread = "mean ± standard deviation over them" if several else "no spread is known"
    introduction = (
        f"{len(run.results[0]['accuracy_matrix'])} tasks, "
        f"{str(config.get('scenario')).replace('_', '-')}; model {config.get('model')}; "
        f"seed{'s' if several else ''} {', '.join(map(str, seeds))}: {spread}. "
        f"Accuracies: {run.shown}."
    )
    title = f"{run.label} on {title_of(config['dataset'])}"
    return {"title": title, "introduction": introduction}


def _metrics(runs: Sequence[FinishedRun]) -> Any:
    rows = [
        [words, *(_spread([result.get(name) for result in run.results], 100) for run in runs)]
        for name, words in METRICS.items()
    ]
    if runs[0].config.get("scenario") == "class_incremental":
        name = "final_average_accuracy"
        aware = [[result["task_aware"][name] for result in run.results] for run in runs]
        rows.append(["final average accuracy among the classes of the task alone"])
        rows[-1] += [_spread(values, 100) for values in aware]
    applicable = [row for row in rows if set(row[1:]) != {"-"}]
    return _table([f"percent, {runs[0].shown}", *(run.label for run in runs)], applicable)


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
                _spread([content[metric] for content in contents], 100)
                for metric in metrics.values()
                for contents in views
            )
            rows.append([f"{name}, {split}", *values])
    several = len(runs) > 1
    heading = [
        f"{metric}, {run.label}" if several else metric for metric in metrics for run in runs
    ]
    return _table(["percent", *heading], rows)


def _warnings(run: FinishedRun) -> list[str]:
    seed = "seed {}, " if len(run.results) > 1 else ""
    return [
        f"{seed.format(content['seed'])}{text}"
        for content in run.results
        for text in warnings_of(content)
    ]


def _settings(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    heading = ["setting", *(run.label for run in runs), "default"]
    columns = [*(run.config for run in runs), saved_form(Config())]
    rows = [[name, *(_shown(c.get(name)) for c in columns)] for name in runs[0].config]
    changed = [row for row in rows if len(set(row[1:])) > 1]
    return {
        "changed_settings": _table(heading, changed) if changed else None,
        "all_settings": _table(heading, rows),
        "number_of_settings": len(rows),
    }


def _accuracy(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    several = len(runs[0].results) > 1
    captioned = [
        _captioned(
            figures.accuracy_curves({run.label: run.results for run in runs}),
            "Accuracy on the tasks seen",
            f"Mean accuracy on the tasks seen so far, after each task; {runs[0].shown}."
            + (" Bars: a standard deviation." if several else ""),
        ),
        _captioned(
            figures.accuracy_matrix(runs[0].results),
            "Accuracy matrix",
            f"Accuracy of {runs[0].label} on each task (column) after each task (row), "
            f"{runs[0].shown}: down a column, a task is forgotten"
            + ("; mean over seeds." if several else "."),
        ),
    ]
    losses = {run.label: read for run in runs if (read := training_losses(run))}
    if losses:
        captioned.append(
            _captioned(
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
        cells = [_spread(matrices[:, t - 1, i - 1], 100) for i in tasks]
        rows.append([f"after\u00a0task\u00a0{t}", *cells])
    heading = [f"percent, {runs[0].shown}", *(f"task\u00a0{task}" for task in tasks)]
    return {
        "accuracy": captioned,
        "has_losses": bool(losses),
        "accuracy_matrix": _table(heading, rows),
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
        [name, *(_spread([each[number] for each in of_run if each], 100) for of_run in values)]
        for number, name in enumerate(names)
    ]
    return _table([f"class, {runs[0].shown}", *(run.label for run in runs)], rows)


def _merges(run: FinishedRun) -> list[Captioned]:
    captioned = []
    # The first task's merge is left out: it has nothing to be merged with.
    if np.isfinite(of_merges(run.results, "alpha")[:, 1:]).any():
        mean = "Mean over seeds, dots: single seeds. " if len(run.results) > 1 else ""
        captioned.append(
            _captioned(
                figures.coefficients(run.results),
                "Merge coefficients",
                f"How far each merge went towards the trained model. {mean}Bars: standard error "
                "over the task's examples, where the rule has one.",
            )
        )
    predicted = of_merges(run.results, "predicted_loss_change")
    actual = of_merges(run.results, "actual_loss_change")
    if np.isfinite(predicted + actual)[:, 1:].any():
        captioned.append(
            _captioned(
                figures.loss_changes(run.results),
                "Predicted against actual loss change",
                "What a merge did to the loss of the task just trained, on held-out data, and "
                "what the quadratic model said it would; the numbers are tasks.",
            )
        )
    return captioned


def _merges_in_numbers(run: FinishedRun) -> dict[int, Any]:
    by_seed = {}
    for content in run.results:
        names = list(content["merges"][0])
        rows = [
            [str(task), *("-" if merge[name] is None else f"{merge[name]:.4g}" for name in names)]
            for task, merge in enumerate(content["merges"], start=1)
        ]
        heading = ["task", *(name.replace("_", " ") for name in names)]
        by_seed[content["seed"]] = _table(heading, rows)
    return by_seed


def _landscape(run: FinishedRun) -> list[Captioned] | None:
    """Draw the first seed's landscapes; `None` if the run measured none."""
    first = run.results[0]
    path = run.directory / f"seed_{first['seed']}" / landscape.FILE
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {n: a.astype(np.float64, casting="same_kind") for n, a in file.items()}
        if not np.isfinite(arrays["loss" if "loss" in arrays else "plane_loss"][1:]).any():
            return []
        columns = "" if run.classifiers == ["trained"] else " of the trained columns"
        along = _along(first, arrays, columns) if "alphas" in arrays else []
        return [*along, *(_plane(first, arrays, columns) if "plane_loss" in arrays else [])]
    except DAMAGE:
        raise InvalidInput(
            f"workdir={run.directory}: {path.parent.name}/{path.name} is damaged; move it away for "
            "a report without it"
        ) from None


def _along(
    first: Mapping[str, Any], arrays: Mapping[str, np.ndarray], columns: str
) -> list[Captioned]:
    captioned = []
    for name, unit, best in (("loss", 1, "oracle_alpha"), ("accuracy", 100, "most_accurate_alpha")):
        figure = figures.landscape(
            arrays["alphas"],
            unit * arrays[name],
            unit * arrays[f"merged_{name}"],
            *(of_merges([first], key)[0] for key in ("alpha", best)),
        )
        caption = (
            f"Mean validation {name}{columns}{', in percent,' if unit > 1 else ''} between the "
            "model that a task started from (0) and the one that it trained (1), seed "
            f"{first['seed']}."
        )
        captioned.append(_captioned(figure, f"{name.capitalize()} along the merges", caption))
    return captioned


def _plane(
    first: Mapping[str, Any], arrays: Mapping[str, np.ndarray], columns: str
) -> list[Captioned]:
    *place, outside = arrays["plane_merged"][-1]
    figure = figures.plane(
        arrays["plane_along"], arrays["plane_across"], arrays["plane_loss"][-1], place
    )
    caption = (
        f"Validation loss{columns} around the last merge, in the plane of the last two task "
        f"vectors, seed {first['seed']}."
    )
    # Below one percent the merged model lies in the plane for the eye.
    if outside > 0.01:
        caption += f" {100 * outside:.0f} % of the merge's displacement lie outside of it."
    return [_captioned(figure, "Around the last merge", caption)]


def _costs(runs: Sequence[FinishedRun]) -> Any:
    rows = [
        [
            f"{'in all (the last process)' if name == 'this_process' else name}, seconds",
            *(_spread([content["seconds"].get(name) for content in run.results]) for run in runs),
        ]
        for name in runs[0].results[0]["seconds"]
    ]
    sizes = [f"{run.results[0]['rule_state_bytes']:,}" for run in runs]
    rows.append(["memory of the rule from task to task, bytes", *sizes])
    return _table(["per seed", *(run.label for run in runs)], rows)


def _examples(run: FinishedRun) -> Any:
    splits = ("train", "validation", "test")
    rows = [
        [str(number), str(len(task["classes"])), *(str(task[name]["examples"]) for name in splits)]
        for number, task in enumerate(run.results[0]["manifest"]["tasks"], start=1)
    ]
    return _table(["task", "classes", "training", "validation", "test"], rows)


def _environment(run: FinishedRun) -> str:
    environment = run.results[0]["environment"]
    versions = {"python": environment["python"], **environment["packages"]}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{environment['devices']} x {environment['device']}; {packages}"


def _captioned(figure: "Figure", name: str, caption: str) -> Captioned:
    return Captioned(figures.data_uri(figure), name, caption)


def _spread(values: Any, unit: float = 1) -> str:
    """Write mean and, of several seeds, deviation; a dash stands for what does not apply."""
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
