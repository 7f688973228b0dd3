"""Phrases about classes: the names of the classes and the templates that they are put into."""

from collections.abc import Sequence
from pathlib import Path

from pm_jax import files
from pm_jax.types import InvalidInput

PLACE = "{}"
"""Stands for the name of the class in a template."""


def read_class_names(path: str, num_classes: int, left_out: int = 0) -> tuple[str, ...]:
    """Read the names of classes 0, 1, ..., one a line.

    The file has them for all classes of the data set, of which `left_out` beyond the first
    `num_classes` may not be used.

    Raises:
        InvalidInput: the file cannot be read, a line is empty, or there are not as many.
    """
    names = _lines("class_names", path)
    if len(names) not in (num_classes, num_classes + left_out):
        wanted = f"{num_classes} or {num_classes + left_out}" if left_out else f"{num_classes}"
        raise InvalidInput(
            f"class_names={path}: has {len(names)} names, and the data have {num_classes} classes; "
            f"give {wanted}, one a line in the order of the labels"
        )
    return names[:num_classes]


def read_templates(setting: str) -> tuple[str, ...]:
    """Read templates: phrases with {}, with | between them, or the path of a file of them.

    Raises:
        InvalidInput: the file cannot be read, or a phrase has not exactly one {}.

    Example:
        >>> read_templates("a photo of a {}.|a drawing of a {}.")
        ('a photo of a {}.', 'a drawing of a {}.')
    """
    phrases = tuple(setting.split("|")) if PLACE in setting else _lines("templates", setting)
    for phrase in phrases:
        if phrase.count(PLACE) != 1:
            raise InvalidInput(
                f"templates={setting}: {phrase!r} needs {PLACE} once, in the place of the class's "
                "name, as 'a photo of a {}.'"
            )
    return phrases


def check_class_names(dataset: str, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return names that a text tower can tell classes apart by.

    Raises:
        InvalidInput: there are none, they are numbers, or two classes have the same.
    """
    remedy = "give names by class_names=FILE, one a line in the order of the labels"
    if not names:
        raise InvalidInput(
            f"class_names=: zero_shot needs the names of the classes, and dataset={dataset} has "
            f"none; {remedy}"
        )
    # ImageNet's subsets call their classes by the numbers of WordNet, such as n01443537.
    if all(name.removeprefix("n").isdigit() for name in names):
        raise InvalidInput(
            f"class_names=: dataset={dataset} calls its classes {files.listed(names)}, which "
            f"zero_shot cannot read; {remedy}"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidInput(
            f"class_names=: two classes of dataset={dataset} are called {twice[0]}, which "
            f"zero_shot cannot tell apart; {remedy}"
        )
    return tuple(names)


def _lines(argument: str, path: str) -> tuple[str, ...]:
    """Read the lines of a file, none of them empty; raises `InvalidInput`."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{argument}={path}: cannot be read ({getattr(error, 'strerror', 'no text')}); give a "
            "text file with one a line"
        ) from error
    if "" in lines or not lines:
        raise InvalidInput(
            f"{argument}={path}: line {lines.index('') + 1 if lines else 1} is empty; give one a "
            "line"
        )
    return tuple(lines)
