r"""The picture of the method: losses along the segment of a merge, from a run, as a small SVG.

python -m experiments.train --workdir=runs/segment --baseline= --landscape_points=41
python -m experiments.studies.segment_picture --workdir=runs/segment --task=4 \
    --output=experiments/segment.svg

It shows one merge of one seed, on the run's validation data: the losses of the tasks before and of
the new task between the previous and the trained model, the mean over all tasks, and the closed
form's coefficient beside the best one. Its colours follow a light or dark page.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax import files
from pm_jax.continual.merging import landscape
from pm_jax.continual.report.results import read_results
from pm_jax.continual.storage.workdir import RESULTS_FILE
from pm_jax.types import InvalidInput

COLORS = {
    "page": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "earlier": ("#0969da", "#58a6ff"),
    "new": ("#bc4c00", "#f0883e"),
    "chosen": ("#1a7f37", "#3fb950"),
}
"""Each colour on a light and on a dark page."""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags; an import must not, because experiments.train has some of the same."""
    flags.DEFINE_string("workdir", None, "Of a run with landscape_points.", values)
    flags.DEFINE_string("output", None, "The .svg file to write.", values)
    flags.DEFINE_integer("seed", 0, "Which seed of the run.", flag_values=values)
    flags.DEFINE_integer("task", 2, "The task whose merge is shown, from 2.", flag_values=values)


def picture(alphas: np.ndarray, losses: np.ndarray, used: float, merged: float) -> str:
    """Draw the losses [A, t] of t tasks at the coefficients [A], and return the SVG.

    `used` is the coefficient of the merge, and `merged` the mean loss of the merged model.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inside = (alphas >= 0) & (alphas <= 1)
    alphas, losses = alphas[inside], losses[inside]
    count = losses.shape[1]
    mean = losses.mean(axis=1)
    best, top = mean.argmin(), 1.1 * losses.max()
    page, ink, earlier, new, chosen = (light for light, _ in COLORS.values())
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pm_jax", "font.size": 11}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor=page)
        axes = figure.subplots(subplot_kw={"facecolor": "none"})
        tasks = "task 1" if count == 2 else f"tasks 1 to {count - 1}"
        curves = (
            (losses[:, :-1].mean(axis=1), f"old: {tasks}", earlier, "--"),
            (losses[:, -1], f"new: task {count}", new, "-."),
            (mean, "mean of all tasks", ink, "-"),
        )
        for values, label, color, style in curves:
            axes.plot(alphas, values, style, color=color, linewidth=2)
            axes.annotate(
                label, (1, values[-1]), (8, 0), textcoords="offset points", color=color,
                va="center", annotation_clip=False,
            )  # fmt: skip
        points = [
            (used, merged, "o", chosen, f"closed form, without old data: {used:.2f}"),
            (alphas[best], mean[best], "D", ink, f"best, with all data: {alphas[best]:.2f}"),
        ]
        # The left one's words stand higher, so that they do not run over the other one's line.
        for height, (at, value, marker, color, label) in zip(
            (top, 0.85 * top), sorted(points), strict=True
        ):
            axes.plot([at, at], [value, height], ":", color=color, linewidth=1.2)
            axes.plot(at, value, marker, color=color, markersize=7)
            axes.annotate(label, (at, height), (6, 0), textcoords="offset points", color=color,
                          va="top")  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.tick_params(colors=ink)
        axes.set_xticks([0, 0.5, 1], ["0\nprevious model", "0.5", "1\ntrained model"])
        axes.set(xlim=(0, 1), ylim=(0, top))
        axes.set_xlabel("merge coefficient", color=ink)
        axes.set_ylabel("loss on held-out data", color=ink)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _following_the_page(text.getvalue())


def _following_the_page(svg: str) -> str:
    """Put variables for the colours, with their values on light and on dark pages."""
    light, dark = (
        "".join(f"--{name}: {pair[side]}; " for name, pair in COLORS.items()) for side in (0, 1)
    )
    style = f":root {{ {light}}} @media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
    for name, (color, _) in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    before, opened, after = svg.partition('<style type="text/css">')
    return f"{before}{opened}{style}{after}"


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Read the run and write the picture."""
    del argv
    with experiment_flags.exits(values):
        for name, example in (("workdir", "runs/segment"), ("output", "segment.svg")):
            if not values[name].value:
                raise InvalidInput(f"{name}=: needs a path, as --{name}={example}")
        folder = Path(values.workdir) / f"seed_{values.seed}"
        if not (folder / RESULTS_FILE).exists():
            raise InvalidInput(
                f"workdir={values.workdir}: has no {folder.name} that is finished; give that of a "
                "run of experiments.train"
            )
        merges = read_results(folder / RESULTS_FILE)["merges"]
        if not 2 <= values.task <= len(merges):
            raise InvalidInput(f"task={values.task}: must be from 2 to {len(merges)}")
        path = folder / landscape.FILE
        if not path.exists():
            raise InvalidInput(
                f"workdir={values.workdir}: has no {path.name}; run it with --landscape_points=41"
            )
        task = values.task - 1
        with np.load(path) as arrays:
            seen = arrays["loss"][task, :, : task + 1]
            merged = arrays["merged_loss"][task, : task + 1].mean()
            svg = picture(arrays["alphas"], seen, merges[task]["alpha"], merged)
        files.write_text(Path(values.output), svg)
        print(f"written: {values.output}")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=experiment_flags.parse)
