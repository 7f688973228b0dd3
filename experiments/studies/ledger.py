"""The ledger of a study: a line of JSON for each run, and the tables that are made of the lines."""

import collections
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
    "seconds": (int, float),
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
    return {
        "stream": stream,
        "rule": rule,
        "learning_rate": config.learning_rate,
        "seed": run["seed"],
        "configuration": configuration_hash(config)[:12],
        "scores": {
            name: {
                split: {figure: scores[figure] for figure in FIGURES}
                for split, scores in by_split.items()
            }
            for name, by_split in run["scores"].items()
        },
        "seconds": comparison.median_seconds([run]),
        "seconds_of_phases": run["seconds"],
        # How far merges move the features of the task's own inputs, over their scatter.
        "drift": float(np.mean(drifts)) if drifts else None,
        "device": run["environment"]["device"],
        "commit": git_revision(),
        "results": results,
    }


def read(path: Path) -> list[Line]:
    """Read the lines of a ledger; none where there is no file yet.

    Raises:
        InvalidInput: a line is damaged.
    """
    lines: list[Line] = []
    if not path.exists():
        return lines
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(files.parse_json(text, FORM))
        except ValueError:
            raise InvalidInput(
                f"ledger={path}: line {number} is damaged; take it out to have its run entered "
                "again"
            ) from None
    return lines


def append(path: Path, line: Line) -> None:
    """Add a line to a ledger, which then is whole or as it was."""
    before = path.read_text() if path.exists() else ""
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
            if line["configuration"] != configuration_hash(config)[:12]:
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
    """
    of_stream = [line for line in lines if line["stream"] == stream]
    names = list(dict.fromkeys(name for line in of_stream for name in line["scores"]))
    rows: dict[str, tuple[float, list[Line]]] = {}
    for rule, of_rule in _grouped(of_stream, "rule").items():
        rate = chosen_rate(of_rule, rule)
        rows[rule] = rate, [line for line in of_rule if line["learning_rate"] == rate]

    def best(rule: str) -> float:
        return max(_mean(rows[rule][1], name, split) for name in names)

    heads = [f"rule ({stream}, {split})", "rate", *names, "learning, s", "drift", "seeds"]
    cells = [heads]
    for rule in sorted(rows, key=best, reverse=True):
        rate, of_rule = rows[rule]
        drifts = [line["drift"] for line in of_rule if line["drift"] is not None]
        cells.append(
            [
                rule,
                f"{rate:g}",
                *(_percent(_values(of_rule, name, split)) for name in names),
                f"{np.median([line['seconds'] for line in of_rule]):.0f}",
                f"{np.mean(drifts):.2f}" if drifts else "-",
                ",".join(str(seed) for seed in sorted(line["seed"] for line in of_rule)),
            ]
        )
    return tables.as_markdown(cells)


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
    found = [line["scores"].get(classifier, {}).get(split) for line in lines]
    return [scores["final_average_accuracy"] for scores in found if scores]


def _mean(lines: Sequence[Line], classifier: str, split: str) -> float:
    return float(np.mean(_values(lines, classifier, split) or [-np.inf]))


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return tables.percent(float(np.mean(values)), spread)
