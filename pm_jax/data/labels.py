"""Labels as people write them, and the numbers 0..C-1 that a stream has for them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput

UNLABELLED = -1
"""A label that stands for none; among strings the empty one does."""
WHOLE_NUMBER = re.compile(r"-?\d+")


class Classes(NamedTuple):
    """The classes of a data set.

    Attributes:
        values: the labels that the data have for classes 0..C-1, int64 or strings [C].
        names: as `LabelledArrays.class_names` has them.
    """

    values: np.ndarray
    names: tuple[str, ...] | None

    def numbers(self, labels: np.ndarray) -> np.ndarray:
        """Return the numbers of labels, all of which are among the values; int64."""
        order = np.argsort(self.values, kind="stable")
        return order[np.searchsorted(self.values, labels, sorter=order)]


def checked(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    """Check that there is a whole number or a string for each of `count` examples.

    Args:
        labels: as the data have them.
        count: number of examples.
        what: words for the labels, which begin a message: "dataset=x.npz: y_train".

    Returns:
        int64 [N], or strings [N].

    Raises:
        InvalidInput: they are one-hot, or of another form.
    """
    if labels.dtype.kind in "iu" and labels.shape == (count,):
        if labels.max(initial=0) > np.iinfo(np.int64).max:
            raise InvalidInput(f"{what} has the label {labels.max()}; use smaller whole numbers")
        return labels.astype(np.int64)
    if labels.dtype.kind in "US" and labels.shape == (count,):
        # Bytes are what h5py and old files have for strings.
        return np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels
    form = f"{what} is {labels.dtype} {labels.shape}"
    if labels.ndim == 2 and len(labels) == count and labels.dtype.kind in "iufb":
        if labels.shape[1] == 1:
            raise InvalidInput(f"{form}; save one label for each example, y.ravel()")
        if ((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all():
            raise InvalidInput(f"{form}, which is one-hot; save the classes, y.argmax(axis=1)")
    whole = labels.dtype.kind == "f" and labels.shape == (count,) and np.isfinite(labels).all()
    remedy = "; save y.astype(int)" if whole and (labels == np.round(labels)).all() else ""
    raise InvalidInput(
        f"{form}; it must hold a whole number from 0 on for each of {count} examples, or "
        f"strings{remedy}"
    )


def with_label(labels: np.ndarray, name: str, split: str, notes: list[str]) -> np.ndarray:
    """Find the examples of a split that have a label, and note how many have none.

    Raises:
        InvalidInput: none has one, or -1 is not the only label below 0.
    """
    if labels.dtype.kind == "U":
        numeric = _are_numbers(labels)
        blank = np.char.strip(labels) == ""
        missing = blank | (labels == str(UNLABELLED)) if numeric else blank
    else:
        missing = labels == UNLABELLED
        if labels.min(initial=0) < UNLABELLED:
            raise InvalidInput(
                f"dataset={name}: {split} has the label {labels.min()}, and {UNLABELLED} would be "
                "an example without label; number the classes from 0 on"
            )
    if missing.all():
        raise InvalidInput(
            f"dataset={name}: {split} has no example with a label; name a split that has, with "
            "test_split or validation_split, or add labels"
        )
    if count := int(missing.sum()):
        left = np.unique(labels[~missing])
        if left.tolist() in ([1], ["1"]):
            raise InvalidInput(
                f"dataset={name}: {split} has the labels -1 and 1, and -1 stands for an example "
                "without label; use 0 and 1"
            )
        notes.append(
            f"{name}: {count} of {len(labels)} examples of {split} have no label (-1 or empty) and "
            "are left out"
        )
    return np.flatnonzero(~missing)


def classes_of(
    train: Sequence[np.ndarray],
    others: Sequence[np.ndarray],
    name: str,
    names: Sequence[str] | None = None,
) -> Classes:
    """Find the classes that training examples have, in rising order, and name them.

    Strings that are all whole numbers are ordered as numbers.

    Args:
        train: labels of training examples, of one or more data sets.
        others: labels of the other examples.
        name: of the data set, for messages.
        names: of the labels 0, 1, ..., where they are known.

    Raises:
        InvalidInput: another example has a class that no training example has, or a label has no
            name.
    """
    values = in_order(np.concatenate(train))
    found = np.unique(np.concatenate(others)) if others else values
    if len(missing := np.setdiff1d(found, values)):
        called = missing[0]
        if names and values.dtype.kind == "i" and called < len(names):
            called = f"{called} ({names[called]})"
        raise InvalidInput(
            f"dataset={name}: class {called} has test examples and no training example; add some, "
            "or leave out those for testing"
        )
    if names is None:
        shown = tuple(str(value) for value in values.tolist())
    elif values.dtype.kind != "i":
        raise InvalidInput(f"dataset={name}: names classes by number, and its labels are strings")
    elif len(names) <= (largest := int(values.max())):
        raise InvalidInput(
            f"dataset={name}: has the label {largest} and names of {len(names)} classes; name all"
        )
    else:
        shown = tuple(names[value] for value in values.tolist())
    # Without names of its own a data set calls its classes by their numbers.
    return Classes(values, None if shown == tuple(map(str, range(len(shown)))) else shown)


def numbering_note(classes: Classes, name: str) -> list[str]:
    """Say that labels which are no numbers 0..C-1 are numbered; nothing about strings."""
    values = classes.values.tolist()
    if values == list(range(len(values))) or classes.values.dtype.kind != "i":
        return []
    shown = files.listed([str(value) for value in values])
    return [
        f"{name}: the labels {shown} are classes 0 to {len(values) - 1}; the results have the "
        "names of all in this order"
    ]


def in_order(values: np.ndarray) -> np.ndarray:
    """Return the different values in rising order, strings that are whole numbers as numbers."""
    different = np.unique(values)
    if different.dtype.kind == "U" and _are_numbers(different):
        filled = [text for text in different.tolist() if text.strip()]
        return np.asarray(sorted(filled, key=lambda text: (int(text), text)), different.dtype)
    return different


def _are_numbers(labels: np.ndarray) -> bool:
    """Tell whether all strings that are not empty are whole numbers."""
    return all(WHOLE_NUMBER.fullmatch(x.strip()) for x in np.unique(labels).tolist() if x.strip())
