"""Charts of the losses and accuracies along the merges of a run, from its landscapes."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pm_jax.continual.merging import landscape
from pm_jax.continual.report import figures
from pm_jax.continual.report.finished_run import FinishedRun
from pm_jax.continual.report.page import Captioned, capitalized, captioned
from pm_jax.continual.report.results import Results, of_merges
from pm_jax.types import InvalidInput

DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, EOFError, zipfile.BadZipFile)
"""A landscape that is damaged raises one of these, when it is read or when it is drawn."""


def charts(run: FinishedRun) -> list[Captioned] | None:
    """Draw the landscapes of a run; `None` if it measured none, an empty list for one task.

    Raises:
        InvalidInput: a landscape is damaged.
    """
    paths = {
        run.directory / f"seed_{content['seed']}" / landscape.FILE: content
        for content in run.results
    }
    paths = {path: content for path, content in paths.items() if path.exists()}
    if not paths:
        return None
    arrays = [_read(run, path) for path in paths]
    columns = "" if run.classifiers == ["trained"] else " of the trained columns"
    try:
        measured = (each["loss" if "loss" in each else "plane_loss"][1:] for each in arrays)
        if not all(np.isfinite(values).any() for values in measured):
            return []
        results = list(paths.values())
        return [*_along(results, arrays, columns), *_plane(results[0], arrays[0], columns)]
    except DAMAGE:
        raise _damaged(run, *paths) from None


def _read(run: FinishedRun, path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {n: a.astype(np.float64, casting="same_kind") for n, a in file.items()}
    except DAMAGE:
        raise _damaged(run, path) from None


def _damaged(run: FinishedRun, *paths: Path) -> InvalidInput:
    names = " or ".join(f"{path.parent.name}/{path.name}" for path in paths)
    return InvalidInput(
        f"workdir={run.directory}: {names} is damaged; move it away for a report without it"
    )


def _along(
    results: Sequence[Results], arrays: Sequence[Mapping[str, np.ndarray]], columns: str
) -> Iterator[Captioned]:
    """Draw losses and accuracies along the merges of all seeds."""
    if "alphas" not in arrays[0]:
        return
    seeds = ", ".join(str(content["seed"]) for content in results)
    of_seeds = f"seed {seeds}"
    if len(results) > 1:
        of_seeds = f"mean over the seeds {seeds}; bands: a standard deviation, dots: single seeds"
    for name, unit, best in (("loss", 1, "oracle_alpha"), ("accuracy", 100, "most_accurate_alpha")):
        segments = [
            figures.Segments(
                unit * read[name],
                unit * read[f"merged_{name}"],
                *(of_merges([content], key)[0] for key in ("alpha", best)),
            )
            for content, read in zip(results, arrays, strict=True)
        ]
        caption = (
            f"Mean validation {name}{columns}{', in percent,' if unit > 1 else ''} between the "
            f"model that a task started from (0) and the one that it trained (1), {of_seeds}."
        )
        figure = figures.landscape(arrays[0]["alphas"], segments)
        yield captioned(figure, f"{capitalized(name)} along the merges", caption)


def _plane(first: Results, arrays: Mapping[str, np.ndarray], columns: str) -> Iterator[Captioned]:
    """Draw losses in the plane of the last two task vectors of the first seed."""
    if "plane_loss" not in arrays:
        return
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
    yield captioned(figure, "Around the last merge", caption)
