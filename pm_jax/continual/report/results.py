"""The form that a run gives its results.json: what is checked before anything is made of one."""

from typing import Any

METRICS = (
    "final_average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "mean_regret_loss",
    "mean_regret_accuracy",
)
NUMBER = (int, float, type(None))
"""Where a figure does not apply, it is `None`."""
FORM = {
    "seed": int,
    "accuracy_matrix": [[NUMBER]],
    "final_average_accuracy": NUMBER,
    "task_aware": {"final_average_accuracy": NUMBER},
    "merges": [{str: NUMBER}],
    "seconds": {str: (int, float)},
    "rule_state_bytes": int,
    "manifest": {"tasks": [{"classes": [int], "train": {"examples": int},
                            "validation": {"examples": int}, "test": {"examples": int}}]},
    "environment": {"python": str, "device": str, "devices": int, "packages": {str: object}},
}  # fmt: skip
"""What each field is: a type or several, a list or dict of those, `{str: ...}` for any names."""
LARGEST = 2**63
"""A whole number beyond it is none that a run writes, and too large for a float."""


def problem_of(content: Any) -> str | None:
    """What is wrong with the contents of a `results.json`, in a few words.

    Args:
        content: as read.

    Returns:
        To follow the file's name, or `None` for nothing.

    Example:
        >>> problem_of([]), problem_of({"seed": "0"})
        ('is damaged', 'is damaged at seed')
    """
    if not isinstance(content, dict):
        return "is damaged"
    for name, form in FORM.items():
        if name in content and not _fits(content[name], form):
            return f"is damaged at {name}"
    if missing := [name for name in FORM if name not in content]:
        return f"lacks {', '.join(missing)}"
    matrix, merges = content["accuracy_matrix"], content["merges"]
    if not matrix or any(len(row) != len(matrix) for row in matrix):
        return "is damaged at accuracy_matrix"
    if len(merges) != len(matrix) or any(merge.keys() != merges[0].keys() for merge in merges):
        return "is damaged at merges"
    for figures in (content, content["task_aware"]):
        for name in METRICS:
            if not _fits(figures.get(name), NUMBER):
                return f"is damaged at {name}"
    return None


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(each, form[0]) for each in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(_fits(each, form[str]) for each in value.values())
        return all(name in value and _fits(value[name], own) for name, own in form.items())
    fits = isinstance(value, form) and not (isinstance(value, bool) and form is not object)
    return fits and not (isinstance(value, int) and abs(value) > LARGEST)
