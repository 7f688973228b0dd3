"""Print the tables of studies that came before the ledgers; each line of the file is a row.

The figures were entered as the commands beside the tables in experiments/README.md printed them.

python -m experiments.studies.earlier_tables
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app

from pm_jax.continual.report import tables

ROWS = Path(__file__).parent / "results" / "earlier_tables.jsonl"


def all_tables() -> dict[str, str]:
    """Lay out each table in Markdown, by its name."""
    rows: dict[str, list[dict[str, str]]] = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row.pop("table"), []).append(row)
    return {
        name: tables.as_markdown([list(of_table[0]), *(list(row.values()) for row in of_table)])
        for name, of_table in rows.items()
    }


def main(argv: Sequence[str]) -> None:
    """Print every table under its name."""
    del argv
    for name, text in all_tables().items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    app.run(main)
