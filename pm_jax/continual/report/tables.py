"""Tables as plain text, LaTeX and HTML, and how a figure is written in them."""

from collections.abc import Sequence

import numpy as np

Cells = Sequence[Sequence[str]]
"""Rows of text; the first row is the heading."""


def as_text(cells: Cells) -> str:
    """Align the columns of a table for a terminal."""
    from tabulate import tabulate

    # The heading goes in as a row: tabulate makes a column wider than its heading otherwise.
    return tabulate(cells, tablefmt="plain", disable_numparse=True)


def as_markdown(cells: Cells) -> str:
    """Write a table in Markdown."""
    from tabulate import tabulate

    heading, *rows = cells
    return tabulate(rows, heading, "github", disable_numparse=True)


def as_latex(cells: Cells) -> str:
    """Write a table as a LaTeX `tabular`, which needs no package."""
    from tabulate import tabulate

    heading, *rows = cells
    aligned = ("left", *["right"] * (len(heading) - 1))
    text = tabulate(rows, heading, "latex", disable_numparse=True, colalign=aligned)
    return text.replace("+-", r"$\pm$")


def as_html(heading: Sequence[str], rows: Cells) -> str:
    """Write a table as HTML, with every cell escaped."""
    from tabulate import tabulate

    text = tabulate(rows, heading, "html", disable_numparse=True, stralign=None)
    # A line may break inside names such as perturb_and_merge, so that columns fit a phone.
    return text.replace("_", "_<wbr>")


def percent(mean: float | None, spread: float | None) -> str:
    """Write a fraction and its spread in percent; a dash stands for what does not apply."""
    if mean is None or not np.isfinite(mean):
        return "-"
    if spread is None or not np.isfinite(spread):
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} +- {100 * spread:.1f}"
