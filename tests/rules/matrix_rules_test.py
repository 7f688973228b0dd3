"""OPCM and the null-space filter: by hand, against float64 NumPy written from the papers' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules, trees
from pm_jax.curvature.kernels import Axes
from pm_jax.rules import Evidence
from pm_jax.rules.matrices import matrices, singular
from pm_jax.types import InvalidInput

SHAPES = {"wide/kernel": (4, 9), "tall/kernel": (9, 4), "square/kernel": (6, 6), "norm/scale": (5,)}


def models(count, seed=0, shapes=SHAPES, rank=None):
    """Models of random leaves; displacements from the first one of a rank, where it is given."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        if rank is None or len(shape) < 2:
            return rng.normal(size=shape)
        return rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))

    base = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    moved = [{p: base[p] + leaf(shape) for p, shape in shapes.items()} for _ in range(count)]
    return base, moved


def run(rule, base, trained, keys=None):
    """Merged models, and the infos, in float32."""
    cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), [base, *trained])
    state, merged, infos = rule.init(cast[0]), [], []
    update = jax.jit(rule.update)
    for number, model in enumerate(cast[1:]):
        key = jax.random.key(number) if keys is None else keys[number]
        found, state, info = update(
            state, previous=cast[0], trained=model, evidence=Evidence(key=key)
        )
        merged.append(found)
        infos.append(info)
    return merged, infos


def assert_models(found, wanted, rtol=1e-5, atol=2e-6):
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=rtol, atol=atol, err_msg=path)


# OPCM.


def published_opcm(base, trained, share=0.5):
    """OPCM as its code has it, step by step, with full singular bases, in float64."""
    merged, scale, norms, steps = None, 1.0, [], []

    def norm(model):
        return np.sqrt(sum(((model[p] - base[p]) ** 2).sum() for p in base))

    for model in trained:
        norms.append(norm(model))
        if merged is None:
            merged = dict(model)
            steps.append(merged)
            continue
        found = {}
        for path, origin in base.items():
            earlier, tau = merged[path] - origin, model[path] - origin
            if origin.ndim == 2:
                u, s, vh = np.linalg.svd(earlier)
                r = int(np.argmax(np.cumsum(s) / s.sum() > share))
                inside = u.T @ tau @ vh.T
                np.fill_diagonal(inside, 0)
                inside[:r, :r] = 0
                tau = u @ inside @ vh
            found[path] = origin + scale * earlier + tau
        length, mean = norm(found), np.mean(norms)
        scale = length / mean
        merged = {path: base[path] + (found[path] - base[path]) / scale for path in base}
        steps.append(merged)
    return steps


def test_opcm_by_hand():
    """D = diag(3, 2, 1) has the shares .5, .83, 1, so that r = 2 at a threshold of .9."""
    zero = {"kernel": np.zeros((3, 3)), "bias": np.zeros(1)}
    first = {"kernel": np.diag([3.0, 2.0, 1.0]), "bias": np.ones(1)}
    second = {"kernel": np.ones((3, 3)), "bias": np.full(1, 2.0)}
    merged, infos = run(rules.opcm(threshold=0.9), zero, [first, second])
    assert all(np.array_equal(merged[0][path], first[path]) for path in first)
    total = np.asarray([[3, 0, 1], [0, 2, 1], [1, 1, 1.0]])
    scale = (np.sqrt(15) + np.sqrt(13)) / 2 / np.sqrt(27)
    assert_models(merged[1], {"kernel": scale * total, "bias": np.full(1, scale * 3)})
    assert float(infos[1].alpha) == pytest.approx(scale, rel=1e-6)
    # Of the nine ones and the bias' 2 four ones and the 2 are left.
    assert float(infos[1].figures["kept_share"]) == pytest.approx((4 + 4) / (9 + 4), rel=1e-6)
    # At the default threshold r = 1: .5 is not above .5.
    merged, _ = run(rules.opcm(), zero, [first, second])
    total = np.asarray([[3, 1, 1], [1, 2, 1], [1, 1, 1.0]])
    scale = (np.sqrt(15) + np.sqrt(13)) / 2 / np.sqrt(29)
    assert_models(merged[1], {"kernel": scale * total, "bias": np.full(1, scale * 3)})


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_opcm_is_what_the_papers_code_computes(threshold):
    base, trained = models(4)
    merged, infos = run(rules.opcm(threshold=threshold), base, trained)
    for found, wanted in zip(merged, published_opcm(base, trained, threshold), strict=True):
        assert_models(found, wanted, atol=1e-5)
    assert infos[0].alpha == 1 and all(0 < float(info.alpha) < 1 for info in infos[1:])


def test_opcm_keeps_the_length_of_orthogonal_task_vectors_by_the_root_of_their_number():
    vectors = np.zeros((4, 8, 8))
    for task in range(4):
        vectors[task, 2 * task, 2 * task] = 3.0
        vectors[task, 2 * task + 1, 2 * task + 1] = 4.0
    trained = [{"kernel": vector} for vector in vectors]
    merged, infos = run(rules.opcm(), {"kernel": np.zeros((8, 8))}, trained)
    for count, (found, info) in enumerate(zip(merged, infos, strict=True), start=1):
        assert float(info.alpha) == pytest.approx(count**-0.5, rel=1e-6)
        assert float(info.figures["kept_share"]) == pytest.approx(1, rel=1e-6)
        np.testing.assert_allclose(found["kernel"], vectors[:count].sum(axis=0) / count**0.5,
                                   rtol=1e-6)  # fmt: skip


def test_opcm_does_not_depend_on_the_order_of_rows_and_columns_nor_on_the_side():
    """Where the rank of D is low, most of its singular vectors are arbitrary."""
    rng = np.random.default_rng(1)
    base, trained = models(3, rank=1)
    plain, _ = run(rules.opcm(), base, trained)
    orders = {path: [rng.permutation(side) for side in leaf.shape] for path, leaf in base.items()}

    def turned(model):
        return {
            path: leaf if leaf.ndim < 2 else np.asarray(leaf)[np.ix_(*orders[path])].T
            for path, leaf in model.items()
        }

    found, _ = run(rules.opcm(), turned(base), [turned(model) for model in trained])
    for left, right in zip(found, plain, strict=True):
        assert_models(left, turned(right), atol=1e-5)


# The null-space filter.


def published_filter(base, trained, rank):
    """The filter in float64, its projector from the eigenvectors of D D^T."""
    earlier = {path: np.zeros_like(leaf) for path, leaf in base.items() if leaf.ndim == 2}
    steps = []
    for model in trained:
        for path, displacement in earlier.items():
            values, vectors = np.linalg.eigh(displacement @ displacement.T)
            u = vectors[:, ::-1][:, :rank] * (values[::-1][:rank] > 1e-9 * values.max(initial=1))
            tau = model[path] - base[path]
            earlier[path] = displacement + tau - u @ (u.T @ tau)
        steps.append({**base, **{path: base[path] + d for path, d in earlier.items()}})
    return steps


def test_the_null_space_filter_by_hand():
    zero = {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}
    # D acts on the first input most, then on the second.
    first = {"kernel": np.asarray([[5.0, 0], [0, 1], [0, 0]]), "bias": np.ones(2)}
    second = {"kernel": np.full((3, 2), 2.0), "bias": np.ones(2)}
    merged, infos = run(rules.null_space(rank=1), zero, [first, second])
    assert np.array_equal(merged[0]["kernel"], first["kernel"])
    assert_models(merged[1], {"kernel": [[5, 0], [2, 3], [2, 2]], "bias": np.zeros(2)})
    assert float(infos[0].figures["kept_share"]) == 1
    assert float(infos[1].figures["kept_share"]) == pytest.approx(2 / 3, rel=1e-6)
    merged, _ = run(rules.null_space(rank=2), zero, [first, second])
    assert_models(merged[1], {"kernel": [[5, 0], [0, 1], [2, 2]], "bias": np.zeros(2)})


@pytest.mark.parametrize("rank", [1, 3, 128])
def test_the_null_space_filter_is_that_of_dense_algebra(rank):
    base, trained = models(3)
    merged, _ = run(rules.null_space(rank=rank), base, trained)
    for found, wanted in zip(merged, published_filter(base, trained, rank), strict=True):
        assert_models(found, wanted, atol=1e-5)


def test_inputs_that_the_displacement_acts_on_pass_through_as_before():
    base, trained = models(4, rank=1, shapes={"kernel": (12, 7)})
    merged, _ = run(rules.null_space(rank=5), base, trained)
    for earlier, later in zip(merged, merged[1:], strict=False):
        before, after = (np.asarray(m["kernel"]) - base["kernel"] for m in (earlier, later))
        u = np.linalg.svd(before)[0][:, :3]
        u = u[:, np.linalg.svd(before)[1][:3] > 1e-4]
        np.testing.assert_allclose(u.T @ after, u.T @ before, atol=2e-5)
        assert np.linalg.matrix_rank(after, tol=1e-4) == np.linalg.matrix_rank(before, tol=1e-4) + 1
    # A task vector inside the span of D changes nothing.
    inside = before @ np.random.default_rng(2).normal(size=(7, 7))
    state = rules.null_space(rank=5).init({"kernel": jnp.asarray(base["kernel"], jnp.float32)})
    state = state._replace(tasks=jnp.int32(3), displacement={"kernel": jnp.asarray(before)})
    again, _, info = rules.null_space(rank=5).update(
        state, previous=None, trained={"kernel": jnp.asarray(base["kernel"] + inside, jnp.float32)}
    )
    np.testing.assert_allclose(again["kernel"], base["kernel"] + before, atol=2e-5)
    assert float(info.figures["kept_share"]) < 1e-9


def test_a_pattern_leaves_all_else_at_the_pretrained_model():
    base, trained = models(2)
    merged, _ = run(rules.null_space(pattern="(wide|tall)/.*", rank=2), base, trained)
    wanted = published_filter(base, trained, 2)[1]
    assert_models(merged[1], {**base, **{p: wanted[p] for p in ("wide/kernel", "tall/kernel")}},
                  atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("path", ["wide/kernel", "tall/kernel"])
def test_the_learned_part_is_fifty_steps_of_adam_on_two_distances(path):
    base, trained = models(2, shapes={path: SHAPES[path]})
    rank, size, steps = 3, 2, 50
    key = jax.random.key(7)
    settings = {"rank": rank, "learned_rank": size, "learning_rate": 0.01}
    merged, _ = run(rules.null_space(**settings), base, trained, keys=[jax.random.key(0), key])
    plain, _ = run(rules.null_space(rank=rank), base, trained)
    assert np.array_equal(merged[0][path], plain[0][path])

    earlier, tau = (model[path] - base[path] for model in trained)
    u = np.linalg.svd(earlier)[0][:, :rank]
    w = np.linalg.svd(tau)[0][:, : min(8, *tau.shape)]
    filtered = tau - u @ (u.T @ tau)
    drawn = jax.random.split(trees.leaf_keys(key, {path: 0})[path], 1)[0]
    a = 0.02 * np.asarray(jax.random.normal(drawn, (len(tau), size)), np.float64)
    b = np.zeros((size, len(tau)))

    def distance_and_gradients(a, b):
        new = earlier + filtered + a @ b @ tau
        left, right = w.T @ (tau - new), u.T @ (earlier - new)
        to_new = -2 * (w @ left + u @ right)
        return (left**2).sum() + (right**2).sum(), to_new @ tau.T @ b.T, a.T @ to_new @ tau.T

    distances, moments = [], [np.zeros_like(x) for x in (a, a, b, b)]
    for step in range(1, steps + 1):
        distance, *gradients = distance_and_gradients(a, b)
        distances.append(distance)
        updates = []
        for number, gradient in enumerate(gradients):
            first, second = moments[2 * number], moments[2 * number + 1]
            first[:] = 0.9 * first + 0.1 * gradient
            second[:] = 0.999 * second + 0.001 * gradient**2
            mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
            updates.append(0.01 * mean / (np.sqrt(square) + 1e-8))
        a, b = a - updates[0], b - updates[1]
    assert distances[-1] < 0.9 * distances[0]
    wanted = base[path] + earlier + filtered + a @ b @ tau
    np.testing.assert_allclose(merged[1][path], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(merged[1][path]) - np.asarray(plain[1][path])).max() > 0.05


# What counts as a matrix.

ATTENTION = {
    "query/kernel": jnp.ones((8, 2, 4)),
    "query/bias": jnp.ones((2, 4)),
    "out/kernel": jnp.ones((2, 4, 8)),
    "out/bias": jnp.ones(8),
    "conv/kernel": jnp.ones((3, 3, 2, 5)),
    "conv/bias": jnp.ones(5),
    "layers/kernel": jnp.ones((6, 8, 4)),
    "layers/bias": jnp.ones((6, 4)),
    "layers/scale": jnp.ones((6, 4)),
    "embed/embedding": jnp.ones((30, 8)),
    "pos_embed": jnp.ones((1, 9, 8)),
    "w": jnp.ones((3, 2)),
}


def test_the_axes_of_matrices_are_told_by_the_biases_beside_them():
    assert matrices(ATTENTION) == {
        "query/kernel": Axes(0, 1),
        "out/kernel": Axes(0, 2),
        "conv/kernel": Axes(0, 3),
        "layers/kernel": Axes(1, 1),
        "w": Axes(0, 1),
    }
    alone = {"key/kernel": jnp.ones((8, 2, 4))}
    with pytest.raises(InvalidInput, match=r"input_axes=0: key/kernel of shape \(8, 2, 4\) may be"):
        rules.opcm().init(alone)
    assert matrices(alone, input_axes=1) == {"key/kernel": Axes(0, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [rules.opcm, lambda: rules.null_space(rank=2)])
def test_kernels_of_more_axes_merge_as_their_matrices(make):
    rng = np.random.default_rng(3)
    shapes = {p: ATTENTION[p].shape for p in ATTENTION if p.endswith(("kernel", "bias"))}
    base, trained = models(0), []
    base = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    trained = [{p: rng.normal(size=s) for p, s in shapes.items()} for _ in range(3)]
    axes = matrices({path: ATTENTION[path] for path in shapes})

    def as_separate(model):
        found = {}
        for path, leaf in model.items():
            if path not in axes:
                found[path.replace("bias", "vector")] = leaf.reshape(-1)
                continue
            for number, matrix in enumerate(leaf.reshape(-1, *axes[path].sides(leaf.shape))):
                found[f"{path}_{number}"] = matrix
        return found

    merged, _ = run(make(), base, trained)
    wanted, _ = run(make(), as_separate(base), [as_separate(model) for model in trained])
    for left, right in zip(merged, wanted, strict=True):
        assert_models(as_separate({p: np.asarray(x) for p, x in left.items()}), right, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 5), (4, 11), (11, 4), (1, 3), (7, 1)])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_singular_vectors_are_those_of_the_matrix_alone(shape, rank):
    rng = np.random.default_rng(0)
    rank = min(rank, *shape)
    matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    u, s, v = map(np.asarray, singular(jnp.asarray(matrix, jnp.float32)))
    assert np.count_nonzero(s) == rank
    np.testing.assert_allclose(u * s @ v.T, matrix, atol=1e-5)
    own = np.diag((s > 0).astype(float))
    np.testing.assert_allclose(u.T @ u, own, atol=1e-5)
    np.testing.assert_allclose(v.T @ v, own, atol=1e-5)


def test_powers_of_averaging_by_hand():
    def alphas(rule):
        _, infos = run(rule, {"w": np.zeros(1)}, [{"w": np.ones(1)}] * 4)
        return [float(info.alpha) for info in infos]

    assert alphas(rules.averaging()) == np.float32([1, 1 / 2, 1 / 3, 1 / 4]).tolist()
    roots = 1 / np.sqrt(np.float32([1, 2, 3, 4]))
    assert alphas(rules.slao()) == alphas(rules.averaging(power=0.5)) == roots.tolist()
    np.testing.assert_allclose(
        alphas(rules.averaging(power=0.3)), np.arange(1, 5) ** -0.3, rtol=1e-6
    )
    assert alphas(rules.averaging(power=0.3))[0] == 1
    assert alphas(rules.frozen()) == [0, 0, 0, 0]
    assert alphas(rules.first_session()) == [1, 0, 0, 0]
