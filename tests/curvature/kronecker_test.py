"""Kronecker-factored curvature against the dense matrix that it stands for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import trees
from pm_jax.curvature import kronecker
from pm_jax.curvature.diagonal import fisher_exact
from pm_jax.curvature.exact import gauss_newton
from pm_jax.curvature.kronecker import KroneckerQuadratic
from pm_jax.curvature.measures import measure_all
from pm_jax.curvature.squared_gradients import Passes
from pm_jax.types import Batch

SHAPES = {"a": (4, 3), "b": (2, 5), "c": (6,)}


def tree(rng):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in SHAPES.items()}  # fmt: skip


def task(rng):
    """A quadratic and its dense matrix by leaf, float64."""

    def moment(width):
        rows = rng.normal(size=(2 * width, width))
        return rows.T @ rows / len(rows)

    inputs = {name: moment(SHAPES[name][0]) for name in "ab"}
    outputs = {name: moment(SHAPES[name][1]) for name in "ab"}
    diagonal = abs(rng.normal(size=6))
    dense = {name: np.kron(inputs[name], outputs[name]) for name in "ab"}
    as_slots = [
        {name: jnp.asarray(x[None], jnp.float32) for name, x in side.items()}
        for side in (inputs, outputs)
    ]
    center = tree(rng)
    quadratic = KroneckerQuadratic.at(center, *as_slots, {"c": jnp.asarray(diagonal, jnp.float32)})
    return quadratic, {**dense, "c": np.diag(diagonal)}, center


def by_hand(matrices, left, right):
    return sum(
        np.asarray(left[name], np.float64).ravel()
        @ matrices[name]
        @ np.asarray(right[name], np.float64).ravel()
        for name in SHAPES
    )


def minus(left, right):
    return {name: np.asarray(left[name], np.float64) - right[name] for name in left}


def test_one_task_answers_as_the_dense_matrix():
    rng = np.random.default_rng(0)
    quadratic, dense, center = task(rng)
    theta, first, second = tree(rng), tree(rng), tree(rng)
    wanted = [[by_hand(dense, a, b) for b in (first, second)] for a in (first, second)]
    np.testing.assert_allclose(quadratic.gram([first, second]), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(quadratic.curvature_along(first), wanted[0][0], rtol=1e-5)
    step = minus(theta, center)
    np.testing.assert_allclose(quadratic.value(theta), by_hand(dense, step, step) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        quadratic.gradient_along(theta, first), by_hand(dense, step, first), rtol=1e-5
    )


@pytest.mark.slow
def test_a_memory_of_slots_is_the_sum_of_the_tasks():
    rng = np.random.default_rng(1)
    tasks = [task(rng) for _ in range(3)]
    origin, theta, direction = tree(rng), tree(rng), tree(rng)
    memory = KroneckerQuadratic.zero(origin, ("a", "b"), slots=4)
    add = jax.jit(KroneckerQuadratic.plus)
    for quadratic, _, _ in tasks:
        before = jax.tree.map(lambda x: (x.shape, x.dtype), memory)
        memory = add(memory, quadratic)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), memory) == before
    steps = [minus(theta, center) for _, _, center in tasks]
    dense = [matrices for _, matrices, _ in tasks]
    value = sum(by_hand(m, s, s) / 2 for m, s in zip(dense, steps, strict=True))
    slope = sum(by_hand(m, s, direction) for m, s in zip(dense, steps, strict=True))
    np.testing.assert_allclose(memory.value(theta), value, rtol=1e-5)
    np.testing.assert_allclose(memory.gradient_along(theta, direction), slope, rtol=1e-5)
    np.testing.assert_allclose(
        memory.curvature_along(direction),
        sum(by_hand(m, direction, direction) for m in dense),
        rtol=1e-5,
    )
    trace = sum(np.trace(m[name]) for m in dense for name in SHAPES)
    np.testing.assert_allclose(memory.trace(), trace, rtol=1e-5)
    half = memory.scaled(0.5)
    np.testing.assert_allclose(half.value(theta), value / 2, rtol=1e-5)
    np.testing.assert_allclose(half.trace(), trace / 2, rtol=1e-5)
    slopes, curvatures = memory.by_leaf(theta, direction)
    for number, name in enumerate(sorted(SHAPES)):
        d = np.asarray(direction[name], np.float64).ravel()
        wanted = sum(d @ m[name] @ d for m in dense)
        np.testing.assert_allclose(curvatures[number], wanted, rtol=1e-5)
        wanted = sum(d @ m[name] @ s[name].ravel() for m, s in zip(dense, steps, strict=True))
        np.testing.assert_allclose(slopes[number], wanted, rtol=1e-5, atol=1e-5 * abs(slope))


@pytest.mark.slow
def test_beyond_the_slots_the_last_one_is_the_nearest_product_to_the_sum():
    rng = np.random.default_rng(3)
    tasks = [task(rng) for _ in range(3)]
    origin, theta, direction = tree(rng), tree(rng), tree(rng)
    memory = KroneckerQuadratic.zero(origin, ("a", "b"), slots=2)
    for quadratic, _, _ in tasks:
        memory = KroneckerQuadratic.plus(memory, quadratic)
    for name in "ab":
        first, *rest = (matrices[name] for _, matrices, _ in tasks)
        m, n = SHAPES[name]
        rearranged = sum(rest).reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)
        u, singular, v = np.linalg.svd(rearranged)
        nearest = np.kron((singular[0] * u[:, 0]).reshape(m, m), v[0].reshape(n, n))
        found = np.kron(memory.curvature.inputs[name][1], memory.curvature.outputs[name][1])
        np.testing.assert_allclose(found, nearest, atol=1e-5 * abs(nearest).max())
        assert abs(nearest - sum(rest)).max() > 0.01 * abs(nearest).max()
        kept = np.kron(memory.curvature.inputs[name][0], memory.curvature.outputs[name][0])
        np.testing.assert_allclose(kept, first, rtol=1e-5, atol=1e-6)
    steps = [minus(origin, center) for _, _, center in tasks]
    slope = sum(by_hand(m, s, direction) for (_, m, _), s in zip(tasks, steps, strict=True))
    np.testing.assert_allclose(memory.gradient_along(origin, direction), slope, rtol=1e-5)
    assert int(memory.curvature.tasks) == 3 and np.isfinite(memory.value(theta))


class Network(nn.Module):
    """Two dense layers, the first one on tokens."""

    tokens: int = 1

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.tanh(nn.Dense(3, name="first")(inputs))
        return nn.Dense(4, name="second")(hidden.mean(axis=1))


def problem(examples, tokens):
    rng = np.random.default_rng(2)
    inputs = jnp.asarray(rng.normal(size=(examples, tokens, 5)), jnp.float32)
    batch = Batch(inputs, jnp.asarray(rng.integers(4, size=examples)))
    params = jax.jit(Network().init)(jax.random.key(0), inputs)["params"]
    return params, batch


def of_labels(logits, _):
    """One pass for each label: the exact Fisher."""
    p = jax.nn.softmax(logits)
    return Passes(
        jnp.stack([p - jax.nn.one_hot(c, 4)[None] for c in range(4)]), p.T
    )  # fmt: skip


KERNELS = ("first/kernel", "second/kernel")


def outputs_of(params):
    return lambda some, batch: Network().apply(
        {"params": trees.replace(params, some)}, batch.inputs
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_factors_are_moments_of_inputs_and_output_gradients(tokens):
    params, batch = problem(6, tokens)
    weights = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    found = kronecker.factors(
        outputs_of(params),
        of_labels,
        trees.select(params, KERNELS),
        batch._replace(weights=weights),
    )
    leaves = {path: np.asarray(x, np.float64) for path, x in trees.leaves_by_path(params).items()}
    a = {path: 0.0 for path in KERNELS}
    g = {path: 0.0 for path in KERNELS}
    for example in np.flatnonzero(weights):
        x = np.asarray(batch.inputs[example], np.float64)
        hidden = np.tanh(x @ leaves["first/kernel"] + leaves["first/bias"])
        mean = hidden.mean(axis=0)
        z = mean @ leaves["second/kernel"] + leaves["second/bias"]
        p = np.exp(z) / np.exp(z).sum()
        a["first/kernel"] += x.T @ x / tokens
        a["second/kernel"] += np.outer(mean, mean)
        for label in range(4):
            out = p - np.eye(4)[label]
            inner = (leaves["second/kernel"] @ out) / tokens * (1 - hidden**2)
            g["second/kernel"] += p[label] * np.outer(out, out)
            g["first/kernel"] += p[label] * inner.T @ inner
    for path in KERNELS:
        np.testing.assert_allclose(found.inputs[path], a[path], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.outputs[path], g[path], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_for_one_example_the_diagonal_is_that_of_the_exact_fisher():
    params, batch = problem(1, 1)
    selected = trees.select(params, KERNELS)
    found = kronecker.factors(outputs_of(params), of_labels, selected, batch)
    exact = measure_all(
        fisher_exact(lambda p, inputs: outputs_of(params)(p, Batch(inputs, batch.labels))),
        selected,
        batch,
        batch_size=1,
    ).quadratic.diagonal
    for path in KERNELS:
        diagonal = np.outer(np.diag(found.inputs[path]), np.diag(found.outputs[path]))
        np.testing.assert_allclose(diagonal, exact[path], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [None, 2])
def test_the_measure_is_a_mean_of_factors_and_of_the_other_leaves_diagonal(num_samples):
    params, batch = problem(7, 2)
    leaves = trees.leaves_by_path(params)
    direction = jax.tree.map(lambda x: jnp.cos(1.0 + x), leaves)

    def logits_fn(some, inputs):
        return outputs_of(params)(some, Batch(inputs, batch.labels))

    measure = kronecker.fisher_kronecker(logits_fn, KERNELS, num_samples=num_samples)
    key = jax.random.key(1) if num_samples else None
    twice = Batch(*(jnp.concatenate([x, x]) for x in batch[:2]))
    weights = (jnp.arange(14) < 7).astype(jnp.float32)
    found = [
        measure_all(measure, leaves, examples, size, direction, key)
        for examples, size in (
            (batch, 7), (batch, 3), (twice._replace(weights=weights), 4),
            *(((twice, 7),) if key is None else ()),
        )
    ]  # fmt: skip
    for other in found[1:]:
        sides = ((each.quadratic, each.along) for each in (found[0], other))
        for a, b in zip(*map(jax.tree.leaves, sides), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    quadratic = found[0].quadratic
    if num_samples is None:
        sums = kronecker.factors(
            outputs_of(params), of_labels, trees.select(params, KERNELS),
            batch._replace(weights=jnp.full(7, 1 / 7)),
        )  # fmt: skip
        for path in KERNELS:
            np.testing.assert_allclose(
                quadratic.curvature.inputs[path][0], sums.inputs[path], rtol=1e-5
            )
            np.testing.assert_allclose(
                quadratic.curvature.outputs[path][0], sums.outputs[path], rtol=1e-5, atol=1e-7
            )
    rest = {path: x for path, x in leaves.items() if path not in KERNELS}
    exact = fisher_exact(lambda p, x: logits_fn({**leaves, **p}, x), num_samples=num_samples)
    wanted = measure_all(exact, rest, batch, 7, key=key).quadratic.diagonal
    assert list(quadratic.curvature.diagonal) == list(rest)
    for path in rest:
        np.testing.assert_allclose(quadratic.curvature.diagonal[path], wanted[path], rtol=1e-5)
    along = measure_all(gauss_newton(logits_fn), leaves, batch, 7, direction)
    np.testing.assert_allclose(found[0].along, along.along, rtol=1e-5)
    np.testing.assert_allclose(found[0].standard_error, along.standard_error, rtol=1e-5)


def test_a_kernel_that_is_no_dense_layer_is_refused():
    params, batch = problem(2, 1)
    with pytest.raises(ValueError, match="are no linen Dense layers"):
        kronecker.factors(
            lambda _, batch: outputs_of(params)({}, batch), of_labels,
            {"third/kernel": jnp.ones((5, 3))}, batch,
        )  # fmt: skip
