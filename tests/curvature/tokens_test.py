"""Curvature of losses that are sums over tokens, against dense matrices in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pm_jax import curvature, losses, trees
from pm_jax.curvature import ExactQuadratic, kronecker, low_rank, measures
from pm_jax.types import Batch, InvalidInput
from tests import oracles
from tests.small_runs import slow

N, T, WIDTH, CLASSES = 7, 3, 4, 3


class Network(nn.Module):
    """Each token sees the earlier ones."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, WIDTH, name="embed")(tokens)
        x = jnp.tanh(nn.Dense(WIDTH, name="hidden")(x))
        x = jnp.cumsum(x, axis=1)
        return nn.Dense(CLASSES, name="head")(x)


def logits_fn(params, tokens):
    return Network().apply({"params": params}, tokens)


LOSSES = losses.cross_entropy(logits_fn)


@functools.cache
def problem(padding=False):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(5, size=(N, T)))
    labels = jnp.asarray(rng.integers(CLASSES, size=(N, T)))
    params = jax.jit(Network().init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    direction = jax.tree.map(lambda x: jnp.sin(1.0 + jnp.arange(x.size)).reshape(x.shape), params)
    if not padding:
        return params, direction, Batch(tokens, labels)
    weights = (np.arange(T) < rng.integers(1, T + 1, size=N)[:, None]).astype(np.float32)
    weights[2] = 0  # a sequence of padding alone
    weights[3, 0] = 0.5
    # Losses of padding are not computed, whatever its labels.
    labels = jnp.where(weights > 0, labels, -100)
    return params, direction, Batch(tokens, labels, jnp.asarray(weights))


def dense(padding=False):
    """Gradients [M, P], Gauss-Newton and Hessian matrices [M, P, P] of the M sequences."""
    params, _, batch = problem(padding)
    weights = np.asarray(losses.token_weights(batch), np.float64)
    keep = np.flatnonzero(weights.sum(axis=1) > 0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        vector, unravel = ravel_pytree(wide)

        def logits(v, tokens):
            return logits_fn(unravel(v), tokens[None])[0]

        def loss(v, tokens, labels, weights):
            values = -jax.nn.log_softmax(logits(v, tokens))
            return jnp.sum(weights * values[jnp.arange(T), jnp.where(weights > 0, labels, 0)])

        def matrices(v, tokens, labels, weights):
            jacobian, p = jax.jacobian(logits)(v, tokens), jax.nn.softmax(logits(v, tokens))
            inner = jnp.einsum("tc,cd->tcd", p, jnp.eye(CLASSES)) - jnp.einsum("tc,td->tcd", p, p)
            matrix = jnp.einsum("t,tcp,tcd,tdq->pq", weights, jacobian, inner, jacobian)
            arguments = (v, tokens, labels, weights)
            return jax.grad(loss)(*arguments), matrix, jax.hessian(loss)(*arguments)

        rows = (batch.inputs, batch.labels, jnp.asarray(weights))
        found = jax.jit(jax.vmap(matrices, (None, 0, 0, 0)))(vector, *rows)
        return [np.asarray(x)[keep] for x in found]


def close(found, wanted):
    scale = abs(np.asarray(wanted)).max()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * scale)


def along(name, padding):
    gradients, matrices, hessians = dense(padding)
    d = oracles.flat(problem(padding)[1])
    if name == "fisher_empirical":
        return gradients**2 @ d**2
    if name == "fisher_exact":
        return np.diagonal(matrices, axis1=1, axis2=2) @ d**2
    return np.einsum("p,npq,q->n", d, hessians if name == "hessian" else matrices, d)


MEASURES = {
    "fisher_empirical": functools.partial(curvature.fisher_empirical, LOSSES, chunk_size=4),
    "fisher_exact": functools.partial(curvature.fisher_exact, logits_fn, chunk_size=4),
    "gauss_newton": functools.partial(curvature.gauss_newton, logits_fn),
    "hessian": functools.partial(curvature.hessian, LOSSES),
    "low_rank": functools.partial(low_rank.gauss_newton_low_rank, logits_fn, rank=2),
    "kronecker": functools.partial(kronecker.fisher_kronecker, logits_fn, ".*/kernel"),
}


@pytest.mark.slow
@pytest.mark.parametrize("padding", [slow(False), True])
@pytest.mark.parametrize(
    "name", [slow(name) if name in ("hessian", "kronecker") else name for name in MEASURES]
)
def test_curvature_along_a_direction_is_that_of_the_sum_over_tokens(name, padding):
    params, direction, batch = problem(padding)
    values = along(name, padding)
    key = jax.random.key(0)
    found = measures.measure_all(MEASURES[name](), params, batch, 4, direction, key)
    close(found.along, values.mean())
    close(found.standard_error, values.std(ddof=1) / len(values) ** 0.5)
    assert float(found.examples) == len(values)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [slow(False), True])
@pytest.mark.parametrize("dense_layers", [slow(()), ("hidden", "head")])
@pytest.mark.parametrize("name", ["fisher_empirical", "fisher_exact"])
def test_diagonals_are_those_of_the_dense_matrices(name, dense_layers, padding):
    params, _, batch = problem(padding)
    gradients, matrices, _ = dense(padding)
    wanted = (gradients**2).mean(axis=0)
    if name == "fisher_exact":
        wanted = np.diag(matrices.mean(axis=0))
    found = measures.measure_all(MEASURES[name](dense_layers=dense_layers), params, batch, 4)
    close(oracles.flat(found.quadratic.diagonal), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [False, True])
def test_labels_drawn_for_every_token_converge_to_the_expectation(padding):
    params, _, batch = problem(padding)
    measure = curvature.fisher_exact(logits_fn, num_samples=4000)
    found = measures.measure_all(measure, params, batch, N, key=jax.random.key(0))
    wanted = np.diag(dense(padding)[1].mean(axis=0))
    error = np.linalg.norm(oracles.flat(found.quadratic.diagonal) - wanted)
    # 28,000 draws: relative errors of about 1 % of the typical entry.
    assert error < 0.03 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_low_rank_and_exact_quadratics_are_the_whole_matrix():
    params, direction, batch = problem(True)
    matrix, d = dense(True)[1].mean(axis=0), oracles.flat(direction)
    found = measures.measure_all(
        low_rank.gauss_newton_low_rank(logits_fn, rank=40), params, batch, 4,
        key=jax.random.key(0),
    ).quadratic  # fmt: skip
    columns = jax.vmap(lambda column: ravel_pytree(column)[0])(found.curvature.columns)
    # Eigenvalues below 1e-5 of the largest are left out, and float32 rounds the small ones.
    np.testing.assert_allclose(columns.T @ columns, matrix, atol=2e-3 * abs(matrix).max())
    exact = ExactQuadratic.at(params, batch, logits_fn, batch_size=4)
    close(exact.curvature_along(direction), d @ matrix @ d)
    close(exact.trace(), np.trace(matrix))
    hessian = ExactQuadratic.at(params, batch, LOSSES, "hessian", batch_size=4)
    close(hessian.curvature_along(direction), d @ dense(True)[2].mean(axis=0) @ d)


@pytest.mark.slow
def test_kronecker_factors_are_moments_of_the_tokens_that_are_no_padding():
    params, _, batch = problem(True)
    found = measures.measure_all(MEASURES["kronecker"](), params, batch, 4).quadratic.curvature
    weights = np.asarray(batch.weights, np.float64)
    keep = weights.sum(axis=1) > 0
    x = np.asarray(Network().apply({"params": params}, batch.inputs, capture_intermediates=True)[1]
                   ["intermediates"]["embed"]["__call__"][0], np.float64)  # fmt: skip
    shares = weights[keep] / weights[keep].sum(axis=1, keepdims=True)
    wanted = np.einsum("nt,nti,ntj->ij", shares, x[keep], x[keep]) / keep.sum()
    close(found.inputs["hidden/kernel"][0], wanted)
    p = np.asarray(jax.nn.softmax(logits_fn(params, batch.inputs)), np.float64)
    inner = np.einsum("ntc,cd->ntcd", p, np.eye(CLASSES)) - np.einsum("ntc,ntd->ntcd", p, p)
    close(found.outputs["head/kernel"][0], np.einsum("nt,ntcd->cd", weights, inner) / keep.sum())
    # The other leaves have the diagonal of the exact Fisher.
    diagonal = np.diag(dense(True)[1].mean(axis=0))
    _, unravel = ravel_pytree(params)
    exact = trees.leaves_by_path(unravel(jnp.asarray(diagonal, jnp.float32)))
    assert set(found.diagonal) == {"embed/embedding", "hidden/bias", "head/bias"}
    for path, leaf in found.diagonal.items():
        close(leaf, exact[path])


@pytest.mark.slow
def test_a_sequence_of_one_token_is_an_example():
    params, direction, batch = problem()
    tokens = Batch(batch.inputs[:, :1], batch.labels[:, :1])
    plain = tokens._replace(labels=batch.labels[:, 0])

    def single(p, inputs):
        return logits_fn(p, inputs)[:, 0]

    for many, one in (
        (curvature.fisher_exact(logits_fn), curvature.fisher_exact(single)),
        (curvature.fisher_empirical(LOSSES),
         curvature.fisher_empirical(losses.cross_entropy(single))),
    ):  # fmt: skip
        found = measures.measure_all(many, params, tokens, 4, direction)
        wanted = measures.measure_all(one, params, plain, 4, direction)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", [slow("fisher_exact"), "sampled"])
def test_sequences_are_left_out_in_groups_and_batches_of_any_size(name):
    params, direction, batch = problem(True)
    measure = curvature.fisher_exact(logits_fn, num_samples=2 if name == "sampled" else None)
    in_groups, key = measures.in_groups(measure, 2), jax.random.key(1)
    whole = measures.measure_all(in_groups, params, batch, 8, direction, key)
    cut = measures.measure_all(in_groups, params, batch, 3, direction, key)
    weights = np.asarray(batch.weights) * (np.arange(N) % 2 == 1)[:, None]
    odd = measures.measure_all(
        measure, params, batch._replace(weights=jnp.asarray(weights)), 8, direction, key
    )
    first = jax.tree.map(lambda x: x[0], whole.left_out)
    for left, right in ((whole, cut), (first, odd._replace(left_out=None))):
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_means_of_losses_are_over_sequences():
    params, _, batch = problem(True)
    values = LOSSES(params, batch)
    weights = np.asarray(losses.weights_of(batch))
    assert weights.tolist() == [1, 1, 0, 1, 1, 1, 1] and np.isfinite(values).all()
    found = losses.mean(LOSSES)(params, batch)
    np.testing.assert_allclose(found, np.asarray(values).sum() / 6, rtol=1e-6)
    halves = batch._replace(weights=jnp.full(N, 0.5), labels=jnp.maximum(batch.labels, 0))
    np.testing.assert_allclose(
        losses.mean(LOSSES)(params, halves), LOSSES(params, halves).sum() / 7, rtol=1e-6
    )


def test_too_many_labels_of_sequences_are_refused_and_can_be_drawn():
    inputs, labels = jnp.ones((2, 30, 1)), jnp.zeros((2, 30), int)

    def wide(w, x):
        return x * w[None, None, :]

    with pytest.raises(InvalidInput, match="num_samples=None: sequences of 30 tokens with 20 "):
        measures.measure_all(curvature.fisher_exact(wide), jnp.zeros(20), (inputs, labels))
    measure = curvature.fisher_exact(wide, num_samples=1)
    found = measures.measure_all(measure, jnp.zeros(20), (inputs, labels), key=jax.random.key(0))
    # At p = 1/20 the gradient of a token has the square 1 - 1/20 on average; tokens add up, and
    # their labels are drawn apart, so that the sum's square is 30 times as large.
    assert float(found.quadratic.trace()) == pytest.approx(30 * 0.95, rel=0.5)
