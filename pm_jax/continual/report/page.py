"""The parts that the page of a report is made of; texts are escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pm_jax.continual.report.figures import data_uri

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.table { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0.5rem 0; max-width: 34rem; }
img { width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption { font-size: 0.875rem; opacity: 0.8; }
summary { cursor: pointer; margin: 0.5rem 0; }
"""


def page(title: str, introduction: str, sections: Mapping[str, str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        introduction: plain text.
        sections: HTML by heading.

    Returns:
        HTML that needs nothing beside it.

    Example:
        >>> "<h1>A &amp; B</h1>" in page("A & B", "", {"Result": paragraph("1 < 2")})
        True
    """
    body = "".join(f"<h2>{name}</h2>\n{content}\n" for name, content in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{paragraph(introduction)}\n{body}</body>\n</html>\n"
    )


def grid(figures: Sequence[str]) -> str:
    """Figures side by side, as many as the window is wide enough for."""
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def captioned(figure: Any, name: str, caption: str) -> str:
    """A figure of matplotlib with its name and what it shows."""
    return (
        f'<figure><img alt="{escape(f"{name}. {caption}")}" '
        f'src="{data_uri(figure)}">'
        f"<figcaption><b>{escape(name)}.</b> {escape(caption)}</figcaption></figure>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; names such as perturb_and_merge may be broken, so that columns fit a phone."""

    def line(cells: Sequence[str], tag: str) -> str:
        texts = [escape(cell).replace("_", "_<wbr>") for cell in cells]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>\n"

    lines = line(header, "th") + "".join(line(row, "td") for row in rows)
    return f'<div class="table"><table>\n{lines}</table></div>\n'


def details(summary: str, content: str) -> str:
    """What is folded away until its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"
