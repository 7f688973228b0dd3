"""Formulas as docstrings write them, in HTML, which needs no network, script or font for formulas.

alpha = - Delta . grad Q(theta_hat) / Delta^T H Delta
"""

import ast
import html
import re
import textwrap

GREEK = {
    **{"alpha": "α", "epsilon": "ε", "lam": "λ", "lambda": "λ", "pi": "π", "rho": "ρ"},
    **{"sigma": "σ", "tau": "τ", "theta": "θ", "Delta": "Δ", "Lam": "Λ"},
}
SIGNS = {
    **{"sum": "∑", "grad": "∇", "<=": "≤", ">=": "≥", "<-": "←", "->": "→", "+-": "±", "~": "∼"},
    **{"...": "…", "-": "−", "||": "‖", "1/2": "½", "`": ""},
}
FUNCTIONS = frozenset("argmax argmin diag exp log max mean min relu sqrt tr vec".split())
TOKEN = re.compile(
    r"(?P<gap>\s{3,})|(?P<sign>\bsum\b|\bsum(?=_)|\bgrad\b|<=|>=|<-|->|\+-|\.\.\.|\|\||1/2|[~`])"
    r"|(?P<root>sqrt(?=\())|(?P<word>[A-Za-z]+(?:'s\b|(?<=[a-z]{2})-[a-z]{2,})*)(?P<hat>_hat)?"
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<other>.)"
)
SCRIPT = re.compile(
    r"(?P<place>[_^])(?:\{(?P<row>[^{}]*)\}|(?P<atom>-?\d+|[A-Za-z]+|\([a-z]\)|\+))|(?P<star>[*'])"
)
FORMULA = re.compile(
    r"[\^~|]|<-|\b(?:theta|Delta|tau|alpha|log|sum|argmin|mean|tr)(?![a-z])|[A-Z] = [A-Z] "
)
"""One of these signs is in every formula that stands alone, and in no other indented text."""
DEFINITION = re.compile(r"[\w, ]+ {2,}[a-z\[]")
"""The start of a list of names and of what each means."""


def render(page: str) -> str:
    """Write the formulas of a docstring's HTML as one writes them by hand; code stays code."""
    parts = re.split(r"(<pre>.*?</pre>)", page, flags=re.DOTALL)
    for number, part in enumerate(parts):
        if part.startswith("<pre><code>"):
            parts[number] = _block(html.unescape(part[11:-13]))
        elif not part.startswith("<pre>"):
            parts[number] = re.sub(r"<code>([^<>]*)</code>", _span, part)
    return "".join(parts)


def line(text: str) -> str:
    """Write one line of a formula in HTML; blanks stay where they are."""
    # Between blanks, these are the inner product and the Kronecker product.
    text, written, at = text.replace(" . ", " ⋅ ").replace(" (x) ", " ⊗ "), [], 0
    text = re.sub(r"(?<=[=(,] )- ", "-", text)
    while at < len(text):
        token = TOKEN.match(text, at)
        assert token
        symbol, at = token[0], token.end()
        if token["root"]:
            end = _closing(text, at)
            inside = line(text[at + 1 : end].strip())
            symbol, at = f'√<span class="root">{inside}</span>', end + 1
        elif token["gap"]:
            symbol = "&emsp;"
        elif token["word"]:
            symbol = GREEK.get(token["word"], token["word"]) + ("\u0302" if token["hat"] else "")
            if _is_symbol(token["word"]):
                symbol = f"<i>{symbol}</i>"
        else:
            symbol = html.escape(SIGNS.get(symbol, symbol), quote=False)
        # A star or a prime belongs to a symbol; after a word it is an apostrophe.
        scripts, at = _scripts(text, at, starred=_is_symbol(token["word"] or ""))
        written.append(symbol + scripts)
    return "".join(written)


def _scripts(text: str, at: int, starred: bool) -> tuple[str, int]:
    """Write the index and the exponent that begin at a position, and say where they end."""
    prime = below = above = ""
    while script := SCRIPT.match(text, at):
        if script["star"] and not (starred or below):
            break
        if script["star"] == "'":
            prime += "′"
        elif script["star"]:
            above += "∗"
        elif script["place"] == "_":
            below += line(script["row"] or script["atom"])
        else:
            above += line(script["row"] or script["atom"])
        at = script.end()
    below, above = below and f"<sub>{below}</sub>", above and f"<sup>{above}</sup>"
    if below and above:
        return f'{prime}<span class="scripts">{above}{below}</span>', at
    return prime + below + above, at


def _closing(text: str, opening: int) -> int:
    """Find the bracket that closes the one at a position."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"{text}: a bracket is not closed")


def _is_symbol(word: str) -> bool:
    return len(word) == 1 or word in GREEK


def _block(text: str) -> str:
    """Write the paragraphs of an indented text that are formulas."""
    paragraphs = [text] if _is_python(text) else text.strip("\n").split("\n\n")
    written = []
    for paragraph in paragraphs:
        if _is_python(paragraph) or DEFINITION.match(paragraph) or not FORMULA.search(paragraph):
            written.append(f"<pre><code>{html.escape(paragraph, quote=False)}</code></pre>")
        else:
            lines = "<br>".join(line(text) for text in textwrap.dedent(paragraph).splitlines())
            written.append(f'<div class="formula">{lines}</div>')
    return "\n".join(written)


def _span(code: re.Match) -> str:
    """Write a piece of code within a sentence as a formula, if it is one."""
    text = " ".join(html.unescape(code[1]).split())
    words = re.findall(r"[A-Za-z]+", SCRIPT.sub(" ", text.replace("_hat", "")))
    symbols = all(_is_symbol(word) or word in FUNCTIONS or word in SIGNS for word in words)
    # A name of code may be Greek, such as `alpha_raw`; as a symbol it has at most a short index.
    greek = "|".join(word for word in words if word in GREEK)
    indexed = greek and re.search(rf"\b({greek})_(hat\b|\w\b|\{{)", text)
    if words and (symbols or indexed) and (indexed or not _is_python(text)):
        return f'<span class="formula">{line(text)}</span>'
    return code[0]


def _is_python(text: str) -> bool:
    try:
        ast.parse(textwrap.dedent(text))
    except SyntaxError:
        return False
    return True
