"""The tables of experiments/README.md are those that its command makes of the ledger."""

import pathlib

from experiments.studies import ledger

HERE = pathlib.Path(ledger.__file__).parent


def test_the_tables_of_results_are_made_from_the_ledger():
    page = (HERE.parent / "README.md").read_text()
    lines = ledger.read(HERE / "rules_and_classifiers.jsonl")
    assert ledger.rule_of_thumb(lines) in page
    for stream in {line["stream"] for line in lines}:
        assert ledger.table(lines, stream) in page
