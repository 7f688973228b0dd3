import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import lora, models, trees

PATTERN = r".*/attn/(key|value)/kernel"


@pytest.fixture(scope="module")
def vit():
    model = models.VisionTransformer(5, patch_size=4, width=16, depth=2, num_heads=2)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    adapters = lora.init(jax.random.key(2), params, PATTERN, 3)
    full = {
        path: adapter._replace(b=jax.random.normal(jax.random.key(i), adapter.b.shape) * 0.2)
        for i, (path, adapter) in enumerate(adapters.items())
    }
    return model, params, images, adapters, full


def test_fresh_adapters_change_nothing_and_are_kaiming_uniform(vit):
    _, params, _, adapters, _ = vit
    assert list(adapters) == list(trees.match_paths(params, PATTERN)) and len(adapters) == 4
    folded = lora.fold(params, adapters)
    for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(params), strict=True):
        assert jnp.array_equal(a, b)
    draws = np.concatenate([np.asarray(a).ravel() for a, _ in adapters.values()])
    bound = 16**-0.5
    assert abs(draws).max() <= bound and abs(draws).max() > 0.9 * bound
    assert lora.count(adapters) == 4 * 3 * (16 + 16)


@pytest.mark.parametrize("scale", [1.0, 0.0, 1.5, -0.3])
def test_branch_equals_fold(vit, scale):
    model, params, images, _, adapters = vit
    folded = model.apply({"params": lora.fold(params, adapters, scale)}, images)
    with lora.branch(adapters, scale):
        branched = model.apply({"params": params}, images)
    np.testing.assert_allclose(branched, folded, rtol=2e-5, atol=2e-6)
    plain = model.apply({"params": params}, images)
    assert (float(jnp.abs(folded - plain).max()) > 1e-3) == (scale != 0.0)


@pytest.mark.slow
def test_one_scale_per_example_is_that_examples_fold(vit):
    model, params, images, _, adapters = vit
    scales = jnp.asarray([0.5, 1.0, 1.5])
    with lora.branch(adapters, scales):
        branched = model.apply({"params": params}, images)
    for n, scale in enumerate(scales):
        single = model.apply({"params": lora.fold(params, adapters, scale)}, images[n : n + 1])
        np.testing.assert_allclose(branched[n : n + 1], single, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_gradients_of_branch_and_fold_agree(vit):
    model, params, images, _, adapters = vit

    def branched(a):
        with lora.branch(a, 1.5):
            return jnp.sum(model.apply({"params": params}, images) ** 2)

    def folded(a):
        return jnp.sum(model.apply({"params": lora.fold(params, a, 1.5)}, images) ** 2)

    for g, w in zip(
        jax.tree.leaves(jax.grad(branched)(adapters)),
        jax.tree.leaves(jax.grad(folded)(adapters)),
        strict=True,
    ):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * float(jnp.abs(w).max()))


def test_scaling_the_branch_is_the_displaced_dense_weight(vit):
    _, params, _, _, adapters = vit
    step = 0.5
    base = trees.select(params, tuple(adapters))
    theta = trees.select(lora.fold(params, adapters), tuple(adapters))
    for path, folded in trees.select(
        lora.fold(params, adapters, 1 + step), tuple(adapters)
    ).items():
        wanted = theta[path] + step * (theta[path] - base[path])
        np.testing.assert_allclose(folded, wanted, rtol=1e-5, atol=1e-6)


def test_norm_without_forming_the_product(vit):
    *_, adapters = vit
    dense = sum(float(jnp.sum(x**2)) for x in lora.displacement(adapters).values())
    np.testing.assert_allclose(lora.squared_norm(adapters), dense, rtol=1e-5)


def test_fold_keeps_types_and_other_leaves(vit):
    _, params, _, _, adapters = vit
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    folded = lora.fold(low, adapters)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(folded))
    changed = [
        path
        for path, leaf in trees.leaves_by_path(folded).items()
        if not jnp.array_equal(leaf, trees.leaves_by_path(low)[path])
    ]
    assert changed == list(adapters)


@pytest.mark.parametrize(
    "pattern,rank,message",
    [
        (PATTERN, 0, "rank=0"),
        (PATTERN, 17, "rank=17: must lie in 1..16"),
        ("pos_embed", 2, "input_axes="),
        (r".*/norm1/bias", 1, "dense kernels"),
        ("attn/key", 2, "matches none"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(vit, pattern, rank, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), vit[1], pattern, rank)


def test_a_branch_on_a_layer_that_is_not_dense_is_refused(vit):
    model, params, images, _, _ = vit
    wrong = {"norm/kernel": lora.Adapter(jnp.ones((16, 1)), jnp.ones((1, 16)))}
    with pytest.raises(ValueError, match="LayerNorm.*use fold"), lora.branch(wrong):
        model.apply({"params": params}, images)
