"""The classifiers that a run's settings name, each by its name and settings of its own."""

import functools
from typing import NamedTuple

from pm_jax import classifiers
from pm_jax.classifiers import Classifier
from pm_jax.types import InvalidInput

CORRECTIONS = ("none", "affine")
"""Whether the statistics of earlier classes follow the features as they drift."""
CORRECTION = "drift_correction"
RECOMMENDED = f"discriminant:{CORRECTION}=affine"
"""The classifier of class-incremental runs that name none: experiments/README.md has why."""


class ChosenClassifier(NamedTuple):
    """A classifier of a run.

    Attributes:
        label: what the settings say, such as "ridge:features=5000"; its heading in tables.
        classifier: the classifier itself.
        correction: one of `CORRECTIONS`; it matters only where statistics can be moved.
    """

    label: str
    classifier: Classifier
    correction: str

    @property
    def movable(self) -> bool:
        """True if its statistics can follow the drift of the features."""
        statistics = self.classifier.statistics
        return statistics is not None and statistics.moved is not None

    @property
    def moves(self) -> bool:
        """True if its statistics follow the drift of the features."""
        return self.movable and self.correction != "none"

    @property
    def state_name(self) -> str:
        """Name of its statistics in a run's state, where classifiers that share them have one."""
        assert self.classifier.statistics
        return f"{self.classifier.statistics.name}{'_moved' if self.moves else ''}"


# Settings are compared by their fields, so that labels are the only key.
@functools.lru_cache(maxsize=64)
def chosen(labels: tuple[str, ...], correction: str) -> tuple[ChosenClassifier, ...]:
    """Make the classifiers of a run from their labels, `name` or `name:setting=value:...`.

    Raises:
        InvalidInput: there is none, a name or a setting is not known, or one comes twice.
    """
    if not labels:
        raise InvalidInput(f"classifiers=: needs one or more of {', '.join(classifiers.REGISTRY)}")
    for label in labels:
        if labels.count(label) > 1:
            raise InvalidInput(f"classifiers={label}: is there twice; name each once")
    return tuple(_chosen(label, correction) for label in labels)


def _chosen(label: str, correction: str) -> ChosenClassifier:
    name, *settings = label.split(":")
    own = [setting for setting in settings if not setting.startswith(f"{CORRECTION}=")]
    corrections = [setting.partition("=")[2] for setting in settings if setting not in own]
    if len(corrections) > 1 or any(each not in CORRECTIONS for each in corrections):
        raise InvalidInput(
            f"classifiers={label}: {CORRECTION} must be one of {', '.join(CORRECTIONS)}"
        )
    try:
        made = classifiers.make(name, ",".join(own))
    except InvalidInput as error:
        # The error begins with the name of the argument, which is another here.
        raise InvalidInput(f"classifiers={label}: {str(error).partition(': ')[2]}") from None
    found = ChosenClassifier(label, made, *(corrections or [correction]))
    if corrections == ["affine"] and not found.moves:
        raise InvalidInput(
            f"classifiers={label}: {name} keeps no statistics that a drift could be corrected in; "
            f"leave {CORRECTION} out"
        )
    return found
