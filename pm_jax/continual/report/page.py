"""Parts of pages that need nothing beside them: templates filled in, tables, and charts as SVG."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pm_jax.continual.report import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CYCLE = {
    "1f77b4": "4ea1e0", "ff7f0e": "ff9f40", "2ca02c": "4cc25a", "d62728": "ff6b6b",
    "9467bd": "b58be0", "8c564b": "c08068", "e377c2": "f09bd6", "7f7f7f": "a8a8a8",
    "bcbd22": "d4d544", "17becf": "3fd5e6",
}  # fmt: skip
"""Matplotlib's colours C0 to C9, each with the one that takes its place on a dark page."""
BETWEEN_TAGS = re.compile(r"(?<=>)\s+|\s+(?=<)")
UNUSED = re.compile(
    r"<defs>\s*<style.*?</style>\s*</defs>"  # in the page's stylesheet
    r'| id="[\w.]+_\d+"'  # of groups, which every chart numbers anew
    r"|font-family: [^;\"]*;? ?",
    re.DOTALL,
)


class Captioned(NamedTuple):
    """A chart of a page: its SVG, its name, and what it shows."""

    svg: Any
    name: str
    caption: str


def render(template: str, **names: Any) -> str:
    """Fill in a template of this folder; texts are escaped unless they are markup."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # A name that the template uses and nobody gives is an error, not an empty text.
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["with_flags"] = _with_flags
    return environment.get_template(template).render(CYCLE=CYCLE, **names)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """Lay out a table as markup."""
    from markupsafe import Markup

    # tabulate has escaped the cells already.
    return Markup(tables.as_html(heading, rows))


def captioned(figure: "Figure", name: str, caption: str) -> Captioned:
    """Turn a figure into a chart of a page."""
    return Captioned(_svg(figure, f"{name}. {caption}"), name, caption)


def _with_flags(text: str) -> Any:
    """Set flags as code, so that no line breaks within them."""
    from markupsafe import Markup, escape

    # A plain string: markup would escape what is put into it.
    return Markup(re.sub(r"--\w+(=\w+([=,.]\w+)*)?", r"<code>\g<0></code>", str(escape(text))))


def _svg(figure: "Figure", label: str) -> Any:
    """Draw a figure as an `<svg>` element whose colours and fonts are those of the page."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    file = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Ids are hashes of this salt and of what they name: each chart has its own, the same each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata=about)
    _, box, body = re.split(r'viewBox="([^"]*)"[^>]*>', file.getvalue(), maxsplit=1)
    body = BETWEEN_TAGS.sub("", UNUSED.sub("", body)).replace("#000000", "currentColor")
    for number, color in enumerate(CYCLE):
        body = body.replace(f"#{color}", f"var(--c{number})")
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="{box}">{body}')


def spread(values: Any, unit: float = 1) -> str:
    """Write mean and, of several seeds, deviation; a dash stands for what does not apply."""
    values = unit * np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return "-"
    deviation = f"\u00a0±\u00a0{values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{deviation}"


def capitalized(text: str) -> str:
    """Begin a text with a capital letter."""
    return text[:1].upper() + text[1:]
