"""The roles of a data set's splits, and the division of one that has a single split."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pm_jax.data.packages import needed_for
from pm_jax.types import InvalidInput, cause

TEST_FRACTION = 0.2
KNOWN = ("train", "test", "validation", "val", "valid", "dev")
"""Names by which a folder is known to hold splits."""


class Roles(NamedTuple):
    """The splits that a data set is read from.

    Attributes:
        train: name of the split to train on.
        test: of the one to test on; `None` for a part of `train`.
        validation: of the one for validation; `None` for a part of the training examples.
        notes: lines about what was chosen, which follow the name of the data set.
    """

    train: str
    test: str | None
    validation: str | None
    notes: tuple[str, ...]

    def notes_about(self, name: str) -> list[str]:
        """Return the notes with the name of the data set."""
        return [f"{name}: {note}" for note in self.notes]

    def named(self) -> dict[str, str]:
        """Return the split of each role that has one of its own."""
        splits = {"train": self.train, "test": self.test, "validation": self.validation}
        return {role: split for role, split in splits.items() if split}


def roles(
    name: str, available: Sequence[str], test_split: str = "", validation_split: str = ""
) -> Roles:
    """Choose the splits of a data set.

    The test split is the one that is named, or `test`, or `validation`. A single split is divided,
    and so is `train` where it is named as the test split.

    Raises:
        InvalidInput: a split that is named does not exist, or has another role; or there is none
            to train or to test on.
    """
    there = ", ".join(available)
    for setting, split in (("test_split", test_split), ("validation_split", validation_split)):
        if split and split not in available:
            raise InvalidInput(f"{setting}={split}: {name} has {there}; name one of them")
    notes = []
    only = available[0] if len(available) == 1 else "train"
    if only not in available or only not in ("train", "test"):
        raise InvalidInput(f"dataset={name}: needs a split 'train' or 'test'; it has {there}")
    test: str | None = test_split or ("test" if "test" in available else None)
    if test is None and "validation" in available and validation_split != "validation":
        test = "validation"
    if test is None and len(available) > 1:
        raise InvalidInput(
            f"dataset={name}: has the splits {there}, none of which is called test; name one with "
            "test_split, or train for a fifth of it"
        )
    if test == only or test is None:
        test = None
        notes.append(
            f"the split {only} is divided, a fifth of each class for testing, which is the "
            "same fifth for every seed"
        )
    elif not test_split and test == "validation":
        notes.append("has no split test; validation is for testing")
    if validation_split and validation_split in (only, test):
        role = "test" if validation_split == test else "train"
        raise InvalidInput(
            f"validation_split={validation_split}: {name} has this split to {role} on; name another"
        )
    used = (only, test, validation_split)
    if rest := [split for split in available if split not in used]:
        notes.append(f"not read: {', '.join(rest)}")
    return Roles(only, test, validation_split or None, tuple(notes))


def divided(name: str, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Divide examples class by class, and return the rising positions to train and to test on.

    ImageNet-R and -A have one split: 20 % of every class are for testing, as many as the 24,000 and
    6,000 images of ImageNet-R in L2P (https://arxiv.org/abs/2112.08654).

    Raises:
        InvalidInput: a class has too few examples.
    """
    with needed_for(f"dataset={name}"):
        from sklearn import model_selection
    try:
        sides = model_selection.train_test_split(
            np.arange(len(labels)), test_size=TEST_FRACTION, random_state=0, stratify=labels
        )
    except ValueError as error:
        fewest = "it is empty"
        if len(labels):
            classes, counts = np.unique(labels, return_counts=True)
            fewest = f"its class {classes[counts.argmin()]} has {counts.min()} examples"
        raise InvalidInput(
            f"dataset={name}: its only split cannot be divided to train and to test "
            f"({cause(error)}); {fewest}, prepare more"
        ) from None
    return {"train": np.sort(sides[0]), "test": np.sort(sides[1])}
