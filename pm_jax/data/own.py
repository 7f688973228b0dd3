"""Tasks of the user's own data: arrays, or sources with `__len__` and `__getitem__`.

A *source* is a sequence of examples in the protocol of grain and PyTorch: `len(source)`, and
`source[i]` for i from 0, an example `(input, label)` or a mapping with a label among its values. A
*split* is a source, or a pair of arrays (inputs [N, ...], labels [N]); labels are whole numbers or
strings. A *task* is a pair of splits
(train, test), a mapping with both by name, or a `LabelledArrays`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pm_jax.data import labels as labelling
from pm_jax.data.random_access import SourceInputs, example_parts, stored_form
from pm_jax.data.stream import (
    LabelledArrays,
    TaskStream,
    class_incremental,
    domain_incremental,
    tasks_of_classes,
)
from pm_jax.types import InvalidInput, cause

IN_MEMORY = 2**30
"""A source of more bytes than these is read again whenever its examples are needed."""


def stream_of_data(
    data: Any,
    seed: int,
    *,
    name: str,
    scenario: str,
    num_tasks: int,
    class_order: str = "random",
    base_classes: int = 0,
    validation_fraction: float = 0.15,
) -> TaskStream:
    """Make a stream of own data.

    Args:
        data: a `TaskStream`; a list of tasks, which are learned in this order; or one task, whose
            classes are divided among `num_tasks` tasks (class-incremental only).
        seed: of the split for validation and of the class order.
        name: of the data, for messages and for the names of the examples.
        scenario: "class_incremental", where the classes of a listed task are those of its labels,
            or "domain_incremental", where each listed task has all classes.
        num_tasks: number of tasks.
        class_order: of one task's classes, as `class_incremental` has it.
        base_classes: likewise.
        validation_fraction: share of each class that is held out of the training examples.

    Raises:
        InvalidInput: data of another form, a source that lies about its length, examples that
            differ in shape, or another number of tasks.
    """
    if isinstance(data, TaskStream):
        check_agrees(data, scenario, num_tasks)
        return data
    options = {"validation_fraction": validation_fraction}
    if not _is_list_of_tasks(data):
        if scenario != "class_incremental":
            raise InvalidInput(
                f"dataset={name}: is one data set, whose classes make tasks; use "
                "scenario=class_incremental, or give a list of one task a domain"
            )
        [arrays] = _numbered([labelled(data, name)], name)
        return class_incremental(
            arrays,
            num_tasks,
            seed,
            class_order=class_order,
            base_classes=base_classes,
            **options,
        )
    if len(data) != num_tasks:
        raise InvalidInput(f"num_tasks={num_tasks}: {name} has {len(data)} tasks; use that number")
    tasks = [labelled(task, f"{name}_{number}") for number, task in enumerate(data, start=1)]
    forms = [(task.train_inputs.shape[1:], str(task.train_inputs.dtype)) for task in tasks]
    for number, form in enumerate(forms, start=1):
        if form != forms[0]:
            raise InvalidInput(
                f"dataset={name}: task {number} has examples of {form[1]} {form[0]} and task 1 of "
                f"{forms[0][1]} {forms[0][0]}; all tasks need the same"
            )
    tasks = _numbered(tasks, name)
    if scenario == "domain_incremental":
        return domain_incremental(tasks, seed, **options)
    return tasks_of_classes(tasks, seed, **options)


def check_agrees(stream: TaskStream, scenario: str, num_tasks: int) -> None:
    """Check that a stream is of the scenario and length that the settings of a run say.

    Raises:
        InvalidInput: it is not.
    """
    if stream.num_tasks != num_tasks:
        raise InvalidInput(
            f"num_tasks={num_tasks}: the stream has {stream.num_tasks} tasks; use that number"
        )
    if stream.scenario != scenario:
        raise InvalidInput(
            f"scenario={scenario}: the stream is {stream.scenario}; use that scenario"
        )


def labelled(task: Any, name: str) -> LabelledArrays:
    """Make a data set of a task.

    Raises:
        InvalidInput: the task has another form, or a split cannot be read.
    """
    if isinstance(task, LabelledArrays):
        splits = {
            "train": (task.train_inputs, task.train_labels),
            "test": (task.test_inputs, task.test_labels),
        }
    elif isinstance(task, Mapping) and {"train", "test"} <= set(task):
        splits = {part: task[part] for part in ("train", "test")}
    elif isinstance(task, (tuple, list)) and len(task) == 2:
        splits = dict(zip(("train", "test"), task, strict=True))
    else:
        raise InvalidInput(
            f"dataset={name}: is a {type(task).__name__}; a task is a pair (train, test), each of "
            "(inputs, labels) or a source of examples with __len__ and __getitem__"
        )
    read = {part: _read_split(split, f"{name}, {part}") for part, split in splits.items()}
    (train, train_labels), (test, test_labels) = read["train"], read["test"]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise InvalidInput(
            f"dataset={name}: train has examples of {train.dtype} {train.shape[1:]} and test of "
            f"{test.dtype} {test.shape[1:]}; both need the same"
        )
    if not isinstance(task, LabelledArrays):
        return LabelledArrays(train, train_labels, test, test_labels, name)
    return task._replace(
        train_inputs=train,
        train_labels=train_labels,
        test_inputs=test,
        test_labels=test_labels,
        name=name if task.name == "data" else task.name,
    )


def _numbered(tasks: list[LabelledArrays], name: str) -> list[LabelledArrays]:
    """Number the classes of tasks together, where their labels are strings or leave numbers out."""
    of_each = [labels for task in tasks for _, labels in task.parts()]
    if len({labels.dtype.kind for labels in of_each}) > 1:
        raise InvalidInput(
            f"dataset={name}: has strings for labels in one part and numbers in another; use one"
        )
    found = np.unique(np.concatenate(of_each))
    if found.dtype.kind == "i" and found.tolist() == list(range(len(found))):
        return tasks
    train = [task.train_labels for task in tasks]
    others = [labels for task in tasks for _, labels in task.parts()[1:]]
    classes = labelling.classes_of(train, others, name, tasks[0].class_names)
    notes = labelling.numbering_note(classes, name)
    return [
        task.with_parts([(x, classes.numbers(y)) for x, y in task.parts()])._replace(
            class_names=classes.names, notes=(*task.notes, *notes)
        )
        for task in tasks
    ]


def _is_list_of_tasks(data: Any) -> bool:
    if isinstance(data, (LabelledArrays, Mapping)) or not isinstance(data, (list, tuple)):
        return False
    # A pair (train, test) is one task, and its splits are sources or pairs of arrays.
    return not (isinstance(data, tuple) and len(data) == 2 and all(map(_is_split, data)))


def _is_split(thing: Any) -> bool:
    if _is_array_pair(thing):
        return True
    is_container = isinstance(thing, (tuple, list, Mapping, LabelledArrays))
    return not is_container and hasattr(thing, "__getitem__") and hasattr(thing, "__len__")


def _is_array_pair(thing: Any) -> bool:
    return (
        isinstance(thing, (tuple, list))
        and len(thing) == 2
        and not isinstance(thing, LabelledArrays)
        and all(hasattr(part, "shape") and hasattr(part, "dtype") for part in thing)
    )


def _read_split(split: Any, name: str) -> tuple[Any, np.ndarray]:
    """Return inputs and labels of a split."""
    if isinstance(split, (tuple, list)) and len(split) == 2:
        # A pair is no source of two examples.
        _check_one_array(split[0], f"{name}: the inputs")
    if _is_array_pair(split):
        inputs, labels = stored_form(_array(split[0], name)), _array(split[1], name)
    elif hasattr(split, "__len__") and hasattr(split, "__getitem__"):
        inputs, labels = _read_source(split, name)
    else:
        raise InvalidInput(
            f"dataset={name}: is a {type(split).__name__}; give (inputs, labels) or a source of "
            "examples with __len__ and __getitem__; a generator can be gone through only once"
        )
    if labels.dtype.kind not in "iuU" or labels.shape != inputs.shape[:1]:
        one_hot = labels.ndim == 2 and labels.shape[:1] == inputs.shape[:1]
        remedy = "; of one-hot labels give y.argmax(axis=1)" if one_hot else ""
        raise InvalidInput(
            f"dataset={name}: its labels are {labels.dtype} {labels.shape}; they must be a whole "
            f"number, or a string, for each of {len(inputs)} examples{remedy}"
        )
    if not len(labels):
        raise InvalidInput(f"dataset={name}: has no examples")
    texts = labels.dtype.kind == "U"
    if (labels == "").any() if texts else labels.min() < 0:
        shown = "''" if texts else labels.min()
        raise InvalidInput(
            f"dataset={name}: has the label {shown}; classes count from 0, and examples without "
            "label have to be left out"
        )
    if inputs.dtype.kind not in "uifb":
        raise InvalidInput(
            f"dataset={name}: its inputs are {inputs.dtype}; they must be numbers in one array"
        )
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind == "f":
        _check_finite(inputs, name)
    return inputs, labels if texts else labels.astype(np.int64)


def _check_finite(inputs: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(inputs.reshape(len(inputs), -1)).all(axis=1)
    if bad.any():
        raise InvalidInput(f"dataset={name}: example {int(bad.argmax())} holds NaN or infinity")


def _read_source(source: Any, name: str) -> tuple[Any, np.ndarray]:
    """Go through a source once, for its labels, and keep its inputs if they are not too many."""
    try:
        count = len(source)
    except Exception as error:
        raise InvalidInput(f"dataset={name}: has no length ({cause(error)})") from error
    if not count:
        raise InvalidInput(f"dataset={name}: has no examples")
    labels, first, kept = list[int | str](), None, None
    for index in range(count):
        try:
            example = source[index]
        except Exception as error:  # The source's own code runs.
            if isinstance(error, IndexError):
                raise InvalidInput(
                    f"dataset={name}: says that it has {count} examples, and has no example "
                    f"{index} ({cause(error)})"
                ) from error
            raise InvalidInput(
                f"dataset={name}: its example {index} cannot be read ({cause(error)})"
            ) from error
        value, label = example_parts(example, f"{name}: example {index}")
        _check_one_array(value, f"{name}: the inputs of example {index}")
        value = stored_form(_array(value, f"{name}: example {index}"))
        if first is None:
            first = value
            kept = None
            if count * value.nbytes <= IN_MEMORY:
                kept = np.empty((count, *value.shape), value.dtype)
        if value.shape != first.shape or value.dtype != first.dtype:
            raise InvalidInput(
                f"dataset={name}: example {index} is {value.dtype} {value.shape} and example 0 "
                f"{first.dtype} {first.shape}; all need the same"
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InvalidInput(f"dataset={name}: example {index} holds NaN or infinity")
        labels.append(_label(label, f"{name}: example {index}"))
        if type(labels[-1]) is not type(labels[0]):
            raise InvalidInput(
                f"dataset={name}: example {index} has the label {label!r} and example 0 "
                f"{labels[0]!r}; all must be whole numbers, or strings"
            )
        if kept is not None:
            kept[index] = value
    assert first is not None
    inputs = SourceInputs([(source, count)], first.shape, first.dtype) if kept is None else kept
    return inputs, np.asarray(labels)


def _check_one_array(inputs: Any, name: str) -> None:
    if isinstance(inputs, Mapping):
        raise InvalidInput(
            f"dataset={name} are several arrays ({', '.join(map(str, inputs))}); put them into one "
            "array, which the model takes apart"
        )


def _label(label: Any, name: str) -> int | str:
    value = np.asarray(label)
    if value.size == 1 and value.dtype.kind == "U":
        return str(value.reshape(()))
    if value.size != 1 or value.dtype.kind not in "iu":
        raise InvalidInput(
            f"dataset={name} has the label {label!r}; it must be one whole number or string, not "
            "one-hot"
        )
    return int(value.reshape(()))


def _array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:
        raise InvalidInput(f"dataset={name} cannot be made an array ({cause(error)})") from error
