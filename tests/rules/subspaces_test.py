import jax.numpy as jnp
import numpy as np

from pm_jax.rules import subspaces


def stacked(seed, count):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(count, 3, 4)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(count, 5)), jnp.float32)}  # fmt: skip


def flat(tree):
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(len(x), -1) for x in (tree["a"], tree["b"])], axis=1
    )


def test_gram_is_the_dense_one():
    directions = stacked(0, 4)
    dense = flat(directions) @ flat(directions).T
    by_leaf = subspaces.gram(directions)
    np.testing.assert_allclose(by_leaf.sum(axis=0), dense, rtol=1e-5, atol=1e-5)
    b = np.asarray(directions["b"], np.float64)
    np.testing.assert_allclose(by_leaf[1], b @ b.T, rtol=1e-5, atol=1e-5)


def test_combination_has_weights_for_each_leaf_or_for_all():
    directions, weights = stacked(3, 2), np.asarray([[1.0, -2.0], [0.5, 3.0]], np.float32)
    for given in (weights, weights[:1]):
        found = subspaces.combination(directions, jnp.asarray(given))
        for leaf, own in zip("ab", np.broadcast_to(given, (2, 2)), strict=True):
            wanted = own[0] * directions[leaf][0] + own[1] * directions[leaf][1]
            np.testing.assert_allclose(found[leaf], wanted, rtol=1e-5, atol=1e-6)


def test_coordinates_are_orthonormal_and_span_what_qr_spans():
    directions = stacked(1, 4)
    # Of very different lengths, which must not count.
    directions = {k: v * jnp.asarray([1e-3, 1.0, 30.0, 1.0]).reshape(-1, *[1] * (v.ndim - 1))
                  for k, v in directions.items()}  # fmt: skip
    coordinates = subspaces.orthonormal_coordinates(subspaces.gram(directions).sum(axis=0), 1e-4)
    basis = np.asarray(coordinates, np.float64).T @ flat(directions)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-5)
    q, _ = np.linalg.qr(flat(directions).T)
    np.testing.assert_allclose(basis.T @ basis, q @ q.T, atol=1e-5)


def test_directions_that_depend_on_others_and_zero_ones_are_left_out():
    directions = stacked(2, 2)
    more = {k: jnp.concatenate([v, v[:1] + 2 * v[1:], jnp.zeros_like(v[:1])])
            for k, v in directions.items()}  # fmt: skip
    coordinates = np.asarray(
        subspaces.orthonormal_coordinates(subspaces.gram(more).sum(axis=0), 1e-4)
    )
    assert coordinates.any(axis=0).sum() == 2
    basis = coordinates.T @ flat(more)
    q, _ = np.linalg.qr(flat(directions).T)
    np.testing.assert_allclose(basis.T @ basis, q @ q.T, atol=1e-5)
    nothing = subspaces.orthonormal_coordinates(jnp.zeros((3, 3)), 1e-4)
    assert not nothing.any()
