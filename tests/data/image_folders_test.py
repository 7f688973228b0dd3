import numpy as np
import pytest
from PIL import Image

from pm_jax.continual import Config
from pm_jax.data import image_folders, several, sources, stored_images
from pm_jax.types import InvalidInput
from tests import bad_files
from tests.small_data_sets import picture

KINDS = bad_files.KINDS


def folder(root, counts, kind="png", size=(6, 5), first=0):
    """Images of `counts`, {folder: number}, which differ from one another."""
    written, number = {}, first
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = picture(number, size)
            image.save(root / name / f"{index}.{kind}")
            written[np.asarray(image).tobytes()] = name
            number += 1
    return written


def labels_of(inputs, written):
    return [written[image.tobytes()] for image in inputs]


def test_images_and_the_names_of_their_classes_come_back(tmp_path):
    counts = {f"{split}/{kind}": n for split, n in (("train", 3), ("test", 2)) for kind in KINDS}
    written = folder(tmp_path / "mine", counts)
    (tmp_path / "mine" / "train" / "cat" / "notes.txt").write_text("mine")
    (tmp_path / "mine" / "train" / ".DS_Store").write_text("mine")
    (tmp_path / "mine" / "train" / "gnu").mkdir()
    [found] = image_folders.load(tmp_path / "mine")
    assert found.class_names == KINDS and found.train_inputs.shape == (12, 5, 6, 3)
    for split, (inputs, labels) in zip(("train", "test"), found.parts(), strict=True):
        names = [f"{split}/{KINDS[label]}" for label in labels]
        assert labels_of(inputs, written) == names
    assert found.notes == (
        "mine: 1 files are no images: train/cat/notes.txt",
        "mine: 1 folders have no images: train/gnu",
    )
    [few] = image_folders.load(
        tmp_path / "mine", class_subset=2, train_per_class=2, test_per_class=1
    )
    assert few.train_labels.tolist() == [0, 0, 1, 1] and few.class_names == ("cat", "dog")
    assert few.test_labels.tolist() == [0, 1] and few.left_out_classes == 2


def test_one_split_is_divided_by_class_and_the_rest_has_names_of_its_own(tmp_path):
    written = folder(tmp_path / "mine", dict.fromkeys(KINDS, 10))
    [found] = image_folders.load(tmp_path / "mine")
    assert np.bincount(found.train_labels).tolist() == [8] * 4
    assert np.bincount(found.test_labels).tolist() == [2] * 4
    everything = np.concatenate([found.train_inputs, found.test_inputs])
    assert len({image.tobytes() for image in everything}) == 40
    labels = np.concatenate([found.train_labels, found.test_labels])
    assert labels_of(everything, written) == [KINDS[label] for label in labels]
    assert len(found.notes) == 1 and "the split train is divided, a fifth of" in found.notes[0]

    counts = {f"{split}/a": 2 for split in ("train", "val", "exam")}
    folder(tmp_path / "named", counts)
    [found] = image_folders.load(tmp_path / "named", test_split="exam", validation_split="val")
    assert [len(labels) for _, labels in found.parts()] == [2, 2, 2] and not found.notes


@pytest.mark.parametrize(
    "form", ["{split}/{domain}/{kind}", "{domain}/{split}/{kind}", "{domain}/{kind}"]
)
def test_a_level_of_folders_has_the_domains_of_a_stream(tmp_path, form):
    names = [
        form.format(split=split, domain=domain, kind=kind)
        for split in ("train", "test")
        for domain in ("sketch", "photo")
        for kind in KINDS
    ]
    folder(tmp_path / "mine", dict.fromkeys(names, 5))
    config = Config(dataset=str(tmp_path / "mine"), num_tasks=2)
    stream = config.task_stream(0)
    assert stream.class_names == KINDS and stream.class_masks.all()
    assert stream.example_ids[0] == "mine/photo/train/0"
    assert any("the domains are photo, sketch" in note for note in stream.notes)
    each = 20 if "{split}" in form else 16
    assert [int(n) for n in stream.train.sizes + stream.validation.sizes] == [each] * 2
    pooled = sources.load(str(tmp_path / "mine"))
    assert len(pooled.train_labels) == 2 * each


def test_a_class_may_be_called_like_a_split_and_domains_have_the_order_of_their_numbers(tmp_path):
    folder(tmp_path / "vehicles", {"train": 5, "car": 5})
    [found] = image_folders.load(tmp_path / "vehicles")
    assert found.class_names == ("car", "train")
    folder(tmp_path / "days", {f"{day}/{kind}": 5 for day in (1, 2, 10) for kind in "ab"})
    names = [each.name for each in image_folders.load(tmp_path / "days", by_domain=True)]
    assert names == ["days/1", "days/2", "days/10"]


def test_resized_images_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    counts = {f"{split}/{kind}": 3 for split in ("train", "test") for kind in KINDS}
    folder(tmp_path / "mine", counts, size=(12, 8))
    picture(0, (9, 14)).save(tmp_path / "mine" / "train" / "cat" / "0.png")
    settings = {"stored_size": 4, "cache_dir": str(tmp_path / "cache")}
    [first] = image_folders.load(tmp_path / "mine", **settings)
    expected = picture(0, (9, 14)).resize((4, 6), Image.Resampling.BICUBIC).crop((0, 1, 4, 5))
    assert first.train_inputs.shape == (12, 4, 4, 3)
    assert np.abs(first.train_inputs[0].astype(int) - np.asarray(expected)).max() <= 40
    with monkeypatch.context() as patch:
        patch.setattr(stored_images, "decoded", None)
        [again] = image_folders.load(tmp_path / "mine", **settings)
    assert np.array_equal(first.train_inputs, again.train_inputs)
    picture(1, (30, 20)).save(tmp_path / "mine" / "train" / "cat" / "0.png")
    [changed] = image_folders.load(tmp_path / "mine", **settings)
    assert not np.array_equal(changed.train_inputs[0], first.train_inputs[0])
    assert np.array_equal(changed.train_inputs[1:], first.train_inputs[1:])


@pytest.mark.parametrize("size", [0, 4])
def test_unreadable_images_are_skipped_where_that_is_wanted_and_named(tmp_path, size):
    root = bad_files.photos_of_which_one_is_damaged(tmp_path)
    settings = {"stored_size": size, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(InvalidInput, match=r"cat/0\.jpg cannot be read as an image"):
        image_folders.load(root, **settings)
    for _ in range(2):  # from the cache as well
        [found] = image_folders.load(root, skip_unreadable=True, **settings)
        assert np.bincount(found.train_labels).tolist() == [3, 4, 4, 4]
        assert found.notes == ("photos: 1 unreadable images are skipped: train/cat/0.jpg",)
    whole = bad_files.photos(tmp_path / "whole")
    [readable] = image_folders.load(whole, **settings)
    assert np.array_equal(found.train_inputs, readable.train_inputs[1:])
    # What was kept without the unreadable image does not serve a call that must read it.
    with pytest.raises(InvalidInput, match=r"cat/0\.jpg cannot be read as an image"):
        image_folders.load(root, **settings)


def test_several_data_sets_share_the_names_of_their_classes(tmp_path):
    folder(tmp_path / "a", {f"{s}/{k}": 4 for s in ("train", "test") for k in ("cat", "emu")})
    names = {f"{s}/{k}": 4 for s in ("train", "test") for k in ("dog", "emu")}
    written = folder(tmp_path / "b", names, first=100)
    both = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    stream = Config(dataset=both, num_tasks=2).task_stream(0)
    assert stream.class_names == ("cat", "dog", "emu")
    rows = stream.test.rows()[1]
    found = [f"test/{stream.class_names[label]}" for label in stream.labels[rows]]
    assert found == labels_of(stream.inputs[rows], written)
    pooled = sources.load(both, class_subset=2)
    assert pooled.class_names == ("cat", "dog") and pooled.left_out_classes == 1
    assert len(pooled.train_labels) == 8 and several.title_of(both) == "a,b"


def test_a_name_that_the_catalogue_has_is_not_a_folder_beside_the_command(tmp_path, monkeypatch):
    folder(tmp_path / "cifar100", {"train/a": 1})
    folder(
        tmp_path / "mine", {f"{split}/{kind}": 2 for split in ("train", "test") for kind in "ab"}
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="dataset=cifar100: is not prepared in"):
        sources.load("cifar100", str(tmp_path / "nothing"))
    assert sources.load("mine").class_names == ("a", "b")
