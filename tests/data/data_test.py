import importlib.machinery
import importlib.util
import sys

import numpy as np
import pytest

from pm_jax import data
from pm_jax.data import prepared, several, splits, stored_images
from pm_jax.types import InvalidInput


def arrays(classes=5, each=20, test_each=4):
    def part(count):
        labels = np.tile(np.arange(classes), count)
        return np.arange(len(labels), dtype=np.uint8)[:, None], labels

    return data.LabelledArrays(*part(each), *part(test_each), "toy")


def test_class_incremental_tasks_part_the_classes_and_the_examples():
    stream = data.class_incremental(arrays(), 3, seed=0, validation_fraction=0.2)
    assert stream.class_masks.sum(axis=0).tolist() == [1] * 5
    assert stream.class_masks.sum(axis=1).tolist() == [2, 2, 1]
    seen = []
    for split in (stream.train, stream.validation, stream.test):
        for task, row in enumerate(split.rows()):
            assert stream.class_masks[task][stream.labels[row]].all()
            seen.extend(row.tolist())
    assert sorted(seen) == list(range(120))
    assert stream.validation.sizes.sum() == 20 and stream.test.sizes.sum() == 20
    assert {stream.example_ids[i].split("/")[1] for i in stream.test.rows()[0]} == {"test"}


def test_base_classes_and_class_order_come_from_the_settings_and_the_seed():
    stream = data.class_incremental(arrays(), 3, seed=0, base_classes=3)
    assert stream.class_masks.sum(axis=1).tolist() == [3, 1, 1]
    orders = {data.class_incremental(arrays(), 2, seed=s).class_order for s in range(5)}
    assert len(orders) > 1
    again = data.class_incremental(arrays(), 3, seed=0, base_classes=3)
    assert again.manifest() == stream.manifest()
    first = np.flatnonzero(stream.class_masks[0])
    assert sorted(stream.class_order[:3]) == first.tolist()


def test_a_stream_of_the_first_classes_says_how_many_are_left_out():
    whole = arrays(5)
    kept = several.keep_classes(whole._replace(class_groups=np.asarray([1, 1, 0, 0, 2])), 3)
    assert sorted(set(kept.train_labels.tolist())) == [0, 1, 2] == sorted(set(kept.test_labels))
    assert np.array_equal(kept.train_inputs, whole.train_inputs[whole.train_labels < 3])
    assert kept.class_groups.tolist() == [1, 1, 0]
    found = data.class_incremental(kept, 3, seed=0).manifest()
    assert found["class_subset"] == {"first": 3, "left_out": 2}
    assert sorted(found["class_order"]) == [0, 1, 2]
    for all_of_them in (several.keep_classes(whole, 0), several.keep_classes(whole, 5)):
        assert "class_subset" not in data.class_incremental(all_of_them, 3, seed=0).manifest()
    with pytest.raises(InvalidInput, match="class_subset=6: toy has 5 classes; choose 2..5, or 0"):
        several.keep_classes(whole, 6)


def test_manifest_tells_splits_apart():
    one = data.class_incremental(arrays(), 2, seed=0).manifest()
    two = data.class_incremental(arrays(), 2, seed=1).manifest()
    hashes = [task["train"]["sha256_of_ids"] for m in (one, two) for task in m["tasks"]]
    assert len(set(hashes)) == 4
    assert one["tasks"][0]["train"]["examples"] > 0 and one["scenario"] == "class_incremental"


def test_domains_hold_out_the_same_images_and_never_train_on_test_images():
    digits = data.load_digits()
    stream = data.domain_incremental([data.rotated(digits, a) for a in (0, 30)], seed=1)

    def numbers(split, task):
        return [stream.example_ids[i].split("/", 1)[1] for i in split.rows()[task]]

    for split in (stream.train, stream.validation, stream.test):
        assert numbers(split, 0) == numbers(split, 1)
    assert not set(numbers(stream.train, 0)) & set(numbers(stream.validation, 0))
    counts = np.bincount(stream.labels[stream.validation.rows()[0]])
    assert counts.min() >= 18  # 15 % of each class
    assert stream.class_masks.all()
    assert all("test" in name for name in numbers(stream.test, 1))


def test_digits_are_the_real_ones_split_once_for_all():
    digits = data.load_digits()
    assert digits.train_inputs.dtype == np.uint8 and digits.train_inputs.max() == 255
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    from sklearn import datasets, model_selection

    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16))[..., None]
    split = model_selection.train_test_split(
        images, bunch.target, test_size=0.25, random_state=0, stratify=bunch.target
    )
    found = (digits.train_inputs, digits.test_inputs, digits.train_labels, digits.test_labels)
    assert all(np.array_equal(*pair) for pair in zip(found, split, strict=True))


def test_digits_are_found_where_scikit_learn_has_its_file_elsewhere(monkeypatch, tmp_path):
    digits = data.load_digits()
    spec = importlib.machinery.ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for a, b in zip(digits[:4], data.load_digits()[:4], strict=True):
        assert np.array_equal(a, b) and a.dtype == b.dtype


def test_rotation_turns_counter_clockwise_and_by_zero_changes_nothing():
    digits = data.load_digits()
    assert np.array_equal(data.rotated(digits, 0).train_inputs, digits.train_inputs)
    small = data.rotated(digits, 20).test_inputs.astype(int)
    quarter = np.rot90(digits.test_inputs, axes=(1, 2)).astype(int)
    other = np.rot90(digits.test_inputs, k=-1, axes=(1, 2)).astype(int)
    assert abs(small - quarter).mean() < abs(small - other).mean()


def test_a_class_may_be_missing_from_a_domain_and_its_only_example_is_for_training():
    few = data.LabelledArrays(
        np.zeros((5, 1), np.uint8), np.asarray([0, 0, 1, 1, 2]),
        np.zeros((1, 1), np.uint8), np.asarray([3]),
    )  # fmt: skip
    stream = data.domain_incremental([arrays(4), few], seed=0)
    assert stream.num_classes == 4
    assert stream.labels[stream.train.rows()[1]].tolist().count(2) == 1
    assert sorted(stream.labels[stream.validation.rows()[1]].tolist()) == [0, 1]


def relabelled(**changes):
    found = arrays()
    return found._replace(
        **{name: change(getattr(found, name)) for name, change in changes.items()}
    )


@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda: data.class_incremental(relabelled(train_labels=lambda y: y + (y > 2)), 2, 0),
            "dataset=toy: class 3 of 6 has no training example",
        ),
        (
            lambda: data.class_incremental(relabelled(test_labels=lambda y: y + 1), 2, 0),
            "dataset=toy: class 5 of 6 has no training example",
        ),
        (
            lambda: data.domain_incremental([relabelled(train_labels=lambda y: 2 * y)] * 2, 0),
            "dataset=toy: class 1 of 9 has no training example",
        ),
        (lambda: data.class_incremental(arrays(), 6, 0), "num_tasks=6.*1..5"),
        (lambda: data.class_incremental(arrays(), 0, 0), "num_tasks=0"),
        (lambda: data.class_incremental(arrays(), 4, 0, base_classes=3), "num_tasks=4.*1..3"),
        (lambda: data.class_incremental(arrays(), 1, 0, base_classes=3), "num_tasks=1"),
        (lambda: data.class_incremental(arrays(), 2, 0, validation_fraction=0.0), "between 0"),
        (lambda: data.class_incremental(arrays(), 2, 0, validation_fraction=0.99), "class 0"),
        (lambda: data.domain_incremental([], 0), "domains"),
        (
            lambda: data.class_incremental(arrays(test_each=0), 2, 0, class_order="given"),
            "dataset=toy: the task of classes 0, 1, 2 has no test example; add some, or use fewer",
        ),
        (
            lambda: data.class_incremental(arrays(each=1), 2, 0, class_order="given"),
            "dataset=toy: the task of classes 0, 1, 2 has no class of two training examples",
        ),
        (
            lambda: data.domain_incremental([arrays(test_each=0)], 0),
            "dataset=toy: the task has no test example",
        ),
    ],
)
def test_streams_that_cannot_be_are_refused(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_a_package_that_is_not_installed_is_named_with_what_brings_it(monkeypatch):
    for module in ("sklearn", "tensorflow_datasets", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    remedy = r"which is not installed; pip install 'pm_jax\[data\]'$"
    with pytest.raises(InvalidInput, match=f"^dataset=digits: needs scikit-learn, {remedy}"):
        data.load_digits()
    with pytest.raises(InvalidInput, match=f"^dataset=mine: needs tensorflow_datasets, {remedy}"):
        prepared.find("mine")
    with pytest.raises(InvalidInput, match=f"^dataset=mine: needs PIL, {remedy}"):
        next(stored_images.decoded([b""], "mine"))
    with pytest.raises(InvalidInput, match=f"^dataset=mine: needs sklearn, {remedy}"):
        splits.divided("mine", np.zeros(5, int))
