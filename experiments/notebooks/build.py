"""Make the notebooks from their percent scripts, with outputs, or check that they are current.

python -m experiments.notebooks.build            # writes NAME.ipynb beside each NAME.py
python -m experiments.notebooks.build linen_model nnx_model
python -m experiments.notebooks.build --check    # writes nothing; code 1 if one is out of date
"""

import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbclient
import nbformat
from jupyter_client.manager import AsyncKernelManager

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TOLERANCE = 0.05
"""Versions of JAX and processors round differently, which 200 steps of training amplify."""


def scripts() -> list[Path]:
    """Return the percent scripts that notebooks are made from."""
    return sorted(path for path in FOLDER.glob("*.py") if "# %%" in path.read_text().split("\n"))


def executed(script: Path) -> nbformat.NotebookNode:
    """Run a percent script as a notebook, from the project's root.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = jupytext.read(script)
    with tempfile.TemporaryDirectory() as sockets:
        # Files instead of ports of the machine: a notebook needs no network.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        resources = {"metadata": {"path": str(ROOT)}}
        client = nbclient.NotebookClient(
            notebook, km=kernel, record_timing=False, resources=resources
        )
        # By default a kernel that is given outlives the notebook.
        client.execute(cleanup_kc=True)
    # Neither times nor versions are kept: a notebook that is made again should not differ.
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            output.pop("execution_count", None)
    return notebook


def differences(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """Say where a stored notebook is out of date; numbers count as equal within `TOLERANCE`."""
    if [cell.source for cell in stored.cells] != [cell.source for cell in fresh.cells]:
        return ["its cells are not those of the script"]
    pairs = zip(stored.cells, fresh.cells, strict=True)
    return [
        f"cell {number} prints {new!r} where {old!r} is stored"
        for number, (before, now) in enumerate(pairs)
        for old, new in [(_outputs(before), _outputs(now))]
        if not _alike(old, new)
    ]


def _outputs(cell: nbformat.NotebookNode) -> str:
    """Join the text outputs of a cell; a picture counts by its kind."""
    parts = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        pictures = sorted(kind for kind in data if kind.startswith("image/"))
        parts.append(output.get("text") or " ".join(pictures) or data.get("text/plain", ""))
    return "".join(parts)


def _alike(old: str, new: str) -> bool:
    if NUMBER.split(old) != NUMBER.split(new):
        return False
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    return all(
        math.isclose(float(a), float(b), rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in pairs
    )


def main(arguments: Sequence[str]) -> int:
    """Make or check the notebooks with these names, or all of them."""
    names = [name for name in arguments if name != "--check"]
    known = {script.stem: script for script in scripts()}
    if unknown := [name for name in names if name not in known]:
        print(f"error: {unknown[0]!r}: must be --check or one of {', '.join(known)}")
        return 2
    outdated = 0
    for name in names or known:
        notebook, path = executed(known[name]), FOLDER / f"{name}.ipynb"
        if "--check" not in arguments:
            nbformat.write(notebook, path)
            continue
        stored = nbformat.read(path, as_version=4) if path.exists() else None
        found = differences(stored, notebook) if stored else ["it does not exist"]
        print(*(f"{path.name}: {line}" for line in found or ["is current"]), sep="\n")
        outdated += bool(found)
    return int(bool(outdated))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
