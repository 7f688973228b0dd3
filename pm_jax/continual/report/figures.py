"""Figures of the report of a run; they need the extra `plots`.

All are 4.6 inches wide: on a phone's screen that leaves their text about as large as the page's.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pm_jax.continual.merging.trust import FACTOR, NEGLIGIBLE
from pm_jax.continual.report.results import accuracies_after_each_task, of_merges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]


def data_uri(figure: "Figure") -> str:
    """A figure as the address of an image that a page contains.

    Args:
        figure: of matplotlib.

    Returns:
        A data URI of an SVG, the same for the same figure; letters are outlines.

    Example:
        >>> data_uri(accuracy_matrix([{"accuracy_matrix": [[1.0]]}]))[:26]
        'data:image/svg+xml;base64,'
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "pm_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def accuracy_matrix(runs: Sequence[Results]) -> "Figure":
    """Heat map of the accuracies after each task, on each task, as the mean over seeds.

    Args:
        runs: contents of `results.json`, one a seed.

    Returns:
        A figure, with the figures in percent in the cells of up to ten tasks.

    Example:
        >>> figure = accuracy_matrix([{"accuracy_matrix": [[1.0, None], [0.5, 0.25]]}])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['100.0', '50.0', '25.0']
    """
    values = 100 * np.mean([np.asarray(run["accuracy_matrix"], np.float64) for run in runs], axis=0)
    figure = _figure(4.0)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8)
    if len(values) <= 10:
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            ink = "white" if value < 60 else "black"
            size = 10 if len(values) <= 7 else 7.5
            axes.text(
                column, row, f"{value:.1f}", color=ink, ha="center", va="center", fontsize=size
            )
    every = -(-len(values) // 10)
    places = np.arange(0, len(values), every)
    axes.set_xticks(places, places + 1)
    axes.set_yticks(places, places + 1)
    axes.set(xlabel="accuracy on task, %", ylabel="after task")
    return figure


def accuracy_curves(runs: Mapping[str, Sequence[Results]]) -> "Figure":
    """Mean accuracy on the tasks seen, after each task, with the spread over seeds.

    Args:
        runs: for each label the contents of `results.json`, one a seed.

    Returns:
        A figure; a run that was measured after its last task only is a point.

    Example:
        >>> figure = accuracy_curves({"mine": [{"accuracy_matrix": [[1.0, None], [0.5, 0.25]]}]})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [100.0, 37.5]
    """
    figure = _figure(3.2)
    axes = figure.subplots()
    for number, (label, results) in enumerate(runs.items()):
        values = 100 * accuracies_after_each_task(results)
        tasks = np.arange(1, values.shape[1] + 1) + 0.05 * number
        axes.errorbar(tasks, values.mean(axis=0), _deviation(values), label=label,
                      color=f"C{number}", marker="os"[number], markersize=4, capsize=3)  # fmt: skip
    axes.set(xlabel="after task", ylabel="accuracy on the tasks seen, %")
    _finish(figure, axes, 1, values.shape[1])
    return figure


def training_loss(losses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Figure":
    """Training loss over the epochs of all tasks.

    Args:
        losses: for each label when an epoch ended, in tasks [E], and its mean loss [S, E].

    Returns:
        A figure, logarithmic if the losses span far; the band is a standard deviation over the
        seeds to either side.

    Example:
        >>> figure = training_loss({"mine": (np.asarray([0.5, 1.0]), np.asarray([[2.0, 1.0]]))})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0, 1.0]
    """
    figure = _figure(3.2)
    axes = figure.subplots()
    for number, (label, (ends, values)) in enumerate(losses.items()):
        mean, color = values.mean(axis=0), f"C{number}"
        axes.plot(ends, mean, label=label, color=color, marker="os"[number], markersize=2)
        if len(values) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(ends, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
    for boundary in range(1, int(ends.max())):
        axes.axvline(boundary, color="0.8", linewidth=0.8, zorder=0)
    means = np.concatenate([values.mean(axis=0) for _, values in losses.values()])
    if means.max() > 20 * means.min() > 0:
        axes.set_yscale("log")
    axes.set(xlabel="tasks trained", ylabel="training loss")
    _finish(figure, axes, 0, int(ends.max()))
    return figure


def coefficients(runs: Sequence[Results]) -> "Figure":
    """The merge coefficient of each task with its error bar, and the best one where it is known.

    Args:
        runs: contents of `results.json`, one a seed.

    Returns:
        A figure: mean over seeds of coefficient and standard error, and each seed as a dot.

    Example:
        >>> merges = [{"alpha": 1.0, "standard_error": 0.0}, {"alpha": 0.25, "standard_error": 0.1}]
        >>> figure = coefficients([{"merges": merges}])
        >>> figure.axes[0].containers[0].lines[0].get_ydata().tolist()
        [1.0, 0.25]
    """
    figure = _figure(3.4)
    axes = figure.subplots()
    alphas = of_merges(runs, "alpha")
    tasks = np.arange(1, alphas.shape[1] + 1)
    axes.plot(tasks, 1 / tasks, color="0.6", linestyle=":", label="1/t (plain averaging)")
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
    """Predicted against actual loss change of every merge but the first.

    Args:
        runs: contents of `results.json`, one a seed.

    Returns:
        A figure, logarithmic beyond `NEGLIGIBLE`; points of the first seed bear the numbers of
        tasks, and the band reaches to `FACTOR` to either side of agreement.

    Example:
        >>> merge = {"predicted_loss_change": 0.01, "actual_loss_change": 0.02}
        >>> figure = loss_changes([{"merges": [{}, merge]}])
        >>> [(text.get_text(), text.xy) for text in figure.axes[0].texts]
        [('2', (0.01, 0.02))]
    """
    figure = _figure(4.2)
    axes = figure.subplots()
    predicted, actual = (
        of_merges(runs, name)[:, 1:] for name in ("predicted_loss_change", "actual_loss_change")
    )
    known = np.isfinite(predicted) & np.isfinite(actual)
    both = np.concatenate([predicted[known], actual[known]])
    top = max(2 * both.max(), 10 * NEGLIGIBLE)
    bottom = min(2 * both.min(), -NEGLIGIBLE / 2)
    line = np.concatenate([[0], np.geomspace(NEGLIGIBLE / 100, FACTOR * top, 200)])
    axes.fill_between(
        line, line / FACTOR, line * FACTOR, color="0.9", label=f"within {FACTOR:.0f} x"
    )
    axes.plot(line, line, color="0.5", linewidth=1, label="agreement")
    axes.plot(predicted[known], actual[known], "o", color="C0", markersize=5)
    for task in np.flatnonzero(known[0])[:: 1 + known.shape[1] // 8]:
        axes.annotate(
            str(task + 2),
            (float(predicted[0, task]), float(actual[0, task])),
            textcoords="offset points",
            xytext=(4, 3),
        )
    axes.set_xscale("symlog", linthresh=NEGLIGIBLE)
    axes.set_yscale("symlog", linthresh=NEGLIGIBLE)
    axes.set(xlim=(bottom, top), ylim=(bottom, top), aspect="equal",
             xlabel="predicted loss change", ylabel="actual loss change")  # fmt: skip
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def landscape(
    alphas: np.ndarray, values: np.ndarray, merged: np.ndarray, used: np.ndarray, best: np.ndarray
) -> "Figure":
    """A score along the segment of every merge but the first, one panel each.

    Args:
        alphas: [A].
        values: [T, A, T], by merge, coefficient and task looked at.
        merged: [T, T], at the merged model.
        used: [T], coefficients of the merges; NaN for none.
        best: [T], the best ones.

    Returns:
        A figure; the vertical axes show what happens between 0 and 1.

    Example:
        >>> values, merged = np.ones((2, 3, 2)), np.ones((2, 2))
        >>> figure = landscape(np.asarray([0, 0.5, 1]), values, merged, np.ones(2), np.ones(2))
        >>> [axes.get_title() for axes in figure.axes]
        ['task 2', '']
    """
    panels = len(values) - 1
    rows = -(-panels // 2)
    figure = _figure(0.8 + 1.8 * rows)
    every = figure.subplots(rows, 2, squeeze=False).flat
    inside = (alphas >= 0) & (alphas <= 1)
    for task, axes in enumerate(every, start=1):
        if task > panels:
            axes.set_axis_off()
            continue
        seen = values[task, :, : task + 1]
        mean = seen.mean(axis=1)
        axes.plot(alphas, seen[:, -1], color="C1", linestyle="--", label="new task")
        axes.plot(alphas, seen[:, :-1].mean(axis=1), color="C2", linestyle="-.",
                  label="earlier tasks")  # fmt: skip
        axes.plot(alphas, mean, color="C0", linewidth=2, label="all seen")
        axes.axvline(best[task], color="0.4", linestyle=":", label="best coefficient")
        axes.plot(used[task], merged[task, : task + 1].mean(), "ko", markersize=5,
                  label="merged model")  # fmt: skip
        shown = np.concatenate([seen[inside, -1], seen[inside, :-1].mean(axis=1)])
        margin = 0.1 * np.ptp(shown) or 1.0
        axes.set(title=f"task {task + 1}", ylim=(shown.min() - margin, shown.max() + margin))
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    figure.supxlabel("merge coefficient", fontsize="medium")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def plane(
    along: np.ndarray, across: np.ndarray, losses: np.ndarray, merged: np.ndarray
) -> "Figure":
    """Losses in the plane of the last two task vectors, of the new task and of those before it.

    Args:
        along: [P], coordinates along the new task's vector.
        across: [P], along the one before it.
        losses: [P, P, t], by place and task seen.
        merged: `along` and `across` of the merged model.

    Returns:
        A figure of two panels with contours on a logarithmic scale.

    Example:
        >>> axis = np.asarray([0.0, 0.5, 1.0])
        >>> figure = plane(axis, axis, 1 + np.arange(18.0).reshape(3, 3, 2), np.zeros(2))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['earlier tasks', 'new task']
    """
    from matplotlib.ticker import LogLocator

    figure = _figure(6.4)
    panels = figure.subplots(2, 1, sharex=True)
    parts = {"earlier tasks": losses[..., :-1].mean(axis=-1), "new task": losses[..., -1]}
    for axes, (name, values) in zip(panels, parts.items(), strict=True):
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


def _deviation(values: np.ndarray) -> np.ndarray | None:
    return values.std(axis=0, ddof=1) if len(values) > 1 else None


def _finish(figure: "Figure", axes, first: int, last: int) -> None:
    """The legend, and whole numbers of tasks below."""
    axes.set_xlim(first - 0.3, last + 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="0.9")
    figure.legend(loc="outside upper center", frameon=False)
