"""Adapters on every kind of kernel: the branch, the fold and what is refused."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pm_jax
from pm_jax import lora, perturbation, trees
from pm_jax.types import InvalidInput
from tests.dense_models import MODELS, VECTORS, example
from tests.small_runs import slow

COMMON = {
    "dense", "general, one axis to two", "general, two axes to one", "einsum, outputs first",
    "convolution", "convolution in groups", "scan", "remat",
}  # fmt: skip
ALL = [name if name in COMMON else slow(name) for name in MODELS]


def adapters_of(name, rank=2):
    """Adapters whose products are not 0."""
    model, params, inputs = example(name)
    fresh = lora.init(
        jax.random.key(2), params, r"(.*/)?kernel", rank, module=model, inputs=(inputs,)
    )
    return jax.tree.map(
        lambda x: 0.4 * jnp.cos(jnp.arange(x.size) + x.ndim).reshape(x.shape), fresh
    )


def outputs(model, params, inputs, **kwargs):
    rngs = {"dropout": jax.random.key(7)}
    return model.apply({"params": params}, inputs, rngs=rngs, **kwargs)


def close(left, right, rtol=1e-4):
    # Sums in another order: 1e-5 of the largest entry, as for the gradients of the ViT.
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ALL)
def test_branch_and_fold_agree_in_outputs_and_gradients(name):
    model, params, inputs = example(name)
    adapters = adapters_of(name)

    def by_branch(adapters, x):
        with lora.branch(adapters, 1.5):
            y = outputs(model, params, x)
        return jnp.sum(y**2), y

    def by_fold(adapters, x):
        y = outputs(model, lora.fold(params, adapters, 1.5), x)
        return jnp.sum(y**2), y

    branched, folded = (
        jax.jit(jax.grad(loss, (0, 1), has_aux=True))(adapters, inputs)
        for loss in (by_branch, by_fold)
    )
    close(branched, folded)
    plain = outputs(model, params, inputs)
    assert float(jnp.abs(folded[1] - plain).max()) > 1e-2 * float(jnp.abs(plain).max())


@pytest.mark.parametrize("name", ["general, two axes to one", slow("scan"), slow("setup")])
def test_one_scale_per_example_is_that_examples_fold(name):
    model, params, inputs = example(name)
    adapters, scales = adapters_of(name), jnp.asarray([0.5, -1.0, 1.5])
    with lora.branch(adapters, scales):
        branched = outputs(model, params, inputs)
    for n, scale in enumerate(scales):
        # All examples, because masks of dropout depend on their number.
        folded = outputs(model, lora.fold(params, adapters, scale), inputs)
        close(branched[n], folded[n])


@pytest.mark.parametrize("name", ALL)
def test_shapes_norms_and_displacements_are_those_of_the_kernels(name):
    model, params, _ = example(name)
    adapters = adapters_of(name)
    kernels = trees.select(params, r"(.*/)?kernel")
    steps = lora.displacement(adapters, params)
    assert list(adapters) == list(kernels)
    for path, (a, b) in adapters.items():
        assert steps[path].shape == kernels[path].shape
        # By hand: each matrix of the stack is the product of its factors.
        stacked = a.ndim + b.ndim - 2 - kernels[path].ndim
        for index in np.ndindex(a.shape[:stacked]):
            left = np.asarray(a[index], np.float64)
            step = left.reshape(-1, 2) @ np.asarray(b[index], np.float64).reshape(2, -1)
            found = np.asarray(steps[path][index]).reshape(step.shape)
            np.testing.assert_allclose(found, step, rtol=1e-5, atol=1e-6)
    dense = sum(float(jnp.sum(x.astype(jnp.float32) ** 2)) for x in steps.values())
    np.testing.assert_allclose(lora.squared_norm(adapters, params), dense, rtol=1e-5)
    assert lora.count(adapters) == sum(a.size + b.size for a, b in adapters.values())


@pytest.mark.parametrize("name", ALL)
def test_fresh_adapters_change_nothing_and_are_drawn_within_the_bound_of_their_rows(name):
    model, params, inputs = example(name)
    adapters = lora.init(
        jax.random.key(5), params, r"(.*/)?kernel", 1, module=model, inputs=(inputs,)
    )
    folded = lora.fold(params, adapters)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(folded), strict=True):
        assert jnp.array_equal(before, after)
    for path, axes in lora.adapted_axes(
        params, r"(.*/)?kernel", 1, module=model, inputs=(inputs,)
    ).items():
        a = adapters[path].a
        rows = axes.sides(trees.leaves_by_path(params)[path].shape)[0]
        assert 0 < float(jnp.abs(a).max()) <= rows**-0.5
        # Layers of a stack have factors of their own.
        flat = np.asarray(a).reshape(*a.shape[: axes.stacked], -1)
        assert len(np.unique(flat.reshape(-1, flat.shape[-1]), axis=0)) == np.prod(
            a.shape[: axes.stacked], dtype=int
        )


@pytest.mark.parametrize(
    "leaves,given,shapes",
    [
        ({"w/kernel": (4, 5), "w/bias": (5,)}, {}, ((4, 2), (2, 5))),
        ({"w/kernel": (4, 2, 3), "w/bias": (2, 3)}, {}, ((4, 2), (2, 2, 3))),
        ({"w/kernel": (2, 3, 4), "w/bias": (4,)}, {}, ((2, 3, 2), (2, 4))),
        ({"w/kernel": (7, 4, 5), "w/bias": (7, 5)}, {}, ((7, 4, 2), (7, 2, 5))),
        ({"w/kernel": (3, 3, 4, 5), "w/bias": (5,)}, {}, ((3, 3, 4, 2), (2, 5))),
        ({"w/kernel": (2, 7, 4, 5), "w/bias": (2, 7, 5)}, {}, ((2, 7, 4, 2), (2, 7, 2, 5))),
        ({"w/kernel": (4, 2, 3)}, {"input_axes": 1}, ((4, 2), (2, 2, 3))),
        ({"w/kernel": (4, 2, 3)}, {"input_axes": 2}, ((4, 2, 2), (2, 3))),
        ({"w/kernel": (7, 4, 5)}, {"stacked_axes": 1}, ((7, 4, 2), (7, 2, 5))),
        ({"w/kernel": (7, 4, 2, 3)}, {"stacked_axes": {".*": 1}, "input_axes": {"w/.*": 2}},
         ((7, 4, 2, 2), (7, 2, 3))),
        # A bias that would fit twice, and what tells.
        ({"w/kernel": (4, 4, 5), "w/bias": (4, 5)}, {"stacked_axes": 0}, ((4, 2), (2, 4, 5))),
        ({"w/kernel": (4, 4, 5), "w/bias": (4, 5)}, {"stacked_axes": 1}, ((4, 4, 2), (4, 2, 5))),
    ],
)  # fmt: skip
def test_axes_follow_from_the_bias_or_are_given(leaves, given, shapes):
    params = {"w": {path[2:]: jnp.ones(shape) for path, shape in leaves.items()}}
    (adapter,) = lora.init(jax.random.key(0), params, ".*/kernel", 2, **given).values()
    assert (adapter.a.shape, adapter.b.shape) == shapes


@pytest.mark.parametrize(
    "leaves,given,message",
    [
        ({"kernel": (4, 4, 5), "bias": (4, 5)}, {}, r"may be \(4,\) x \(4, 5\) or .* for each"),
        ({"kernel": (4, 4, 5), "bias": (4, 5)}, {"input_axes": 1}, "stacked_axes="),
        ({"kernel": (4, 2, 3)}, {}, "give the number of its input axes"),
        ({"kernel": (3, 3, 4, 5)}, {"stacked_axes": 1}, "input_axes="),
        ({"kernel": (4, 5)}, {"input_axes": 2}, "cannot have input_axes=2"),
        ({"kernel": (4, 2, 3)}, {"input_axes": 0}, "cannot have input_axes=0"),
        ({"kernel": (4, 2, 3)}, {"input_axes": 1, "stacked_axes": 2}, "cannot have"),
        ({"kernel": (4,)}, {}, "none of the dense kernels"),
        ({"scale": (4, 4)}, {}, "none of the dense kernels"),
        ({"kernel": (4, 2, 3), "bias": (2, 3)}, {"rank": 5}, r"rank=5: must lie in 1..4"),
        ({"kernel": (9, 2, 3), "bias": (9, 3)}, {"rank": 3}, r"rank=3: must lie in 1..2"),
    ],
)
def test_what_is_no_kernel_or_several_is_refused_in_one_line(leaves, given, message):
    params = {name: jnp.ones(shape) for name, shape in leaves.items()}
    given = {"rank": 2, **given}
    with pytest.raises(InvalidInput, match=message) as error:
        lora.init(jax.random.key(0), params, "kernel|scale", given.pop("rank"), **given)
    assert "\n" not in str(error.value) and next(iter(leaves)) in str(error.value)


def test_whole_numbers_have_no_adapters():
    with pytest.raises(InvalidInput, match="int8 is none of the dense kernels"):
        lora.init(jax.random.key(0), {"kernel": jnp.ones((4, 4), jnp.int8)}, "kernel", 2)


def test_a_linen_module_needs_inputs():
    with pytest.raises(InvalidInput, match="give inputs="):
        lora.init(jax.random.key(0), {"kernel": jnp.ones((4, 4))}, ".*", 2, module=nn.Dense(4))


@pytest.mark.parametrize(
    "a,b,message",
    [
        ((4, 2), (2, 2, 3), None),
        ((4, 2, 2), (2, 2, 3), "do not fit the kernel"),
        ((4, 3), (2, 2, 3), "do not fit the kernel"),
        ((5, 2), (2, 2, 3), "do not fit the kernel"),
    ],
)
def test_factors_must_fit_each_other_and_the_kernel(a, b, message):
    params = {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}
    adapters = {"kernel": lora.Adapter(jnp.ones(a), jnp.ones(b))}

    def branched():
        with lora.branch(adapters):
            return nn.DenseGeneral((2, 3)).apply({"params": params}, jnp.ones((1, 4)))

    for use in (lambda: lora.fold(params, adapters), branched):
        if message is None:
            use()
            continue
        with pytest.raises(InvalidInput, match=f"adapters=kernel: .*{message}"):
            use()


def test_a_stack_whose_factors_look_like_one_adapter_needs_the_parameters():
    # Two layers and rank 2: [2, 4, 2] and [2, 2, 4] are also factors of a kernel [2, 4, 2, 4].
    adapters = {"kernel": lora.Adapter(jnp.ones((2, 4, 2)), jnp.ones((2, 2, 4)))}
    for function in (lora.displacement, lora.squared_norm):
        with pytest.raises(InvalidInput, match="give params="):
            function(adapters)
    kernel = {"kernel": jnp.zeros((2, 4, 4))}
    assert lora.displacement(adapters, kernel)["kernel"].shape == (2, 4, 4)
    assert float(lora.squared_norm(adapters, kernel)) == 2 * 4 * 4 * 4
    assert float(lora.squared_norm(adapters, {"kernel": jnp.zeros((2, 4, 2, 4))})) == 256


class Twice(nn.Module):
    """A layer that scales the output of the one that it is a subclass of."""

    layer: str

    @nn.compact
    def __call__(self, x):
        class Doubled(nn.Dense):
            def __call__(self, x):
                return 2 * super().__call__(x)

        class Standardised(nn.Dense):
            def param(self, name, *args, **kwargs):
                value = super().param(name, *args, **kwargs)
                return value / jnp.std(value) if name == "kernel" else value

        class Own(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))

        kinds = {
            "Doubled": Doubled, "Standardised": Standardised, "Own": Own,
            "ConvTranspose": lambda size, name: nn.ConvTranspose(size, (3,), name=name),
        }  # fmt: skip
        layer = kinds[self.layer]
        return Own(name="w")(x) if self.layer == "Own" else layer(3, name="w")(x)


@pytest.mark.parametrize("layer", ["Doubled", "Standardised", "Own", "ConvTranspose"])
def test_layers_that_pm_jax_does_not_know_are_named(layer):
    model, inputs = Twice(layer), jnp.ones((2, 5, 4))
    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    adapters = lora.init(jax.random.key(0), params, ".*kernel", 1, input_axes={".*": None}
                         if layer != "ConvTranspose" else 2)  # fmt: skip
    with (
        pytest.raises(InvalidInput, match=f"adapters=w/kernel: belongs to a {layer}.*use fold"),
        lora.branch(adapters),
    ):
        model.apply({"params": params}, inputs)


def test_a_masked_convolution_is_refused():
    model = nn.Conv(3, (2,), mask=jnp.tril(jnp.ones((2, 4, 3))))
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 5, 4)))["params"]
    adapters = lora.init(jax.random.key(0), params, "kernel", 1)
    with pytest.raises(InvalidInput, match="Conv layer .*masked.*use fold"), lora.branch(adapters):
        model.apply({"params": params}, jnp.ones((1, 5, 4)))


@pytest.mark.parametrize(
    "path,near",
    [
        ("no/such/kernel", "nearest are"),
        ("head/weight", "head/kernel"),
        ("blocks/kernel", "belongs to a Step"),
        ("blocks/key/kernel/deeper", "blocks/key/kernel"),
    ],
)
def test_an_adapter_that_no_layer_used_is_an_error(path, near):
    model, params, inputs = example("scan")
    wrong = {path: lora.Adapter(jnp.ones((4, 6, 2)), jnp.ones((4, 2, 6)))}
    with pytest.raises(InvalidInput, match=f"adapters={re.escape(path)}: .*{near}"):
        with lora.branch({**adapters_of("scan"), **wrong}):
            model.apply({"params": params}, inputs)


def test_an_adapter_of_a_program_that_was_compiled_before_is_an_error():
    model, params, inputs = example("dense")
    apply = jax.jit(lambda params: model.apply({"params": params}, inputs))
    apply(params)
    with pytest.raises(InvalidInput, match="was jitted before does not see this context"):
        with lora.branch(adapters_of("dense")):
            apply(params)


COMPILED = nn.jit(nn.Dense)


def test_a_layer_within_a_compiled_one_is_refused_and_stays_as_it_is():
    model, inputs = COMPILED(5), jnp.ones(VECTORS)
    params = model.init(jax.random.key(0), inputs)
    adapters = {"kernel": lora.Adapter(jnp.ones((6, 2)), jnp.ones((2, 5)))}
    with pytest.raises(InvalidInput, match="kernel: .*within nn.jit"), lora.branch(adapters):
        model.apply(params, inputs)
    # Flax would have kept the program with the branch for all later calls.
    close(model.apply(params, inputs), nn.Dense(5).apply(params, inputs))


def test_an_exception_within_the_context_stays_the_exception():
    with pytest.raises(KeyError, match="mine"), lora.branch(adapters_of("dense")):
        raise KeyError("mine")


def test_leaves_without_adapters_have_no_branch_and_nested_ones_do():
    model, params, inputs = example("general, one axis to two")
    adapters = adapters_of("general, one axis to two")
    with lora.branch({"bias": params["bias"]}):
        plain = model.apply({"params": params}, inputs)
    with lora.branch({**params, **adapters}):
        branched = model.apply({"params": params}, inputs)
    np.testing.assert_array_equal(plain, model.apply({"params": params}, inputs))
    close(branched, model.apply({"params": lora.fold(params, adapters)}, inputs))


@pytest.mark.parametrize(
    "name", ["general, two axes to one", slow("attention"), slow("scan"), slow("convolution")]
)
@pytest.mark.parametrize(
    "law",
    [perturbation.symmetric(), slow(perturbation.gaussian(0.3)), slow(perturbation.antithetic())],
)
def test_perturbation_of_adapters_is_that_of_the_folded_kernels(name, law):
    model, params, inputs = example(name)
    adapters = adapters_of(name)
    base = trees.select(params, tuple(adapters))

    def loss(point):
        with lora.branch(point):
            dense = trees.replace(params, lora.dense_leaves(point))
            return jnp.sum(outputs(model, dense, inputs) ** 2)

    def loss_of_kernels(point):
        return jnp.sum(outputs(model, trees.replace(params, point), inputs) ** 2)

    folded = lora.fold(base, adapters)
    for key in jax.random.split(jax.random.key(3), 3):
        found = pm_jax.perturbed(loss, law)(key, adapters, base)
        wanted = pm_jax.perturbed(loss_of_kernels, law)(key, folded, base)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.slow
def test_kernels_of_attention_merge_in_the_coordinates_of_the_effective_weights():
    model, params, inputs = example("attention")
    adapters = adapters_of("attention")
    previous = trees.select(params, tuple(adapters))
    trained = lora.fold(previous, adapters)

    def logits(leaves, x):
        return model.apply({"params": trees.replace(params, leaves)}, x).mean(axis=1)

    batch = pm_jax.Batch(inputs, jnp.asarray([0, 1, 2]))
    rule, measure = pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(logits)
    state = rule.init(previous)
    quadratic = pm_jax.measure_all(measure, previous, batch, 3).quadratic
    evidence = pm_jax.Evidence(quadratic=quadratic)
    first, state, _ = rule.update(state, previous=previous, trained=previous, evidence=evidence)
    quadratic = pm_jax.measure_all(measure, trained, batch, 3).quadratic
    merged, state, info = rule.update(
        state, previous=first, trained=trained, evidence=pm_jax.Evidence(quadratic=quadratic)
    )
    assert 0.0 < float(info.alpha) < 1.0
    # What the merge gives is the fold with alpha: kernels of the same shapes.
    close(merged, lora.fold(previous, adapters, info.alpha))
