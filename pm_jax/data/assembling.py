"""Data sets of splits whose examples are read only if they are kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.data import labels as labelling
from pm_jax.data.splits import divided
from pm_jax.data.stream import LabelledArrays, first_classes, first_of_each_class
from pm_jax.types import InvalidInput

Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Reads the inputs of rising positions; returns also the positions, without those left out."""


class Split(NamedTuple):
    """The examples of a split.

    Attributes:
        labels: as the data have them, int64 or strings [N].
        read: reads inputs.
        domains: the domain of each example, whole numbers or strings [N].
    """

    labels: np.ndarray
    read: Read
    domains: np.ndarray | None = None


class Rows(NamedTuple):
    """Some examples of a split, by their rising positions."""

    split: Split
    positions: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels as the data have them."""
        return self.split.labels[self.positions]

    def at(self, chosen: np.ndarray) -> "Rows":
        """Choose among the examples."""
        return Rows(self.split, self.positions[chosen])


def of_array(inputs: np.ndarray) -> Read:
    """Make the reader of inputs that are in memory."""

    def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = len(positions) == len(inputs)
        return (inputs if whole else inputs[positions]), positions

    return read


def assembled(
    name: str,
    splits: Mapping[str, Split],
    *,
    by_domain: bool = False,
    class_names: Sequence[str] | None = None,
    class_subset: int = 0,
    train_per_class: int = 0,
    test_per_class: int = 0,
    notes: Sequence[str] = (),
) -> list[LabelledArrays]:
    """Make data sets of splits: one, or one for each domain in the order of their names.

    Args:
        name: of the data set, for messages and for the names of the examples.
        splits: by role, "train", "test" and "validation"; without "test" the training examples
            are divided class by class, in each domain.
        by_domain: whether each domain is a data set.
        class_names: of the labels 0, 1, ..., where they are known.
        class_subset: as the settings have it, and so the next two.
        train_per_class: likewise.
        test_per_class: likewise.
        notes: lines about the data so far.

    Raises:
        InvalidInput: labels without meaning, no domains, or a domain without examples.
    """
    said = list(notes)
    whole = {
        role: Rows(split, labelling.with_label(split.labels, name, role, said))
        for role, split in splits.items()
    }
    domains = _by_domain(name, whole) if by_domain else {name: whole}
    parts = {domain: _with_test(domain, rows) for domain, rows in domains.items()}
    classes = labelling.classes_of(
        [rows["train"].labels for rows in parts.values()],
        [rows[role].labels for rows in parts.values() for role in rows if role != "train"],
        name,
        class_names,
    )
    said += labelling.numbering_note(classes, name)
    kept = first_classes(classes.values, class_subset, name)
    counts = {"train": train_per_class, "test": test_per_class, "validation": 0}
    left_out = len(classes.values) - len(kept)
    result = []
    for domain, rows in parts.items():
        read = {}
        for role, of_role in rows.items():
            chosen = of_role.at(np.flatnonzero(np.isin(of_role.labels, kept)))
            chosen = chosen.at(first_of_each_class(chosen.labels, counts[role]))
            read[role] = _read(f"{domain}, {role}", chosen, classes)
        result.append(
            LabelledArrays(
                *read["train"],
                *read["test"],
                name=domain,
                class_groups=None if by_domain else _groups(whole["train"], kept),
                left_out_classes=left_out,
                class_names=classes.names and classes.names[: len(kept)],
                validation=read.get("validation"),
                notes=tuple(said),
            )
        )
    check_one_shape(result)
    return result


def check_one_shape(data_sets: Sequence[LabelledArrays]) -> None:
    """Check that all inputs have one shape; raises `InvalidInput`."""
    shapes = {inputs.shape[1:] for arrays in data_sets for inputs, _ in arrays.parts()}
    if len(shapes) > 1:
        shown = " and ".join(map(str, sorted(shapes)))
        raise InvalidInput(
            f"dataset={data_sets[0].name}: its parts have images of the shapes {shown}; set "
            "stored_size to bring them to one size"
        )


def _read(name: str, rows: Rows, classes: labelling.Classes) -> tuple[Any, np.ndarray]:
    if not len(rows.positions):
        raise InvalidInput(f"dataset={name}: has no example of the classes that are kept")
    inputs, positions = rows.split.read(rows.positions)
    return inputs, classes.numbers(rows.split.labels[positions])


def _with_test(name: str, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    if "test" in rows:
        return dict(rows)
    train = rows["train"]
    sides = {side: train.at(part) for side, part in divided(name, train.labels).items()}
    return {**sides, **{role: part for role, part in rows.items() if role != "train"}}


def _by_domain(name: str, rows: Mapping[str, Rows]) -> dict[str, dict[str, Rows]]:
    """Part the examples of each role by their domains; raises `InvalidInput`."""
    of_role: dict[str, np.ndarray] = {}
    for role, (split, positions) in rows.items():
        if split.domains is None:
            if of_role:
                raise InvalidInput(f"dataset={name}: says the domains of train, and not of {role}")
            raise InvalidInput(without_domains(name))
        of_role[role] = split.domains[positions]
        if missing := int(np.sum(of_role[role] == "")) if of_role[role].dtype.kind == "U" else 0:
            raise InvalidInput(
                f"dataset={name}: {missing} examples of {role} have no domain; give them one, or "
                "leave them out"
            )
    values = labelling.in_order(np.concatenate(list(of_role.values()))).tolist()
    result = {}
    for value in values:
        parts = {
            role: part.at(np.flatnonzero(of_role[role] == value)) for role, part in rows.items()
        }
        if lacking := [role for role, part in parts.items() if not len(part.positions)]:
            raise InvalidInput(
                f"dataset={name}: its domain {value} has no example of {lacking[0]}; the domains "
                f"are {files.listed([str(value) for value in values])}"
            )
        result[f"{name}/{value}"] = parts
    return result


def without_domains(name: str, what: str = "has no domains") -> str:
    """Say that a data set has no domains, and what would give it some."""
    return (
        f"scenario=domain_incremental: dataset={name} {what}; use "
        "scenario=class_incremental, several data sets with commas between them, domain_train and "
        "domain_test in an .npz, a folder for each domain, or a field that domain_field names"
    )


def _groups(rows: Rows, kept: np.ndarray) -> np.ndarray | None:
    """Return the domain of each class; `None` where there are none, or a class is in several."""
    domains = rows.split.domains
    if domains is None:
        return None
    labels, of_example = rows.labels, domains[rows.positions]
    of_class = [np.unique(of_example[labels == value]) for value in kept]
    if any(len(values) != 1 for values in of_class):
        return None
    return np.concatenate(of_class)
