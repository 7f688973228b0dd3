"""Texts with labels in `.csv` and `.jsonl`: one file, or a folder with one for each split."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.data import splits as split_names
from pm_jax.data.assembling import Split, assembled, of_array
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput, cause

ENDINGS = (".csv", ".jsonl")
TEXT = ("text", "sentence", "utterance")
LABEL = ("label", "intent", "category", "class")
"""Names of a column, of which a file has one; the first that it has is read."""
SPLIT = "split"
"""The column that says which split a row of a single file is in."""

Row = Mapping[str, Any]


def load(
    path: Path,
    *,
    test_split: str = "",
    validation_split: str = "",
    domain_field: str = "",
    **keeping: Any,
) -> list[LabelledArrays]:
    """Load texts, strings [N], with their labels; `keeping` is as `assembled` takes it.

    Raises:
        InvalidInput: a file is missing or damaged, or a column is missing.
    """
    by_split, unread = _rows_by_split(path, domain_field)
    name = path.stem
    roles = split_names.roles(str(path), list(by_split), test_split, validation_split)
    splits = {
        role: _split(by_split[split], domain_field or "domain")
        for role, split in roles.named().items()
    }
    kinds = {split.labels.dtype.kind for split in splits.values()}
    if len(kinds) > 1:
        # A split whose labels all look like numbers has strings too, where another one has.
        splits = {
            role: split._replace(labels=split.labels.astype(str)) for role, split in splits.items()
        }
    notes = roles.notes_about(name)
    if unread:
        notes.append(f"{name}: columns that are not read: {files.listed(unread)}")
    return assembled(name, splits, notes=notes, **keeping)


def _rows_by_split(path: Path, domain_field: str) -> tuple[dict[str, list[Row]], list[str]]:
    """Read all rows by the names of their splits, and list the columns that have no use."""
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
        if not paths:
            raise InvalidInput(
                f"dataset={path}: has no {' and no '.join(ENDINGS)}; a text model reads train.csv "
                "and test.csv in a folder, or one file"
            )
        rows = {file.stem: _rows(file) for file in paths}
    else:
        paths, rows = [path], {"train": _rows(path)}
    columns = {
        split: _columns(file, of_split, domain_field)
        for file, (split, of_split) in zip(paths, rows.items(), strict=True)
    }
    used = {*TEXT[:1], *LABEL[:1], SPLIT, domain_field or "domain"}
    renamed: dict[str, list[Row]] = {
        split: [{columns[split].get(key, key): row[key] for key in row} for row in of_split]
        for split, of_split in rows.items()
    }
    unread = sorted({key for of_split in renamed.values() for row in of_split[:1] for key in row})
    unread = [key for key in unread if key not in used]
    if not path.is_dir() and SPLIT in renamed["train"][0]:
        parted: dict[str, list[Row]] = {}
        for row in renamed["train"]:
            parted.setdefault(str(row[SPLIT]), []).append(row)
        return parted, unread
    return renamed, unread


def _columns(path: Path, rows: Sequence[Row], domain_field: str) -> dict[str, str]:
    """Find the columns of text and label, and map them to the first of their names."""
    if not rows:
        raise InvalidInput(f"dataset={path}: has no rows")
    there = list(rows[0])
    found = {}
    for names in (TEXT, LABEL):
        column = next((name for name in names if name in there), None)
        if column is None:
            raise InvalidInput(
                f"dataset={path}: has the columns {files.listed(there)}; it needs {names[0]}"
                f" (or {', '.join(names[1:])})"
            )
        found[column] = names[0]
    if domain_field and domain_field not in there:
        raise InvalidInput(
            f"domain_field={domain_field}: {path} has the columns {files.listed(there)}; name one "
            "of them"
        )
    return found


def _split(rows: Sequence[Row], field: str) -> Split:
    # As objects: an array of strings takes the room of its longest one for each.
    texts = np.asarray([row["text"] for row in rows], object)
    values = ("" if (value := row.get(field)) is None else str(value) for row in rows)
    domains = np.asarray([*values]) if field in rows[0] else None
    return Split(_as_labels([row["label"] for row in rows]), of_array(texts), domains)


def _as_labels(values: Sequence[Any]) -> np.ndarray:
    """Return labels as whole numbers where all are, and else as strings, "" for none."""
    if all(isinstance(value, int) for value in values):
        return np.asarray(values, np.int64)
    return np.asarray(["" if value is None else str(value) for value in values])


def _rows(path: Path) -> list[Row]:
    """Read the rows of a file; raises `InvalidInput`."""
    if not path.is_file():
        raise InvalidInput(f"dataset={path}: there is no such file")
    try:
        # Excel begins its files with a byte-order mark, which utf-8-sig leaves out.
        with path.open(encoding="utf-8-sig", newline="") as file:
            read = _of_csv if path.suffix == ".csv" else _of_jsonl
            return list(read(path, file))
    except InvalidInput:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidInput(
            f"dataset={path}: cannot be read ({cause(error)}); save it as text in UTF-8"
        ) from error


def _of_csv(path: Path, file: Any) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():
            raise InvalidInput(
                f"dataset={path}: line {reader.line_num} has not as many fields as the first line; "
                "put texts with commas in quotes"
            )
        yield row


def _of_jsonl(path: Path, file: Any) -> Iterator[Row]:
    first: Row | None = None
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InvalidInput(
                f"dataset={path}: line {number} is no JSON object; write one in each line, as "
                '{"text": "...", "label": 0}'
            )
        first = first or row
        row = {**dict.fromkeys(first), **row}
        _check_values(path, number, row)
        yield row


def _check_values(path: Path, number: int, row: Row) -> None:
    for names, kinds, wanted in (
        (TEXT, str, "a string"),
        (LABEL, (str, int, type(None)), "a whole number or a string, not one-hot"),
    ):
        key = next((name for name in names if name in row), None)
        if key and (not isinstance(row[key], kinds) or isinstance(row[key], bool)):
            raise InvalidInput(
                f"dataset={path}: line {number} has {row[key]!r:.40} for {key}; it must be {wanted}"
            )
