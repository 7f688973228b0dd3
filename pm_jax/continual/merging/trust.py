"""Doubts about the merges of a run, in words."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FACTOR = 3.0
"""A predicted loss change is called wrong where a larger factor is between it and the actual."""
NEGLIGIBLE = 1e-3
"""A loss change below this counts as 0."""


def of_merge(merge: Mapping[str, Any]) -> dict[str, str]:
    """Word the doubts about the figures of one merge, of a task after the first, by their kind."""
    return dict([*_doubts_about_prediction(merge), *_doubts_about_coefficient(merge)])


def trusted_share(alpha_raw: float, predicted: float, actual: float) -> float:
    """Return how much of a coefficient's distance from 1/t to keep, a share from 0 to 1.

    It is 1 where the loss changes are within `FACTOR` of each other, less in proportion beyond it,
    and 0 where they have opposite signs or the minimum `alpha_raw` lies outside [0, 1].
    """
    if not 0 <= alpha_raw <= 1:
        return 0.0
    smaller, larger = sorted((abs(predicted), abs(actual)))
    # Without a prediction, or without a change, nothing speaks against the coefficient.
    if math.isnan(predicted + actual) or larger < NEGLIGIBLE:
        return 1.0
    return 0.0 if predicted * actual <= 0 else min(1.0, FACTOR * smaller / larger)


def _doubts_about_prediction(merge: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    predicted = _figure(merge, "predicted_loss_change")
    actual = _figure(merge, "actual_loss_change")
    smaller, larger = sorted((abs(predicted), abs(actual)))
    if math.isnan(predicted + actual) or larger < NEGLIGIBLE:
        return
    moves = {True: ("rise", "rose"), False: ("fall", "fell")}
    noun, verb = moves[predicted > 0][0], moves[actual > 0][1]
    if predicted * actual < 0:
        yield (
            "prediction",
            f"the task's own loss {verb} by {_plain(abs(actual))} although a {noun} by "
            f"{_plain(abs(predicted))} was predicted",
        )
    elif larger > FACTOR * smaller:
        noun = moves[predicted + actual > 0][0]
        over = "over" if abs(predicted) > abs(actual) else "under"
        times = f"{larger / smaller:.1f}" if larger < 1000 * smaller else "more than 1,000"
        yield (
            "prediction",
            f"the quadratic model {over}-predicted the {noun} of the task's own loss by {times} x "
            f"({_plain(predicted)} predicted, {_plain(actual)} measured)",
        )


def _doubts_about_coefficient(merge: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    alpha, raw, error = (_figure(merge, n) for n in ("alpha", "alpha_raw", "standard_error"))
    if _figure(merge, "degenerate") >= 0.5:
        yield (
            "no minimum",
            "the curvature gave no minimum along the task vector; the coefficient "
            f"{alpha:.2f} was used for want of one",
        )
    # A coefficient without a closed form, such as 1/t, is never called extreme.
    elif merge.get("numerator") is not None:
        if raw < -1e-6 or raw > 1 + 1e-6:
            used = f"clipped to {alpha:.2f}" if 0 <= alpha <= 1 else "used as it is"
            yield (
                "outside",
                f"the quadratic model's minimum is at {raw:.2f}, outside [0, 1], and was {used}",
            )
        elif alpha < 0.02 or alpha > 0.98:
            lost = "the new task" if alpha < 0.02 else "the earlier tasks' model"
            yield (
                "extreme",
                f"the merge, with the coefficient {alpha:.3f}, kept almost nothing of {lost}",
            )
    if error > abs(raw) / 2:
        yield (
            "uncertain",
            f"the coefficient {raw:.2g} is uncertain: its standard error {error:.2g} is more than "
            "half of it",
        )
    if (regret := _figure(merge, "regret_accuracy")) > 0.01:
        yield (
            "regret",
            f"a coefficient of {_figure(merge, 'most_accurate_alpha'):.2f} instead of "
            f"{alpha:.2f} would have been {100 * regret:.1f} points better on validation data",
        )


def _figure(merge: Mapping[str, Any], name: str) -> float:
    value = merge.get(name)
    return math.nan if value is None else value


def _plain(value: float) -> str:
    """Write a number with two significant digits, without an exponent."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")
