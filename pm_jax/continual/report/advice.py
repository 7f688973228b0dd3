"""Doubts about the merges of a run, each with its meaning and what to do about it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax.continual.merging import trust
from pm_jax.continual.report.results import of_merges, read_results
from pm_jax.continual.storage.workdir import RESULTS_FILE

COMPARE = (
    "python -m experiments.compare --rules=perturb_and_merge,averaging "
    "--curvature=fisher_exact,kronecker --evaluate_on=validation"
)
TEXTS = {
    "regret": (
        "Another coefficient would have been better",
        "The losses and accuracies along the merge were measured on validation data: another model "
        "between the previous and the trained one is more than a point more accurate over the "
        "tasks so far.",
        f"Compare curvatures with plain averaging, with your other settings after it: {COMPARE}. "
        "On the digits stream Kronecker factors came nearest to the best coefficients.",
    ),
    "outside": (
        "The quadratic model's minimum lies outside the merge",
        "By the curvature of the tasks no model between the previous and the trained one is best, "
        "so the nearest end of the segment was taken, or with clip=false a point beyond it. One "
        "of the two models is then lost.",
        "Set --trust=shrink, which takes 1/t for such a merge, or measure the curvature with "
        "--curvature=kronecker.",
    ),
    "extreme": (
        "A merge kept almost nothing of one of its two models",
        "The curvature of one side is some fifty times that of the other. It is so where a task "
        "was fitted until its loss was almost 0, which leaves it hardly any curvature.",
        "Set --rule_settings=normalize=trace, which gives every task the same weight, or train "
        "with fewer --epochs; --rule=averaging is the plain alternative.",
    ),
    "no minimum": (
        "The curvature gave no coefficient",
        "No curvature was measured along the task vector: the task did not move the model, or its "
        "loss is flat there. 1/t was used instead.",
        "If the task trained at all, draw more labels for an example with --curvature_samples=8; "
        "--rule=averaging does on purpose what happened here.",
    ),
    "uncertain": (
        "A coefficient is uncertain",
        "Measured on other examples of the same task, the coefficient could be half as large "
        "again, or half as large.",
        "Measure the curvature on all of the task's examples (--curvature_examples=0 "
        "--curvature_error=0), and with more labels for each (--curvature_samples=8).",
    ),
}
"""By kind of doubt: what happened, what it means, and what to do."""
PREDICTION = (
    "The rule predicts from curvature how much a merge changes the loss of the task just trained. "
    "Predictions that are far too small are normal for a diagonal Fisher: it is measured where the "
    "loss is flat, and the loss steepens along the task vector (on the digits stream 108 times for "
    "the default, 3 times for Kronecker factors, in the median). It does no harm while the "
    "coefficients are near the best ones, because they depend only on how the curvatures of the "
    "tasks compare."
)
MEASURE = (
    "How near they are was not measured here; --landscape_points=21 and a new work directory do "
    "that."
)


class Doubt(NamedTuple):
    """One kind of doubt: what happened, where, what it means, and what to do."""

    heading: str
    # One text a merge, with its seed and task.
    merges: list[str]
    meaning: str
    # Empty for what is normal and needs nothing.
    remedy: str = ""


def warnings_of(results: Sequence[Mapping[str, Any]]) -> list[Doubt]:
    """List the doubts about the merges of some seeds that something can be done about."""
    by_kind = _by_kind(results)
    return [
        Doubt(heading, by_kind[kind], meaning, remedy)
        for kind, (heading, meaning, remedy) in TEXTS.items()
        if kind in by_kind
    ]


def in_short(directory: Path, seeds: Sequence[int]) -> list[str]:
    """Name each doubt about the merges of a work directory in a line."""
    results = [read_results(directory / f"seed_{seed}" / RESULTS_FILE) for seed in seeds]
    count = np.size(of_merges(results, "alpha")[:, 1:])
    return [
        f"warning, at {len(doubt.merges)} of {count} merges: {doubt.heading}. {doubt.remedy}"
        for doubt in warnings_of(results)
    ]


def remark_on_predictions(results: Sequence[Mapping[str, Any]]) -> Doubt | None:
    """Explain predicted loss changes that are far from the measured ones; `None` without any."""
    merges = _by_kind(results).get("prediction")
    if not merges:
        return None
    count = np.size(of_merges(results, "predicted_loss_change")[:, 1:])
    return Doubt(
        f"The predicted loss change is off at {len(merges)} of {count} merges",
        merges,
        f"{PREDICTION} {_nearness(results)}",
    )


def _nearness(results: Sequence[Mapping[str, Any]]) -> str:
    """Say how near the coefficients are to the best ones, by the regret."""
    regrets = 100 * of_merges(results, "regret_accuracy")[:, 1:]
    if not np.isfinite(regrets).any():
        return MEASURE
    mean, worst = np.nanmean(regrets), np.nanmax(regrets)
    verdict = "see the warning above" if worst > 1 else "so nothing is to be done"
    return (
        f"Here the best coefficients would have been {mean:.1f} points more accurate in the mean, "
        f"{worst:.1f} at most, on validation data: {verdict}."
    )


def _by_kind(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Collect the doubts about all merges; the first task has no earlier model to merge with."""
    by_kind: dict[str, list[str]] = {}
    for content in results:
        seed = f"Seed {content['seed']}, task" if len(results) > 1 else "Task"
        for task, merge in enumerate(content["merges"][1:], start=2):
            for kind, text in trust.of_merge(merge).items():
                by_kind.setdefault(kind, []).append(f"{seed} {task}: {text}.")
    return by_kind
