import pathlib

import numpy as np
import pytest

from pm_jax.data import class_incremental, sources
from pm_jax.types import InvalidInput

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tfds"


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


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared CIFAR-100")
def test_cifar100_is_read_without_tensorflow():
    found = sources.load("cifar100", str(SHARED), train_per_class=100, test_per_class=20)
    assert found.train_inputs.shape == (10_000, 32, 32, 3) and found.train_inputs.dtype == np.uint8
    assert np.bincount(found.train_labels).tolist() == [100] * 100
    assert np.bincount(found.test_labels).tolist() == [20] * 100
    # The mean of all training images, as commonly used to normalise them; this is a fifth of them.
    means = found.train_inputs.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.5071, 0.4866, 0.4409], atol=5e-3)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
def test_a_data_set_without_images_is_refused():
    with pytest.raises(InvalidInput, match="dataset=clinc_oos: has no feature 'image'"):
        sources.load("clinc_oos", str(SHARED))
