import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import models, trees
from pm_jax.types import InvalidInput
from pm_jax.weights import model_config, pretrained, public_names

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"
VIT_TINY = SHARED / "vit_tiny" / "model.safetensors"
CIFAR100 = SHARED / "tfds"
needs_shared = pytest.mark.skipif(not VIT_TINY.exists(), reason="needs the shared ViT-Ti weights")

VIT_LAYOUTS = ("timm", "transformers", "augreg")
SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 8, 24, 2, 3, 5


def vit(epsilon=1e-6):
    return models.VisionTransformer(
        CLASSES, PATCH, None, WIDTH, DEPTH, HEADS, layer_norm_epsilon=epsilon
    )


def test_the_place_before_the_move_still_leads_here_and_says_so():
    with pytest.warns(DeprecationWarning, match="is pm_jax.weights.pretrained now"):
        assert models.pretrained is pretrained
    with pytest.raises(AttributeError, match="no attribute 'layouts'"):
        models.layouts  # noqa: B018


@functools.cache
def initial_params(size):
    init = jax.jit(vit().init)
    return jax.tree.map(np.asarray, init(jax.random.key(0), jnp.ones((1, size, size, 3)))["params"])


def random_params(seed=0, size=SIZE):
    """Nothing at its initial zero or one, so that every tensor counts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), initial_params(size)
    )


def assert_same(left, right):
    for path, leaf in trees.leaves_by_path(left).items():
        assert jnp.array_equal(leaf, trees.leaves_by_path(right)[path]), path


@pytest.mark.slow
@pytest.mark.parametrize("layout", VIT_LAYOUTS)
def test_what_is_exported_is_recognised_and_read_back_bit_for_bit(layout, tmp_path):
    params = random_params()
    tensors = pretrained.export_params(params, layout, num_heads=HEADS)
    assert pretrained.layout_of(tensors) == layout
    path = tmp_path / "model.safetensors"
    pretrained.write_tensors(tensors, path)
    read = pretrained.read_tensors(path)
    assert_same(pretrained.load_params(read, random_params(1), head=True), params)
    np.savez(tmp_path / "model.npz", **tensors)
    read = pretrained.read_tensors(tmp_path / "model.npz")
    assert_same(pretrained.load_params(read, random_params(1), head=True), params)


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
def test_every_leaf_of_the_model_has_a_place_in_every_layout(layout):
    paths = [entry.path for entry in pretrained.LAYOUTS[layout](DEPTH)]
    of_options = re.compile(r"reg_token|fc_norm/.*|.*/ls[12]/gamma")
    plain = [path for path in paths if not of_options.fullmatch(path)]
    assert sorted(plain) == sorted(trees.leaves_by_path(random_params()))


def test_without_its_head_a_checkpoint_fills_a_model_of_other_classes():
    tensors = pretrained.export_params(random_params(), "timm")
    tensors["head.weight"] = np.zeros((1000, WIDTH), np.float32)
    tensors["head.bias"] = np.zeros(1000, np.float32)
    params = random_params(1)
    loaded = pretrained.load_params(tensors, params)
    assert_same(loaded["head"], params["head"])
    assert_same(loaded["norm"], random_params()["norm"])


def test_fused_query_key_value_rows_go_where_they_belong():
    params = random_params()
    fused = pretrained.export_params(params, "timm")["blocks.1.attn.qkv.weight"]
    attention = params["blocks_1"]["attn"]
    for part, name in enumerate(("query", "key", "value")):
        rows = fused[part * WIDTH : (part + 1) * WIDTH]
        assert np.array_equal(rows, np.asarray(attention[name]["kernel"]).T)


@pytest.mark.slow
def test_position_embeddings_are_resized_and_the_class_token_kept():
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None], (8, 8)).reshape(1, 64, 1)
    positions = np.concatenate([np.full((1, 1, 1), 99, np.float32), ramp], axis=1)
    larger = pretrained.resize_positions(positions, 1 + 16 * 16)
    assert larger[0, 0, 0] == 99
    grid = larger[0, 1:, 0].reshape(16, 16)
    # Half-pixel centres: row r of 16 lies at (r + 0.5) / 2 - 0.5 of 8; a cubic keeps a ramp inside.
    rows = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(grid[4:12], np.tile(rows[4:12, None], 16), rtol=1e-5)
    tensors = pretrained.export_params(random_params(), "timm")
    assert pretrained.load_params(tensors, random_params(1, size=64))["pos_embed"].shape[1] == 65
    with pytest.raises(ValueError, match="square"):
        pretrained.resize_positions(positions, 12)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_what_does_not_fit_is_listed():
    tensors = pretrained.export_params(random_params(), "timm")
    bad = without(tensors, "norm.weight", "blocks.1.mlp.fc1.bias")
    bad["blocks.0.gate"] = np.zeros(1)
    bad["blocks.0.norm1.bias"] = np.zeros(7, np.float32)
    with pytest.raises(InvalidInput) as refused:
        pretrained.load_params(bad, random_params())
    text = str(refused.value)
    assert "missing blocks.1.mlp.fc1.bias, norm.weight" in text
    assert "extra blocks.0.gate" in text
    assert re.search(r"misshapen blocks.0.norm1.bias gives \(7,\) for .*\(24,\)", text)
    assert "\n" not in text
    with pytest.raises(InvalidInput, match="not named in a known"):
        pretrained.load_params({"foo": np.zeros(1)}, random_params())
    deeper = pretrained.export_params(random_params(), "transformers")
    extra = {f"vit.encoder.layer.{n}.output.dense.bias": np.zeros(WIDTH) for n in range(2, 20)}
    with pytest.raises(InvalidInput, match="and 12 more"):
        pretrained.load_params({**deeper, **extra}, random_params())


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    pretrained.write_tensors(pretrained.export_params(random_params(), "timm"), path)
    with pytest.raises(InvalidInput, match="exists"):
        pretrained.write_tensors({}, path)
    with pytest.raises(InvalidInput, match="must end in .safetensors"):
        pretrained.write_tensors({}, tmp_path / "model.bin")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidInput, match=f"{path}: cannot be read"):
        pretrained.read_tensors(path)
    np.savez(tmp_path / "pickled.npz", a=np.asarray([{}], object))
    with pytest.raises(InvalidInput, match="cannot be read"):
        pretrained.read_tensors(tmp_path / "pickled.npz")
    with pytest.raises(InvalidInput, match="no such file"):
        pretrained.read_tensors(tmp_path / "none.npz")


def test_a_folder_and_its_shards_are_read_whole(tmp_path):
    tensors = pretrained.export_params(random_params(), "timm")
    pretrained.write_tensors(tensors, tmp_path / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "shards").mkdir()
    place = {}
    for number, part in enumerate((names[:20], names[20:23], names[23:]), 1):
        file = f"model-0000{number}-of-00003.safetensors"
        place |= dict.fromkeys(part, file)
        pretrained.write_tensors({n: tensors[n] for n in part}, tmp_path / "shards" / file)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    for path in (tmp_path, tmp_path / "shards", index):
        read = pretrained.read_tensors(path)
        assert sorted(read) == names
        assert all(np.array_equal(read[name], tensors[name]) for name in names)


def test_weights_in_half_precision_become_float32(tmp_path):
    tensors = pretrained.export_params(random_params(), "timm")
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    pretrained.write_tensors(half, tmp_path / "model.safetensors")
    read = pretrained.read_tensors(tmp_path / "model.safetensors")
    loaded = pretrained.load_params(read, random_params(1), head=True)
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), random_params())
    assert_same(loaded, wanted)


def test_a_tree_of_orbax_is_read_at_its_newest_step_or_the_named_one(tmp_path):
    from orbax import checkpoint as orbax

    with orbax.PyTreeCheckpointer() as checkpointer:
        for step in (1, 2):
            tree = {"params": random_params(step)}
            checkpointer.save(tmp_path / "steps" / str(step), tree)
    for path, seed in (("steps", 2), ("steps@1", 1), ("steps/1", 1)):
        tensors = pretrained.read_tensors(tmp_path / path)
        assert pretrained.layout_of(tensors) == "flax"
        assert pretrained.left_out(tensors) == ("params/head",)
        assert_same(
            pretrained.load_params(tensors, random_params(), head=True), random_params(seed)
        )


# Other people's implementations, where they are installed (the extra `parity`).


def close_to_torch(theirs, model, params, images):
    import torch

    with torch.no_grad():
        wanted = theirs(torch.tensor(np.asarray(images).transpose(0, 3, 1, 2)))
    wanted = getattr(wanted, "logits", wanted).numpy()
    got = model.apply({"params": params}, images)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.std(wanted) > 0.05


def images_for(size=SIZE):
    return jax.random.normal(jax.random.key(3), (4, size, size, 3))


def numpy_state(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def randomized(module):
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def torch_state(tensors):
    import torch

    return {name: torch.tensor(tensor) for name, tensor in tensors.items()}


def test_logits_are_those_of_timm_before_import_and_after_export():
    pytest.importorskip("torch", reason="needs the extra parity")
    timm = pytest.importorskip("timm", reason="needs the extra parity")

    def make():
        return timm.models.VisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            num_classes=CLASSES,
        )  # fmt: skip

    theirs = randomized(make())
    params = pretrained.load_params(numpy_state(theirs), random_params(), head=True)
    close_to_torch(theirs, vit(), params, images_for())
    merged, again = random_params(7), make().eval()
    again.load_state_dict(torch_state(pretrained.export_params(merged, "timm")))
    close_to_torch(again, vit(), merged, images_for())


def test_logits_are_those_of_transformers_before_import_and_after_export(tmp_path):
    pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=SIZE,
        intermediate_size=4 * WIDTH, patch_size=PATCH, num_labels=CLASSES,
    )  # fmt: skip
    model = vit(epsilon=config.layer_norm_eps)
    theirs = randomized(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    tensors = pretrained.read_tensors(tmp_path / "model.safetensors")
    params = pretrained.load_params(tensors, random_params(), head=True)
    close_to_torch(theirs, model, params, images_for())
    merged = random_params(7)
    pretrained.write_tensors(
        pretrained.export_params(merged, "transformers"),
        tmp_path / "model.safetensors",
        overwrite=True,
    )
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    close_to_torch(again, model, merged, images_for())


def dino(**options):
    return models.VisionTransformer(
        CLASSES, PATCH, None, WIDTH, DEPTH, HEADS, layer_scale=1e-5, **options
    )


def random_params_of(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images_for())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    "model, theirs",
    [
        (dino(), {"init_values": 1e-5}),
        (dino(registers=3), {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True}),
        (
            dino(registers=2, pooling="mean_norm"),
            {"init_values": 1e-5, "reg_tokens": 2, "no_embed_class": True, "class_token": False,
             "global_pool": "avg"},
        ),
        (
            dino(pooling="mean"),
            {"init_values": 1e-5, "class_token": False, "global_pool": "avg", "fc_norm": False},
        ),
    ],
)  # fmt: skip
def test_logits_of_vits_with_options_are_those_of_timm_in_and_out(model, theirs):
    pytest.importorskip("torch", reason="needs the extra parity")
    timm = pytest.importorskip("timm", reason="needs the extra parity")

    def make():
        return timm.models.VisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            num_classes=CLASSES, **theirs,
        )  # fmt: skip

    first, again = randomized(make()), make().eval()
    start = random_params_of(model)
    params = pretrained.load_params(numpy_state(first), start, head=True)
    close_to_torch(first, model, params, images_for())
    again.load_state_dict(torch_state(pretrained.export_params(start, "timm")))
    close_to_torch(again, model, start, images_for())


def test_deit_iii_and_dinov2_of_its_authors_are_those_of_timm():
    """DeiT III has no position of the class token; the authors' DINOv2 has, and timm adds it."""
    pytest.importorskip("torch", reason="needs the extra parity")
    timm = pytest.importorskip("timm", reason="needs the extra parity")
    sizes = {
        "img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH,
        "num_heads": HEADS, "num_classes": CLASSES, "init_values": 1e-5, "no_embed_class": True,
    }  # fmt: skip
    theirs = randomized(timm.models.VisionTransformer(**sizes))
    state = numpy_state(theirs)
    params = pretrained.load_params(state, random_params_of(dino()), head=True)
    close_to_torch(theirs, dino(), params, images_for())
    again = timm.models.VisionTransformer(**sizes).eval()
    form = public_names.known(state).form
    again.load_state_dict(torch_state(pretrained.export_params(params, form)))
    close_to_torch(again, dino(), params, images_for())

    model = dino(registers=4)
    params = random_params_of(model)
    authors = pretrained.export_params(params, public_names.Form("timm", class_position=True))
    authors["register_tokens"] = authors.pop("reg_token")
    authors["mask_token"] = np.zeros((1, WIDTH), np.float32)
    theirs = timm.models.VisionTransformer(**sizes, reg_tokens=4).eval()
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(torch_state(authors), theirs)
    theirs.load_state_dict(filtered)
    loaded = pretrained.load_params(authors, random_params_of(model, 1), head=True)
    close_to_torch(theirs, model, loaded, images_for())


@pytest.mark.parametrize("registers", [0, 3])
def test_logits_and_features_of_dinov2_are_those_of_transformers(registers, tmp_path):
    pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=SIZE,
        patch_size=PATCH, num_labels=CLASSES, mlp_ratio=4, layerscale_value=0.5,
        **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    model = dino(registers=registers)
    theirs = randomized(getattr(transformers, f"{name}Model")(config))
    theirs.save_pretrained(tmp_path)
    model_config.check_config(tmp_path, model)
    tensors = pretrained.read_tensors(tmp_path)
    assert pretrained.left_out(tensors) == ("embeddings.mask_token",)
    identity = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
    params = pretrained.load_params(tensors, {**random_params_of(model), "head": identity})
    features = dino(registers=registers).clone(num_classes=WIDTH)
    close_to_torch(lambda x: theirs(x).pooler_output, features, params, images_for())
    # Back under the names that the file has, and those of the classifier, in both of their models.
    merged = random_params_of(model, 7)
    again = pretrained.export_params(merged, public_names.known(tensors).form)
    assert set(tensors) - set(again) == {"embeddings.mask_token"}
    pretrained.write_tensors(again, tmp_path / "model.safetensors", overwrite=True)
    whole = getattr(transformers, f"{name}ForImageClassification").from_pretrained(tmp_path)
    close_to_torch(whole.eval(), model, merged, images_for())


def test_features_of_dinov3_are_those_of_transformers(tmp_path):
    pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    width, size = 32, (2 * SIZE, SIZE)
    config = transformers.DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=DEPTH, num_attention_heads=2, patch_size=PATCH,
        intermediate_size=4 * width, layerscale_value=0.5, num_register_tokens=4,
    )  # fmt: skip
    model = models.VisionTransformer(
        width, PATCH, None, width, DEPTH, 2, layer_norm_epsilon=1e-5, layer_scale=1e-5, registers=4,
        positions="rotary",
    )  # fmt: skip
    images = jax.random.normal(jax.random.key(3), (4, *size, 3))
    theirs = randomized(transformers.DINOv3ViTModel(config))
    theirs.save_pretrained(tmp_path)
    model_config.check_config(tmp_path, model)
    tensors = pretrained.read_tensors(tmp_path)
    assert pretrained.left_out(tensors) == ("embeddings.mask_token",)
    identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    params = pretrained.load_params(tensors, {**random_params_of(model), "head": identity})
    close_to_torch(lambda x: theirs(x).pooler_output, model, params, images)
    merged = {**random_params_of(model, 7), "head": identity}
    again = pretrained.export_params(merged, public_names.known(tensors).form)
    pretrained.write_tensors(again, tmp_path / "model.safetensors", overwrite=True)
    loaded = transformers.DINOv3ViTModel.from_pretrained(tmp_path).eval()
    close_to_torch(lambda x: loaded(x).pooler_output, model, merged, images)


def test_features_of_vit_models_are_those_of_transformers(tmp_path):
    """ViTModel, with a pooler and without a prefix, and I-JEPA, whose patches have a mean."""
    pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "image_size": SIZE, "intermediate_size": 4 * WIDTH, "patch_size": PATCH,
        "num_labels": CLASSES, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    identity = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
    theirs = randomized(transformers.ViTModel(transformers.ViTConfig(**sizes)))
    theirs.save_pretrained(tmp_path / "vit")
    tensors = pretrained.read_tensors(tmp_path / "vit")
    assert pretrained.left_out(tensors) == ("pooler.dense",)
    params = pretrained.load_params(tensors, {**random_params(), "head": identity})
    features = vit().clone(num_classes=WIDTH)
    close_to_torch(lambda x: theirs(x).last_hidden_state[:, 0], features, params, images_for())
    again = pretrained.export_params(random_params(7), public_names.known(tensors).form)
    pretrained.write_tensors(again, tmp_path / "vit" / "model.safetensors", overwrite=True)
    whole = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    close_to_torch(whole, vit(), random_params(7), images_for())

    model = vit().clone(pooling="mean")
    jepa = transformers.IJepaForImageClassification(transformers.IJepaConfig(**sizes))
    randomized(jepa).save_pretrained(tmp_path / "jepa")
    tensors = pretrained.read_tensors(tmp_path / "jepa")
    params = pretrained.load_params(tensors, random_params_of(model), head=True)
    close_to_torch(jepa, model, params, images_for())


# The real thing.


@needs_shared
def test_real_weights_load_whole_and_go_back_bit_for_bit():
    tensors = pretrained.read_tensors(VIT_TINY)
    model = models.VisionTransformer(1000, 16, None, 192, 12, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))["params"]
    params = pretrained.load_params(tensors, shapes, head=True)
    again = pretrained.export_params(params, "timm")
    assert set(again) == set(tensors)
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.slow
@needs_shared
def test_real_weights_see_real_images():
    """Nearest class mean on ten classes of CIFAR-100 at 96 pixels; chance is 10 %."""
    tfds = pytest.importorskip("tensorflow_datasets")
    labels, images = [], []
    source = tfds.data_source("cifar100", split="test", data_dir=CIFAR100, download=False)
    for example in source:
        if example["label"] < 10 and labels.count(example["label"]) < 20:
            labels.append(int(example["label"]))
            images.append(example["image"])
        if len(labels) == 200:
            break
    model = models.VisionTransformer(1, 16, 96, 192, 12, 3)
    pixels = np.stack(images) / 127.5 - 1.0
    shapes = jax.eval_shape(model.init, jax.random.key(0), pixels[:1])["params"]
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params = pretrained.load_params(pretrained.read_tensors(VIT_TINY), start)

    @jax.jit
    def features(images):
        _, state = model.apply(
            {"params": params}, images, capture_intermediates=lambda m, _: m.name == "norm"
        )
        return state["intermediates"]["norm"]["__call__"][0]

    found = np.asarray(features(pixels))
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    kind, half = np.asarray(labels), np.arange(200) % 2 == 0
    means = np.stack([found[half & (kind == c)].mean(axis=0) for c in range(10)])
    guess = (found[~half] @ means.T).argmax(axis=1)
    assert np.mean(guess == kind[~half]) > 0.5
