import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from pm_jax import lora, losses, models, trees
from pm_jax.curvature.input_moments import input_moment
from pm_jax.curvature.measures import measure_all
from pm_jax.types import InvalidInput
from tests.small_runs import slow


def numpy_turned(x):
    """Rotary positions of DINOv3 with one angle for each number, over a grid [N, H, W, ..., D]."""
    half = x.shape[-1] // 2
    out = x.copy()
    for row, column, pair in np.ndindex(*x.shape[1:3], half):
        along_rows = pair < half // 2
        place, side = (row, x.shape[1]) if along_rows else (column, x.shape[2])
        period = 100 ** ((pair % (half // 2)) / (half // 2))
        angle = 2 * np.pi * (2 * (place + 0.5) / side - 1) / period
        turn = np.exp(1j * angle)
        z = (x[:, row, column, ..., pair] + 1j * x[:, row, column, ..., pair + half]) * turn
        out[:, row, column, ..., pair], out[:, row, column, ..., pair + half] = z.real, z.imag
    return out


def numpy_vit(params, images, num_heads, pooling="class_token"):
    """The same network written out in NumPy, float64."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in trees.leaves_by_path(params).items()}

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * p[f"{name}/scale"] + p[f"{name}/bias"]

    def softmax(x):
        exponent = np.exp(x - x.max(-1, keepdims=True))
        return exponent / exponent.sum(-1, keepdims=True)

    kernel = p["patch_embed/kernel"]
    side, width = kernel.shape[0], kernel.shape[-1]
    n, height, across, channels = images.shape
    rows, columns = height // side, across // side
    patches = images.reshape(n, rows, side, columns, side, channels).transpose(0, 1, 3, 2, 4, 5)
    tokens = patches.reshape(n, rows * columns, -1) @ kernel.reshape(-1, width)
    tokens = tokens + p["patch_embed/bias"]
    prefix, positions = [], p.get("pos_embed", np.zeros((1, 1 + rows * columns, 1)))
    if pooling == "class_token":
        prefix, positions = [p["cls_token"] + positions[:, :1]], positions[:, 1:]
    prefix += [p["reg_token"]] if "reg_token" in p else []
    prefix = [np.broadcast_to(part, (n, *part.shape[1:])) for part in prefix]
    x = np.concatenate([*prefix, tokens + positions], 1)
    for layer in range(2):
        block = f"blocks_{layer}"
        y = norm(x, f"{block}/norm1")
        q, k, v = (
            dense(y, f"{block}/attn/{name}").reshape(n, -1, num_heads, width // num_heads)
            for name in ("query", "key", "value")
        )
        if "pos_embed" not in p:
            for head in (q, k):
                head[:, -rows * columns :] = numpy_turned(
                    head[:, -rows * columns :].reshape(n, rows, columns, *head.shape[2:])
                ).reshape(n, rows * columns, *head.shape[2:])
        weights = softmax(np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(width // num_heads))
        mixed = np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, -1, width)
        x = x + dense(mixed, f"{block}/attn/proj") * p.get(f"{block}/ls1/gamma", 1.0)
        hidden = dense(norm(x, f"{block}/norm2"), f"{block}/mlp/fc1")
        hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
        x = x + dense(hidden, f"{block}/mlp/fc2") * p.get(f"{block}/ls2/gamma", 1.0)
    patches = x[:, -rows * columns :]
    features = {
        "class_token": lambda: norm(x, "norm")[:, 0],
        "mean": lambda: norm(patches, "norm").mean(1),
        "mean_norm": lambda: norm(patches.mean(1), "fc_norm"),
    }
    return dense(features[pooling](), "head")


@pytest.mark.parametrize(
    "options",
    [
        {"registers": 2, "layer_scale": 0.3, "positions": "rotary"},
        slow({"registers": 1, "pooling": "mean_norm", "pad_tokens": 8}),
        slow({"layer_scale": 0.3, "pooling": "mean"}),
        slow({"registers": 1, "positions": "rotary", "remat": True, "pad_tokens": 8}),
    ],
)
def test_vit_with_its_options_agrees_with_the_same_network_in_numpy(options):
    model = models.VisionTransformer(
        5, patch_size=4, width=16, depth=2, num_heads=2, mlp_ratio=1, **options
    )
    images = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 3, shapes)
    got = jax.jit(model.apply)({"params": params}, images)
    wanted = numpy_vit(params, images, 2, options.get("pooling", "class_token"))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    paths = set(trees.leaves_by_path(params))
    assert ("reg_token" in paths) == ("registers" in options)
    assert ("blocks_1/ls2/gamma" in paths) == ("layer_scale" in options)
    assert ("cls_token" in paths) == ("pooling" not in options)
    rotary = "positions" in options
    assert ("pos_embed" not in paths) == ("blocks_0/attn/key/bias" not in paths) == rotary


def test_layer_scales_begin_at_their_value_and_a_pooling_has_a_known_name():
    images, scale = jnp.ones((1, 8, 8, 3)), models.vit.LayerScale(1e-5)
    gamma = scale.init(jax.random.key(0), images[0])["params"]["gamma"]
    assert gamma.tolist() == [np.float32(1e-5)] * 3
    with pytest.raises(InvalidInput, match="pooling=max: must be one of class_token, mean"):
        models.VisionTransformer(5, 8, pooling="max").init(jax.random.key(0), images)


@pytest.mark.slow
def test_vit_agrees_with_the_same_network_in_numpy():
    model = models.VisionTransformer(5, patch_size=2, width=12, depth=2, num_heads=3)
    images = jax.random.normal(jax.random.key(1), (4, 6, 8, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)  # nothing at its initial zero or one
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), params
    )
    got = model.apply({"params": params}, images)
    wanted = numpy_vit(params, np.asarray(images, np.float64), 3)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [models.MLP(3, (7, 5)), models.VisionTransformer(3, 2, width=8, depth=1, num_heads=2)]
)
def test_an_examples_logits_do_not_depend_on_the_batch(model):
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    params = jax.jit(model.init)(jax.random.key(0), images)
    whole = model.apply(params, images)
    parts = jnp.concatenate([model.apply(params, images[n : n + 1]) for n in range(6)])
    assert whole.shape == (6, 3)
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_names_of_the_vit():
    model = models.VisionTransformer(3, 2, width=8, depth=1, num_heads=2)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4, 4, 1)))["params"]
    names = set(trees.leaves_by_path(params))
    assert {"cls_token", "pos_embed", "patch_embed/kernel", "norm/scale", "head/bias"} <= names
    assert {"blocks_0/attn/key/kernel", "blocks_0/mlp/fc1/kernel"} <= names


def test_a_masked_class_is_never_chosen_and_gets_no_gradient():
    logits = jnp.asarray([[1.0, 9.0, 2.0]])
    mask = jnp.asarray([True, False, True])
    assert int(jnp.argmax(losses.mask_logits(logits, mask))) == 2
    loss = losses.mean(losses.cross_entropy(lambda w, x: losses.mask_logits(w[None, :], mask)))
    batch = losses.Batch(jnp.ones((1, 1)), jnp.zeros(1, int))
    gradient = jax.grad(loss)(logits[0], batch)
    assert float(gradient[1]) == 0.0 and bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(gradient[2], 1 / (1 + np.exp(-1.0)), rtol=1e-6)


def embedded_patches():
    """A small ViT with images and parameters, and the convolution that embeds patches alike."""
    model = models.VisionTransformer(3, 4, width=8, depth=1, num_heads=2)
    images = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    return model, images, params, nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID")


def test_patches_are_embedded_like_by_a_convolution_with_the_same_initial_parameters():
    model, images, params, convolution = embedded_patches()
    apply = functools.partial(model.apply, capture_intermediates=True)
    (got,) = jax.jit(apply)({"params": params}, images)[1]["intermediates"]["patch_embed"][
        "__call__"
    ]
    wanted = convolution.apply({"params": params["patch_embed"]}, images)
    np.testing.assert_allclose(got, wanted.reshape(2, 6, 8), rtol=1e-5, atol=1e-6)

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            # Linen draws parameters by the name of the layer.
            return convolution.clone(name="patch_embed", parent=self)(x)

    initial = jax.jit(Named().init)(jax.random.key(0), images)["params"]["patch_embed"]
    assert all(jnp.array_equal(initial[name], params["patch_embed"][name]) for name in initial)


def test_an_adapter_of_the_patch_embedding_is_a_change_of_its_kernel():
    model, images, params, _ = embedded_patches()
    adapters = lora.init(jax.random.key(2), params, "patch_embed/kernel", 2)
    assert adapters["patch_embed/kernel"].a.shape == (4, 4, 3, 2)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    wanted = apply(lora.fold(params, adapters), images)
    with lora.branch(adapters):
        got = jax.jit(lambda images: model.apply({"params": params}, images))(images)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_input_moments_of_the_patch_embedding_are_those_of_its_patches():
    model, images, params, _ = embedded_patches()
    measure = input_moment(lambda p, x: model.apply({"params": p}, x), ("patch_embed/kernel",))
    examples = images, jnp.zeros(2, int)
    found = jax.jit(functools.partial(measure_all, measure))(params, examples).quadratic.curvature
    cut = np.asarray(images, np.float64).reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    rows = cut.reshape(12, 48)
    wanted = rows.T @ rows / 2
    got = found.moments["patch_embed/kernel"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_patches_must_divide_the_image():
    model, images, _, _ = embedded_patches()
    with pytest.raises(InvalidInput, match=r"patch_size=4: must divide the image of 8 x 11 pixels"):
        model.init(jax.random.key(0), images[:, :, :11])
