import copy
import importlib.util

import nbformat
import pytest

from experiments.notebooks import build

CODE_LINES = 80


def code_lines(script):
    """Lines that are neither blank, comments nor docstrings of one line."""
    lines = (line.strip() for line in script.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", '"""'))]


def test_every_script_has_its_notebook():
    assert {path.stem for path in build.FOLDER.glob("*.ipynb")} == {p.stem for p in build.scripts()}


@pytest.mark.parametrize("script", build.scripts(), ids=lambda path: path.stem)
def test_scripts_are_short(script):
    assert len(code_lines(script)) <= CODE_LINES


@pytest.mark.slow
@pytest.mark.parametrize("script", build.scripts(), ids=lambda path: path.stem)
def test_stored_outputs_are_current(script, monkeypatch):
    source = script.read_text()
    if script.stem == "own_model":
        # Unoptimised programs train its convolutions several times as slowly.
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
            monkeypatch.delenv(name, raising=False)
    if "qwix" in source and importlib.util.find_spec("qwix") is None:
        pytest.skip("qwix is not installed")
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert build.differences(stored, build.executed(script)) == []


def notebook(text, source="print(x)"):
    output = nbformat.v4.new_output("stream", text=text)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=[output])])


@pytest.mark.parametrize(
    "old,new,count",
    [
        ("alpha 0.500 of 3", "alpha 0.510 of 3", 0),
        ("alpha 0.500 of 3", "alpha 0.600 of 3", 1),
        ("alpha 0.500", "beta 0.500", 1),
        ("1.0 2.0", "1.0", 1),
        ("-0.9", "0.9", 1),
    ],
)
def test_outputs_differ_by_words_and_by_more_than_rounding(old, new, count):
    assert len(build.differences(notebook(old), notebook(new))) == count


def test_another_source_or_a_missing_picture_is_a_difference():
    assert build.differences(notebook("1"), notebook("1", "print(y)"))
    stored = notebook("")
    picture = nbformat.v4.new_output("display_data", data={"image/png": "a", "text/plain": "<F>"})
    stored.cells[0].outputs = [picture]
    other = copy.deepcopy(stored)
    other.cells[0].outputs[0].data["image/png"] = "b"
    assert build.differences(stored, other) == []
    assert build.differences(stored, notebook(""))


def test_an_unknown_name_is_refused(capsys):
    assert build.main(["nothing"]) == 2
    assert "must be --check or one of" in capsys.readouterr().out
