"""Plots that compare merge rules; they need the extra `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pm_jax.continual.report import comparison, figures
from pm_jax.continual.report.comparison import Comparison
from pm_jax.continual.report.results import (
    Shown,
    accuracies_after_each_task,
    has_coefficient,
    of_merges,
)
from pm_jax.continual.storage import manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Sequence[Mapping[str, Any]]]
WIDTH = 5.2
"""In inches: on a phone's screen the text of a plot is then hardly smaller than the page's."""
IN_LEGEND, ON_AXIS = 55, 20
"""Longer labels of rules are broken into lines before their settings."""


class Plot(NamedTuple):
    """A plot of a comparison, and what it shows."""

    figure: "Figure"
    name: str
    caption: str


def plots_of(rows: Sequence[Comparison], results: Results) -> dict[str, Plot]:
    """Draw the plots of a comparison by the names of their files, rules in the order of the rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    results = {row.rule: results[row.rule] for row in rows}
    several = len(rows[0].figures["final_average_accuracy"]) > 1
    bars = "Bars: a standard deviation over the seeds." if several else "One seed."
    dots = f"Dots: single seeds. {bars}" if several else bars
    plots = {
        "final_accuracy": Plot(
            _final_accuracies(rows),
            "Final accuracy",
            f"Mean over the tasks after the last one, with each classifier. {dots}",
        ),
        "accuracy_after_each_task": Plot(
            _lines({x: 100 * accuracies_after_each_task(runs) for x, runs in results.items()},
                   "accuracy on tasks seen, %"),
            "Accuracy on the tasks seen",
            f"Mean over the tasks seen so far, after each task. {bars}",
        ),
        "final_accuracy_of_each_task": Plot(
            _final_accuracy_of_each_task(results),
            "Final accuracy of each task",
            "Accuracy after the last task, in percent, mean over the seeds: early tasks on the "
            "left are the ones that are forgotten.",
        ),
    }  # fmt: skip
    # With one task there is nothing to forget.
    if np.isfinite([row.figures["forgetting"] for row in rows]).any():
        plots["forgetting_and_learning_accuracy"] = Plot(
            _forgetting_and_learning_accuracy(results),
            "Learning against forgetting",
            f"Right and down is better: new tasks are learned, earlier ones kept. {bars}",
        )
    merged = {label: runs for label, runs in results.items() if has_coefficient(_config(runs))}
    if merged:
        plots["alpha_of_each_task"] = Plot(
            _lines({label: of_merges(runs, "alpha") for label, runs in merged.items()},
                   "merge coefficient alpha", list(results)),
            "Merge coefficients",
            "How far each merge went from the previous model (0) to the trained one (1), of the "
            f"rules that have such a coefficient. {bars}",
        )  # fmt: skip
    shown = Shown.of(next(iter(results.values()))[0])
    for name, plot in plots.items():
        of_all = name == "final_accuracy" and len(rows[0].by_classifier) > 1
        title = f"{shown.split} data{'' if of_all else f', classifier {shown.classifier}'}"
        plot.figure.suptitle(title, fontsize="small")
    return plots


def write_plots(plots: Mapping[str, Plot], split: str, directory: Path) -> list[Path]:
    """Write the plots of a comparison as PNG, with the split in their names; return their paths."""
    files = []
    for name, plot in plots.items():
        files.append(directory / f"{comparison.file_stem(name, split)}.png")
        with manifest.covering(directory, files[-1].name):
            plot.figure.savefig(files[-1], dpi=200)
        # It is laid out now; the report, which draws it again, need not do so once more.
        plot.figure.set_layout_engine("none")
    return files


def _config(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return runs[0].get("config", {})


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of a rule, the same in every plot."""
    # Ten colours, then the same ones with another marker and line.
    again = number // 10 % 3
    return {
        "color": f"C{number % 10}",
        "marker": "osD"[again],
        "linestyle": ("-", "--", ":")[again],
    }


def _wrapped(label: str, width: int) -> str:
    return label if len(label) <= width else label.replace("+", "\n+")


def _legend(figure: "Figure", axes) -> None:
    """Name rules or classifiers below the axes, where no label can run into them."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [_wrapped(label, IN_LEGEND) for label in labels]
    # Two columns have room for short names.
    columns = 2 if max(map(len, labels), default=0) <= IN_LEGEND // 2 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False,
                  fontsize="small")  # fmt: skip


def _lines(curves: Mapping[str, np.ndarray], name: str, order: Sequence[str] = ()) -> "Figure":
    """Draw curves [S, T] with mean and standard deviation over the seeds."""
    from matplotlib.ticker import MaxNLocator

    order = list(order or curves)
    figure = _figure(3.4 + 0.18 * len(curves))
    axes = figure.subplots()
    for label, values in curves.items():
        if not np.isfinite(values).any():
            continue
        tasks = np.arange(1, values.shape[1] + 1)
        axes.errorbar(tasks, values.mean(axis=0), figures.deviation(values), label=label,
                      capsize=2, linewidth=1, elinewidth=0.7, markersize=3,
                      **_style(order.index(label)))  # fmt: skip
    axes.set(xlabel="task", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="k", alpha=0.1)
    _legend(figure, axes)
    return figure


def _final_accuracies(rows: Sequence[Comparison]) -> "Figure":
    """Draw the final accuracy of each rule with each classifier, a row for each rule."""
    names = list(rows[0].by_classifier)
    figure = _figure(1.4 + 0.12 * len(rows) * (1 + len(names)))
    axes = figure.subplots()
    # The classifiers of a rule lie below each other within its row.
    offsets = 0.7 * ((np.arange(len(names)) + 0.5) / len(names) - 0.5)
    for number, (name, offset) in enumerate(zip(names, offsets, strict=True)):
        values = 100 * np.asarray([row.by_classifier[name] for row in rows], np.float64).T
        places = np.arange(len(rows)) + offset
        style = {**_style(number), "linestyle": "none"}
        if len(values) > 1:
            axes.plot(values.T, places, **{**style, "marker": "."}, alpha=0.4)
        axes.errorbar(values.mean(axis=0), places, xerr=figures.deviation(values), label=name,
                      capsize=2, markersize=5, **style)  # fmt: skip
    for between in np.arange(0.5, len(rows) - 1):
        axes.axhline(between, color="k", alpha=0.1, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_wrapped(row.rule, ON_AXIS) for row in rows])
    axes.tick_params(axis="y", labelsize="small")
    axes.set(xlabel="final accuracy, %", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", color="k", alpha=0.1)
    if len(names) > 1:
        _legend(figure, axes)
    return figure


def _final_accuracy_of_each_task(results: Results) -> "Figure":
    figure = _figure(1.2 + 0.4 * len(results))
    axes = figure.subplots()
    rows = [[run["accuracy_matrix"][-1] for run in runs] for runs in results.values()]
    final = 100 * np.asarray(rows, np.float64).mean(axis=1)
    image = axes.imshow(final, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    if final.shape[1] > 10:
        figure.colorbar(image, ax=axes)
    figures.write_percents(axes, final)
    # At most ten ticks; the division rounds up.
    places = np.arange(0, final.shape[1], -(-final.shape[1] // 10))
    axes.set_xticks(places, places + 1)
    axes.set_yticks(range(len(results)), [_wrapped(label, ON_AXIS) for label in results])
    axes.tick_params(axis="y", labelsize="small")
    axes.set(xlabel="task")
    return figure


def _forgetting_and_learning_accuracy(results: Results) -> "Figure":
    figure = _figure(3.4 + 0.18 * len(results))
    axes = figure.subplots()
    for number, (label, runs) in enumerate(results.items()):
        pairs = [[run["learning_accuracy"], run["forgetting"]] for run in runs]
        points = 100 * np.asarray(pairs, np.float64)
        x, y = points.mean(axis=0)
        # A bound that trains all tasks as one has neither.
        if not np.isfinite((x, y)).all():
            continue
        error = points.std(axis=0, ddof=1) if len(runs) > 1 else (None, None)
        axes.errorbar(x, y, error[1], error[0], label=label, capsize=2, markersize=5,
                      **{**_style(number), "linestyle": "none"})  # fmt: skip
    axes.set(xlabel="learning accuracy, %", ylabel="forgetting, %")
    axes.grid(color="k", alpha=0.1)
    _legend(figure, axes)
    return figure
