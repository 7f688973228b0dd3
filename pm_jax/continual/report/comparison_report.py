"""The report of a comparison of merge rules: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pm_jax.continual.report import adapting, comparison, report
from pm_jax.continual.report.comparison import Comparison
from pm_jax.continual.report.comparison_plots import Plot, Results
from pm_jax.continual.report.page import captioned, render, table
from pm_jax.continual.settings.config import Config
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.workdir import saved_form, write_text
from pm_jax.data.several import title_of


def write_report(
    rows: Sequence[Comparison],
    results: Results,
    plots: Mapping[str, Plot],
    configs: tuple[Config, Mapping[str, str]],
    workdir: Path,
    verdict: adapting.Verdict | None = None,
) -> Path:
    """Write the report of a comparison, and return its path.

    `configs` are the settings of the comparison, and in words what those of each rule have of their
    own.
    """
    base, own = configs
    config = saved_form(base)
    runs = results[rows[0].rule]
    own_settings = [[label, text or "none"] for label, text in own.items()]
    heading, *cells = comparison.cells(rows)
    # Numbers and units stay on one line; names of rules may be broken.
    whole = [[name, *(each.replace("+-", "±").replace(" ", "\u00a0") for each in numbers)]
             for name, *numbers in cells]  # fmt: skip
    page = render(
        "comparison.html.jinja",
        title=f"{len(rows)} merge rule{'s' * (len(rows) > 1)} on {title_of(base.dataset)}",
        headline=[text for text in (_best(rows), verdict and verdict.sentence()) if text],
        introduction=report.introduction(config, runs),
        table_of_rules=table(heading, whole),
        caption=comparison.caption(rows),
        plots=[captioned(*plot) for plot in plots.values()],
        own_settings=table(["rule", "settings of its own"], own_settings),
        **report.settings({"comparison": config}),
        seed=runs[0]["seed"],
        examples=report.examples(runs[0]),
        environment=report.environment(runs[0]),
    )
    path = workdir / f"{comparison.file_stem('report', rows[0].split)}.html"
    with manifest.covering(workdir, path.name):
        write_text(path, page)
    return path


def _best(rows: Sequence[Comparison]) -> str:
    """Say in a sentence which rule is best, by how much, and how sure that is."""
    # Bounds have no rank, which is NaN, and only NaN differs from itself.
    first, second, *_ = *(row for row in rows if row.rank == row.rank), None, None
    if first is None or second is None:
        return ""
    values = first.figures["final_average_accuracy"]
    gap, seeds = -100 * second.difference, len(values)
    head = (
        f"{first.rule} has the highest final accuracy, {100 * sum(values) / seeds:.1f} %: "
        f"{gap:.1f} "
    )
    if seeds == 1:
        return f"{head}points above {second.rule}, with one seed, which may be luck."
    error = 100 * second.difference_error
    doubt = "; which of the two is better is not clear" if gap <= 2 * error else ""
    return (
        f"{head}± {error:.1f} points above {second.rule} (standard error, paired over {seeds} "
        f"seeds){doubt}."
    )
