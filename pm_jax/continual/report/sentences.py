"""Results in sentences that a person reads without a table beside them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax.continual.report.results import MERGE_NOTHING, read_results
from pm_jax.continual.storage.progress import in_words
from pm_jax.continual.storage.workdir import RESULTS_FILE
from pm_jax.types import InvalidInput

NAMES = {
    "perturb_and_merge": "Perturb-and-Merge",
    "frozen": "the frozen model",
    "first_session": "first-session training",
    "sequential": "sequential training",
    "averaging": "averaging",
    "slao": "SLAO",
    "became": "BECAME",
    "trm": "TRM",
    "pam": "PAM",
    "fisher_averaging": "Fisher averaging",
    "regmean": "RegMean",
    "coma": "CoMA",
    "cofima": "CoFiMA",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "opcm": "OPCM",
    "null_space": "null-space projection",
    "random_mix": "random mixing",
    "magmax": "MagMax",
    "tunable_magmax": "tunable MagMax",
    "exact_curvature": "merging by exact curvature",
    "oracle": "the oracle",
    "joint": "joint training",
}
"""Merge rules in words, by their names in `pm_jax.rules.REGISTRY`."""


def gain(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one sentence what the first of two runs gains over the second.

    Only seeds that both have count, and the error is the standard error of their paired
    differences. The sentence is empty where there is nothing to compare.
    """
    if len(summaries) < 2:
        return ""
    (label, run), (other, baseline), *_ = summaries.items()
    seeds = [seed for seed in run["seeds"] if seed in baseline["seeds"]]

    def values(name: str) -> np.ndarray:
        return np.asarray([_of_seeds(summary, name, seeds) for summary in (run, baseline)])

    difference = -np.diff(values("final_average_accuracy"), axis=0)
    if not seeds or not np.isfinite(difference).all():
        return ""
    rules = [re.split(r"[ +]", text)[0] for text in (label, other)]
    words = [NAMES.get(rule, rule) for rule in rules]
    if rules[0] == rules[1]:
        words[1] = "its baseline"
    # Merging is what differs from sequential training; otherwise the rule's own name says more.
    merges = rules[1] == "sequential" and rules[0] not in MERGE_NOTHING
    subject = "merging" if merges else words[0]
    forgetting = values("forgetting").mean(axis=1)
    head = ""
    if np.isfinite(forgetting).all():
        forgets, by_other = map(_points, forgetting)
        head = f"{words[0]} forgets {forgets} points, {words[1]} {by_other}; "
    sentence = f"{head}{_worth(subject, difference[0], '' if merges else words[1])}."
    return sentence[0].upper() + sentence[1:]


def _worth(subject: str, differences: np.ndarray, other: str) -> str:
    """Say what something adds to the final accuracy, by its differences over the seeds."""
    mean, number = float(differences.mean()), len(differences)
    over = f" over {other}" if other else ""
    if number == 1:
        verb = "costs" if mean < 0 else "is worth"
        return (
            f"{subject} {verb} {_points(abs(mean))} points of final accuracy{over} with one "
            "seed, which may be luck: run more, as --seeds=0,1,2"
        )
    error = float(np.std(differences, ddof=1)) / number**0.5
    spread = f"+- {_points(error)} points of final accuracy{over} over {number} seeds"
    paired = "(standard error, paired by seed)"
    if abs(mean) <= 2 * error:
        gained = f"{'-' if mean < 0 else '+'}{_points(abs(mean))} {spread} {paired}"
        return f"whether {subject} is worth anything is not clear: {gained}"
    return f"{subject} {'costs' if mean < 0 else 'is worth'} {_points(abs(mean))} {spread} {paired}"


def method(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one sentence what Perturb-and-Merge did; "" without it, and for one task."""
    summary = summaries.get("perturb_and_merge", {})
    if not summary.get("alpha"):
        return ""
    low, high = (f"{100 * value:.0f}" for value in summary["alpha"])
    share = low if low == high else f"{low} to {high}"
    share = share if summary["alpha"][1] > 0.9 else f"only {share}"
    return (
        f"After each later task Perturb-and-Merge went {share} % of the way from the merged "
        "model to the newly trained one, to where the sum of the losses of all tasks so far, each "
        "remembered as a quadratic, is lowest."
    )


def duration(directories: Sequence[Path], seeds: Sequence[int]) -> str:
    """Say how long the runs of some work directories still take, by those that are finished."""
    seconds = []
    for directory in directories:
        for seed in seeds:
            path = directory / f"seed_{seed}" / RESULTS_FILE
            if path.exists():
                try:
                    seconds.append(read_results(path)["seconds"].get("this_process", np.nan))
                except InvalidInput:
                    continue
    runs = len(directories) * len(seeds)
    known = [value for value in seconds if np.isfinite(value)]
    if not known:
        return (
            "duration: it is not known before something has run; the first steps of a run tell how "
            "much time is left, and what is stopped goes on from there"
        )
    if len(seconds) == runs:
        return f"duration: nothing is left to run, all of {runs} are finished"
    left, each = runs - len(seconds), float(np.mean(known))
    return (
        f"duration: about {in_words(left * each)} for the {left} of {runs} runs that are left, at "
        f"{in_words(each)} a run as the finished ones took"
    )


def _of_seeds(summary: Mapping[str, Any], name: str, seeds: Sequence[int]) -> list[float]:
    """Return the figures of seeds; NaN where one does not apply."""
    values = summary[name].get("values") or [None] * len(summary["seeds"])
    by_seed = dict(zip(summary["seeds"], values, strict=True))
    return [np.nan if by_seed[seed] is None else by_seed[seed] for seed in seeds]


def _points(fraction: float) -> str:
    """Write a fraction in percentage points; what rounds to zero has no sign."""
    return f"{round(100 * fraction, 1) + 0.0:.1f}"
