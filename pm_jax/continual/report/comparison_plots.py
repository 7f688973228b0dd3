"""Plots that compare merge rules; they need the extra `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax.continual.report import comparison, figures
from pm_jax.continual.report.results import Shown, accuracies_after_each_task, of_merges
from pm_jax.continual.storage import manifest

Results = Mapping[str, Sequence[Mapping[str, Any]]]


def write_plots(results: Results, directory: Path) -> list[Path]:
    """Write the plots of a comparison as PNG, and return their paths.

    Titles and names of the files say which split the accuracies are of.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    plots = {
        "accuracy_after_each_task": _accuracy_after_each_task,
        "final_accuracy_of_each_task": _final_accuracy_of_each_task,
        "forgetting_and_learning_accuracy": _forgetting_and_learning_accuracy,
        "alpha_of_each_task": _alpha_of_each_task,
    }
    files = []
    shown = Shown.of(next(iter(results.values()))[0])
    for name, plot in plots.items():
        figure = Figure(figsize=(9, max(5.0, 2 + 0.25 * len(results))), layout="constrained")
        plot(figure.subplots(), results)
        figure.suptitle(f"{shown.split} data, classifier {shown.classifier}", fontsize="small")
        files.append(directory / f"{comparison.file_stem(name, shown.split)}.png")
        with manifest.covering(directory, files[-1].name):
            figure.savefig(files[-1], dpi=150)
    return files


def _accuracy_after_each_task(axes, results: Results) -> None:
    curves = {label: 100 * accuracies_after_each_task(runs) for label, runs in results.items()}
    _lines(axes, curves, "accuracy on the tasks seen, %")


def _alpha_of_each_task(axes, results: Results) -> None:
    curves = {label: of_merges(runs, "alpha") for label, runs in results.items()}
    _lines(axes, curves, "merge coefficient alpha")


def _lines(axes, curves: Mapping[str, np.ndarray], name: str) -> None:
    """Draw curves [S, T] with mean and standard deviation over the seeds."""
    for number, (label, values) in enumerate(curves.items()):
        if not np.isfinite(values).any():
            continue
        # Shifted a little, so that error bars do not hide each other.
        tasks = np.arange(1, values.shape[1] + 1) + 0.03 * (number - len(curves) / 2)
        spread = figures.deviation(values)
        # Ten colours, then the same ones with another line.
        style = ("-", "--", ":")[number // 10 % 3]
        axes.errorbar(tasks, values.mean(axis=0), spread, label=label, linestyle=style,
                      color=f"C{number % 10}", marker=".", capsize=2, linewidth=1)  # fmt: skip
    axes.set(xlabel="after task", ylabel=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.has_data():
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _final_accuracy_of_each_task(axes, results: Results) -> None:
    rows = [[run["accuracy_matrix"][-1] for run in runs] for runs in results.values()]
    final = 100 * np.asarray(rows, np.float64).mean(axis=1)
    axes.imshow(final, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    figures.write_percents(axes, final)
    axes.set_xticks(range(final.shape[1]), range(1, final.shape[1] + 1))
    axes.set_yticks(range(len(results)), list(results))
    axes.set(xlabel="task", title="accuracy after the last task, %")


def _forgetting_and_learning_accuracy(axes, results: Results) -> None:
    for number, (label, runs) in enumerate(results.items()):
        pairs = [[run["learning_accuracy"], run["forgetting"]] for run in runs]
        points = 100 * np.asarray(pairs, np.float64)
        x, y = points.mean(axis=0)
        # With one task there is nothing to forget.
        if not np.isfinite((x, y)).all():
            continue
        error = points.std(axis=0, ddof=1) if len(runs) > 1 else (None, None)
        # A rule has the same colour in every plot.
        marker, color = "osD"[number // 10 % 3], f"C{number % 10}"
        axes.errorbar(x, y, error[1], error[0], fmt=marker, color=color, label=label, capsize=2)
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 4), fontsize="small")
    axes.set(xlabel="learning accuracy, %", ylabel="forgetting, %")
