import numpy as np
import pytest

from pm_jax.data import labels, own, splits
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput


@pytest.mark.parametrize(
    "given,values,names",
    [
        ([0, 1, 2, 1], [0, 1, 2], None),
        ([5, 8, 11, 8], [5, 8, 11], ("5", "8", "11")),
        (["red", "blue", "red"], ["blue", "red"], ("blue", "red")),
        # As numbers: 10 comes behind 9, and names that count from 0 are none.
        (["10", "9", "9"], ["9", "10"], ("9", "10")),
        (["1", "0", "2"], ["0", "1", "2"], None),
    ],
)
def test_classes_are_numbered_in_rising_order(given, values, names):
    given = np.asarray(given)
    classes = labels.classes_of([given], [given[:1]], "x")
    assert classes.values.tolist() == values and classes.names == names
    numbers = classes.numbers(given)
    assert [values[number] for number in numbers] == given.tolist()


def test_names_are_those_of_the_labels_that_occur():
    classes = labels.classes_of([np.asarray([7, 2])], [], "x", [f"n{i}" for i in range(8)])
    assert classes.names == ("n2", "n7")
    assert labels.classes_of([np.asarray([1, 0])], [], "x", ["0", "1"]).names is None
    [note] = labels.numbering_note(classes, "x")
    assert note.startswith("x: the labels 2, 7 are classes 0 to 1;")
    assert not labels.numbering_note(labels.classes_of([np.asarray(["b"])], [], "x"), "x")


@pytest.mark.parametrize(
    "given,kept",
    [([0, -1, 2], [0, 2]), (["a", "", " ", "-1"], [0, 3]), (["3", "-1", "", "4"], [0, 3])],
)
def test_examples_without_label_are_left_out_and_counted(given, kept):
    notes = []
    found = labels.with_label(np.asarray(given), "x", "train", notes)
    assert found.tolist() == kept
    missing = len(given) - len(kept)
    assert notes == [
        f"x: {missing} of {len(given)} examples of train have no label (-1 or empty) and are left "
        "out"
    ]
    assert labels.with_label(np.asarray([3, 4]), "x", "train", notes).tolist() == [0, 1]
    assert len(notes) == 1


ALL = ("train", "validation", "test", "oos")


@pytest.mark.parametrize(
    "available,settings,wanted,notes",
    [
        (("train", "test"), {}, ("train", "test", None), []),
        (ALL, {}, ("train", "test", None), ["not read: validation, oos"]),
        (ALL, {"test_split": "oos"}, ("train", "oos", None), ["not read: validation, test"]),
        (ALL[:3], {"validation_split": "validation"}, ("train", "test", "validation"), []),
        (
            ("train", "validation"), {}, ("train", "validation", None),
            ["has no split test; validation is for testing"],
        ),
        (("train", "dev"), {"test_split": "dev"}, ("train", "dev", None), []),
        (
            ("train", "dev"), {"test_split": "train", "validation_split": "dev"},
            ("train", None, "dev"), ["divided"],
        ),
        (("test",), {}, ("test", None, None), ["divided"]),
    ],
)  # fmt: skip
def test_splits_have_the_roles_that_are_named_or_known(available, settings, wanted, notes):
    found = splits.roles("x", available, **settings)
    assert found[:3] == wanted and len(found.notes) == len(notes)
    for note, part in zip(found.notes, notes, strict=True):
        assert part in note


@pytest.mark.parametrize(
    "available,settings,message",
    [
        (("train", "val"), {}, "has the splits train, val, none of which is called test; name one"),
        (("train", "val", "dev"), {}, "train, val, dev, none of which is called test"),
        (("dev",), {}, "needs a split 'train' or 'test'; it has dev"),
        (("test", "dev"), {}, "needs a split 'train' or 'test'; it has test, dev"),
        (("train", "test"), {"validation_split": "test"}, "has this split to test on"),
        (("train", "test"), {"validation_split": "train"}, "has this split to train on"),
        (("train", "test"), {"test_split": "dev"}, "test_split=dev: x has train, test; name one"),
    ],
)
def test_splits_are_never_chosen_in_silence(available, settings, message):
    with pytest.raises(InvalidInput, match=message):
        splits.roles("x", available, **settings)


def test_the_classes_of_ones_own_tasks_are_numbered_together():
    x = np.arange(16, dtype=np.float32)[:, None]
    words = np.asarray(["emu", "cat", "fox", "dog"])
    parts = [words[np.arange(16) % 2], words[np.arange(16) % 2 + 2]]
    tasks = [((x, y), (x, y)) for y in parts]
    stream = own.stream_of_data(tasks, 0, name="x", scenario="class_incremental", num_tasks=2)
    assert stream.class_names == ("cat", "dog", "emu", "fox")
    for rows, y in zip(stream.test.rows(), parts, strict=True):
        assert [stream.class_names[label] for label in stream.labels[rows]] == y.tolist()
    assert stream.manifest()["class_names"] == ["cat", "dog", "emu", "fox"]
    gaps = LabelledArrays(x, np.arange(16) % 2 * 5, x, np.arange(16) % 2 * 5)
    stream = own.stream_of_data(gaps, 0, name="x", scenario="class_incremental", num_tasks=1)
    assert set(stream.labels.tolist()) == {0, 1} and stream.class_names == ("0", "5")
    assert stream.manifest()["notes"] == [
        "x: the labels 0, 5 are classes 0 to 1; the results have the names of all in this order"
    ]


def test_examples_for_validation_that_are_given_replace_those_held_out():
    x = np.arange(8, dtype=np.uint8)[:, None]
    y = np.arange(8) % 2
    given = LabelledArrays(x, y, x + 100, y, "x", validation=(x[:4] + 200, y[:4]))
    stream = own.stream_of_data(
        [given, given], 1, name="x", scenario="domain_incremental", num_tasks=2
    )
    assert stream.train.sizes.tolist() == [8, 8] and stream.validation.sizes.tolist() == [4, 4]
    for task in range(2):
        found = {
            split: sorted(stream.inputs[getattr(stream, split).rows()[task]][:, 0].tolist())
            for split in ("train", "validation", "test")
        }
        wanted = {"train": x, "validation": x[:4] + 200, "test": x + 100}
        assert found == {split: values[:, 0].tolist() for split, values in wanted.items()}
    ids = {stream.example_ids[row] for row in stream.validation.rows()[0]}
    assert ids == {f"x/validation/{i}" for i in range(4)}
