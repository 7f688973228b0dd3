import pathlib

import numpy as np
import pytest

from pm_jax.data import class_incremental, sources
from pm_jax.types import InvalidInput

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "tfds"


def archive(path, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "x_train": rng.integers(256, size=(12, 6, 6, 3)).astype(np.uint8),
        "y_train": np.arange(12) % 4,
        "x_test": rng.integers(256, size=(8, 6, 6, 3)).astype(np.uint8),
        "y_test": np.arange(8) % 4,
    }
    fields = {k: v for k, v in {**fields, **changes}.items() if v is not None}
    np.savez(path, **fields)
    return fields


def test_a_users_own_arrays_come_back_as_they_are(tmp_path):
    fields = archive(tmp_path / "mine.npz")
    found = sources.load(str(tmp_path / "mine.npz"))
    assert np.array_equal(found.train_inputs, fields["x_train"])
    assert np.array_equal(found.test_labels, fields["y_test"]) and found.name == "mine"
    stream = class_incremental(found, 2, seed=0)
    assert stream.example_ids[0] == "mine/train/0"


def test_the_first_examples_of_each_class_are_kept(tmp_path):
    fields = archive(tmp_path / "mine.npz")
    found = sources.load(str(tmp_path / "mine.npz"), train_per_class=2, test_per_class=1)
    assert found.train_labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert np.array_equal(found.train_inputs, fields["x_train"][:8])
    assert found.test_labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((12, 6, 6, 3), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((12, 6), np.uint8)}, "x_train is uint8"),
        ({"y_train": np.zeros(11, int)}, "y_train is int64 .*12 examples"),
        ({"y_train": np.zeros(12, np.float32)}, "y_train is float32"),
        ({"y_train": np.full(12, -1)}, "whole number from 0 on"),
        ({"x_test": np.zeros((8, 5, 6, 3), np.uint8)}, "different shapes"),
        ({"x_test": np.asarray([{}] * 8, object)}, "cannot be read"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, changes, message):
    archive(tmp_path / "mine.npz", **changes)
    with pytest.raises(InvalidInput, match=message):
        sources.load_archive(tmp_path / "mine.npz")


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    archive(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InvalidInput, match="cannot be read"):
        sources.load_archive(path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared CIFAR-100")
def test_cifar100_is_read_whole_without_tensorflow():
    found = sources.load("cifar100", str(SHARED))
    assert found.train_inputs.shape == (50_000, 32, 32, 3) and found.train_inputs.dtype == np.uint8
    assert np.bincount(found.train_labels).tolist() == [500] * 100
    assert np.bincount(found.test_labels).tolist() == [100] * 100
    # The mean of CIFAR-100's training images, as commonly used to normalise them.
    means = found.train_inputs.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.5071, 0.4866, 0.4409], atol=1e-3)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
def test_a_data_set_without_images_is_refused():
    with pytest.raises(InvalidInput, match="dataset=clinc_oos: has no feature 'image'"):
        sources.load("clinc_oos", str(SHARED))
