"""Whether adapting pays on a stream: the best rule that adapts against the frozen model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pm_jax.continual.report.comparison import (
    Results,
    final_accuracy,
    median_seconds,
    paired_differences,
)

UNKNOWN = "Whether adapting pays is not known: compare frozen with a rule that adapts."
"""Stands for the sentence where a comparison lacks one of the two."""


class Verdict(NamedTuple):
    """The best adapted rule beside the frozen model, both with the same classifier."""

    rule: str
    # How many adapted rules it is the best of.
    rules: int
    classifier: str
    split: str
    # Mean final accuracies over the seeds; fractions.
    accuracy: float
    frozen_accuracy: float
    # Standard error of their difference, and whether it is that of the seeds' paired differences;
    # for one seed it is that of two accuracies over so many examples.
    error: float
    seeds: int
    examples: int
    # Median seconds in which each learns the stream.
    seconds: float
    frozen_seconds: float

    @property
    def difference(self) -> float:
        """Mean final accuracy of the adapted rule less that of the frozen model."""
        return self.accuracy - self.frozen_accuracy

    @property
    def pays(self) -> bool | None:
        """Whether adapting pays; `None` where it gains less than twice the standard error."""
        if self.difference > 0 and self.difference <= 2 * self.error:
            return None
        return self.difference > 0

    def sentence(self) -> str:
        """Say whether adapting pays, by how much, how sure that is, and what it costs."""
        head = "It is not clear whether adapting pays on this stream"
        if self.pays is not None:
            head = f"Adapting {'pays' if self.pays else 'does not pay'} on this stream"
        gain = f"{100 * self.difference:+.1f} +- {100 * self.error:.1f}"
        beside = f"{100 * self.accuracy:.1f} against {100 * self.frozen_accuracy:.1f}"
        spread = f"paired over {self.seeds} seeds, standard error"
        if self.seeds == 1:
            spread = f"one seed, binomial error of {self.examples} examples"
        best = f"the best of {self.rules} adapted rules" if self.rules > 1 else "the adapted rule"
        return (
            f"{head}: {self.rule}, {best}, has {gain} points over the frozen model with the "
            f"classifier {self.classifier} ({beside} on {self.split} data; {spread}), and learns "
            f"in {self.seconds:.1f} s instead of {self.frozen_seconds:.1f} s."
        )

    def as_record(self) -> dict[str, Any]:
        """Return the numbers and the sentence as JSON."""
        computed = {"difference": self.difference, "pays": self.pays, "sentence": self.sentence()}
        return {**self._asdict(), **computed}


def verdict(
    results: Results,
    frozen: Sequence[str],
    adapted: Sequence[str],
    *,
    split: str,
    classifiers: Sequence[str],
) -> Verdict | None:
    """Compare the best adapted rule with the frozen model; `None` without one of the two.

    Both have the classifier with which any of them is best, so that a weak classifier makes
    adapting look neither better nor worse than it is for who chooses well.
    """
    if not frozen or not adapted:
        return None
    accuracies = {
        (label, classifier): [final_accuracy(run, classifier, split) for run in results[label]]
        for label in (*frozen, *adapted)
        for classifier in classifiers
    }
    means = {pair: float(np.mean(values)) for pair, values in accuracies.items()}
    # A row without a classifier has NaN, which is never the best.
    means = {pair: mean for pair, mean in means.items() if np.isfinite(mean)}
    complete = [
        classifier
        for classifier in classifiers
        if any((label, classifier) in means for label in frozen)
        and any((label, classifier) in means for label in adapted)
    ]
    if not complete:
        return None
    highest = {c: max(mean for (_, of), mean in means.items() if of == c) for c in complete}
    classifier = max(complete, key=highest.__getitem__)

    def best(labels: Sequence[str]) -> str:
        return max(labels, key=lambda label: means.get((label, classifier), -1.0))

    rule, reference = best(adapted), best(frozen)
    values = [accuracies[rule, classifier], accuracies[reference, classifier]]
    runs = [(results[label][0], classifier, split) for label in (rule, reference)]
    _, (error, _) = paired_differences(values, 1)
    if len(values[0]) == 1:
        error = float(np.sqrt(sum(binomial_variance(*run) for run in runs)))
    return Verdict(
        rule=rule,
        rules=len(adapted),
        classifier=classifier,
        split=split,
        accuracy=means[rule, classifier],
        frozen_accuracy=means[reference, classifier],
        error=float(error),
        seeds=len(values[0]),
        examples=sum(_examples(results[rule][0], split)),
        seconds=median_seconds(results[rule]),
        frozen_seconds=median_seconds(results[reference]),
    )


def binomial_variance(run: Mapping[str, Any], classifier: str, split: str) -> float:
    """Return the variance of a final accuracy, the mean over the tasks, due to its examples."""
    last = np.asarray(run["scores"][classifier][split]["accuracy_matrix"][-1], np.float64)
    return float(np.mean(last * (1 - last) / _examples(run, split)) / len(last))


def _examples(run: Mapping[str, Any], split: str) -> list[int]:
    return [task[split]["examples"] for task in run["manifest"]["tasks"]]
