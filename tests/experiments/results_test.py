"""The tables of experiments/README.md are those that its commands make of the ledgers."""

import pathlib

import pytest

from experiments.studies import earlier_tables, ledger

HERE = pathlib.Path(ledger.__file__).parent
PAGE = (HERE.parent / "README.md").read_text()


@pytest.mark.parametrize("name", ["rules_and_classifiers", "paper_regime"])
def test_the_tables_of_results_are_made_from_the_ledgers(name):
    lines = ledger.read(HERE / "results" / f"{name}.jsonl")
    for stream in {line["stream"] for line in lines}:
        assert ledger.table(lines, stream) in PAGE
    thumb = ledger.rule_of_thumb(lines)
    # A heading alone has no stream in it.
    assert thumb in PAGE or len(thumb.splitlines()) == 2


def test_earlier_tables_are_made_from_their_rows():
    found = earlier_tables.all_tables()
    assert len(found) == 9
    for table in found.values():
        assert table in PAGE
