import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from pm_jax import lora, perturbation, trees
from pm_jax.types import InvalidInput
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


def test_with_key_and_base_bound_it_takes_the_place_of_the_loss():
    def loss_fn(params, x, *, scale):
        return scale * jnp.sum((x @ params) ** 2)

    key, params, base = jax.random.key(2), jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, 0.0])
    loss = perturbation.perturbed(loss_fn, perturbation.gaussian(0.5, 1.0))
    bound = functools.partial(loss, key, base=base)
    got = jax.value_and_grad(bound)(params, jnp.ones((3, 2)), scale=2.0)
    wanted = jax.value_and_grad(loss, argnums=1)(key, params, base, jnp.ones((3, 2)), scale=2.0)
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(g, w)


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


class Regularized(nn.Module):
    """A linen model with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(6)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def regularized_problem():
    model, x = Regularized(), jax.random.normal(jax.random.key(4), (5, 3))
    variables = model.init(jax.random.key(0), x, train=False)
    params, statistics = variables["params"], variables["batch_stats"]
    base = jax.tree.map(lambda leaf: 0.5 * leaf - 0.1, params)

    def loss_fn(params, statistics, dropout_key, x, *, train):
        """The loss of a training loop; `train` is a Python flag."""
        logits, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            x,
            train=train,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        return jnp.mean(logits**2), (logits, updated["batch_stats"])

    return loss_fn, params, base, statistics, x


@pytest.mark.slow
@pytest.mark.parametrize(
    "law,train",
    [
        (perturbation.antithetic(0.4), True),
        (perturbation.antithetic(0.4), False),
        pytest.param(perturbation.symmetric(), True, marks=pytest.mark.slow),
        pytest.param(perturbation.gaussian(0.5, 1.0), True, marks=pytest.mark.slow),
        pytest.param(perturbation.none(), True, marks=pytest.mark.slow),
    ],
)
def test_statistics_dropout_keys_and_a_train_flag_work_as_in_a_training_loop(law, train):
    loss_fn, params, base, statistics, x = regularized_problem()
    key, dropout_key = jax.random.key(1), jax.random.key(2)
    step = jax.jit(
        jax.value_and_grad(perturbed_with_aux(loss_fn, law), argnums=1, has_aux=True),
        static_argnames="train",
    )
    (value, aux), gradient = step(key, params, base, statistics, dropout_key, x, train=train)

    # By hand: the passes of the law at their points, each with the same key and statistics.
    step_key, direction_key = jax.random.split(key)

    def by_hand(params):
        passes = [
            (weight, loss_fn(point, statistics, dropout_key, x, train=train))
            for s, weight in law.draws(step_key)
            for point in [perturbation.displace(direction_key, law, s, params, base)]
        ]
        return sum(weight * loss for weight, (loss, _) in passes), passes[-1][1][1]

    (wanted, wanted_aux), wanted_gradient = jax.value_and_grad(by_hand, has_aux=True)(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, right in ((aux, wanted_aux), (gradient, wanted_gradient)):
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6)
    moved = float(jnp.abs(aux[1]["BatchNorm_0"]["mean"]).max())
    assert (moved > 0) == train


def perturbed_with_aux(loss_fn, law):
    return perturbation.perturbed(loss_fn, law, has_aux=True)


def test_leaves_that_are_not_floating_point_stay_and_get_no_noise():
    params = {
        "w": jnp.asarray([2.0, 1.0]),
        "step": jnp.asarray(7),
        "key": jax.random.key(3),
        "mask": jnp.asarray([True, False]),
        "none": None,
    }
    base = params | {"w": jnp.zeros(2), "step": jnp.asarray(1), "key": jax.random.key(4)}
    for law in (perturbation.Perturbation((0.5,), (1.0,)), perturbation.gaussian(0.5, 1.0)):
        point = perturbation.displace(jax.random.key(0), law, 0.5, params, base)
        assert int(point["step"]) == 7 and point["mask"].tolist() == [True, False]
        assert bool(point["key"] == params["key"])
        # Noise of the law has half the norm of Delta, whatever whole numbers lie beside it.
        moved = float(jnp.linalg.norm(point["w"] - params["w"]))
        np.testing.assert_allclose(moved, 0.5 * 5**0.5, rtol=1e-5)
    loss = perturbation.perturbed(lambda p: jnp.sum(p["w"] * p["mask"]), law)
    gradient = jax.grad(loss, argnums=1, allow_int=True)(jax.random.key(0), params, base)
    assert gradient["w"].shape == (2,) and gradient["step"].dtype == jax.dtypes.float0


def test_a_legacy_key_gives_what_its_typed_key_gives():
    params, base = jnp.asarray([1.0, 2.0]), jnp.zeros(2)
    loss = perturbation.perturbed(lambda w: jnp.sum(w**2), perturbation.gaussian(0.5, 1.0))
    key = jax.random.key(3)
    with jax.legacy_prng_key("allow"):
        raw = loss(jax.random.key_data(key), params, base)
    np.testing.assert_array_equal(raw, loss(key, params, base))


def test_checks_leave_no_trace_in_the_program(monkeypatch):
    loss_fn, params, base, statistics, x = regularized_problem()
    step = perturbed_with_aux(loss_fn, perturbation.symmetric())
    arguments = (jax.random.key(1), params, base, statistics, jax.random.key(2), x)

    def lowered():
        return jax.jit(lambda *args: step(*args, train=True)).lower(*arguments).as_text()

    checked = lowered()
    for name in ("check_law", "check_models", "check_key"):
        monkeypatch.setattr(perturbation, name, lambda *_: None)
    monkeypatch.setattr(perturbation, "loss_and_aux", lambda output, _: output)
    assert lowered() == checked


def deleted(params):
    copy = jax.tree.map(jnp.copy, params)
    for leaf in jax.tree.leaves(copy):
        leaf.delete()
    return copy


def mistakes():
    w, key, law = (
        {"a": {"w": jnp.ones(3)}, "b": jnp.ones(2)},
        jax.random.key(0),
        perturbation.symmetric(),
    )

    def loss_fn(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def perturbed(loss_fn=loss_fn, law=law, **settings):
        return perturbation.perturbed(loss_fn, law, **settings)

    adapter = lora.Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)))
    return {
        "law not called": (
            lambda: perturbed(law=perturbation.symmetric),
            r"^perturbation=symmetric: is a function that makes a law; call it, as symmetric\(\)$",
        ),
        "law not called, elsewhere": (
            lambda: perturbation.curvature_weight(perturbation.antithetic),
            r"^perturbation=antithetic: is a function",
        ),
        "law not called, in a draw": (
            lambda: perturbation.sample(key, perturbation.gaussian),
            r"^perturbation=gaussian: is a function",
        ),
        "a number for the law": (lambda: perturbed(law=0.5), r"^perturbation=0.5: is no law; make"),
        "law and loss swapped": (
            lambda: perturbation.perturbed(law, loss_fn),
            r"^perturbation=loss_fn: is no law; make one with",
        ),
        "no function": (lambda: perturbed(loss_fn=3.0), r"^loss_fn=3.0: must be a function"),
        "examples": (lambda: perturbed(examples=0), r"^examples=0: must be the number of examples"),
        "arguments in another order": (
            lambda: perturbed()(w, w, key),
            r"^key: is a dict with floating-point leaves; the order is \(key, params, base, ...\), "
            r"and jax.grad needs argnums=1$",
        ),
        "argnums of another order": (
            lambda: jax.grad(perturbed())(w, w, key),
            r"^key: is a dict with floating-point leaves; .* argnums=1",
        ),
        "params and key swapped": (lambda: perturbed()(w, key, w), r"^params: is a PRNG key; the"),
        "no base": (
            lambda: perturbed()(key, w),
            r"^base: is missing; pass the model that the task started from",
        ),
        "a seed for the key": (
            lambda: perturbed()(0, w, w),
            r"^key=0: is no PRNG key; make one with jax.random.key\(seed\)$",
        ),
        "no key": (lambda: perturbed()(None, w, w), r"^key=None: is no PRNG key"),
        "many keys": (
            lambda: perturbed()(jax.random.split(key, 4), w, w),
            r"^key: has shape \(4,\); a call takes one key",
        ),
        "base without a leaf": (
            lambda: perturbed()(key, w, {"a": w["a"]}),
            r"^base: lacks b, which params has; give trees of one structure",
        ),
        "base with another leaf": (
            lambda: perturbed()(key, w, w | {"c": jnp.ones(1)}),
            r"^base: has c, which params lacks",
        ),
        "base of another shape": (
            lambda: perturbed()(key, w, w | {"b": jnp.ones(4)}),
            r"^base=float32\[4\] at b: params is float32\[2\] there",
        ),
        "base of another kind": (
            lambda: perturbed()(key, w, w | {"b": jnp.arange(2)}),
            r"^base=int32\[2\] at b: params is float32\[2\] there",
        ),
        "base in other containers": (
            lambda: perturbed()(key, w, FrozenDict(w)),
            r"^base=FrozenDict: params is dict",
        ),
        "base of adapters": (
            lambda: perturbed()(key, {"k": adapter}, {"k": adapter}),
            r"^base: has an adapter at k; pass the kernels",
        ),
        "deleted base": (
            lambda: perturbed()(key, w, deleted(w)),
            r"^base: the array at a/w was deleted, .* donate_argnums; keep a copy",
        ),
        "deleted base in a closure": (
            lambda: jax.jit(functools.partial(perturbed(), key, base=deleted(w)))(w),
            r"^base: the array at a/w was deleted",
        ),
        "deleted params": (lambda: perturbed()(key, deleted(w), w), r"^params: the array at a/w"),
        "all collections": (
            lambda: perturbed()(key, *2 * [{"params": w, "batch_stats": w}]),
            r"^params: has the collections params and batch_stats, .* pass variables\['params'\]",
        ),
        "nothing that moves": (
            lambda: perturbed()(key, {"n": jnp.arange(3)}, {"n": jnp.arange(3)}),
            r"^params: has no floating-point leaf",
        ),
        "empty": (lambda: perturbed()(key, {}, {}), r"^params: has no floating-point leaf"),
        "aux without has_aux": (
            lambda: perturbed(lambda p: (loss_fn(p), {}))(key, w, w),
            r"^has_aux=False: loss_fn returned a tuple of 2; .* pass has_aux=True",
        ),
        "has_aux without aux": (
            lambda: perturbed(has_aux=True)(key, w, w),
            r"^has_aux=True: loss_fn must return \(loss, aux\), and returned an array",
        ),
        "three outputs": (
            lambda: perturbed(lambda p: (loss_fn(p), 1, 2), has_aux=True)(key, w, w),
            r"^has_aux=True: .* returned a tuple of 3$",
        ),
        "losses of examples": (
            lambda: jax.grad(perturbed(lambda p: p["b"]), argnums=1)(key, w, w),
            r"^loss_fn: returned a loss of shape \(2,\); return a scalar, as jnp.mean or",
        ),
        "aux first": (
            lambda: perturbed(lambda p: ({}, loss_fn(p)), has_aux=True)(key, w, w),
            r"^loss_fn: returned a dict as the loss",
        ),
        "no loss": (lambda: perturbed(lambda p: None)(key, w, w), r"^loss_fn: returned a NoneType"),
        "a count": (
            lambda: perturbed(lambda p: jnp.sum(p["b"] > 0))(key, w, w),
            r"^loss_fn: returned a loss of type int32",
        ),
        "the same without a perturbation": (
            lambda: perturbed(lambda p: p["b"], perturbation.none())(key, w, w),
            r"^loss_fn: returned a loss of shape \(2,\)",
        ),
    }


@pytest.mark.parametrize("name", list(mistakes()))
def test_mistakes_are_one_line_that_names_the_argument(name):
    call, message = mistakes()[name]
    with pytest.raises(InvalidInput, match=message) as error:
        call()
    assert "\n" not in str(error.value)
