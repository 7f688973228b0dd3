"""The pages of how-tos, as tests read them: sections, their code and their commands."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
HOWTOS = ROOT / "pm_jax" / "README.md"
IMAGES = ROOT / "experiments" / "howto" / "image_folder.md"
MERGING = ROOT / "experiments" / "howto" / "merging.md"


def sections(page):
    """Each section of a page by its title."""
    parts = re.split(r"^## (.+)\n", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Binary and arguments of each command, those of a loop once for each of its words."""

    def written_out(loop):
        name, words, body = loop.groups()
        return "".join(body.replace(f"${name}", word) for word in words.split())

    found = []
    for block in blocks(text, "bash"):
        block = re.sub(r"for (\w+) in (.+); do\n(.*?)done\n", written_out, block, flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            program, option, module, *arguments = shlex.split(line, comments=True)
            assert (program, option) == ("python", "-m"), line
            found.append((module.removeprefix("experiments."), *arguments))
    return found


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
