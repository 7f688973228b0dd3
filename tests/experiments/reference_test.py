import importlib
import pathlib
import re
import sys
from dataclasses import fields

import pytest

from experiments import formulas, reference
from pm_jax.continual import Config

pdoc = pytest.importorskip("pdoc")
ROOT = pathlib.Path(__file__).parents[2]

FORMULAS = {
    "alpha = - Delta . grad Q(theta_hat) / Delta^T H Delta": (
        "<i>α</i> = −<i>Δ</i> ⋅ ∇ <i>Q</i>(<i>θ\u0302</i>) / "
        "<i>Δ</i><sup><i>T</i></sup> <i>H</i> <i>Δ</i>"
    ),
    "theta_hat_{t-1}* <= tau'": (
        '<i>θ\u0302</i><span class="scripts"><sup>∗</sup><sub><i>t</i>−1</sub></span> ≤ <i>τ</i>′'
    ),
    "1/2 sqrt((K - 1)^2 a_k), A (x) S^-1": (
        '½ √<span class="root">(<i>K</i> − 1)<sup>2</sup> <i>a</i><sub><i>k</i></sub></span>, '
        "<i>A</i> ⊗ <i>S</i><sup>−1</sup>"
    ),
    "sum_{i<t} G_i   the group's cross-entropy": (
        "∑<sub><i>i</i>&lt;<i>t</i></sub> <i>G</i><sub><i>i</i></sub>&emsp;"
        "the group's cross-entropy"
    ),
}


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_written_as_by_hand(text):
    assert formulas.line(text) == FORMULAS[text]


def test_code_names_and_lists_stay_as_they_are():
    page = (
        "<p><code>alpha_raw</code> <code>[N, C]</code> <code>x</code> <code>theta_0</code></p>"
        "<pre><code>state = rule.init(params)\n</code></pre>"
        "<pre><code>H          curvature [P, P]\n\nf(x) = |x|\n</code></pre>"
    )
    assert formulas.render(page) == (
        "<p><code>alpha_raw</code> <code>[N, C]</code> <code>x</code> "
        '<span class="formula"><i>θ</i><sub>0</sub></span></p>'
        "<pre><code>state = rule.init(params)\n</code></pre>"
        "<pre><code>H          curvature [P, P]</code></pre>\n"
        '<div class="formula"><i>f</i>(<i>x</i>) = |<i>x</i>|</div>'
    )


SAMPLE = '''"""A module."""
from typing import NamedTuple, TypeVar
T = TypeVar("T")
LIMIT = 3
SHARE = 0.5
"""A constant with its text."""
class Pair(NamedTuple):
    """A class.

    Attributes:
        left: a field with its text.
    """
    left: int
    right: int
    def both(self): ...
    def _sum(self): ...
def add(): ...
'''


def test_names_without_docstring_are_named(tmp_path, monkeypatch):
    (tmp_path / "sample_of_names.py").write_text(SAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    module = pdoc.doc.Module(importlib.import_module("sample_of_names"))
    found = {name.removeprefix("sample_of_names.") for name in reference.undocumented(module)}
    assert found == {"LIMIT", "Pair.right", "Pair.both", "add"}
    del sys.modules["sample_of_names"]


def test_what_pages_and_notebooks_import_is_in_the_reference():
    sources = [ROOT / "README.md", *ROOT.glob("pm_jax/*.md"), *ROOT.glob("experiments/**/*.md")]
    sources += ROOT.glob("experiments/notebooks/*_*.py")
    found = set()
    for source in sources:
        for module, names in re.findall(r"(?m)^from (pm_jax\S*) import (.*)$", source.read_text()):
            whole = [f"{module}.{name.split()[0]}" for name in names.split(", ")]
            found.update({module} if module in reference.PAGES else whole)
    assert "pm_jax.continual" in found and found <= set(reference.PAGES)


@pytest.mark.slow
def test_the_reference_needs_no_network_and_its_links_lead_somewhere(tmp_path):
    assert reference.build(tmp_path).exists()
    pages = {path.resolve(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) == 1 + len(reference.PAGES)
    for path, page in pages.items():
        assert not re.search(
            r"<(script|link|img)[^>]*(src|href)=.?https?:|@import|url\(.?http", page
        )
        for target, place in re.findall(r'<a [^>]*href="(?!https?:)([^"#$]*)#?([^"$]*)"', page):
            other = (path.parent / target).resolve() if target else path
            assert other in pages and (not place or f'id="{place}"' in pages[other]), (path, target)
        shown = re.sub("<[^>]*>", "", "".join(re.findall(r'<div class="formula">.*?</div>', page)))
        assert not re.search(r"[_^{}`]|theta|Delta|alpha", shown), shown
    settings = pages[(tmp_path / "pm_jax/continual.html").resolve()]
    assert all(f"<strong>{field.name}:</strong>" in settings for field in fields(Config))
    closed_form = next(iter(FORMULAS.values()))
    assert closed_form in pages[(tmp_path / "pm_jax/coefficients.html").resolve()]
