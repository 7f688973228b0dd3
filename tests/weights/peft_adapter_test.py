import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import lora, models, trees
from pm_jax.types import InvalidInput
from pm_jax.weights import peft_adapter, peft_folder, peft_start, pretrained

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 16, 8, 24, 2, 3, 5
VOCABULARY, POSITIONS = 40, 12
IDS = jnp.asarray([[3, 9, 4, 17, 0, 0], [5, 6, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
PATTERN = r".*/attn/(key|value)/kernel"
MODULES = {
    "timm": ["blocks.{}.attn.qkv"],
    "transformers": ["vit.layers.{}.attention.k_proj", "vit.layers.{}.attention.v_proj"],
    "bert": ["encoder.layer.{}.attention.self.key", "encoder.layer.{}.attention.self.value"],
}
SAVED = {
    **MODULES,
    "transformers": [
        "vit.encoder.layer.{}.attention.attention.key",
        "vit.encoder.layer.{}.attention.attention.value",
    ],
}
HEADS_OF = {"timm": "head", "transformers": "classifier"}


def network(layout, epsilon=1e-6):
    if layout == "bert":
        return models.TextEncoder(CLASSES, VOCABULARY, POSITIONS, WIDTH, DEPTH, HEADS)
    return models.VisionTransformer(
        CLASSES, PATCH, None, WIDTH, DEPTH, HEADS, layer_norm_epsilon=epsilon
    )


def inputs(layout):
    return IDS if layout == "bert" else jax.random.normal(jax.random.key(3), (3, SIZE, SIZE, 3))


def random_params(layout, seed=0):
    shapes = jax.eval_shape(network(layout).init, jax.random.key(0), inputs(layout))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )


def moved(start, pattern=PATTERN, rank=4):
    """The model after adapters of a rank in all, with another classifier."""
    rng = np.random.default_rng(5)
    leaves = {
        path: kernel
        + jnp.asarray(
            0.1 * rng.normal(size=(kernel.shape[0], rank)) @ rng.normal(size=(rank, WIDTH)),
            jnp.float32,
        )
        for path, kernel in trees.select(start, pattern).items()
    }
    return {**trees.replace(start, leaves), "head": jax.tree.map(lambda x: x + 1.0, start["head"])}


def adapter_of(layout, start, merged, pattern=PATTERN, rank=4):
    return peft_adapter.peft_adapter(start, merged, trees.match_paths(start, pattern), layout, rank)


@pytest.mark.parametrize("layout", MODULES)
def test_the_adapters_product_is_the_displacement(layout):
    start = random_params(layout)
    merged = moved(start)
    adapter = adapter_of(layout, start, merged)
    rank = 8 if layout == "timm" else 4
    assert adapter.config["r"] == adapter.config["lora_alpha"] == rank
    modules = [name.format(layer) for layer in range(DEPTH) for name in MODULES[layout]]
    assert adapter.config["target_modules"] == sorted(modules)
    keys = {f"base_model.model.{name}.lora_{f}.weight" for name in modules for f in "AB"}
    assert {key for key in adapter.tensors if "lora" in key} == keys
    before, after = (pretrained.export_params(params, layout) for params in (start, merged))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    saved = [f"{name.format(layer)}.weight" for layer in range(DEPTH) for name in SAVED[layout]]
    assert {name for name in changed if not name.startswith(("head", "classifier"))} == set(saved)
    for module, name in zip(modules, saved, strict=True):
        a, b = (adapter.tensors[f"base_model.model.{module}.lora_{f}.weight"] for f in "AB")
        assert a.shape == (rank, WIDTH) and b.shape == (len(after[name]), rank)
        # Both sides carry the rounding of the float32 weights that were subtracted.
        np.testing.assert_allclose(b @ a, after[name] - before[name], atol=1e-6)


def test_a_fused_matrix_moves_only_where_it_was_adapted():
    start = random_params("timm")
    adapter = adapter_of("timm", start, moved(start))
    b = adapter.tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    query, key, value = np.split(b, 3)
    assert not query.any() and key.any() and value.any()
    pattern = r".*/attn/value/kernel"
    adapter = adapter_of("timm", start, moved(start, pattern), pattern)
    b = adapter.tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert b.shape == (3 * WIDTH, 4) and not b[: 2 * WIDTH].any() and b[2 * WIDTH :].any()


def test_other_layers_than_attention_have_names_too():
    pattern = r".*/(attn/(query|proj)|mlp/fc1)/kernel"
    start = random_params("transformers")
    hidden = {path: k for path, k in trees.select(start, pattern).items()}
    merged = trees.replace(start, {path: k.at[0].add(1.0) for path, k in hidden.items()})
    names = adapter_of("transformers", start, merged, pattern).config["target_modules"]
    assert [name for name in names if ".0." in name] == [
        *("vit.layers.0.attention.o_proj", "vit.layers.0.attention.q_proj"),
        "vit.layers.0.mlp.fc1",
    ]


@pytest.mark.parametrize("layout", MODULES)
def test_the_classifier_goes_along(layout):
    start = random_params(layout)
    merged = moved(start)
    adapter = adapter_of(layout, start, merged)
    kernel = np.asarray(merged["head"]["kernel"]).T
    if layout == "bert":
        assert adapter.config["modules_to_save"] is None
        assert np.array_equal(adapter.head["classifier.weight"], kernel)
    else:
        name = HEADS_OF[layout]
        assert adapter.config["modules_to_save"] == [name] and not adapter.head
        assert np.array_equal(adapter.tensors[f"base_model.model.{name}.weight"], kernel)


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_a_convolution_has_factors_that_peft_convolves_with(layout):
    pattern = r"(patch_embed|blocks_0/attn/value)/kernel"
    start = random_params(layout)
    factors = lora.init(jax.random.key(0), start, pattern, 3)
    adapters = {path: x._replace(b=jnp.cos(jnp.arange(x.b.size)).reshape(x.b.shape))
                for path, x in factors.items()}  # fmt: skip
    merged = lora.fold(start, adapters)
    adapter = adapter_of(layout, start, merged, pattern, rank=3)
    (name,) = (name for name in adapter.tensors if "patch" in name and "lora_A" in name)
    a, b = (adapter.tensors[name.replace("lora_A", f"lora_{f}")] for f in "AB")
    assert a.shape == (3, 3, PATCH, PATCH) and b.shape == (WIDTH, 3, 1, 1)
    key = name.removeprefix("base_model.model.").replace(".lora_A", "")
    before, after = (pretrained.export_params(params, layout) for params in (start, merged))
    np.testing.assert_allclose(
        np.einsum("orxy,rihw->oihw", b, a), after[key] - before[key], atol=1e-6
    )


def test_leaves_that_peft_has_no_such_adapter_for_are_refused_by_name():
    start = random_params("bert")
    with pytest.raises(InvalidInput, match="export_adapter: word_embed/embedding of shape"):
        adapter_of("bert", start, start, "word_embed/embedding", rank=1)


def test_a_displacement_of_higher_rank_is_no_adapter():
    start = random_params("transformers")
    with pytest.raises(ValueError, match=r"displacement of vit\S+(key|value)\S+ is not of rank 3"):
        adapter_of("transformers", start, moved(start), rank=3)
    whole = adapter_of("transformers", start, random_params("transformers", 1), rank=1000)
    assert whole.config["r"] == WIDTH


def test_a_displacement_as_small_as_the_weights_rounding_is_an_adapter():
    start = random_params("transformers")
    noise = jax.tree.map(lambda x: x * (1 + 1e-7), start)
    assert adapter_of("transformers", start, noise, rank=1).config["r"] == 1


def test_an_adapter_is_written_over_and_beside_what_is_there(tmp_path):
    directory = tmp_path / "adapter"
    start = random_params("bert")
    adapter = adapter_of("bert", start, moved(start))
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")
    for _ in range(2):
        peft_adapter.write_adapter(adapter, directory)
    assert sorted(path.name for path in directory.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "thesis.tex"),
    ]
    assert json.loads((directory / "adapter_config.json").read_text()) == adapter.config
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="export_adapter=.*cannot be written"):
        peft_adapter.write_adapter(adapter, tmp_path / "file")


@pytest.mark.parametrize("layout", MODULES)
def test_an_adapter_added_to_its_start_is_the_merged_model(layout, tmp_path):
    pattern = r".*/attn/(key|value)/kernel|blocks_1/mlp/fc2/kernel"
    start = random_params(layout)
    paths = trees.match_paths(start, pattern)
    steps = lora.init(jax.random.key(0), start, pattern, 3)
    steps = {path: x._replace(b=jnp.cos(jnp.arange(x.b.size)).reshape(x.b.shape))
             for path, x in steps.items()}  # fmt: skip
    merged = lora.fold(start, steps)
    adapter = peft_adapter.peft_adapter(start, merged, paths, layout, 3)
    peft_adapter.write_adapter(adapter, tmp_path / "adapter")
    opened = peft_folder.PeftFolder.open("adapter_from", tmp_path / "adapter")
    assert set(paths) <= set(peft_start.places_of(start, opened, layout))
    found = trees.leaves_by_path(peft_start.with_adapter(start, opened, layout))
    for path, leaf in trees.leaves_by_path(merged).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6)
    other = {"bert": "timm"}.get(layout, "bert")
    with pytest.raises(InvalidInput, match="adapter_from=.*: adapts .*which the base does not"):
        peft_start.with_adapter(start, opened, other)
