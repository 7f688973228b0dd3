import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import curvature, losses, trees
from pm_jax.curvature import measures, products
from pm_jax.types import Batch
from tests import oracles
from tests.small_runs import slow

EXAMPLES = 13


def fisher_empirical_oracle(params, batch):
    return (oracles.per_example_gradients(params, batch) ** 2).mean(axis=0)


def fisher_exact_oracle(params, batch):
    return np.diag(oracles.dense_gauss_newton(params, batch))


DIAGONAL = {
    "fisher_empirical": (
        functools.partial(curvature.fisher_empirical, oracles.losses),
        fisher_empirical_oracle,
    ),
    "fisher_exact": (
        functools.partial(curvature.fisher_exact, oracles.network),
        fisher_exact_oracle,
    ),
    "identity": (
        lambda chunk_size=1: curvature.identity(),
        lambda params, batch: np.ones_like(oracles.flat(params)),
    ),
}


def per_example_along(name, params, direction, batch):
    d = oracles.flat(direction)
    if name == "fisher_empirical":
        return (oracles.per_example_gradients(params, batch) ** 2) @ d**2
    matrices = oracles.dense_gauss_newtons(params, batch)
    if name == "fisher_exact":
        return np.diagonal(matrices, axis1=1, axis2=2) @ d**2
    if name == "gauss_newton":
        return np.einsum("p,npq,q->n", d, matrices, d)
    singles = [Batch(batch.inputs[n : n + 1], batch.labels[n : n + 1]) for n in range(EXAMPLES)]
    return np.asarray([d @ oracles.dense_hessian(params, single) @ d for single in singles])


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("name", DIAGONAL)
def test_diagonal_fisher_equals_the_dense_one(name, chunk_size):
    make, oracle = DIAGONAL[name]
    params, _, batch = oracles.problem(EXAMPLES)
    measure = make(chunk_size=chunk_size)
    found = measures.measure_all(measure, params, batch, 8).quadratic
    np.testing.assert_allclose(oracles.flat(found.diagonal), oracle(params, batch), rtol=1e-5)
    assert found.center is not None and float(found.value(params)) == 0.0


class Tokens(nn.Module):
    """Dense layers with and without token axes, and a norm, which is no dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(6, name="token")(x))
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(4, name="head")(x)


@pytest.fixture
def tokens():
    model, rng = Tokens(), np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(EXAMPLES, 3, 5)), jnp.float32)
    batch = Batch(inputs, jnp.asarray(rng.integers(4, size=EXAMPLES)))
    params = trees.leaves_by_path(jax.jit(model.init)(jax.random.key(0), inputs)["params"])
    params = {k: v + 0.1 * jnp.cos(jnp.arange(v.size)).reshape(v.shape) for k, v in params.items()}
    direction = jax.tree.map(lambda v: jnp.sin(jnp.arange(v.size)).reshape(v.shape), params)

    def logits_fn(leaves, inputs):
        nested = flax.traverse_util.unflatten_dict(leaves, sep="/")
        return model.apply({"params": nested}, inputs)

    return logits_fn, params, direction, batch


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [4, slow(64)])
@pytest.mark.parametrize("layers", [("token", "head"), slow(("head",))])
@pytest.mark.parametrize("kind", ["empirical", "exact", "sampled"])
def test_dense_layers_give_the_same_fisher_as_per_example_gradients(
    tokens, kind, layers, chunk_size
):
    logits_fn, params, direction, batch = tokens
    if kind == "empirical":
        make = functools.partial(curvature.fisher_empirical, losses.cross_entropy(logits_fn))
    else:
        samples = 2 if kind == "sampled" else None
        make = functools.partial(curvature.fisher_exact, logits_fn, num_samples=samples)
    found = [
        measures.measure_all(
            make(chunk_size=chunk_size, dense_layers=dense), params, batch, 7, direction,
            jax.random.key(1),
        )
        for dense in ((), layers)
    ]  # fmt: skip
    plain, fast = (f.quadratic.diagonal for f in found)
    for path in params:
        scale = float(jnp.abs(plain[path]).max())
        np.testing.assert_allclose(fast[path], plain[path], rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(found[1].along, found[0].along, rtol=1e-5)
    np.testing.assert_allclose(found[1].standard_error, found[0].standard_error, rtol=1e-5)


def test_a_name_that_is_no_dense_layer_or_is_called_twice_is_refused(tokens):
    logits_fn, params, direction, batch = tokens
    measure = curvature.fisher_exact(logits_fn, dense_layers=("norm",))
    with pytest.raises(ValueError, match="dense_layers=.*norm"):
        measures.measure_all(measure, params, batch, 5)

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(5, use_bias=False, name="shared")
            return shared(shared(x))

    def twice(leaves, inputs):
        return Twice().apply({"params": {"shared": {"kernel": leaves["shared/kernel"]}}}, inputs)

    measure = curvature.fisher_exact(twice, dense_layers=("shared",))
    flat = Batch(batch.inputs[:, 0], batch.labels)
    with pytest.raises(ValueError, match="more than once"):
        measures.measure_all(measure, {"shared/kernel": jnp.eye(5)}, flat, 5)


def test_empirical_fisher_is_not_the_square_of_the_batch_gradient():
    params, _, batch = oracles.problem(EXAMPLES)
    per_example = oracles.per_example_gradients(params, batch)
    found = measures.measure_all(
        curvature.fisher_empirical(oracles.losses), params, batch, EXAMPLES
    )
    wrong = per_example.mean(axis=0) ** 2
    assert np.sum(oracles.flat(found.quadratic.diagonal)) > 2 * np.sum(wrong)


MEASURES = {
    "fisher_empirical": DIAGONAL["fisher_empirical"][0],
    "fisher_exact": DIAGONAL["fisher_exact"][0],
    "gauss_newton": functools.partial(curvature.gauss_newton, oracles.network),
    "hessian": functools.partial(curvature.hessian, oracles.losses),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("batch_size", [1, 7, 64, EXAMPLES])
def test_curvature_along_a_direction_and_its_error_for_any_batch_size(name, batch_size):
    params, direction, batch = oracles.problem(EXAMPLES)
    found = measures.measure_all(MEASURES[name](), params, batch, batch_size, direction)
    values = per_example_along(name, params, direction, batch)
    np.testing.assert_allclose(found.along, values.mean(), rtol=1e-5)
    error = values.std(ddof=1) / np.sqrt(EXAMPLES)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-5)
    assert float(found.examples) == EXAMPLES


def test_the_identity_along_a_direction_is_its_square_without_error():
    params, direction, batch = oracles.problem(EXAMPLES)
    found = measures.measure_all(curvature.identity(), params, batch, 7, direction)
    np.testing.assert_allclose(found.along, oracles.flat(direction) @ oracles.flat(direction), 1e-5)
    assert float(found.standard_error) == 0.0 and float(found.examples) == EXAMPLES
    found = measures.measure_all(curvature.identity(), params, batch, 7)
    assert np.isnan(found.along)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_sampled_labels_do_not_depend_on_the_batch_size(batch_size):
    params, _, batch = oracles.problem(EXAMPLES)
    measure = curvature.fisher_exact(oracles.network, num_samples=2, chunk_size=4)
    key = jax.random.key(5)
    whole = measures.measure_all(measure, params, batch, EXAMPLES, key=key).quadratic
    found = measures.measure_all(measure, params, batch, batch_size, key=key).quadratic
    np.testing.assert_allclose(
        oracles.flat(found.diagonal), oracles.flat(whole.diagonal), rtol=1e-5, atol=1e-9
    )


def test_sampled_labels_converge_to_the_expectation():
    params, _, batch = oracles.problem(EXAMPLES)
    measure = curvature.fisher_exact(oracles.network, num_samples=4000)
    found = measures.measure_all(measure, params, batch, EXAMPLES, key=jax.random.key(0))
    wanted = fisher_exact_oracle(params, batch)
    # 52,000 draws: relative errors of about 1 % of the typical entry.
    error = np.linalg.norm(oracles.flat(found.quadratic.diagonal) - wanted)
    assert error < 0.03 * np.linalg.norm(wanted)


def test_sampling_without_a_key_and_measuring_without_a_direction_are_refused():
    params, _, batch = oracles.problem(EXAMPLES)
    with pytest.raises(ValueError, match="key=None"):
        measures.measure_all(
            curvature.fisher_exact(oracles.network, num_samples=1), params, batch, 4
        )
    with pytest.raises(ValueError, match="direction=None"):
        measures.measure_all(curvature.gauss_newton(oracles.network), params, batch, 4)
    with pytest.raises(ValueError, match="chunk_size=0"):
        curvature.fisher_empirical(oracles.losses, chunk_size=0)
    with pytest.raises(ValueError, match="num_samples=0"):
        curvature.fisher_exact(oracles.network, num_samples=0)


@pytest.mark.slow
def test_padding_in_the_last_batch_changes_nothing():
    params, direction, batch = oracles.problem(EXAMPLES)
    padded = Batch(
        jnp.concatenate([batch.inputs, 1e3 * jnp.ones((3, oracles.FEATURES))]),
        jnp.concatenate([batch.labels, jnp.zeros(3, int)]),
        jnp.asarray([1.0] * EXAMPLES + [0.0] * 3),
    )
    for make in MEASURES.values():
        plain = measures.measure_all(make(), params, batch, 5, direction)
        masked = measures.measure_all(make(), params, padded, 5, direction)
        np.testing.assert_allclose(masked.along, plain.along, rtol=1e-5)
        np.testing.assert_allclose(masked.standard_error, plain.standard_error, rtol=1e-5)


@pytest.mark.slow
def test_products_of_single_examples_against_dense_matrices():
    params, direction, batch = oracles.problem(EXAMPLES)
    for name, got in {
        "gauss_newton": products.gauss_newton_along(oracles.network, params, direction, batch),
        "hessian": products.hessian_along(oracles.losses, params, direction, batch),
    }.items():
        values = per_example_along(name, params, direction, batch)
        np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-6 * abs(values).max())


@pytest.mark.slow
def test_hessian_vector_product_is_the_dense_one():
    params, direction, batch = oracles.problem(EXAMPLES)
    got = products.hessian_vector_product(
        lambda p, b: oracles.losses(p, b).mean(), params, direction, batch
    )
    wanted = oracles.dense_hessian(params, batch) @ oracles.flat(direction)
    np.testing.assert_allclose(oracles.flat(got), wanted, rtol=1e-5, atol=1e-6 * abs(wanted).max())


def test_gauss_newton_is_never_negative_for_confident_models():
    params, direction, batch = oracles.problem(EXAMPLES)
    confident = {**params, "v": 200 * params["v"]}
    got = products.gauss_newton_along(oracles.network, confident, direction, batch)
    assert float(got.min()) >= 0.0


def test_masked_classes_have_no_curvature_and_no_nan():
    params, direction, batch = oracles.problem(EXAMPLES)
    mask = jnp.asarray([True, True, False, True])

    def masked(p, inputs):
        return jnp.where(mask[None, :], oracles.network(p, inputs), -1e30)

    fisher = measures.measure_all(curvature.fisher_exact(masked), params, batch, 5, direction)
    assert float(jnp.abs(fisher.quadratic.diagonal["v"][:, 2]).max()) == 0.0
    along = measures.measure_all(curvature.gauss_newton(masked), params, batch, 5, direction)
    assert np.isfinite(float(along.along)) and float(along.along) > 0


def test_chunk_for_memory_bounds_the_gradients():
    params = {"a": jnp.zeros((100, 100)), "b": jnp.zeros(100, jnp.bfloat16)}
    per_example = 4 * (10_000 + 100)
    for memory in (1, per_example, 10.5 * per_example, 1e12):
        chunk = curvature.chunk_for_memory(params, memory)
        assert chunk == 1 or chunk * per_example <= memory
    assert curvature.chunk_for_memory(params, 10.5 * per_example) == 10
