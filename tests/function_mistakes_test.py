"""Mistakes with functions, and the one line that answers each: the rows of function_mistakes.md."""

import pathlib
import re
import warnings
from typing import NamedTuple

import jax
import pytest

PAGE = pathlib.Path(__file__).with_name("function_mistakes.md").read_text()


class Row(NamedTuple):
    call: str
    answer: str


def rows():
    found = []
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("    "):
                found[-1] = Row(found[-1].call, f"{found[-1].answer} {line.strip()}".strip())
            else:
                found.append(Row(line, ""))
    return found


ROWS = rows()


@pytest.fixture(scope="module")
def setting():
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    return names


def test_there_are_many_rows_each_once():
    assert len({row.call for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=[row.call for row in ROWS])
def test_the_answer_is_one_line(row, setting):
    pattern = "".join(
        ".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", row.answer)
    )
    # Users' code adds biases to batches; our own strictness is not theirs.
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("error")
        with pytest.raises((ValueError, UserWarning)) as caught:
            eval(row.call, setting)
    assert "\n" not in str(caught.value)
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
