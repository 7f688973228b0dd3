"""Several data sets, given with commas between them, that share their classes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pm_jax import files
from pm_jax.data import labels as labelling
from pm_jax.data.assembling import check_one_shape
from pm_jax.data.stream import LabelledArrays, first_classes, first_of_each_class
from pm_jax.types import InvalidInput


def names_in(dataset: str) -> list[str]:
    """List the data sets that a setting names; a path may itself have a comma.

    Example:
        >>> names_in("a.npz,b.npz")
        ['a.npz', 'b.npz']
    """
    if "," not in dataset or Path(dataset).exists():
        return [dataset]
    return [name.strip() for name in dataset.split(",")]


def title_of(dataset: str) -> str:
    """Return what a setting names without the folders of paths."""
    return ",".join(Path(name).name for name in names_in(dataset))


def read_each(
    dataset: str, read: Callable[[str], list[LabelledArrays]], class_subset: int = 0
) -> list[LabelledArrays]:
    """Read the data sets that a setting names, and number their classes alike.

    Raises:
        InvalidInput: a name is empty or given twice, or as `read` or `with_common_classes`.
    """
    names = names_in(dataset)
    if not all(names) or len({*names}) < len(names):
        raise InvalidInput(f"dataset={dataset}: needs different names with commas between them")
    read_sets = [data_set for name in names for data_set in read(name)]
    if len(names) > 1 and len({data_set.name for data_set in read_sets}) < len(names):
        # Files of one name in several folders: their examples need different names.
        read_sets = [d._replace(name=name) for d, name in zip(read_sets, names, strict=True)]
    data_sets = with_common_classes(read_sets)
    check_one_shape(data_sets)
    # A subset is for tasks that bring new classes, and is one of the classes of all.
    return [keep_classes(pooled(data_sets, dataset), class_subset)] if class_subset else data_sets


def with_common_classes(data_sets: Sequence[LabelledArrays]) -> list[LabelledArrays]:
    """Number the classes of data sets alike, by their names, or by their numbers without names.

    Raises:
        InvalidInput: some have names of their classes and others have not.
    """
    first = data_sets[0].class_names
    if all(data_set.class_names == first for data_set in data_sets):
        return [*data_sets]
    of_each = []
    for data_set in data_sets:
        if not data_set.class_names:
            named = next(d.name for d in data_sets if d.class_names)
            raise InvalidInput(
                f"dataset={data_set.name}: has numbers for its classes and {named} has names; give "
                "both the same, as an .npz has class_names"
            )
        of_each.append(np.asarray(data_set.class_names))
    classes = labelling.classes_of(of_each, [], data_sets[0].name)
    return [
        data_set.with_parts([(x, classes.numbers(names)[y]) for x, y in data_set.parts()])._replace(
            class_names=classes.names
        )
        for data_set, names in zip(data_sets, of_each, strict=True)
    ]


def pooled(data_sets: Sequence[LabelledArrays], name: str) -> LabelledArrays:
    """Make one data set of several, where tasks bring new classes."""
    if len(data_sets) == 1:
        return data_sets[0]
    if len({data_set.validation is None for data_set in data_sets}) > 1:
        raise InvalidInput(f"dataset={name}: not all have examples for validation; leave them out")
    parts = zip(*(data_set.parts() for data_set in data_sets), strict=True)
    joined = []
    for part in parts:
        inputs, labels = zip(*part, strict=True)
        joined.append((np.concatenate(inputs), np.concatenate(labels)))
    notes = dict.fromkeys(note for data_set in data_sets for note in data_set.notes)
    first = data_sets[0]._replace(name=name, class_groups=None, notes=tuple(notes))
    return first.with_parts(joined)


def check_domains(data_sets: Sequence[LabelledArrays], count: int, dataset: str) -> None:
    """Check that there are as many domains as tasks.

    Raises:
        InvalidInput: there are more or fewer.
    """
    if len(data_sets) != count:
        names = files.listed([data_set.name for data_set in data_sets])
        raise InvalidInput(
            f"num_tasks={count}: {dataset} has {len(data_sets)} domains ({names}); use "
            f"num_tasks={len(data_sets)}"
        )


def keep_classes(arrays: LabelledArrays, count: int) -> LabelledArrays:
    """Keep the examples of the first `count` classes, by their numbers; 0 keeps all.

    Raises:
        InvalidInput: there are fewer classes.
    """
    if not count:
        return arrays
    classes = np.unique(np.concatenate([labels for _, labels in arrays.parts()]))
    kept = first_classes(classes, count, arrays.name)
    groups, names = arrays.class_groups, arrays.class_names
    chosen = [np.isin(labels, kept) for _, labels in arrays.parts()]
    parts = [(x[rows], y[rows]) for (x, y), rows in zip(arrays.parts(), chosen, strict=True)]
    return arrays.with_parts(parts)._replace(
        class_groups=None if groups is None else groups[:count],
        left_out_classes=len(classes) - count,
        class_names=names and names[:count],
    )


def keep_first(arrays: LabelledArrays, train_per_class: int, test_per_class: int) -> LabelledArrays:
    """Keep the first examples of each class, in the data's order; 0 keeps all."""
    (x, y), (x_test, y_test), *validation = arrays.parts()
    train = first_of_each_class(y, train_per_class)
    test = first_of_each_class(y_test, test_per_class)
    return arrays.with_parts([(x[train], y[train]), (x_test[test], y_test[test]), *validation])
