import dataclasses
import importlib.util
import io
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pm_jax import data
from pm_jax.continual import Config
from pm_jax.continual.run import describe
from pm_jax.data import sources, stored_images, tfds_images
from pm_jax.types import InvalidInput
from tests.small_data_sets import encoded, labelled, picture, prepare

CMATERDB = pathlib.Path(__file__).parents[3] / "shared" / "data" / "cmaterdb" / "bangla-numerals"
IMAGENET_NUMBERS = (7, 130, 999)


def load(name, data_dir, **settings):
    [arrays] = tfds_images.load_images([name], str(data_dir), **settings)
    return arrays


def as_set(images):
    return sorted(image.tobytes() for image in images)


def image_features(channels=3, dtype=np.uint8):
    return {
        "image": tfds.features.Image(
            shape=(None, None, channels), dtype=dtype, encoding_format="png"
        ),
        "label": tfds.features.ClassLabel(num_classes=3),
    }


@pytest.fixture(scope="module")
def imagenet_r(tmp_path_factory):
    """Its form: one split, "test"; 1,000 classes of which few occur; several sizes."""
    folder = tmp_path_factory.mktemp("imagenet_r")
    examples = [
        {**example, "label": IMAGENET_NUMBERS[example["label"]], "file_name": "a/b.jpg"}
        for example in labelled(30)
    ]
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    prepare(folder, "imagenet_r", "0.2.0", {"test": examples}, features)
    return folder


@pytest.fixture(scope="module")
def domainnet(tmp_path_factory):
    """Its form: a configuration for each domain; sketch lacks a class."""
    folder = tmp_path_factory.mktemp("domainnet")
    for number, domain in enumerate(sorted(tfds_images.DOMAINS["domainnet"], reverse=True)):
        classes = 2 if domain == "sketch" else 3
        first = 100 * number
        splits = {"train": labelled(12, classes, first), "test": labelled(6, classes, first + 50)}
        prepare(folder, f"domainnet/{domain}", "1.0.0", splits)
    return folder


def of_one_size(folder, name="mine", train=None, test=None, **settings):
    train = labelled(12, size=(6, 5)) if train is None else train
    test = labelled(6, first=50, size=(6, 5)) if test is None else test
    return prepare(folder, name, "1.0.0", {"train": train, "test": test}, **settings)


def test_images_and_labels_come_back_as_they_were_written(tmp_path):
    of_one_size(tmp_path)
    found = load("mine", tmp_path)
    assert found.train_inputs.shape == (12, 5, 6, 3) and found.train_inputs.dtype == np.uint8
    written = {np.asarray(e["image"]).tobytes(): e["label"] for e in labelled(12, size=(6, 5))}
    labels = [written.pop(image.tobytes()) for image in found.train_inputs]
    assert labels == found.train_labels.tolist() and not written
    assert found.test_labels.shape == (6,) and found.name == "mine"


def test_the_only_split_is_divided_by_class_and_declared_classes_without_examples_are_dropped(
    imagenet_r, tmp_path
):
    found = load("imagenet_r", imagenet_r, stored_size=8, cache_dir=str(tmp_path))
    assert np.bincount(found.train_labels).tolist() == [8, 8, 8]
    assert np.bincount(found.test_labels).tolist() == [2, 2, 2]
    both = np.concatenate([found.train_inputs, found.test_inputs])
    everything = stored_images.decoded(
        (encoded(picture(i)).getvalue() for i in range(30)), "mine", side=8
    )
    assert as_set(both) == as_set(everything)
    again = load("imagenet_r", imagenet_r, stored_size=8, cache_dir=str(tmp_path / "other"))
    for left, right in zip(found[:4], again[:4], strict=True):
        assert np.array_equal(left, right)


def test_the_first_of_each_class_of_a_division_are_those_of_the_whole(imagenet_r, tmp_path):
    settings = {"stored_size": 8, "cache_dir": str(tmp_path)}
    whole = load("imagenet_r", imagenet_r, **settings)
    few = load("imagenet_r", imagenet_r, train_per_class=3, test_per_class=1, **settings)
    first = data.stream.first_of_each_class(whole.train_labels, 3)
    assert np.array_equal(few.train_inputs, whole.train_inputs[first])
    assert np.array_equal(few.train_labels, whole.train_labels[first])
    assert few.test_labels.tolist() == sorted({0, 1, 2}, key=whole.test_labels.tolist().index)


def test_validation_is_the_test_where_there_is_no_other(tmp_path):
    splits = {"train": labelled(6, size=(4, 4)), "validation": labelled(3, first=50, size=(4, 4))}
    prepare(tmp_path, "mine", "1.0.0", splits)
    found = load("mine", tmp_path)
    assert len(found.train_labels) == 6
    assert as_set(found.test_inputs) == as_set(np.asarray(e["image"]) for e in splits["validation"])


def test_splits_have_any_name_and_a_field_has_the_domains(tmp_path):
    def part(count, first):
        examples = labelled(count, first=first, size=(4, 4))
        return [{**example, "site": i // 3 % 2} for i, example in enumerate(examples)]

    splits = {"train": part(24, 0), "val": part(12, 100), "dev": part(12, 200)}
    features = {**image_features(), "site": tfds.features.ClassLabel(names=["in", "out"])}
    prepare(tmp_path, "mine", "1.0.0", splits, features)
    with pytest.raises(InvalidInput, match="has the splits .*, none of which is called test"):
        load("mine", tmp_path)
    settings = {"test_split": "val", "validation_split": "dev", "domain_field": "site"}
    found = tfds_images.load_images(["mine"], str(tmp_path), **settings)
    assert [arrays.name for arrays in found] == ["mine/in", "mine/out"]
    for site, arrays in enumerate(found):
        for split, (images, labels) in zip(("train", "val", "dev"), arrays.parts(), strict=True):
            wanted = [e for e in splits[split] if e["site"] == site]
            assert as_set(images) == as_set(np.asarray(e["image"]) for e in wanted)
            assert np.bincount(labels).tolist() == [len(wanted) // 3] * 3
    config = Config(dataset="mine", data_dir=str(tmp_path), num_tasks=2, **settings)
    assert config.task_stream(0).validation.sizes.tolist() == [6, 6]
    with pytest.raises(
        InvalidInput, match="domain_field=place: mine has the fields .*site.*; name"
    ):
        load("mine", tmp_path, test_split="val", domain_field="place")


def test_examples_without_label_are_counted(tmp_path):
    unlabelled = [{**example, "label": -1} for example in labelled(2, first=90, size=(6, 5))]
    of_one_size(tmp_path, train=labelled(12, size=(6, 5)) + unlabelled)
    found = load("mine", tmp_path)
    assert np.bincount(found.train_labels).tolist() == [4, 4, 4] and len(found.train_inputs) == 12
    assert found.notes == (
        "mine: 2 of 14 examples of train have no label (-1 or empty) and are left out",
    )


def test_only_what_is_kept_is_decoded(tmp_path, monkeypatch):
    of_one_size(tmp_path)
    whole = load("mine", tmp_path)
    seen = []

    def counted(images, *arguments):
        seen.extend(images := list(images))
        return decoded(images, *arguments)

    decoded = stored_images.decoded
    monkeypatch.setattr(stored_images, "decoded", counted)
    few = load("mine", tmp_path, train_per_class=2, test_per_class=1)
    assert len(seen) == 3 * 2 + 3
    kept = data.stream.first_of_each_class(whole.train_labels, 2)
    assert np.array_equal(few.train_inputs, whole.train_inputs[kept])
    seen.clear()
    two = load("mine", tmp_path, class_subset=2, train_per_class=3)
    assert len(seen) == 2 * 3 + 2 * 2 and two.left_out_classes == 1
    kept = data.stream.first_of_each_class(whole.train_labels, 3)
    kept = kept[whole.train_labels[kept] < 2]
    assert np.array_equal(two.train_inputs, whole.train_inputs[kept])
    assert np.array_equal(two.train_labels, whole.train_labels[kept])
    with pytest.raises(InvalidInput, match=r"class_subset=4: mine has 3 classes; choose 2\.\.3"):
        load("mine", tmp_path, class_subset=4)


def test_the_first_classes_are_those_that_occur_and_resized_ones_have_a_place_of_their_own(
    imagenet_r, tmp_path
):
    settings = {"stored_size": 8, "cache_dir": str(tmp_path)}
    # Of 1,000 declared classes 7, 130 and 999 occur: the first two become 0 and 1.
    two = load("imagenet_r", imagenet_r, class_subset=2, **settings)
    whole = load("imagenet_r", imagenet_r, **settings)
    again = load("imagenet_r", imagenet_r, class_subset=2, **settings)
    assert np.bincount(two.train_labels).tolist() == [8, 8] and two.left_out_classes == 1
    assert np.array_equal(two.train_inputs, whole.train_inputs[whole.train_labels < 2])
    assert np.array_equal(two.test_inputs, whole.test_inputs[whole.test_labels < 2])
    assert all(np.array_equal(a, b) for a, b in zip(two[:4], again[:4], strict=True))


def test_other_fields_of_birds_are_left_alone(tmp_path):
    features = {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=3),
        "label_name": tfds.features.Text(),
        "bbox": tfds.features.BBoxFeature(),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
    }
    other = {
        "image/filename": "a.png",
        "label_name": "albatross",
        "bbox": tfds.features.BBox(0.1, 0.2, 0.9, 0.8),
        "segmentation_mask": io.BytesIO(b"not an image, so decoding it would fail"),
    }
    splits = {
        split: [{**example, **other} for example in labelled(6)] for split in ("train", "test")
    }
    prepare(tmp_path, "caltech_birds2011", "0.2.0", splits, features)
    found = load("caltech_birds2011", tmp_path, stored_size=6)
    assert found.train_inputs.shape == (6, 6, 6, 3)


def test_resizing_is_that_of_the_shorter_side_and_a_central_crop():
    image = picture(0, (24, 8))
    [found] = stored_images.decoded([encoded(image).getvalue()], "mine", side=4)
    expected = image.resize((12, 4), Image.Resampling.BICUBIC).crop((4, 0, 8, 4))
    assert np.array_equal(found, np.asarray(expected))


def test_domains_come_in_alphabetical_order_with_the_same_classes(domainnet):
    settings = {"data_dir": str(domainnet), "stored_size": 8}
    config = Config(dataset="domainnet", num_tasks=6, **settings)
    stream = config.task_stream(0)
    assert stream.scenario == "domain_incremental" and stream.class_masks.shape == (6, 3)
    names = [stream.example_ids[row[0]].split("/")[:2] for row in stream.test.rows()]
    order = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    assert names == [["domainnet", domain] for domain in order]
    assert stream.train.sizes.tolist() == [9] * 5 + [10]  # 4 of each class less 1; 6 less 1
    for domain, row in zip(order, stream.test.rows(), strict=True):
        alone = load(f"domainnet/{domain}", domainnet, stored_size=8)
        assert np.array_equal(stream.inputs[row], alone.test_inputs)
    few = Config(dataset="domainnet", num_tasks=2, **settings).task_stream(0)
    assert np.array_equal(few.inputs, stream.inputs[: len(few.inputs)])
    with pytest.raises(InvalidInput, match="num_tasks=7: domainnet has 6 domains"):
        Config(dataset="domainnet", num_tasks=7, **settings).task_stream(0)


def test_all_domains_are_pooled_where_tasks_bring_classes(domainnet):
    found = sources.load("domainnet", str(domainnet), stored_size=8)
    assert found.train_inputs.shape == (72, 8, 8, 3) and found.test_inputs.shape == (36, 8, 8, 3)
    stream = data.class_incremental(found, 3, seed=0)
    assert stream.example_ids[0] == "domainnet/train/0"


def test_a_dry_run_over_domains(domainnet):
    config = Config(
        dataset="domainnet", num_tasks=2, data_dir=str(domainnet), stored_size=8, model="vit"
    )
    assert "tasks: 2, training examples [9, 9], validation [3, 3], test [6, 6]" in describe(config)


@pytest.mark.parametrize("mode,channels", [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_channels_are_kept_unless_a_pretrained_model_needs_three(tmp_path, mode, channels):
    train, test = (labelled(6, first=f, size=(4, 4), mode=mode) for f in (0, 50))
    of_one_size(tmp_path, train=train, test=test, features=image_features(channels))
    scratch = Config(
        dataset="mine", data_dir=str(tmp_path), scenario="class_incremental", num_tasks=1
    )
    plain = scratch.task_stream(0).inputs
    assert plain.shape == (12, 4, 4, channels)
    pretrained = dataclasses.replace(scratch, model="vit", pretrained="weights.npz")
    rgb = pretrained.task_stream(0).inputs
    assert rgb.shape == (12, 4, 4, 3)
    colours = plain[..., :3] if channels > 2 else plain[..., :1].repeat(3, axis=-1)
    assert np.array_equal(rgb, colours)


def test_grey_files_in_a_data_set_of_colours_become_colours(tmp_path):
    train = labelled(3, size=(4, 4), mode="L") + labelled(3, first=3, size=(4, 4))
    of_one_size(tmp_path, train=train, test=labelled(3, size=(4, 4)))
    found = load("mine", tmp_path).train_inputs
    assert found.shape == (6, 4, 4, 3)
    assert sum((image[..., :1] == image).all() for image in found) == 3


@pytest.fixture
def several_sizes(tmp_path):
    of_one_size(tmp_path, train=labelled(6), test=labelled(3))
    return tmp_path


def test_what_was_resized_is_kept_beside_the_data_and_not_decoded_again(several_sizes, monkeypatch):
    first = load("mine", several_sizes, stored_size=8)
    kept = sorted(p.name for p in (several_sizes / "pm_jax_images/mine/1.0.0/8px").iterdir())
    assert [name.rsplit("-", 1)[1].split(".", 1)[1] for name in kept] == [
        *("images.npy", "labels.npy") * 2
    ]
    monkeypatch.setattr(stored_images, "decoded", None)
    again = load("mine", several_sizes, stored_size=8)
    assert np.array_equal(again.train_inputs, first.train_inputs)
    assert np.array_equal(again.train_labels, first.train_labels)
    with pytest.raises(TypeError):
        load("mine", several_sizes, stored_size=9)


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("length", [0, 20, -1])
def test_a_damaged_cache_is_made_anew(several_sizes, kind, length):
    first = load("mine", several_sizes, stored_size=8)
    expected = np.array(first.train_inputs), first.test_labels  # Read before the file is cut.
    for path in several_sizes.glob(f"pm_jax_images/**/*.{kind}.npy"):
        path.write_bytes(path.read_bytes()[:length])
    again = load("mine", several_sizes, stored_size=8)
    assert np.array_equal(again.train_inputs, expected[0])
    assert np.array_equal(again.test_labels, expected[1])


def test_other_data_under_the_same_name_and_version_do_not_meet_the_old_cache(tmp_path):
    cache = str(tmp_path / "cache")
    for folder, first in (("a", 0), ("b", 200)):
        of_one_size(tmp_path / folder, train=labelled(6, first=first), test=labelled(3))
        found = load("mine", tmp_path / folder, stored_size=8, cache_dir=cache)
        [expected] = stored_images.decoded([encoded(picture(first)).getvalue()], "mine", side=8)
        assert expected.tobytes() in as_set(found.train_inputs)


def test_the_users_cache_serves_where_the_data_cannot_be_written(
    several_sizes, tmp_path, monkeypatch
):
    (several_sizes / "pm_jax_images").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    found = load("mine", several_sizes, stored_size=8)
    assert found.train_inputs.shape == (6, 8, 8, 3)
    assert len(list((tmp_path / "own/pm_jax/mine/1.0.0/8px").iterdir())) == 4
    with pytest.raises(InvalidInput, match="cache_dir=.*pm_jax_images.*name a place that can be"):
        load("mine", several_sizes, stored_size=8, cache_dir=f"{several_sizes}/pm_jax_images")


def test_a_cache_that_could_not_be_finished_leaves_nothing_behind(tmp_path):
    def images():
        yield np.zeros((2, 2, 3), np.uint8)
        raise OSError("No space left on device")

    with pytest.raises(InvalidInput, match="cache_dir=.*No space left.*name another place"):
        stored_images.keep([tmp_path], "x", images(), [0, 0], 2, (2, 2, 3))
    assert not list(tmp_path.iterdir())


def without(field):
    fields = {k: v for k, v in image_features().items() if k != field}
    part = [{k: v for k, v in example.items() if k != field} for example in labelled(3)]
    return {"train": part, "test": part, "features": fields}


def damaged_image():
    part = labelled(3, size=(4, 4))
    return {"train": part, "test": part, "image": lambda _: io.BytesIO(b"\x89PNG cut short")}


REFUSED = {
    "several sizes": (
        lambda: {"train": labelled(6)},
        r"has images of several sizes, \d+x\d+ and \d+x\d+ pixels; set stored_size",
    ),
    "sizes of train and test": (
        lambda: {"test": labelled(3, size=(5, 5))},
        r"images of the shapes \(5, 5, 3\) and \(5, 6, 3\); set stored_size",
    ),
    "no image": (lambda: without("image"), "has no feature 'image' of type Image; it has label"),
    "no label": (lambda: without("label"), "no feature 'label' of type ClassLabel; it has image"),
    "no training example": (
        lambda: {"train": labelled(6, 2, size=(6, 5))},
        r"class 2 \(2\) has test examples and no training example",
    ),
    "unlabelled": (
        lambda: {"test": [{"image": picture(0, (6, 5)), "label": -1}]},
        "test has no example with a label; name a split",
    ),
    "sixteen bits": (
        lambda: {"features": image_features(1, np.uint16)},
        r"its images are uint16 \(None, None, 1\)",
    ),
    "damaged image": (damaged_image, "holds an image that cannot be decoded .*prepare it again"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_sets_of_another_form_are_refused(tmp_path, case):
    make, message = REFUSED[case]
    of_one_size(tmp_path, **make())
    with pytest.raises(InvalidInput, match=f"^dataset=mine: .*({message})"):
        load("mine", tmp_path)


@pytest.mark.parametrize(
    "splits,message",
    [
        ({"corrupted": labelled(3, size=(4, 4))}, "split 'train' or 'test'; it has corrupted"),
        (
            {"test": labelled(3, size=(4, 4))},
            "its only split cannot be divided .*; its class 0 has 1 examples, prepare more",
        ),
    ],
)
def test_splits_that_cannot_serve_are_refused(tmp_path, splits, message):
    prepare(tmp_path, "mine", "1.0.0", splits)
    with pytest.raises(InvalidInput, match=message):
        load("mine", tmp_path)


def test_a_domain_that_is_not_prepared_is_named(tmp_path):
    prepare(tmp_path, "domainnet/clipart", "1.0.0", {"train": labelled(3), "test": labelled(3)})
    message = "dataset=domainnet/infograph: is not prepared in .*: tfds build domainnet/infograph"
    with pytest.raises(InvalidInput, match=message):
        sources.load_domains("domainnet", 2, str(tmp_path))


def test_files_cut_short_are_refused(tmp_path):
    of_one_size(tmp_path)
    for path in tmp_path.glob("mine/1.0.0/*train.array_record*"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InvalidInput, match="split train cannot be read .*prepare it again"):
        load("mine", tmp_path)


def test_tfrecord_without_tensorflow_names_both_remedies(tmp_path, monkeypatch):
    of_one_size(tmp_path)
    information = tmp_path / "mine/1.0.0/dataset_info.json"
    information.write_text(information.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"tfrecord.*pip install.*tfds build mine --file_format"):
        load("mine", tmp_path)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"stored_size": 8}, "stored_size=8: dataset=digits has images of one size"),
        ({"stored_size": -1, "dataset": "domainnet"}, "stored_size=-1: must not be negative"),
        ({"dataset": "mnist"}, "scenario=domain_incremental: dataset=mnist is no file or folder"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        Config(**settings)


@pytest.mark.skipif(not CMATERDB.exists(), reason="needs the shared CMATERdb")
def test_both_formats_of_a_real_data_set_read_the_same(tmp_path):
    pytest.importorskip("tensorflow", reason="needs TensorFlow")
    found = []
    for file_format in ("array_record", "tfrecord"):
        builder = tfds.builder(
            "cmaterdb/bangla", data_dir=tmp_path / file_format, file_format=file_format
        )
        settings = tfds.download.DownloadConfig(manual_dir=CMATERDB)
        builder.download_and_prepare(download_config=settings)
        found.append(load("cmaterdb/bangla", tmp_path / file_format, train_per_class=100))
    records, other = found
    assert records.train_inputs.shape == (1000, 32, 32, 3)
    assert np.bincount(records.test_labels).tolist() == [100] * 10
    for left, right in zip(records[:4], other[:4], strict=True):
        assert np.array_equal(left, right)
    with np.load(CMATERDB / "testing-images.npz") as archive:
        raw = archive["images"]
    assert as_set(records.test_inputs) == as_set(raw.reshape(-1, 32, 32, 3))
