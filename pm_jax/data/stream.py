"""A stream of tasks over arrays: the examples of each task, for training, validation and testing.

All examples of all tasks lie in one array that can stay on the device. A task is a row of indices
into it, padded to the largest task, so that shapes never change along the stream.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pm_jax import files
from pm_jax.data.random_access import joined_inputs
from pm_jax.types import InvalidInput

SCENARIOS = ("domain_incremental", "class_incremental")
CLASS_ORDERS = ("random", "given", "groups")


class LabelledArrays(NamedTuple):
    """A data set in memory.

    Attributes:
        train_inputs: uint8 images [N, H, W, channels] or int32 token ids [N, tokens].
        train_labels: classes 0..C-1, int [N].
        test_inputs: the same [M, ...].
        test_labels: int [M].
        name: prefix of the example ids, "name/train/17".
        class_groups: the group of each class (a domain of intents), int [C]; `None` without groups.
        left_out_classes: how many classes the data set has beyond the first C, which are here.
        class_names: the name, or else the label in the data, of each class 0..C-1; `None` where
            nobody gave them any and the labels count from 0.
        validation: inputs and labels for validation; `None` to hold out training examples.
        notes: lines about the data that a person should see.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    name: str = "data"
    class_groups: np.ndarray | None = None
    left_out_classes: int = 0
    class_names: tuple[str, ...] | None = None
    validation: tuple[np.ndarray, np.ndarray] | None = None
    notes: tuple[str, ...] = ()

    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return inputs and labels for training, for testing and, if given, for validation."""
        parts = [(self.train_inputs, self.train_labels), (self.test_inputs, self.test_labels)]
        return parts if self.validation is None else [*parts, self.validation]

    def with_parts(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "LabelledArrays":
        """Return the data set with other inputs and labels, in the order of `parts`."""
        train, test, *validation = parts
        return self._replace(
            train_inputs=train[0],
            train_labels=train[1],
            test_inputs=test[0],
            test_labels=test[1],
            validation=validation[0] if validation else None,
        )

    def with_inputs(self, change: Callable[[np.ndarray], np.ndarray]) -> "LabelledArrays":
        """Return the data set with a function applied to its inputs."""
        return self.with_parts([(change(inputs), labels) for inputs, labels in self.parts()])


class TaskIndices(NamedTuple):
    """The examples of each task in one split.

    Attributes:
        positions: places in the stream's arrays, int32 [T, M]; rows are padded with 0.
        sizes: number of examples in each row, int32 [T].
    """

    positions: np.ndarray
    sizes: np.ndarray

    def rows(self) -> list[np.ndarray]:
        """Return the rows without their padding."""
        return [row[:size] for row, size in zip(self.positions, self.sizes, strict=True)]


@dataclasses.dataclass(frozen=True)
class TaskStream:
    """Tasks to be learned one after another.

    Attributes:
        inputs: all examples of all tasks and splits, uint8 or int32 [N, ...].
        labels: int32 [N].
        example_ids: N strings that name the examples independently of seed and order.
        train: examples to train on.
        validation: examples held out of the training data; for choosing hyper-parameters.
        test: examples for reporting, never for choosing.
        class_masks: the classes of each task, bool [T, C].
        scenario: "class_incremental" (tasks bring new classes) or "domain_incremental" (every task
            has every class, its inputs differ).
        class_order: the classes in the order in which they arrive.
        left_out_classes: as `LabelledArrays` has it.
        class_names: likewise.
        notes: likewise.
    """

    inputs: np.ndarray
    labels: np.ndarray
    example_ids: tuple[str, ...]
    train: TaskIndices
    validation: TaskIndices
    test: TaskIndices
    class_masks: np.ndarray
    scenario: str
    class_order: tuple[int, ...]
    left_out_classes: int = 0
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_tasks(self) -> int:
        """Number T of tasks."""
        return len(self.class_masks)

    @property
    def num_classes(self) -> int:
        """Number C of classes, over all tasks."""
        return self.class_masks.shape[1]

    def together(self) -> "TaskStream":
        """Return the same examples as one task."""
        splits = (self.train, self.validation, self.test)
        train, validation, test = (_padded([np.concatenate(split.rows())]) for split in splits)
        masks = np.any(self.class_masks, axis=0, keepdims=True)
        return dataclasses.replace(
            self, train=train, validation=validation, test=test, class_masks=masks
        )

    def manifest(self) -> dict:
        """Return, as JSON, the class order, and per task its classes, sizes and hashes of ids."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        tasks = []
        for task, mask in enumerate(self.class_masks):
            entry: dict = {"classes": np.flatnonzero(mask).tolist()}
            for name, split in splits.items():
                ids = "\n".join(self.example_ids[i] for i in split.rows()[task])
                digest = hashlib.sha256(ids.encode()).hexdigest()
                entry[name] = {"examples": int(split.sizes[task]), "sha256_of_ids": digest}
            tasks.append(entry)
        subset = {"first": self.num_classes, "left_out": self.left_out_classes}
        return {
            "scenario": self.scenario,
            "class_order": list(self.class_order),
            **({"class_subset": subset} if self.left_out_classes else {}),
            **({"class_names": list(self.class_names)} if self.class_names else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
            "tasks": tasks,
        }


def class_incremental(
    arrays: LabelledArrays,
    num_tasks: int,
    seed: int,
    *,
    class_order: str = "random",
    base_classes: int = 0,
    validation_fraction: float = 0.15,
) -> TaskStream:
    """Make tasks that each bring new classes.

    Raises:
        InvalidInput: a task has no classes, a class has no training examples or loses them all to
            validation, or there are not as many groups as tasks.
    """
    num_classes = _count_classes([arrays])
    # Class order and validation split draw from streams of their own, [seed, 0] and [seed, 1].
    generator = np.random.default_rng([seed, 0])
    if class_order == "groups":
        groups = _given_groups(generator, arrays.class_groups, num_tasks, base_classes)
    else:
        # "given" is the order of the numbers.
        order = np.arange(num_classes)
        order = generator.permutation(order) if class_order == "random" else order
        groups = _class_groups(order, num_tasks, base_classes)
    labels = np.concatenate([labels for _, labels in arrays.parts()])
    rows = {
        split: [whole[np.isin(labels[whole], g)] for g in groups]
        for split, [whole] in _rows_of([arrays], seed, validation_fraction).items()
    }
    _check_examples(rows, [f"{arrays.name}: {_task_of_classes(g)}" for g in groups])
    masks = np.stack([np.isin(np.arange(num_classes), g) for g in groups])
    return _task_stream([arrays], rows, masks, "class_incremental", np.concatenate(groups))


def domain_incremental(
    domains: Sequence[LabelledArrays], seed: int, *, validation_fraction: float = 0.15
) -> TaskStream:
    """Make tasks with the same classes and different inputs, one per domain, in the order given.

    Raises:
        InvalidInput: there is no domain, or a class has no training examples in any of them or
            loses them all to validation.
    """
    if not domains:
        raise InvalidInput("domains=[]: at least one is needed")
    num_classes = _count_classes(domains)
    rows = _rows_of(domains, seed, validation_fraction)
    _check_examples(rows, [f"{domain.name}: the task" for domain in domains])
    masks = np.ones((len(domains), num_classes), bool)
    return _task_stream(domains, rows, masks, "domain_incremental", np.arange(num_classes))


def tasks_of_classes(
    tasks: Sequence[LabelledArrays], seed: int, *, validation_fraction: float = 0.15
) -> TaskStream:
    """Make tasks of data sets, each with the classes of its own labels, in the order given.

    Raises:
        InvalidInput: a class has no training examples in any task, or loses them all to validation.
    """
    num_classes = _count_classes(tasks)
    rows = _rows_of(tasks, seed, validation_fraction)
    _check_examples(rows, [f"{task.name}: the task" for task in tasks])
    groups = [np.unique(task.train_labels) for task in tasks]
    for task, classes in zip(tasks, groups, strict=True):
        if len(foreign := np.setdiff1d(task.test_labels, classes)):
            raise InvalidInput(
                f"dataset={task.name}: has test examples of class {foreign[0]} and no training "
                "example of it"
            )
    masks = np.stack([np.isin(np.arange(num_classes), classes) for classes in groups])
    order = np.asarray(list(dict.fromkeys(np.concatenate(groups).tolist())))
    return _task_stream(tasks, rows, masks, "class_incremental", order)


def _rows_of(
    tasks: Sequence[LabelledArrays], seed: int, validation_fraction: float
) -> dict[str, list[np.ndarray]]:
    """Find the rows of each task in each split, where the tasks lie behind one another."""
    rows: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    offset = 0
    for task in tasks:
        # Test examples lie behind the training examples, and those for validation behind both.
        tests = offset + len(task.train_labels)
        end = tests + len(task.test_labels)
        if task.validation is None:
            # Versions of the same examples have equal labels, so the same ones are held out of all.
            train, validation = _hold_out(task.train_labels, seed, validation_fraction)
            validation += offset
        else:
            train = np.random.default_rng([seed, 1]).permutation(len(task.train_labels))
            validation = end + np.arange(len(task.validation[1]))
        rows["train"].append(offset + train)
        rows["validation"].append(validation)
        rows["test"].append(np.arange(tests, end))
        offset = end + (len(validation) if task.validation else 0)
    return rows


def _task_stream(
    data_sets: Sequence[LabelledArrays],
    rows: dict[str, list[np.ndarray]],
    class_masks: np.ndarray,
    scenario: str,
    class_order: np.ndarray,
) -> TaskStream:
    """Lay the data sets behind one another, each in the order of its parts."""
    parts = [part for data_set in data_sets for part in data_set.parts()]
    return TaskStream(
        inputs=joined_inputs([inputs for inputs, _ in parts]),
        labels=np.concatenate([labels for _, labels in parts]).astype(np.int32),
        example_ids=tuple(name for data_set in data_sets for name in _ids(data_set)),
        **{split: _padded(of_tasks) for split, of_tasks in rows.items()},
        class_masks=class_masks,
        scenario=scenario,
        class_order=tuple(class_order.tolist()),
        left_out_classes=data_sets[0].left_out_classes,
        class_names=data_sets[0].class_names,
        notes=tuple(dict.fromkeys(note for data_set in data_sets for note in data_set.notes)),
    )


def first_classes(classes: np.ndarray, count: int, name: str) -> np.ndarray:
    """Return the first `count` of a data set's classes, in rising order; 0 for all.

    Raises:
        InvalidInput: the data set has fewer.
    """
    if count > len(classes):
        raise InvalidInput(
            f"class_subset={count}: {name} has {len(classes)} classes; choose 2..{len(classes)}, "
            "or 0 for all"
        )
    return classes[: count or None]


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Return positions of the first `count` examples of each class, in rising order; 0 for all."""
    if not count:
        return np.arange(len(labels))
    firsts = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(firsts))


def _count_classes(domains: Sequence[LabelledArrays]) -> int:
    """Count the classes, and check that each has a training example in some domain."""
    trained = np.unique(np.concatenate([domain.train_labels for domain in domains])).tolist()
    tested = np.unique(np.concatenate([domain.test_labels for domain in domains])).tolist()
    count = max([*trained, *tested], default=-1) + 1
    if len(trained) < count or not count:
        # A gap is looked for one by one: a label of two billion would make a list of as many.
        missing = next(c for c in itertools.count() if c >= len(trained) or trained[c] != c)
        raise InvalidInput(
            f"dataset={domains[0].name}: class {missing} of {count} has no training example; "
            "number the classes from 0 on without gaps"
        )
    return count


def _class_groups(order: np.ndarray, num_tasks: int, base_classes: int) -> list[np.ndarray]:
    rest = order[base_classes:]
    # The first task may have a number of classes of its own; the others share the rest evenly.
    later_tasks = num_tasks - (1 if base_classes else 0)
    if num_tasks < 1 or len(rest) < later_tasks or (later_tasks == 0 and len(rest)):
        first = f" after base_classes={base_classes}" if base_classes else ""
        raise InvalidInput(
            f"num_tasks={num_tasks}: {len(rest)} classes are left{first}, and every task needs "
            f"at least one; choose 1..{len(rest) + (1 if base_classes else 0)} tasks"
        )
    groups = [order[:base_classes]] if base_classes else []
    return groups + (np.array_split(rest, later_tasks) if later_tasks else [])


def _given_groups(
    generator: np.random.Generator, of_class: np.ndarray | None, num_tasks: int, base_classes: int
) -> list[np.ndarray]:
    if of_class is None:
        raise InvalidInput(
            "class_order=groups: the data set names no groups of classes; use random or given"
        )
    names = generator.permutation(np.unique(of_class))
    if base_classes or len(names) != num_tasks:
        raise InvalidInput(
            f"num_tasks={num_tasks}: class_order=groups makes one task of each of {len(names)} "
            f"groups; use num_tasks={len(names)} and base_classes=0"
        )
    return [np.flatnonzero(of_class == name) for name in names]


def _hold_out(labels: np.ndarray, seed: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into shuffled training ones and validation ones, class by class."""
    if not 0 < fraction < 1:
        raise InvalidInput(f"validation_fraction={fraction}: must lie strictly between 0 and 1")
    generator = np.random.default_rng([seed, 1])
    train, validation = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        # A class with one example, as in some domains, keeps it for training.
        held_out = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        if held_out >= len(members):
            raise InvalidInput(
                f"validation_fraction={fraction}: class {label} has {len(members)} training "
                "examples and none would be left; lower the fraction or add examples"
            )
        validation.append(members[:held_out])
        train.append(members[held_out:])
    return generator.permutation(np.concatenate(train)), np.sort(np.concatenate(validation))


def _task_of_classes(classes: np.ndarray) -> str:
    names = files.listed([str(label) for label in sorted(classes.tolist())])
    return f"the task of class{'es' if len(classes) > 1 else ''} {names}"


def _check_examples(rows: dict[str, list[np.ndarray]], tasks: Sequence[str]) -> None:
    """Check that every task has examples in all of its splits."""
    lacks = {
        "train": "no training example",
        "validation": "no class of two training examples, of which one is held out for validation",
        "test": "no test example",
    }
    for split, lacking in lacks.items():
        for task, row in zip(tasks, rows[split], strict=True):
            if not len(row):
                raise InvalidInput(f"dataset={task} has {lacking}; add some, or use fewer tasks")


def _padded(rows: Sequence[np.ndarray]) -> TaskIndices:
    sizes = np.asarray([len(row) for row in rows], np.int32)
    positions = np.zeros((len(rows), int(sizes.max())), np.int32)
    for row, values in zip(positions, rows, strict=True):
        row[: len(values)] = values
    return TaskIndices(positions, sizes)


def _ids(arrays: LabelledArrays) -> tuple[str, ...]:
    splits = zip(("train", "test", "validation"), arrays.parts(), strict=False)
    return tuple(
        f"{arrays.name}/{split}/{i}" for split, (_, labels) in splits for i in range(len(labels))
    )
