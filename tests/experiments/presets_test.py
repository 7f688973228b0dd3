"""Every preset passes a dry run with tiny stand-ins for its data and its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import flags as experiment_flags
from pm_jax import models
from pm_jax.data import tfds_images
from pm_jax.weights import pretrained
from tests import clip_files
from tests.binaries import call
from tests.small_data_sets import labelled, prepare

PRESETS = sorted(path.stem for path in experiment_flags.PRESETS.glob("*.flags"))
TOUR = "tour"  # has no settings; tour_test.py runs its commands
WITHOUT_DATA = ("digits_classes", "digits_vit_lora", "paper_recipe")
TEXTS = [name for name in PRESETS if name.startswith("clinc150")]
CLIP = [name for name in PRESETS if "clip" in name]
IMAGES = [name for name in PRESETS if name not in (TOUR, *WITHOUT_DATA, *TEXTS, *CLIP)]
WORDS = ["[PAD]", "[UNK]", "yes", "no"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("prepared")

    def image(classes, size=(None, None, 3), **more):
        return {
            "image": tfds.features.Image(shape=size),
            "label": tfds.features.ClassLabel(num_classes=classes),
            **more,
        }

    def both(classes, **settings):
        train = labelled(2 * classes, classes, **settings)
        return {"train": train, "test": labelled(classes, classes, **settings)}

    prepare(folder, "cifar100", "3.0.2", both(100, size=(32, 32)), image(100, (32, 32, 3)))
    prepare(folder, "cars_168", "1.0.0", both(196, size=(24, 24)), image(196, (24, 24, 3)))
    prepare(folder, "caltech_birds2011", "0.2.0", both(200), image(200))
    for name, version in (("imagenet_r", "0.2.0"), ("imagenet_a", "0.1.0")):
        prepare(folder, name, version, {"test": labelled(1000, 200)}, image(1000))
    for domain in tfds_images.DOMAINS["domainnet"]:
        prepare(folder, f"domainnet/{domain}", "1.0.0", both(5), image(345))
    texts = [{"text": WORDS[2 + i % 2], "intent": i % 150, "domain": i % 150 // 15}
             for i in range(450)]  # fmt: skip
    features = {
        "text": tfds.features.Text(), "intent": tfds.features.Scalar(np.int32),
        "domain": tfds.features.Scalar(np.int32),
    }  # fmt: skip
    prepare(folder, "clinc_oos", "0.1.0", {"train": texts, "test": texts[:150]}, features)
    return folder


def dry_run(capsys, preset, *arguments):
    assert (experiment_flags.PRESETS / f"{preset}.flags").read_text().startswith("#")
    call("train", "--dry_run", f"--preset={preset}", *arguments)
    text = capsys.readouterr().out
    assert "merging:" in text
    return text


@pytest.mark.parametrize("preset", WITHOUT_DATA)
def test_presets_that_need_no_data_pass_a_dry_run(capsys, preset):
    own = ["--dataset=digits", "--num_tasks=5", "--stored_size=0"]
    dry_run(capsys, preset, *(own if preset == "paper_recipe" else []))


@pytest.mark.slow
@pytest.mark.parametrize("preset", IMAGES)
def test_presets_of_images_pass_a_dry_run(capsys, data_dir, tmp_path, preset):
    model = models.VisionTransformer(1, 16, None, 16, 1, 2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
    weights = tmp_path / "model.safetensors"
    pretrained.write_tensors(pretrained.export_params(params, "timm"), weights)
    text = dry_run(
        capsys, preset, f"--data_dir={data_dir}", f"--cache_dir={tmp_path}",
        f"--pretrained={weights}", "--model=vit",
        "--patch_size=16", "--width=16", "--depth=1", "--num_heads=2",
    )  # fmt: skip
    assert "adapted by '.*/attn/(key|value)/kernel':\n  blocks_0/attn/key/kernel" in text
    if preset == "cars_5_vit_tiny":
        # Ten of the first fifty classes a task, with an image each to train on, validate and test.
        assert "tasks: 5, training examples [10, 10, 10, 10, 10], validation [10, 10," in text


@pytest.mark.slow
@pytest.mark.parametrize("preset", CLIP)
def test_presets_of_clip_pass_a_dry_run(capsys, data_dir, tmp_path, preset):
    pytest.importorskip("tokenizers", reason="needs the extra text")
    dataset, classes = ("cifar100", 100) if preset.startswith("cifar") else ("cars_168", 196)
    names, weights = tmp_path / "names.txt", clip_files.write_model(tmp_path)
    names.write_text("".join(f"thing {number}\n" for number in range(classes)))
    text = dry_run(
        capsys, preset, f"--data_dir={data_dir}", f"--pretrained={weights}", "--image_size=32",
        f"--dataset={dataset}", "--stored_size=0", f"--class_names={names}",
    )  # fmt: skip
    parameters = {line.split(": ")[0]: line.split(": ")[1] for line in text.splitlines()[-6:]
                  if line.count(": ") == 1}  # fmt: skip
    # All but the columns of the classes train and merge.
    trained = int(parameters["parameters"]) - classes * (clip_files.EMBEDDING + 1)
    assert parameters["training in a later task"] == f"{trained} (adapters 0)"
    assert parameters["merging"] == f"{trained}"


@pytest.mark.slow
@pytest.mark.parametrize("preset", TEXTS)
def test_presets_of_texts_pass_a_dry_run(capsys, data_dir, tmp_path, preset):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text")
    words = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    model = models.TextEncoder(1, len(WORDS), width=16, depth=1, num_heads=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    weights = tmp_path / "model.safetensors"
    pretrained.write_tensors(pretrained.export_params(params, "bert"), weights)
    # The tokenizer of the weights lies beside them, whether they are a file or a folder.
    source = tmp_path if preset == TEXTS[0] else weights
    text = dry_run(
        capsys, preset, f"--data_dir={data_dir}", f"--pretrained={source}", "--model=text_encoder",
        f"--vocabulary={len(WORDS)}", "--width=16", "--depth=1", "--num_heads=2",
    )  # fmt: skip
    assert "tasks: 10," in text
