"""Files and folders that are not what a run can use, each by a name that says what it is.

`experiments/mistakes.md` has the names in braces; each function makes its file in a folder that is
given and returns the path.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pm_jax.continual import Config
from pm_jax.continual.storage.workdir import claim
from pm_jax.models import VisionTransformer
from pm_jax.weights import pretrained
from tests import clip_files

# Anything.


def nothing(folder):
    return folder / "nothing"


def empty_folder(folder):
    path = folder / "empty folder"
    path.mkdir()
    return path


def text_file(folder):
    path = folder / "text file"
    path.write_text("years of work")
    return path


def link_to_nothing(folder):
    path = folder / "link to nothing"
    path.symlink_to(folder / "gone")
    return path


def link_to_itself(folder):
    path = folder / "link to itself"
    path.symlink_to(path)
    return path


def empty_file(folder, name):
    path = folder / name
    path.write_bytes(b"")
    return path


def folder_named(folder, name):
    path = folder / name
    path.mkdir()
    return path


def a_name_that_is_too_long(folder):
    return folder / ("x" * 300)


# Images and labels.

Y = np.arange(24) % 4
X = (np.arange(24)[:, None, None] * 10 + np.arange(64).reshape(8, 8)).astype(np.uint8)


def images(folder, name="images.npz", **changes):
    fields = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y} | changes
    np.savez(folder / name, **{key: value for key, value in fields.items() if value is not None})
    return folder / name


def images_with_nan(folder):
    return images(folder, x_train=np.where(X == 77, np.nan, X).astype(np.float32))


def images_as_numbers_from_0_to_1(folder):
    return images(folder, x_train=X / np.float32(255))


def images_as_lists_of_pixels(folder):
    return images(folder, x_train=X.reshape(24, 64))


def images_of_two_sizes(folder):
    return images(folder, x_test=X[:, :4])


def images_of_no_pixels(folder):
    return images(folder, x_train=X[:, :0], x_test=X[:, :0])


def images_of_5_channels(folder):
    return images(folder, **{part: np.stack([X] * 5, axis=-1) for part in ("x_train", "x_test")})


def images_without_test_labels(folder):
    return images(folder, y_test=None)


def labels_with_nan(folder):
    return images(folder, y_train=np.where(Y == 3, np.nan, Y))


def labels_with_infinity(folder):
    return images(folder, y_test=np.where(Y == 3, np.inf, Y))


def labels_below_0(folder):
    return images(folder, y_train=Y - 1)


def labels_that_leave_out_class_2(folder):
    return images(folder, y_train=np.where(Y == 2, 3, Y))


def labels_of_one_class(folder):
    return images(folder, y_train=0 * Y, y_test=0 * Y)


def fewer_labels_than_images(folder):
    return images(folder, y_train=Y[:-1])


def labels_of_the_test_data_that_are_new(folder):
    return images(folder, y_test=Y + 1)


def one_image_of_each_class(folder):
    return images(folder, x_train=X[:4], y_train=Y[:4])


def no_test_images(folder):
    return images(folder, x_test=X[:0], y_test=Y[:0])


def pickled_objects(folder):
    return images(folder, x_test=np.asarray([{}] * 24, object))


def strings_as_objects(folder):
    return images(folder, x_train=WORDS[Y].astype(object))


def images_as_numbers_from_0_to_255(folder):
    return images(folder, x_train=X.astype(np.float32))


def images_with_channels_first(folder):
    return images(folder, **{part: np.stack([X] * 3, axis=1) for part in ("x_train", "x_test")})


def labels_that_are_one_hot(folder):
    return images(folder, y_train=np.eye(4)[Y])


def labels_in_a_column(folder):
    return images(folder, y_train=Y[:, None])


def labels_as_whole_floats(folder):
    return images(folder, y_test=Y.astype(np.float32))


def labels_of_minus_1_and_1(folder):
    return images(folder, y_train=Y % 2 * 2 - 1, y_test=Y % 2 * 2 - 1)


def labels_far_below_0(folder):
    return images(folder, y_train=Y - 3)


def labels_of_no_example(folder):
    return images(folder, y_test=0 * Y - 1)


def labels_that_are_strings(folder):
    return images(folder, y_train=WORDS[Y], y_test=WORDS[Y])


def labels_that_are_strings_in_one_split(folder):
    return images(folder, y_train=WORDS[Y])


def labels_with_gaps(folder):
    return images(folder, y_train=3 * Y + 5, y_test=3 * Y + 5)


def names_of_too_few_classes(folder):
    return images(folder, class_names=WORDS[:3])


def images_of_two_domains(folder, **changes):
    site = np.where(np.arange(24) < 12, "inside", "outside")
    return images(folder, "sites.npz", **{"domain_train": site, "domain_test": site, **changes})


def domains_of_the_training_data_alone(folder):
    return images_of_two_domains(folder, domain_test=None)


def a_domain_without_test_images(folder):
    return images_of_two_domains(folder, domain_test=np.full(24, "inside"))


def other_images(folder):
    return images(folder, "other.npz", x_train=255 - X)


def images_cut_short(folder):
    path = images(folder)
    path.write_bytes(path.read_bytes()[:200])
    return path


def empty_npz(folder):
    return empty_file(folder, "empty.npz")


def folder_named_npz(folder):
    return folder_named(folder, "folder.npz")


# Folders of images.

KINDS = ("cat", "dog", "emu", "fox")


def photo(path, size=(8, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def photos(folder, under=""):
    root = folder / "photos"
    for split, count in (("train", 4), ("test", 2)):
        for number, kind in enumerate(KINDS):
            for index in range(count):
                path = root / under / split / kind / f"{index}.jpg"
                photo(path, seed=100 * number + 10 * count + index)
    return root


def photos_by_domain(folder):
    photos(folder, "inside")
    return photos(folder, "outside")


def photos_of_a_domain_without_test_images(folder):
    root = photos_by_domain(folder)
    shutil.rmtree(root / "inside" / "test")
    return root


def photos_without_classes(folder):
    return photo(folder / "photos" / "train" / "0.jpg").parents[1]


def photos_in_one_folder(folder):
    return photo(folder / "photos" / "0.jpg").parent


def photos_at_several_depths(folder):
    root = photos(folder)
    photo(root / "train" / "cat" / "more" / "0.jpg")
    return root


def photos_of_two_sizes(folder):
    root = photos(folder)
    photo(root / "train" / "dog" / "0.jpg", (9, 8))
    return root


def photos_whose_test_folder_has_another_name(folder):
    root = photos(folder)
    (root / "test").rename(root / "exam")
    return root


def photos_of_a_class_to_test_on_alone(folder):
    root = photos(folder)
    photo(root / "test" / "gnu" / "0.jpg")
    return root


def photos_of_which_one_is_damaged(folder):
    root = photos(folder)
    (root / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    return root


def photos_of_which_one_is_cut_short(folder):
    root = photos(folder)
    path = root / "train" / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return root


def photos_of_which_all_are_damaged(folder):
    root = photos(folder)
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")
    return root


def photos_of_which_one_has_16_bits(folder):
    root = photos(folder)
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(grey).save(root / "train" / "cat" / "0.png")
    return root


# Texts.

WORDS = np.asarray(["red", "green", "blue", "please"])


def texts(folder, **changes):
    return images(folder, "texts.npz", **({"x_train": WORDS[Y], "x_test": WORDS[Y]} | changes))


def texts_as_bytes(folder):
    return texts(folder, x_train=WORDS[Y].astype("S"))


def table(folder, heading="text,label,site", row="{},{},inside", name="texts.csv"):
    lines = [heading, *(row.format(WORDS[y], y) for y in Y)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def table_without_labels(folder):
    return table(folder, "text,topic,site")


def table_without_texts(folder):
    return table(folder, "title,label,site")


def table_with_commas_in_texts(folder):
    return table(folder, row="{},please,{},inside")


def table_without_rows(folder):
    path = folder / "texts.csv"
    path.write_text("text,label\n")
    return path


def table_in_latin_1(folder):
    path = folder / "texts.csv"
    path.write_bytes("text,label\ngrün,0\n".encode("latin-1"))
    return path


def lines(folder, **changes):
    rows = [{"text": WORDS[y], "label": int(y)} for y in Y]
    rows[6] |= changes
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of_which_one_is_damaged(folder):
    path = lines(folder)
    path.write_text(path.read_text().replace("}\n", "\n", 1))
    return path


def lines_of_which_one_has_no_text(folder):
    return lines(folder, text=None)


def lines_with_a_one_hot_label(folder):
    return lines(folder, label=[0, 0, 1, 0])


def tokenizer(folder):
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tokenizer_cut_short(folder):
    path = tokenizer(folder)
    path.write_text(path.read_text()[:100])
    return path


# CLIP and the names of classes.


def clip_weights(folder):
    return clip_files.write_model(folder / "clip")


def clip_weights_of_siglip(folder):
    path = clip_weights(folder)
    path.with_name("config.json").write_text('{"model_type": "siglip"}')
    return path


def clip_weights_of_another_size(folder):
    path = clip_weights(folder)
    content = json.loads(path.with_name("config.json").read_text()) | {"projection_dim": 5}
    path.with_name("config.json").write_text(json.dumps(content))
    return path


def class_names(folder):
    return clip_files.write_names(folder)


def class_names_of_three(folder):
    return clip_files.write_names(folder, ("cat", "dog", "fish"))


def class_names_with_a_gap(folder):
    return clip_files.write_names(folder, ("cat", "", "dog", "fish"))


def class_names_twice(folder):
    return clip_files.write_names(folder, ("cat", "dog", "cat", "fish"))


def class_names_of_wordnet(folder):
    return clip_files.write_names(folder, ("n01", "n02", "n03", "n04"))


def long_template(folder):
    path = folder / "templates.txt"
    path.write_text("a " * 50 + "{}\n")
    return path


# Weights of the ViT that {vit} describes.

VIT = VisionTransformer(4, 4, None, 16, 1, 2)
KERNEL = "blocks.0.attn.qkv.weight"


@functools.cache
def tensors_of_the_vit():
    shapes = jax.eval_shape(VIT.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    return pretrained.export_params(params, "timm")


def weights(folder, name="weights.safetensors", **changes):
    tensors = tensors_of_the_vit()
    tensors = {key: changes[key](value) if key in changes else value
               for key, value in tensors.items()}  # fmt: skip
    tensors = {key: value for key, value in tensors.items() if value is not None}
    pretrained.write_tensors(tensors, folder / name, overwrite=True)
    return folder / name


def weights_with_nan(folder):
    return weights(folder, **{KERNEL: lambda x: x * np.float32(np.nan)})


def weights_with_infinity(folder):
    return weights(folder, **{KERNEL: lambda x: x + np.float32(np.inf)})


def weights_without_a_kernel(folder):
    return weights(folder, **{"blocks.0.mlp.fc1.weight": lambda _: None})


def weights_of_another_number_of_classes(folder):
    return weights(folder, **{"head.weight": lambda x: x[:3], "head.bias": lambda x: x[:3]})


def weights_of_whole_numbers(folder):
    return weights(folder, **{KERNEL: lambda x: x.astype(np.int8)})


def weights_under_other_names(folder):
    path = folder / "weights.safetensors"
    pretrained.write_tensors({"fc.weight": np.ones(3, np.float32)}, path)
    return path


def weights_cut_short(folder):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:200])
    return path


def empty_safetensors(folder):
    return empty_file(folder, "empty.safetensors")


def folder_named_safetensors(folder):
    return folder_named(folder, "folder.safetensors")


def weights_in_a_folder(folder, config=None):
    path = folder / "a model"
    path.mkdir()
    weights(path, "model.safetensors")
    if config:
        (path / "config.json").write_text(config)
    return path


def weights_of_4_heads(folder):
    return weights_in_a_folder(folder, '{"model_type": "vit", "num_attention_heads": 4}')


def weights_of_another_epsilon(folder):
    config = '{"model_type": "vit", "layer_norm_eps": 1e-12, "hidden_act": "gelu"}'
    return weights_in_a_folder(folder, config)


def weights_of_another_activation(folder):
    return weights_in_a_folder(folder, '{"model_type": "vit", "hidden_act": "quick_gelu"}')


def weights_whose_config_says_swin(folder):
    return weights_in_a_folder(folder, '{"model_type": "swin"}')


def weights_whose_config_says_timms_small_model(folder):
    return weights_in_a_folder(folder, '{"architecture": "vit_small_patch4_64"}')


def weights_with_a_config_cut_short(folder):
    return weights_in_a_folder(folder, '{"model_type"')


def weights_in_shards(folder, *, second="model-2-of-2.safetensors", twice=(), moved=""):
    """A model of two files with their index, in which `moved` is said to be in the first."""
    path = weights_in_a_folder(folder)
    whole = pretrained.read_tensors(path)
    (path / "model.safetensors").unlink()
    names = sorted(whole)
    place = {name: f"model-{1 + (n > 9)}-of-2.safetensors" for n, name in enumerate(names)}
    for number in (1, 2):
        file = f"model-{number}-of-2.safetensors"
        shard = {name: x for name, x in whole.items() if place[name] == file or name in twice}
        pretrained.write_tensors(shard, path / file)
    place |= {moved: "model-1-of-2.safetensors"} if moved else {}
    index = {name: second if file == "model-2-of-2.safetensors" else file
             for name, file in place.items()}  # fmt: skip
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def shards_of_which_one_is_missing(folder):
    return weights_in_shards(folder, second="model-3-of-3.safetensors")


def shards_that_share_a_tensor(folder):
    return weights_in_shards(folder, twice=("cls_token",))


def shards_in_other_places_than_their_index_says(folder):
    return weights_in_shards(folder, moved="pos_embed")


def shards_with_one_cut_short(folder):
    path = weights_in_shards(folder)
    file = path / "model-2-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return path


def weights_of_pytorch(folder):
    path = folder / "of pytorch"
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"")
    (path / "config.json").write_text("{}")
    return path


def weights_and(folder, **more):
    path = weights(folder)
    tensors = {name: np.full(shape, 0.1, np.float32) for name, shape in more.items()}
    pretrained.write_tensors(pretrained.read_tensors(path) | tensors, path, overwrite=True)
    return path


def weights_of_roberta(folder):
    return weights_and(folder, **{"roberta.embeddings.LayerNorm.weight": (16,)})


def weights_of_a_distilled_deit(folder):
    return weights_and(folder, dist_token=(1, 1, 16))


def weights_with_swiglu(folder):
    return weights_and(folder, **{"blocks.0.mlp.w12.weight": (64, 16)})


def weights_of_timms_dinov3(folder):
    return weights_and(folder, storage_tokens=(1, 4, 16))


def weights_with_4_registers_and_layer_scale(folder):
    scales = {f"blocks.0.ls{number}.gamma": (16,) for number in (1, 2)}
    return weights_and(folder, reg_token=(1, 4, 16), **scales)


def weights_without_a_class_token(folder):
    return weights(folder, cls_token=lambda _: None)


def weights_of_one_tensor_by_two_names(folder):
    registers = {"reg_token": (1, 1, 16), "register_tokens": (1, 1, 16)}
    return weights_and(folder, **registers)


def pickled_weights(folder):
    np.savez(folder / "weights.npz", weight=np.asarray([{}], object))
    return folder / "weights.npz"


# Small models for experiments.merge.


def model(folder, name="model.safetensors", **tensors):
    whole = {"scale": np.ones(3, np.float32), "blocks.0.mlp": np.ones((2, 3), np.float32)}
    pretrained.write_tensors(whole | tensors, folder / name, overwrite=True)
    return folder / name


def model_with_nan(folder):
    return model(folder, "nan.safetensors", scale=np.float32([1, np.nan, 1]))


def model_with_infinity(folder):
    return model(folder, "infinite.safetensors", scale=np.float32([1, -np.inf, 1]))


def model_of_another_shape(folder):
    return model(folder, "shape.safetensors", scale=np.ones(2, np.float32))


def model_with_a_tensor_more(folder):
    return model(folder, "more.safetensors", extra=np.ones(2, np.float32))


def model_of_bytes(folder):
    return model(folder, "bytes.safetensors", scale=np.ones(3, jnp.float8_e4m3fn))


def model_folder(folder, name="model folder", **tensors):
    path = folder / name
    path.mkdir()
    model(path, **tensors)
    (path / "config.json").write_text('{"model_type": "bert"}')
    return path


def model_folder_with_a_damaged_config(folder):
    path = model_folder(folder)
    (path / "config.json").write_text("{")
    return path


def sharded_model(folder, *shards, name="sharded", **places):
    """The small model in two shards, or in others that are given; `places` as the index has it."""
    path = folder / name
    path.mkdir()
    shards = shards or ({"scale": np.ones(3)}, {"blocks.0.mlp": np.ones((2, 3))})
    files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": x for n, x in enumerate(shards, 1)}
    for file, tensors in files.items():
        tensors = {key: x.astype(np.float32) for key, x in tensors.items()}
        pretrained.write_tensors(tensors, path / file)
    places = {key: file for file, tensors in files.items() for key in tensors} | places
    index = json.dumps({"metadata": {}, "weight_map": places})
    (path / "model.safetensors.index.json").write_text(index)
    return path


def shards_without_one(folder):
    path = sharded_model(folder)
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


def shards_without_index(folder):
    path = sharded_model(folder)
    (path / "model.safetensors.index.json").unlink()
    return path


def shards_with_a_tensor_twice(folder):
    first, second = {"scale": np.ones(3)}, {"scale": np.ones(2), "blocks.0.mlp": np.ones((2, 3))}
    return sharded_model(folder, first, second, scale="model-00001-of-00002.safetensors")


def shards_with_a_tensor_elsewhere(folder):
    shards = {"scale": np.ones(3), "extra": np.ones(3)}, {"blocks.0.mlp": np.ones((2, 3))}
    return sharded_model(folder, *shards, scale="model-00002-of-00002.safetensors")


def shards_with_a_tensor_that_the_index_lacks(folder):
    path = sharded_model(folder)
    tensors = {name: np.ones(3, np.float32) for name in ("scale", "extra")}
    pretrained.write_tensors(tensors, path / "model-00001-of-00002.safetensors", overwrite=True)
    return path


def shards_of_which_one_is_cut_short(folder):
    path = sharded_model(folder)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    return path


def shards_whose_index_leads_outside(folder):
    return sharded_model(folder, scale="../model.safetensors")


def shards_whose_index_is_cut_short(folder):
    path = sharded_model(folder)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {')
    return path


def shard_of_a_model(folder):
    return sharded_model(folder) / "model-00001-of-00002.safetensors"


def pickled_model(folder):
    return empty_file(folder, "pytorch_model.bin")


def folder_of_a_pickled_model(folder):
    path = folder_named(folder, "pickled")
    pickled_model(path)
    return path


def folder_of_two_models(folder):
    path = folder_named(folder, "two models")
    for name in ("a.safetensors", "b.safetensors"):
        model(path, name)
    return path


def folder_of_an_adapter(folder):
    path = folder_named(folder, "adapter")
    (path / "adapter_config.json").write_text("{}")
    model(path, "adapter_model.safetensors")
    return path


def steps_of_a_manager(folder):
    path = folder / "manager"
    for step in (5, 10):
        (path / str(step) / "default").mkdir(parents=True)
        (path / str(step) / "default" / "_METADATA").write_text("{}")
    return path


def two_trees_of_orbax(folder):
    path = folder / "saved"
    for name in ("optimizer", "params"):
        (path / name).mkdir(parents=True)
        (path / name / "_METADATA").write_text("{}")
    return path


def arrays_of_text(folder):
    np.savez(folder / "text.npz", scale=np.asarray(["a"]))
    return folder / "text.npz"


def recipe(folder, text):
    path = folder / "merge.toml"
    path.write_text(text)
    return path


def recipe_with_an_unknown_key(folder):
    return recipe(folder, 'rule = "ties"\nweight = [1, 2]\n')


def recipe_with_text_for_weights(folder):
    return recipe(folder, 'weights = "1/2, 1/2"\n')


def recipe_cut_short(folder):
    return recipe(folder, 'rule = "ti')


def fishers_below_0(folder):
    return model(folder, "fishers.safetensors", scale=-np.ones(3, np.float32))


def damaged_model(folder):
    path = folder / "damaged.safetensors"
    path.write_bytes(b"\xff" * 20)
    return path


# Adapters for experiments.merge, of the module that `model_of_adapters` has.

A, B = "base_model.model.layer.query.lora_A.weight", "base_model.model.layer.query.lora_B.weight"


def adapter(folder, name="adapter", rank=2, tensors=(), without=(), **settings):
    """A LoRA adapter as PEFT writes one; `without` names what is left out."""
    path = folder / name
    path.mkdir()
    rng = np.random.default_rng(rank)
    factors = {A: rng.normal(size=(rank, 3)), B: rng.normal(size=(2, rank))}
    factors = ({} if "query" in without else factors) | dict(tensors)
    factors = {key: np.asarray(value, np.float32) for key, value in factors.items()}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank} | settings
    if "weights" not in without:
        pretrained.write_tensors(factors, path / "adapter_model.safetensors")
    if "config" not in without:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def model_of_adapters(folder):
    path = folder / "base.safetensors"
    pretrained.write_tensors({"layer.query.weight": np.ones((2, 3), np.float32)}, path)
    return path


def another_adapter(folder):
    return adapter(folder, "another", 1, base_model_name_or_path="some/base")


def adapter_of_another_base(folder):
    return adapter(folder, "of another base", base_model_name_or_path="another/large")


def adapter_of_another_shape(folder):
    return adapter(folder, "shape", tensors={A: np.ones((2, 4))})


def adapter_of_other_modules(folder):
    tensors = {key.replace("query", "gate"): np.ones((2, 2)) for key in (A, B)}
    return adapter(folder, "modules", tensors=tensors)


def adapter_of_a_file_alone(folder):
    return adapter(folder, without=("config",)) / "adapter_model.safetensors"


def adapter_without_weights(folder):
    return adapter(folder, "empty", without=("weights",))


def adapter_that_is_pickled(folder):
    path = adapter(folder, "pickled", without=("weights",))
    (path / "adapter_model.bin").write_bytes(b"")
    return path


def adapter_with_a_damaged_config(folder):
    path = adapter(folder, "damaged")
    (path / "adapter_config.json").write_text("{")
    return path


def adapter_cut_short(folder):
    path = adapter(folder, "cut")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return path


def fisher_of_another_shape(folder):
    path = folder / "fisher.safetensors"
    pretrained.write_tensors({"layer.query.weight": np.ones((3, 2), np.float32)}, path)
    return path


def adapter_of_transposed_kernels(folder):
    return adapter(folder, "transposed", fan_in_fan_out=True)


def adapter_of_dora(folder):
    return adapter(folder, "dora", use_dora=True)


def adapter_of_loha(folder):
    return adapter(folder, "loha", peft_type="LOHA")


def adapter_with_biases(folder):
    return adapter(folder, "bias", bias="all")


def adapter_of_pissa(folder):
    return adapter(folder, "pissa", init_lora_weights="pissa_niter_4")


def adapter_without_a_rank(folder):
    return adapter(folder, "no rank", r=None)


def adapter_of_another_rank(folder):
    return adapter(folder, "rank", r=3)


def adapter_with_half_the_factors(folder):
    return adapter(folder, "half", tensors={A.replace("query", "key"): np.ones((2, 3))})


def adapter_with_a_tensor_more(folder):
    return adapter(folder, "more", tensors={"base_model.model.layer.scale": np.ones(2)})


def adapter_with_nan(folder):
    return adapter(folder, "nan", tensors={A: np.full((2, 3), np.nan)})


def adapter_with_a_pattern_that_is_none(folder):
    return adapter(folder, "pattern", rank_pattern={"(": 2})


def adapter_of_a_larger_vit(folder):
    name = "base_model.model.blocks.0.attn.qkv.lora_{}.weight"
    tensors = {name.format("A"): np.ones((2, 24)), name.format("B"): np.ones((72, 2))}
    return adapter(folder, "larger", tensors=tensors, without=("query",))


def adapters_with_other_classifiers(folder):
    head = "base_model.model.classifier.weight"
    first, second = (
        adapter(
            folder, f"head_{n}", tensors={head: np.full((2, 3), n)}, modules_to_save=["classifier"]
        )
        for n in (1, 2)
    )
    return f"{first},{second}"


# Flagfiles and work directories.


def flagfile_with_an_unknown_flag(folder):
    path = folder / "mine.flags"
    path.write_text("# mine\n--epoch=3\n")
    return path


def folder_of_something_else(folder):
    path = folder / "thesis"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    return path


def comparison_of_something_else(folder):
    """Where experiments.compare would put the runs of `averaging`."""
    path = folder / "compared"
    (path / "averaging").mkdir(parents=True)
    (path / "averaging" / "thesis.tex").write_text("years of work")
    return path


def run_of_7_epochs(folder):
    path = folder / "run"
    claim(path, Config(epochs=7))
    return path


def run_with_damaged_settings(folder):
    path = run_of_7_epochs(folder)
    (path / "config.json").write_text("{")
    return path


def run_with_empty_settings(folder):
    path = run_of_7_epochs(folder)
    (path / "config.json").write_text("")
    return path


def run_whose_settings_are_a_folder(folder):
    path = folder / "run"
    (path / "config.json").mkdir(parents=True)
    return path


def run_with_a_file_for_seed_1(folder):
    path = folder / "run"
    tiny = Config(
        num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(8,), rule="averaging",
        perturbation="none",
    )  # fmt: skip
    claim(path, tiny)
    (path / "seed_1").write_text("years of work")
    return path


# Odd, and good.


def oddly_named_folder(folder):
    return folder_named(folder, "grüße, 你好 & 'co' 100 %")


def images_in_a_folder_that_is_oddly_named(folder):
    return images(oddly_named_folder(folder), "my images; 2.npz")


def flagfile_that_is_oddly_named(folder):
    path = oddly_named_folder(folder) / "meine Werte.flags"
    path.write_text("# größer\n--epochs=2\n")
    return path


def link_to_an_empty_folder(folder):
    path = folder / "link"
    path.symlink_to(empty_folder(folder), target_is_directory=True)
    return path


def link_to_a_model(folder):
    path = folder / "link.safetensors"
    path.symlink_to(model(folder))
    return path
