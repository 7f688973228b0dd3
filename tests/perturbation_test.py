import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import lora, perturbation, trees
from tests import oracles


def expected_loss(loss_fn, law, params, base):
    """The mean over the law by enumeration: each value of s alone, as a law that is certain."""
    total = 0.0
    for step, probability in zip(law.steps, law.probabilities, strict=True):
        certain = perturbation.Perturbation((step,), (1.0,))
        total += probability * perturbation.perturbed(loss_fn, certain)(
            jax.random.key(0), params, base
        )
    return total


@pytest.fixture
def smooth(float64):
    params, direction, batch = oracles.problem(dtype=np.float64)
    base = jax.tree.map(lambda p, d: p - d, params, direction)
    return lambda p: oracles.losses(p, batch).mean(), params, base, direction


@pytest.mark.parametrize("epsilon,p", [(0.5, 1 / 3), (0.8, 0.25), (1.0, 0.5)])
def test_mean_of_the_sampled_loss_is_the_three_point_formula(smooth, epsilon, p):
    loss_fn, params, base, delta = smooth
    law = perturbation.symmetric(epsilon, (1 - 2 * p, p, p))

    def at(step):
        return loss_fn(jax.tree.map(lambda w, d: w + step * d, params, delta))

    difference = (at(epsilon) + at(-epsilon) - 2 * at(0.0)) / epsilon**2
    formula = at(0.0) + perturbation.curvature_weight(law) * difference
    assert perturbation.curvature_weight(law) == pytest.approx(p * epsilon**2, rel=1e-12)
    np.testing.assert_allclose(expected_loss(loss_fn, law, params, base), formula, rtol=1e-12)


@pytest.mark.parametrize("law", [perturbation.symmetric(0.5), perturbation.antithetic(0.4)])
def test_mean_gradient_on_a_quadratic_is_gradient_plus_two_lam_h_delta(float64, law):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, linear = jnp.asarray(root @ root.T), jnp.asarray(rng.normal(size=6))
    params, base = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=6))

    def loss_fn(w):
        return 0.5 * w @ matrix @ w + linear @ w

    got = jax.grad(lambda w: expected_loss(loss_fn, law, w, base))(params)
    weight = perturbation.curvature_weight(law)
    wanted = matrix @ params + linear + 2 * weight * matrix @ (params - base)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_gradient_of_one_draw_has_the_factor_one_plus_s(smooth):
    loss_fn, params, base, delta = smooth
    law = perturbation.Perturbation((0.5,), (1.0,))
    got = jax.grad(perturbation.perturbed(loss_fn, law), argnums=1)(jax.random.key(0), params, base)
    moved = jax.tree.map(lambda w, d: w + 0.5 * d, params, delta)
    wanted = jax.tree.map(lambda g: 1.5 * g, jax.grad(loss_fn)(moved))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12)


def test_antithetic_loss_is_its_own_expectation(smooth):
    loss_fn, params, base, _ = smooth
    law = perturbation.antithetic(0.5)
    drawn = perturbation.perturbed(loss_fn, law)(jax.random.key(7), params, base)
    np.testing.assert_allclose(drawn, expected_loss(loss_fn, law, params, base), rtol=1e-14)


def test_one_sided_law_adds_a_first_order_term(smooth):
    loss_fn, params, base, delta = smooth
    epsilon, p = 1e-4, 0.3
    law = perturbation.one_sided(epsilon, p)
    slope = trees.inner(jax.grad(loss_fn)(params), delta)
    added = expected_loss(loss_fn, law, params, base) - loss_fn(params)
    # First order in epsilon = 1e-4: the second-order remainder is 1e-4 of it.
    np.testing.assert_allclose(added, p * epsilon * slope, rtol=1e-3)


def test_gaussian_noise_has_the_norm_of_the_task_vector_and_no_nan_at_its_origin():
    params, delta, _ = oracles.problem()
    base = jax.tree.map(jnp.subtract, params, delta)
    law = perturbation.gaussian(0.5)
    moved = perturbation.displace(jax.random.key(1), law, jnp.asarray(0.5), params, base)
    noise = jax.tree.map(jnp.subtract, moved, params)
    np.testing.assert_allclose(trees.norm(noise), 0.5 * trees.norm(delta), rtol=1e-5)
    assert abs(float(trees.inner(noise, delta))) < 0.5 * float(trees.norm(noise)) * float(
        trees.norm(delta)
    )
    loss = perturbation.perturbed(lambda p: trees.norm(p), perturbation.gaussian(0.5, 1.0))
    gradient = jax.grad(loss, argnums=1)(jax.random.key(0), params, params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_sampled_frequencies_and_shapes():
    law = perturbation.symmetric(0.5, (0.5, 0.3, 0.2))
    draws = np.asarray(perturbation.sample(jax.random.key(0), law, (20_000,)))
    for value, probability in ((0.0, 0.5), (0.5, 0.3), (-0.5, 0.2)):
        # Five standard deviations of a frequency over 20,000 draws.
        assert abs(np.mean(draws == value) - probability) < 5 * 0.5 / 20_000**0.5
    assert perturbation.sample(jax.random.key(0), law).shape == ()
    assert float(perturbation.sample(jax.random.key(0), perturbation.none())) == 0.0


def test_a_perturbed_step_is_one_forward_pass():
    calls = []

    def loss_fn(w):
        calls.append(1)
        return jnp.sum(w**2)

    loss = perturbation.perturbed(loss_fn, perturbation.symmetric())
    jax.make_jaxpr(jax.grad(loss, argnums=1))(jax.random.key(0), jnp.ones(2), jnp.zeros(2))
    assert len(calls) == 1


def test_jit_equals_eager():
    params, delta, batch = oracles.problem()
    base = jax.tree.map(jnp.subtract, params, delta)
    loss = perturbation.perturbed(
        lambda p: oracles.losses(p, batch).mean(), perturbation.symmetric()
    )
    for seed in range(4):
        key = jax.random.key(seed)
        np.testing.assert_allclose(
            loss(key, params, base), jax.jit(loss)(key, params, base), rtol=1e-6
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: perturbation.symmetric(0.0),
        lambda: perturbation.symmetric(1.5),
        lambda: perturbation.symmetric(0.5, (0.5, 0.5, 0.5)),
        lambda: perturbation.symmetric(0.5, (0.5, 0.5)),
        lambda: perturbation.symmetric(0.5, (1.5, -0.25, -0.25)),
        lambda: perturbation.one_sided(0.5, 2.0),
        lambda: perturbation.gaussian(-1.0),
        lambda: perturbation.antithetic(float("nan")),
    ],
)
def test_settings_out_of_range_are_refused_when_the_law_is_made(make):
    with pytest.raises(ValueError, match="^(epsilon|probabilities)="):
        make()


# Losses as people have them.


def test_auxiliary_outputs_and_further_arguments_pass_through():
    def loss_fn(params, batch, *, scale):
        values = batch @ params
        return scale * jnp.mean(values**2), {"largest": jnp.max(values)}

    params, base, batch = jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, 0.0]), jnp.ones((3, 2))
    for law in (perturbation.symmetric(), perturbation.antithetic(), perturbation.none()):
        plain = perturbation.perturbed(lambda *args: loss_fn(*args, scale=2.0)[0], law)
        with_aux = perturbation.perturbed(loss_fn, law, has_aux=True)
        key = jax.random.key(3)
        (got, aux), gradient = jax.value_and_grad(with_aux, argnums=1, has_aux=True)(
            key, params, base, batch, scale=2.0
        )
        wanted = jax.value_and_grad(plain, argnums=1)(key, params, base, batch)
        np.testing.assert_array_equal(got, wanted[0])
        np.testing.assert_array_equal(gradient, wanted[1])
        assert aux["largest"].shape == ()


def adapted_loss(point, inputs):
    """Squared outputs of a linen layer whose kernel may have a branch."""
    with lora.branch(point):
        outputs = nn.Dense(2, use_bias=False).apply({"params": lora.dense_leaves(point)}, inputs)
    return jnp.mean(outputs**2)


def test_adapters_move_along_the_task_vector_of_their_product():
    key, inputs = jax.random.key(5), jnp.asarray([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]])
    kernel = jnp.arange(6.0).reshape(3, 2) / 6
    adapter = lora.Adapter(jnp.asarray([[1.0], [0.5], [-1.0]]), jnp.asarray([[0.25, -0.5]]))
    trained = {"kernel": kernel + adapter.a @ adapter.b}
    for law in (perturbation.symmetric(), perturbation.antithetic(), perturbation.gaussian(0.5, 1)):
        loss = perturbation.perturbed(adapted_loss, law)
        got = loss(key, {"kernel": adapter}, {"kernel": kernel}, inputs)
        np.testing.assert_allclose(got, loss(key, trained, {"kernel": kernel}, inputs), rtol=1e-5)


def test_a_draw_for_each_example_scales_its_own_branch():
    law, key = perturbation.symmetric(0.5), jax.random.key(1)
    kernel, inputs = jnp.ones((1, 2)), jnp.asarray([[1.0], [2.0], [3.0], [4.0]])
    adapter = lora.Adapter(jnp.asarray([[2.0]]), jnp.asarray([[1.0, -1.0]]))
    loss = perturbation.perturbed(adapted_loss, law, examples=4)
    got = loss(key, {"kernel": adapter}, {"kernel": kernel}, inputs)
    steps = perturbation.sample(jax.random.split(key)[0], law, (4,))
    assert len(set(steps.tolist())) > 1
    outputs = inputs * (kernel + (1 + steps[:, None]) * (adapter.a @ adapter.b))
    np.testing.assert_allclose(got, jnp.mean(outputs**2), rtol=1e-5)


def test_a_draw_for_each_example_is_refused_where_examples_share_what_moves():
    one, key = jnp.ones(1), jax.random.key(0)
    with pytest.raises(ValueError, match="one draw per example needs adapters, and w is an array"):
        perturbation.perturbed(lambda p: p["w"].sum(), perturbation.symmetric(), examples=2)(
            key, {"w": one}, {"w": one}
        )
    with pytest.raises(ValueError, match="examples=2: a Gaussian law perturbs the weights"):
        perturbation.perturbed(lambda p: p.sum(), perturbation.gaussian(), examples=2)
