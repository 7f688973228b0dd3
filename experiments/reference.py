"""Build the reference of the library from its docstrings, as pages that need no network.

python -m experiments.reference runs/reference
"""

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import flax.linen as nn
from absl import app

import pm_jax
from experiments import flags as experiment_flags
from experiments import formulas
from pm_jax import files
from pm_jax.continual import Config
from pm_jax.types import InvalidInput

if TYPE_CHECKING:
    from pdoc import doc

PAGES = (
    *("pm_jax", "pm_jax.types", "pm_jax.trees", "pm_jax.task_vectors", "pm_jax.losses"),
    *("pm_jax.perturbation", "pm_jax.coefficients", "pm_jax.merger", "pm_jax.lora"),
    *("pm_jax.metrics", "pm_jax.rules", "pm_jax.rules.base", "pm_jax.rules.building"),
    "pm_jax.block_sums",
    *("pm_jax.rules.checked", "pm_jax.rules.preferences", "pm_jax.curvature"),
    *("pm_jax.curvature.quadratics", "pm_jax.curvature.measures"),
    "pm_jax.curvature.squared_gradients",
    *("pm_jax.curvature.kronecker", "pm_jax.curvature.low_rank", "pm_jax.curvature.products"),
    *("pm_jax.classifiers", "pm_jax.classifiers.base", "pm_jax.classifiers.drift"),
    *("pm_jax.integrations", "pm_jax.integrations.linen", "pm_jax.integrations.nnx"),
    *("pm_jax.integrations.nnx_adapters", "pm_jax.integrations.qwix"),
    *("pm_jax.models", "pm_jax.models.model", "pm_jax.data", "pm_jax.weights"),
    *("pm_jax.weights.pretrained", "pm_jax.weights.peft_adapter", "pm_jax.offline"),
    *("pm_jax.offline.requests", "pm_jax.offline.merging", "pm_jax.continual"),
)
"""The modules that people import; other modules are how these do their work."""

ARRAY = re.compile(r"(?:</?span[^<>]*>|\.)+".join(("jax", "jaxlib", "_jax", "Array")))
"""The name that an array's type has within JAX, with the marks of its parts."""
GENERATED = re.compile(r"Alias for field number \d+$|Create new instance of \w+\(")
"""Python writes such docstrings for the fields of named tuples."""
STYLE = """
main.pdoc { overflow-x: clip; }
.formula { font-family: "STIX Two Text", Cambria, "Times New Roman", serif; font-size: 1.1em; }
div.formula { margin: 1em 1.5em; overflow-x: auto; line-height: 1.8; white-space: nowrap; }
.formula sub, .formula sup { font-size: 72%; line-height: 0; }
.scripts { display: inline-flex; flex-direction: column; vertical-align: middle; }
.scripts sub, .scripts sup { line-height: 1.1; vertical-align: baseline; }
.root { border-top: 1px solid; }
@media (prefers-color-scheme: dark) {
  :root { --pdoc-background: #16181b; color-scheme: dark; }
  .pdoc { --text: #dfe3e8; --muted: #9aa3ad; --link: #8ab4f8; --link-hover: #aecbfa;
    --code: #22262b; --active: #5a5320; --accent: #2b3036; --accent2: #4a525b;
    --nav-hover: #ffffff14; --name: #79b8ff; --def: #7ee787; --annotation: #a5d6a7; }
}
"""

TEMPLATE = """
{% extends "default/module.html.jinja2" %}
{% block nav_submodules %}
  {% for name in all_modules if name.startswith(module.modulename ~ ".") %}
    {% if loop.first %}<h2>Modules</h2><ul>{% endif %}
    <li>{{ (name, "") | link }}</li>
    {% if loop.last %}</ul>{% endif %}
  {% endfor %}
{% endblock %}
"""
"""The pages within a page are listed beside it, also those that its module does not export."""


def main(argv: Sequence[str]) -> None:
    """Build all pages, unless a public name has no docstring."""
    with experiment_flags.exits():
        if len(argv) != 2:
            raise InvalidInput("DIR: is missing; name one, as experiments.reference runs/reference")
        print(f"reference: {build(Path(argv[1]))}")


def build(output: Path) -> Path:
    """Write a page for each module, an index and what their search box reads.

    Raises:
        InvalidInput: pdoc is not installed, or a public name has no docstring.
    """
    try:
        from pdoc import doc, render
    except ImportError as error:
        raise InvalidInput(f"{error.name}: is not installed; pip install 'pm_jax[docs]'") from None
    modules = {name: doc.Module.from_name(name) for name in PAGES}
    _explain_settings(modules["pm_jax.continual"].members["Config"])
    if missing := [name for module in modules.values() for name in undocumented(module)]:
        raise InvalidInput(f"{', '.join(missing)}: no docstring says what this is; write one")
    _configure(render)
    with warnings.catch_warnings():
        # A field of a named tuple that has the tuple's own type.
        warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
        pages = {f"{name.replace('.', '/')}.html": module for name, module in modules.items()}
        for name, module in pages.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            text = render.html_module(module, modules)
            files.write_text(output / name, ARRAY.sub("jax.Array", text))
        files.write_text(output / "search.js", render.search_index(modules))
    files.write_text(output / "index.html", render.html_index(modules))
    return output / "index.html"


def _configure(render: Any) -> None:
    """Give pdoc our colours, our form of docstrings and formulas."""
    import jinja2
    from pdoc.render_helpers import to_html

    footer = f"pm_jax {pm_jax.__version__}"
    render.configure(docformat="google", show_source=False, footer_text=footer)
    ours = jinja2.DictLoader({"custom.css": STYLE + _dark_code(), "module.html.jinja2": TEMPLATE})
    render.env.loader = jinja2.ChoiceLoader([ours, render.env.loader])
    render.env.filters["to_html"] = lambda text: formulas.render(to_html(text))


def _explain_settings(config: "doc.Doc") -> None:
    """Add what `--help` says of each setting to the docstring of `Config`."""
    described = [f"    {field.name}: {field.metadata['description']}" for field in fields(Config)]
    config.docstring = "\n".join([inspect.getdoc(Config) or "", "", "Attributes:", *described])


def undocumented(owner: "doc.Namespace") -> Iterator[str]:
    """Name what a module offers without a docstring; a class may explain its fields itself."""
    from pdoc import doc

    own = {member.name for member in owner.own_members}
    for member in owner.members.values():
        if GENERATED.match(member.docstring):
            member.docstring = ""
        if member.name.startswith("_") or _is_inner(member, owner):
            continue
        if isinstance(member, doc.Variable) and not member.docstring:
            member.docstring = _docstring_at_origin(member)
        if not member.docstring:
            if member.name in own and not _explained_by_class(member.name, owner.obj):
                yield member.fullname
            member.docstring = "@private"  # It has no entry beside that in its class's docstring.
        if isinstance(member, doc.Class) and member.name in own:
            yield from undocumented(member)


def _docstring_at_origin(variable: "doc.Variable") -> str:
    """Find the text below a constant in the module that it was imported from."""
    from pdoc import doc_ast

    for name, module in sys.modules.items():
        if name.startswith("pm_jax.") and vars(module).get(variable.name) is variable.default_value:
            if text := doc_ast.walk_tree(module).var_docstrings.get(variable.name):
                return text
    return ""


def _is_inner(member: "doc.Doc", owner: "doc.Namespace") -> bool:
    """Tell whether a name is nobody's to use: a type variable, or a field that linen adds."""
    added = inspect.isclass(owner.obj) and issubclass(owner.obj, nn.Module)
    value = getattr(member, "default_value", None)
    return isinstance(value, TypeVar | ParamSpec) or (added and member.name in ("name", "scope"))


def _explained_by_class(name: str, owner: Any) -> bool:
    """Tell whether a class, or one that it is made from, explains a field in its docstring."""
    classes = inspect.getmro(owner) if inspect.isclass(owner) else ()
    return any(re.search(rf"(?m)^ +{name}:", found.__doc__ or "") for found in classes)


def _dark_code() -> str:
    from pygments.formatters import HtmlFormatter  # a dependency of pdoc

    colors = HtmlFormatter(style="github-dark").get_style_defs(".pdoc-code")
    return f"@media (prefers-color-scheme: dark) {{ {colors} }}"


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(experiment_flags.parse, positional=1))
