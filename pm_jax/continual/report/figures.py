"""Figures for the report of a run; they need the extra `plots`.

`runs` are the contents of results.json, one a seed. All figures are 4.6 inches wide: on a phone's
screen their text is then about as large as the page's. Frames and grids are black, which pages draw
in the colour of their text; grey is black with little opacity.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pm_jax.continual.merging.trust import FACTOR, NEGLIGIBLE
from pm_jax.continual.report.results import Shown, accuracies_after_each_task, of_merges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]


def accuracy_matrix(runs: Sequence[Results]) -> "Figure":
    """Draw a heat map of the accuracies after each task, on each task, as the mean over seeds."""
    matrices = 100 * np.asarray([run["accuracy_matrix"] for run in runs], np.float64)
    values = matrices.mean(axis=0)
    figure = _figure(4.0)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8)
    write_percents(axes, values, deviation(matrices))
    # At most ten ticks; the division rounds up.
    places = np.arange(0, len(values), -(-len(values) // 10))
    axes.set_xticks(places, places + 1)
    axes.set_yticks(places, places + 1)
    axes.set(xlabel=f"{Shown.of(runs[0]).split} accuracy on task, %", ylabel="after task")
    return figure


def accuracy_curves(runs: Mapping[str, Sequence[Results]]) -> "Figure":
    """Draw the mean accuracy on the tasks seen, after each task, for each label."""
    figure = _figure(3.2)
    axes = figure.subplots()
    for number, (label, results) in enumerate(runs.items()):
        values = 100 * accuracies_after_each_task(results)
        tasks = np.arange(1, values.shape[1] + 1)
        axes.errorbar(tasks, values.mean(axis=0), deviation(values), label=label,
                      color=f"C{number}", marker="os"[number], markersize=4, capsize=3)  # fmt: skip
    axes.set(xlabel="after task", ylabel="accuracy on tasks seen, %")
    _finish(figure, axes, 1, values.shape[1])
    return figure


def training_loss(losses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Figure":
    """Draw the training loss over the epochs of all tasks."""
    figure = _figure(3.2)
    axes = figure.subplots()
    for number, (label, (ends, values)) in enumerate(losses.items()):
        mean, color = values.mean(axis=0), f"C{number}"
        axes.plot(ends, mean, label=label, color=color, marker="os"[number], markersize=2)
        if (spread := deviation(values)) is not None:
            axes.fill_between(ends, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
    for boundary in range(1, int(ends.max())):
        axes.axvline(boundary, color="k", alpha=0.2, linewidth=0.8, zorder=0)
    means = np.concatenate([values.mean(axis=0) for _, values in losses.values()])
    # Losses that span far are legible on a logarithmic axis only.
    if means.max() > 20 * means.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="tasks trained", ylabel="training loss")
    _finish(figure, axes, 0, int(ends.max()))
    return figure


def coefficients(runs: Sequence[Results]) -> "Figure":
    """Draw the merge coefficient of each task with its error bar, and the best one if measured."""
    figure = _figure(3.4)
    axes = figure.subplots()
    alphas = of_merges(runs, "alpha")
    tasks = np.arange(1, alphas.shape[1] + 1)
    axes.plot(tasks, 1 / tasks, color="k", alpha=0.5, linestyle=":", label="1/t (plain averaging)")
    if len(runs) > 1:
        axes.plot(np.tile(tasks, len(runs)), alphas.ravel(), ".", color="C0", alpha=0.4)
    errors = np.nan_to_num(of_merges(runs, "standard_error")).mean(axis=0)
    axes.errorbar(tasks, alphas.mean(axis=0), errors, color="C0", marker="o", markersize=4,
                  capsize=3, label="used, with standard error")  # fmt: skip
    for name, label, marker, color in (
        ("oracle_alpha", "least validation loss", "D", "C1"),
        ("most_accurate_alpha", "best validation accuracy", "^", "C2"),
    ):
        best = of_merges(runs, name)
        if np.isfinite(best).any():
            axes.plot(tasks, best.mean(axis=0), marker, color=color, markersize=6, label=label,
                      fillstyle="none")  # fmt: skip
    axes.set(xlabel="task", ylabel="merge coefficient")
    _finish(figure, axes, 1, len(tasks))
    return figure


def loss_changes(runs: Sequence[Results]) -> "Figure":
    """Draw predicted against measured loss changes of all merges but the first."""
    figure = _figure(4.2)
    axes = figure.subplots()
    predicted, actual = (
        of_merges(runs, name)[:, 1:] for name in ("predicted_loss_change", "actual_loss_change")
    )
    measured = np.isfinite(predicted) & np.isfinite(actual)
    both = np.concatenate([predicted[measured], actual[measured]])
    top = max(2 * both.max(), 10 * NEGLIGIBLE)
    bottom = min(2 * both.min(), -NEGLIGIBLE / 2)
    line = np.concatenate([[0], np.geomspace(NEGLIGIBLE / 100, FACTOR * top, 200)])
    # The report says nothing about merges within the band.
    within = f"within {FACTOR:.0f} x"
    axes.fill_between(line, line / FACTOR, line * FACTOR, color="k", alpha=0.1, lw=0, label=within)
    axes.plot(line, line, color="k", alpha=0.5, linewidth=1, label="agreement")
    axes.plot(predicted[measured], actual[measured], "o", color="C0", markersize=5)
    # Linear around 0, logarithmic beyond: loss changes have both signs.
    axes.set_xscale("symlog", linthresh=NEGLIGIBLE)
    axes.set_yscale("symlog", linthresh=NEGLIGIBLE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set(xlim=(bottom, top), ylim=(bottom, top), aspect="equal",
             xlabel="predicted loss change", ylabel="measured loss change")  # fmt: skip
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    # The layout, and so the places of the points, is made as the figure is drawn.
    figure.draw_without_rendering()
    _number_points(axes, measured[0], np.stack([predicted[0], actual[0]], axis=1))
    return figure


def _number_points(axes: "Axes", measured: np.ndarray, places: np.ndarray) -> None:
    """Write the numbers of tasks beside the first seed's points, but for those that would meet."""
    numbered: list[np.ndarray] = []
    points_per_pixel = 72 / axes.figure.dpi
    for task in np.flatnonzero(measured):
        at = axes.transData.transform(places[task]) * points_per_pixel
        # A number of two digits takes this much room, in points.
        if all((np.abs(at - other) > (16, 10)).any() for other in numbered):
            numbered.append(at)
            axes.annotate(str(task + 2), places[task], textcoords="offset points", xytext=(4, 3))


class Segments(NamedTuple):
    """A score along the merges of one seed's run."""

    # By merge, coefficient and task, [T, A, T]; that at the merged models is [T, T].
    values: np.ndarray
    merged: np.ndarray
    # Coefficients [T] that were used, and those that were best.
    used: np.ndarray
    best: np.ndarray


def landscape(alphas: np.ndarray, seeds: Sequence[Segments]) -> "Figure":
    """Draw a score along the segment of every merge but the first, in a panel for each."""
    panels = len(seeds[0].values) - 1
    rows = -(-panels // 2)
    figure = _figure(0.8 + 1.8 * rows)
    axes_of_panels = figure.subplots(rows, 2, squeeze=False).flat
    for task, axes in enumerate(axes_of_panels, start=1):
        if task > panels:
            axes.set_axis_off()
        else:
            _segment(axes, alphas, seeds, task)
    figure.supxlabel("merge coefficient", fontsize="medium")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _segment(axes, alphas: np.ndarray, seeds: Sequence[Segments], task: int) -> None:
    """Draw one panel: the mean over seeds of each part, with a band, and each merged model."""
    seen = np.asarray([seed.values[task, :, : task + 1] for seed in seeds])
    parts = {
        "new task": (seen[..., -1], "C1", "--"),
        "earlier tasks": (seen[..., :-1].mean(axis=-1), "C2", "-."),
        "all seen": (seen.mean(axis=-1), "C0", "-"),
    }
    for label, (values, color, style) in parts.items():
        mean = values.mean(axis=0)
        axes.plot(alphas, mean, color=color, linestyle=style, label=label)
        if (band := deviation(values)) is not None:
            axes.fill_between(alphas, mean - band, mean + band, color=color, alpha=0.2, lw=0)
    best = np.mean([seed.best[task] for seed in seeds])
    axes.axvline(best, color="k", alpha=0.6, linestyle=":", label="best coefficient")
    places = [(seed.used[task], seed.merged[task, : task + 1].mean()) for seed in seeds]
    axes.plot(*zip(*places, strict=True), "ko", markersize=5, label="merged model")
    # The vertical axis shows what happens between 0 and 1; losses beyond may be huge.
    inside = (alphas >= 0) & (alphas <= 1)
    shown = np.concatenate([parts[name][0][:, inside].ravel() for name in list(parts)[:2]])
    margin = 0.1 * np.ptp(shown) or 1.0
    axes.set(title=f"task {task + 1}", ylim=(shown.min() - margin, shown.max() + margin))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def plane(
    along: np.ndarray, across: np.ndarray, losses: np.ndarray, merged: np.ndarray
) -> "Figure":
    """Draw losses in the plane of the last two task vectors, for new task and earlier ones."""
    from matplotlib.ticker import LogLocator

    figure = _figure(6.4)
    panels = figure.subplots(2, 1, sharex=True)
    parts = {"earlier tasks": losses[..., :-1].mean(axis=-1), "new task": losses[..., -1]}
    for axes, (name, values) in zip(panels, parts.items(), strict=True):
        # A loss of 0 has no place on a logarithmic scale.
        image = axes.contourf(along, across, np.maximum(values, 1e-6).T, cmap="viridis_r",
                              locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # fmt: skip
        figure.colorbar(image, ax=axes, label="loss", format="%.2g")
        for place, marker, label in (
            ((0, 0), "s", "before"), ((1, 0), "^", "trained"), (merged, "o", "merged"),
        ):  # fmt: skip
            axes.plot(*place, marker, color="C3", markeredgecolor="white", markersize=7,
                      linestyle="none", label=label)  # fmt: skip
        axes.set(title=name, ylabel="along the task vector before")
    panels[-1].set_xlabel("along the new task's vector")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(4.6, height), layout="constrained")


def write_percents(axes, values: np.ndarray, spread: np.ndarray | None = None) -> None:
    """Write the numbers of a heat map into its cells, with their spread where there is room."""
    columns = values.shape[1]
    # More numbers than those of ten tasks are not legible.
    if columns > 10:
        return
    size = 10 if columns <= 7 else 7.5
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        # Legible on both ends of the colour map, of which high values are bright. Pages give text
        # their own colour where it is black, so that this is not quite.
        ink = "white" if value < 60 else "#111111"
        text = f"{value:.1f}"
        if spread is not None and columns <= 5:
            text += f"\n±{spread[row, column]:.1f}"
        axes.text(column, row, text, color=ink, ha="center", va="center", fontsize=size)


def deviation(values: np.ndarray) -> np.ndarray | None:
    """Compute the sample deviation over seeds [S, ...]; `None` for one seed, without a spread."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else None


def _finish(figure: "Figure", axes, first: int, last: int) -> None:
    """Add the legend, and number the axis of tasks with whole numbers."""
    axes.set_xlim(first - 0.3, last + 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="k", alpha=0.1)
    figure.legend(loc="outside upper center", frameon=False)
