"""Joint training: all tasks at once, the upper bound."""

from pm_jax.rules.base import MergeRule
from pm_jax.rules.sequential import sequential


def joint() -> MergeRule:
    """Train all tasks at once, as one, over the classes of all; nothing is merged.

    An analysis tool, the usual upper bound of continual learning: it needs the data of all tasks
    together. The model passes over each example as often as in a first task.

    Returns:
        A `MergeRule` that needs no evidence.

    Example:
        >>> joint().tasks_at_once
        True
    """
    return sequential()._replace(tasks_at_once=True, analysis_only=True)
