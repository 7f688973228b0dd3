import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pm_jax import task_vectors, trees
from pm_jax.types import InvalidInput


def models(dtype, seed=0, count=4000):
    rng = np.random.default_rng(seed)
    return tuple(
        {"a": jnp.asarray(rng.normal(size=count) * 10.0 ** rng.integers(-4, 4, count), dtype)}
        for _ in range(2)
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lerp_is_exact_at_both_ends_and_for_equal_models(dtype, wrap):
    previous, new = models(dtype)
    lerp = wrap(trees.lerp)
    assert jnp.array_equal(lerp(previous, new, 0.0)["a"], previous["a"])
    assert jnp.array_equal(lerp(previous, new, 1.0)["a"], new["a"])
    for alpha in (0.1, 1 / 3, 0.5, 0.9):
        assert jnp.array_equal(lerp(new, new, alpha)["a"], new["a"])
    assert lerp(previous, new, 0.3)["a"].dtype == dtype


def test_lerp_agrees_with_float64():
    previous, new = models(jnp.float32)
    low, high = (np.asarray(m["a"], np.float64) for m in (previous, new))
    for alpha in (0.2, 0.7):
        got = np.asarray(trees.lerp(previous, new, alpha)["a"], np.float64)
        scale = np.maximum(abs(low), abs(high))
        assert np.max(abs(got - (low + np.float32(alpha) * (high - low))) / scale) < 4 * 2**-23


def test_lerp_refuses_shapes_that_would_broadcast():
    with pytest.raises(
        InvalidInput, match=r"^new=float32\[1\] at a: previous is float32\[3\] there"
    ):
        trees.lerp({"a": jnp.ones(3)}, {"a": jnp.ones(1)}, 0.5)


def test_inner_product_accumulates_in_float32_whatever_the_leaf_type():
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.normal(size=(300, 700)), jnp.bfloat16) for _ in range(2))
    expected = np.vdot(np.asarray(left, np.float64), np.asarray(right, np.float64))
    got = trees.inner([left], [right])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    weight = jnp.asarray(rng.uniform(size=left.shape), jnp.float32)
    expected = np.sum(np.asarray(left, np.float64) * np.asarray(right, np.float64) * weight)
    np.testing.assert_allclose(trees.inner([left], [right], [weight]), expected, rtol=1e-5)


def test_inner_product_is_float64_for_float64_leaves(float64):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 1000))
    got = trees.inner(jnp.asarray(left), jnp.asarray(right))
    np.testing.assert_allclose(got, left @ right, rtol=1e-13)


def test_inner_product_does_not_depend_on_the_order_of_leaves():
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.normal(size=100), jnp.float32) for _ in range(6)]
    trees_in_order = [dict(zip(names, leaves, strict=True)) for names in ("abcdef", "fedcba")]
    forward, backward = (trees.inner(tree, tree) for tree in trees_in_order)
    np.testing.assert_allclose(forward, backward, rtol=1e-6)


def test_a_pattern_that_matches_nothing_lists_near_misses():
    tree = {"blocks_0": {"attn": {"key": {"kernel": 1.0}}}, "head": {"kernel": 1.0}}
    with pytest.raises(ValueError, match="blocks_0/attn/key/kernel"):
        trees.match_paths(tree, "attn/key")
    with pytest.raises(ValueError, match="not a regular expression"):
        trees.match_paths(tree, "(")
    with pytest.raises(ValueError, match="none/here"):
        trees.select(tree, ("none/here",))


def test_select_and_replace_are_inverse_on_a_linen_tree_and_on_nnx_state():
    linen = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    for tree in (linen, state):
        chosen = trees.select(tree, ".*kernel")
        assert len(chosen) == 1 and next(iter(chosen)).endswith("kernel")
        doubled = trees.replace(tree, jax.tree.map(lambda x: 2 * x, chosen))
        assert jax.tree.structure(doubled) == jax.tree.structure(tree)
        path = next(iter(chosen))
        assert jnp.array_equal(trees.leaves_by_path(doubled)[path], 2 * chosen[path])
        other = [p for p in trees.leaves_by_path(tree) if p != path][0]
        assert jnp.array_equal(
            trees.leaves_by_path(doubled)[other], trees.leaves_by_path(tree)[other]
        )


def test_random_leaves_do_not_depend_on_the_rest_of_the_tree():
    key = jax.random.key(3)
    alone = trees.gaussian_like(key, {"b": jnp.ones(4)})
    among = trees.gaussian_like(key, {"a": jnp.ones(2), "b": jnp.ones(4), "c": jnp.ones(1)})
    assert jnp.array_equal(alone["b"], among["b"])
    assert not jnp.array_equal(among["b"][:2], among["a"])


def test_task_vector_arithmetic_by_hand():
    previous = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    trained = {"w": jnp.asarray([2.0, 0.0], jnp.bfloat16)}
    delta = task_vectors.difference(trained, previous)
    assert delta["w"].dtype == jnp.float32
    assert delta["w"].tolist() == [1.0, -2.0]
    moved = task_vectors.apply(previous, delta, 0.5)
    assert moved["w"].dtype == jnp.bfloat16 and moved["w"].tolist() == [1.5, 1.0]
    combined = task_vectors.combine([delta, delta], [2.0, -0.5])
    assert combined["w"].tolist() == [1.5, -3.0]
    assert float(trees.norm(delta)) == pytest.approx(5**0.5, rel=1e-6)


def test_combining_needs_one_coefficient_per_task_vector():
    with pytest.raises(ValueError, match="2 task vectors"):
        task_vectors.combine([jnp.ones(1), jnp.ones(1)], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        task_vectors.combine([], [])


def test_bfloat16_difference_is_not_rounded():
    previous, trained = jnp.asarray([256.0], jnp.bfloat16), jnp.asarray([1.0], jnp.bfloat16)
    assert task_vectors.difference(trained, previous).tolist() == [-255.0]
