"""The ledger of a study: a line of JSON for each run, and the tables that are made of the lines."""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.continual.report import comparison, tables
from pm_jax.continual.settings.config import Config
from pm_jax.continual.storage.provenance import configuration_hash, git_revision
from pm_jax.types import InvalidInput

Line = dict[str, Any]
FIGURES = tuple(comparison.FIGURES)
NUMBER = (int, float, type(None))
FORM = {
    "stream": str,
    "rule": str,
    "learning_rate": float,
    "seed": int,
    "configuration": str,
    "scores": {str: {split: dict.fromkeys(FIGURES, NUMBER) for split in ("test", "validation")}},
    "seconds": NUMBER,
    "drift": NUMBER,
    "device": str,
}
"""Fields that every line has, with their forms as `files.fits` reads them."""
UNMOVED = ("frozen", "first_session")
"""Rules that do not adapt to the stream: they are what the others are compared with."""


def line_of(
    stream: str, rule: str, config: Config, run: Mapping[str, Any], *, results: str
) -> Line:
    """Return the line of a finished run, whose results lie under a name."""
    sizes = [merge.get("drift_size") for merge in run["merges"]]
    drifts = [size for size in sizes if size is not None]
    environment = run["environment"]
    return {
        "stream": stream,
        "rule": rule,
        "learning_rate": config.learning_rate,
        "seed": run["seed"],
        "configuration": identity(config),
        "settings": changed_settings(config),
        "scores": {
            name: {
                split: {figure: scores[figure] for figure in FIGURES}
                for split, scores in by_split.items()
            }
            for name, by_split in run["scores"].items()
        },
        "accuracy_matrices": {
            name: {split: _rounded(scores["accuracy_matrix"]) for split, scores in by_split.items()}
            for name, by_split in run["scores"].items()
        },
        "seconds": comparison.median_seconds([run]),
        "seconds_of_phases": run["seconds"],
        # How far merges move the features of the task's own inputs, over their scatter.
        "drift": float(np.mean(drifts)) if drifts else None,
        "device": environment["device"],
        "versions": {"python": environment["python"], **environment["packages"]},
        "commit": git_revision(),
        "results": results,
    }


def _rounded(matrix: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    rows = np.round(np.asarray(matrix, np.float64), 6).tolist()
    return files.without_nan(rows)  # Tasks that are still to come have no accuracy.


def identity(config: Config) -> str:
    """Hash the settings to twelve digits; files count by their contents, wherever they lie."""
    return configuration_hash(_by_contents(config))[:12]


def changed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide the numbers and are not the default ones."""
    settings = _by_contents(config)
    return {
        field.name: value
        for field in dataclasses.fields(Config)
        if field.metadata["identity"] and (value := getattr(settings, field.name)) != field.default
    }


def _by_contents(config: Config) -> Config:
    paths = {name: Path(getattr(config, name)) for name in ("dataset", "pretrained", "tokenizer")}
    # The ending stays, as it says what a file is.
    names: dict[str, Any] = {
        name: _fingerprint(path) + path.suffix
        for name, path in paths.items()
        if path.suffix and path.is_file()
    }
    return dataclasses.replace(config, **names)


@functools.cache  # Every cell has the same files.
def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read(path: Path) -> list[Line]:
    """Read the lines of a ledger; none where there is no file yet.

    A last line that was cut short is moved to a file beside the ledger, and a printed line says so.

    Raises:
        InvalidInput: a line is damaged.
    """
    lines: list[Line] = []
    if not path.exists():
        return lines
    content = path.read_bytes()
    texts = content.splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(files.parse_json(text, FORM))
        except ValueError:
            # Anything else without a line's end is no ledger, and stays as it is.
            if number == len(texts) and text[:2] == b'{"' and not content.endswith(b"\n"):
                _set_aside(path, number, content[: -len(text)], text)
                break
            raise InvalidInput(
                f"ledger={path}: line {number} is damaged; take it out to have its run entered "
                "again"
            ) from None
    return lines


def _set_aside(path: Path, number: int, whole: bytes, cut: bytes) -> None:
    aside = path.with_name(f"{path.name}.cut")
    with aside.open("ab") as file:
        file.write(cut + b"\n")
    with files.replacing(path) as temporary:
        temporary.write_bytes(whole)
    print(f"{path}: line {number} was cut short and is now in {aside}; its run is entered again")


def append(path: Path, line: Line) -> None:
    """Add a line to a ledger, which then is whole or as it was."""
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, f"{before}{json.dumps(line, sort_keys=True)}\n")


def find(lines: Iterable[Line], stream: str, rule: str, config: Config, seed: int) -> Line | None:
    """Find the line of a run.

    Raises:
        InvalidInput: there is one of the same name with other settings.
    """
    for line in lines:
        named = (line["stream"], line["rule"], line["learning_rate"], line["seed"])
        if named == (stream, rule, config.learning_rate, seed):
            # Lines of earlier versions name files by their paths.
            if line["configuration"] not in (identity(config), configuration_hash(config)[:12]):
                raise InvalidInput(
                    f"stream={stream}: the ledger has {rule} with seed {seed} and other settings; "
                    "give these another name of the stream, or another ledger"
                )
            return line
    return None


def validation_accuracy(lines: Sequence[Line]) -> float:
    """Return the mean validation accuracy of some runs with the classifier that it is best with."""
    names = set.intersection(*(set(line["scores"]) for line in lines))
    return max(_mean(lines, name, "validation") for name in names)


def chosen_rate(lines: Sequence[Line], rule: str) -> float:
    """Choose a rule's learning rate by validation accuracy, over the seeds that all rates have."""
    by_rate = _grouped((line for line in lines if line["rule"] == rule), "learning_rate")
    common = set.intersection(*({line["seed"] for line in of} for of in by_rate.values()))
    if not common:
        return max(by_rate, key=lambda rate: len(by_rate[rate]))
    fair = {rate: [x for x in of if x["seed"] in common] for rate, of in by_rate.items()}
    return max(fair, key=lambda rate: validation_accuracy(fair[rate]))


def leading(lines: Sequence[Line], rate: float, count: int) -> list[str]:
    """List the rules that are ahead on validation data at one rate, the best first."""
    at_rate = [line for line in lines if line["learning_rate"] == rate]
    by_rule = _grouped((x for x in at_rate if x["rule"] != "frozen"), "rule")
    return sorted(by_rule, key=lambda rule: -validation_accuracy(by_rule[rule]))[:count]


def table(lines: Sequence[Line], stream: str, split: str = "test") -> str:
    """Lay out a stream's rules in Markdown, a column of final accuracy for each classifier.

    Every rule is at its rate of the best validation accuracy; percent, mean +- standard deviation.
    Notes of lines follow.
    """
    of_stream = [line for line in lines if line["stream"] == stream]
    names = list(dict.fromkeys(name for line in of_stream for name in line["scores"]))
    rows: dict[str, tuple[float, list[Line]]] = {}
    for rule, of_rule in _grouped(of_stream, "rule").items():
        rate = chosen_rate(of_rule, rule)
        rows[rule] = rate, [line for line in of_rule if line["learning_rate"] == rate]

    def best(rule: str) -> float:
        return max(_mean(rows[rule][1], name, split) for name in names)

    heads = [f"rule ({stream}, {split})", "rate", *names, "learning, s", "drift"]
    cells = [[*heads, "n (seeds)", "device"]]
    for rule in sorted(rows, key=best, reverse=True):
        rate, of_rule = rows[rule]
        drifts, seconds = (
            [line[name] for line in of_rule if line[name] is not None]
            for name in ("drift", "seconds")
        )
        seeds = ",".join(str(seed) for seed in sorted(line["seed"] for line in of_rule))
        cells.append(
            [
                rule,
                f"{rate:g}",
                *(_percent(_values(of_rule, name, split)) for name in names),
                f"{np.median(seconds):.0f}" if seconds else "-",
                f"{np.mean(drifts):.2f}" if drifts else "-",
                f"{len(of_rule)} ({seeds})",
                " and ".join(sorted({line["device"] for line in of_rule})),
            ]
        )
    notes = dict.fromkeys(line["note"] for line in of_stream if line.get("note"))
    return "\n\n".join([tables.as_markdown(cells), *notes])


def rule_of_thumb(lines: Sequence[Line], split: str = "test") -> str:
    """Lay out in Markdown, stream by stream, what can be known beforehand beside what pays.

    The frozen model's accuracy is its best classifier's; the gain is that of the best rule and
    classifier over it; the drift is that of the features in sequential training.
    """
    heads = ["stream", f"frozen ({split})", "drift when trained", "best", "gain"]
    cells = [heads]
    for stream, of_stream in _grouped(lines, "stream").items():
        by_rule = {
            rule: [x for x in of_rule if x["learning_rate"] == chosen_rate(of_rule, rule)]
            for rule, of_rule in _grouped(of_stream, "rule").items()
        }
        adapted = {rule: of for rule, of in by_rule.items() if rule not in UNMOVED}
        if "frozen" not in by_rule or not adapted:
            continue
        frozen, _ = _best_classifier(by_rule["frozen"], split)
        rule = max(adapted, key=lambda name: _best_classifier(adapted[name], split)[0])
        accuracy, classifier = _best_classifier(adapted[rule], split)
        drifts = [x["drift"] for x in by_rule.get("sequential", ()) if x["drift"] is not None]
        drift = f"{np.mean(drifts):.2f}" if drifts else "-"
        row = [stream, f"{100 * frozen:.1f}", drift, f"{rule}, {classifier}"]
        cells.append([*row, f"{100 * (accuracy - frozen):+.1f}"])
    return tables.as_markdown(cells)


def _best_classifier(lines: Sequence[Line], split: str) -> tuple[float, str]:
    names = set.intersection(*(set(line["scores"]) for line in lines))
    return max((_mean(lines, name, split), name) for name in names)


def _grouped(lines: Iterable[Line], field: str) -> dict[Any, list[Line]]:
    groups: dict[Any, list[Line]] = collections.defaultdict(list)
    for line in lines:
        groups[line[field]].append(line)
    return dict(groups)


def _values(lines: Sequence[Line], classifier: str, split: str) -> list[float]:
    found = [line["scores"].get(classifier, {}).get(split) or {} for line in lines]
    accuracies = [scores.get("final_average_accuracy") for scores in found]
    return [accuracy for accuracy in accuracies if accuracy is not None]


def _mean(lines: Sequence[Line], classifier: str, split: str) -> float:
    return float(np.mean(_values(lines, classifier, split) or [-np.inf]))


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return tables.percent(float(np.mean(values)), spread)
