"""Curvature from input moments: against dense matrices, and against how outputs of layers move."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pm_jax
from pm_jax import trees
from pm_jax.coefficients import merge_coefficient
from pm_jax.curvature import InputMomentQuadratic, identity, input_moment
from pm_jax.curvature.measures import in_groups, measure_all
from pm_jax.types import Batch, InvalidInput
from tests import dense_models, oracles
from tests.small_runs import slow

KERNELS = ("w", "v")  # of the network of the oracles, [in, out]


def dense(params, batch):
    """One matrix for each example, [N, P, P] in float64, in the order of the tree: b, v, w."""
    x = np.asarray(batch.inputs, np.float64)
    w, b = (np.asarray(params[name], np.float64) for name in "wb")
    hidden = np.tanh(x @ w + b)
    sizes = [oracles.HIDDEN, oracles.HIDDEN * oracles.CLASSES, oracles.FEATURES * oracles.HIDDEN]
    matrices = np.zeros((len(x), sum(sizes), sum(sizes)))
    for n in range(len(x)):
        of_v = np.kron(np.outer(hidden[n], hidden[n]), np.eye(oracles.CLASSES))
        of_w = np.kron(np.outer(x[n], x[n]), np.eye(oracles.HIDDEN))
        start, middle = sizes[0], sizes[0] + sizes[1]
        matrices[n, start:middle, start:middle] = of_v
        matrices[n, middle:, middle:] = of_w
    return matrices


def measured(params, batch, size=5, direction=None, **weights):
    measure = input_moment(oracles.network, KERNELS, chunk_size=3)
    return measure_all(measure, params, batch._replace(**weights), size, direction)


def test_answers_are_those_of_the_dense_matrix():
    params, direction, batch = oracles.problem()
    matrices = dense(params, batch)
    matrix, d = matrices.mean(axis=0), oracles.flat(direction)
    found = measured(params, batch, direction=direction)
    quadratic, other = found.quadratic, jax.tree.map(jnp.cos, direction)
    theta = jax.tree.map(jnp.add, params, other)
    o = oracles.flat(other)
    step = oracles.flat(theta) - oracles.flat(params)
    np.testing.assert_allclose(quadratic.value(theta), step @ matrix @ step / 2, rtol=1e-5)
    np.testing.assert_allclose(quadratic.gradient_along(theta, direction), step @ matrix @ d,
                               rtol=1e-5)  # fmt: skip
    wanted = [[a @ matrix @ b for b in (d, o)] for a in (d, o)]
    np.testing.assert_allclose(quadratic.gram([direction, other]), wanted, rtol=1e-5)
    np.testing.assert_allclose(quadratic.trace(), np.trace(matrix), rtol=1e-5)
    slopes, curvatures = quadratic.by_leaf(theta, direction)
    edges = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(params))])
    for leaf, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        part = np.where((np.arange(len(d)) >= start) & (np.arange(len(d)) < stop), d, 0)
        np.testing.assert_allclose(curvatures[leaf], part @ matrix @ d, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(slopes[leaf], part @ matrix @ step, rtol=1e-5, atol=1e-12)
    assert curvatures[0] == 0  # the bias
    values = np.einsum("p,npq,q->n", d, matrices, d)
    np.testing.assert_allclose(found.along, values.mean(), rtol=1e-5)
    error = values.std(ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_padding_and_labels_have_no_part_in_it(size):
    params, direction, batch = oracles.problem()
    wanted = measured(params, batch, 13, direction)
    twice = Batch(*(jnp.concatenate([x, x[::-1]]) for x in batch[:2]))
    weights = jnp.asarray([1.0] * 13 + [0.0] * 13)
    found = measured(params, twice._replace(labels=0 * twice.labels), size, direction,
                     weights=weights)  # fmt: skip
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # An example of weight 2 counts as two.
    first = measured(params, batch, 4, weights=jnp.ones(13).at[0].set(2.0)).quadratic
    x = np.concatenate([batch.inputs, batch.inputs[:1]]).astype(np.float64)
    np.testing.assert_allclose(first.curvature.moments["w"], x.T @ x / 14, rtol=1e-5, atol=1e-6)


def tasks_of(count, dtype=np.float32):
    """Parameters, inputs and directions of some tasks."""
    return [oracles.problem(9 + seed, seed, dtype) for seed in range(count)]


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_a_running_sum_is_the_list_of_tasks_and_alpha_is_its_minimum():
    tasks = tasks_of(4, np.float64)
    start, delta, _ = oracles.problem(3, 9, np.float64)
    memory = InputMomentQuadratic.zero(start, KERNELS)
    for params, _, batch in tasks:
        shapes = jax.tree.map(jnp.shape, memory)
        memory = memory.plus(measured(params, batch).quadratic)
        assert jax.tree.map(jnp.shape, memory) == shapes

    def total(theta):
        steps = ((oracles.flat(theta) - oracles.flat(p), dense(p, b)) for p, _, b in tasks)
        return sum(step @ matrices.mean(axis=0) @ step / 2 for step, matrices in steps)

    def at(alpha):
        return jax.tree.map(lambda x, d: x + alpha * d, start, delta)

    for alpha in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(memory.value(at(alpha)), total(at(alpha)), rtol=1e-10)
    found = merge_coefficient(memory, start, delta, task=4, clip=False)
    raw = float(found.alpha)
    # Q along the segment is a parabola through three values of the list of tasks.
    q0, q1, q2 = (total(at(alpha)) for alpha in (0.0, 0.5, 1.0))
    second = 4 * (q0 - 2 * q1 + q2)
    np.testing.assert_allclose(raw, (q0 - q2) / second + 0.5, rtol=1e-10)
    grid = [total(at(alpha)) for alpha in np.linspace(raw - 1, raw + 1, 41)]
    assert total(at(raw)) <= min(grid) * (1 + 1e-14)
    half = memory.scaled(0.5)
    np.testing.assert_allclose(half.value(at(1.0)), total(at(1.0)) / 2, rtol=1e-10)


@pytest.mark.slow
def test_results_without_groups_are_those_of_the_other_examples():
    params, direction, batch = oracles.problem(12)
    measure = in_groups(input_moment(oracles.network, KERNELS), 3)
    found = measure_all(measure, params, batch, 5, direction)
    for group in range(3):
        rest = jax.tree.map(lambda x, k=group: x[np.arange(12) % 3 != k], batch[:2])
        alone = measured(params, Batch(*rest), 8, direction)
        left_out = jax.tree.map(lambda x, k=group: x[k], found.left_out)
        for a, b in zip(jax.tree.leaves((left_out.quadratic, left_out.along)),
                        jax.tree.leaves((alone.quadratic, alone.along)), strict=True):  # fmt: skip
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# The layers below are linear in their kernel: a displacement D of the kernel moves their outputs by
# what their kernel D alone gives, and `D^T H_n D` is the sum of squares of that for an example.
LINEAR = [
    "dense",
    *map(slow, ["dense without bias", "general, one axis to two", "general, two axes to one"]),
    *map(slow, ["general, an axis in the middle", "einsum"]),
    *map(slow, ["einsum with dots", "einsum, a kernel for each head", "ensemble", "convolution"]),
    *map(slow, ["convolution, dilated", "convolution, of dilated inputs", "convolution, circular"]),
    *map(slow, ["convolution, reflecting", "convolution of more batch axes"]),
    *map(slow, ["convolution, causal"]),
]


def assert_moves_outputs(apply, params, inputs, path):
    leaves = trees.leaves_by_path(params)
    kernel = leaves[path]
    step = jnp.sin(1.0 + jnp.arange(kernel.size)).reshape(kernel.shape)
    direction = trees.replace(jax.tree.map(jnp.ones_like, params), {path: step})
    only = {name: 0 * leaf for name, leaf in leaves.items()} | {path: step}
    moves = np.asarray(apply(trees.replace(params, only), inputs), np.float64)
    values = (moves.reshape(len(inputs), -1) ** 2).sum(axis=1)
    measure = input_moment(lambda p, x: apply(p, x).reshape(len(x), -1))
    batch = Batch(inputs, jnp.zeros(len(inputs), int), jnp.asarray([1.0, 0.0, 1.0]))
    found = measure_all(measure, params, batch, 2, direction)
    wanted = (values[0] + values[2]) / 2
    np.testing.assert_allclose(found.along, wanted, rtol=1e-5)
    np.testing.assert_allclose(found.quadratic.curvature_along(direction), wanted, rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, abs(values[0] - values[2]) / 2, rtol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_a_linen_layer_has_the_squares_by_which_its_outputs_move(name):
    model, params, inputs = dense_models.example(name)
    (path,) = [path for path in trees.leaves_by_path(params) if path.endswith("kernel")]
    assert_moves_outputs(lambda p, x: model.apply({"params": p}, x), params, inputs, path)


NNX = {
    "linear": lambda rngs: nnx.Linear(6, 5, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral((4, 6), (2, 3), axis=(-2, -1), rngs=rngs),
    "einsum": lambda rngs: nnx.Einsum("btd,dnh->btnh", (6, 2, 3), (2, 3), rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(6, 5, (3,), rngs=rngs),
}


@pytest.mark.parametrize("name", ["convolution", *map(slow, list(NNX)[:-1])])
def test_an_nnx_layer_has_the_squares_by_which_its_outputs_move(name):
    graph, state = nnx.split(NNX[name](nnx.Rngs(0)))
    inputs = jax.random.normal(jax.random.key(1), dense_models.TOKENS)
    params = nnx.to_pure_dict(state)
    assert_moves_outputs(lambda p, x: nnx.merge(graph, p)(x), params, inputs, "kernel")


def moments_of(model, params, inputs, **options):
    def logits(p, x):
        return model.apply({"params": p}, x).reshape(len(x), -1)

    batch = Batch(inputs, jnp.zeros(len(inputs), int))
    return measure_all(input_moment(logits, **options), params, batch).quadratic.curvature.moments


def by_rows(rows):
    """`mean_n sum_t x_nt x_nt^T` of [N, T, in] in float64."""
    rows = np.asarray(rows, np.float64)
    return np.einsum("nti,ntj->ij", rows, rows) / len(rows)


@pytest.mark.slow
def test_calls_of_one_layer_and_steps_of_a_loop_add_up():
    class Model(nn.Module):
        """One layer in the open, again, and in a loop that shares it."""

        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(6, name="shared")

            class Step(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return nn.tanh(nn.Dense(6, name="looped")(x)), None

            x = nn.tanh(shared(nn.tanh(shared(x))))
            loop = nn.scan(nn.remat(Step), {}, variable_broadcast="params",
                           split_rngs={"params": False}, length=3)  # fmt: skip
            return loop(name="steps")(x, None)[0]

    model = Model()
    inputs = jax.random.normal(jax.random.key(0), (4, 2, 6))
    params = jax.jit(model.init)(jax.random.key(1), inputs)["params"]
    found = moments_of(model, params, inputs)
    leaves = {path: np.asarray(x, np.float64) for path, x in trees.leaves_by_path(params).items()}

    def apply(name, x):
        return np.tanh(x @ leaves[f"{name}/kernel"] + leaves[f"{name}/bias"])

    x = np.asarray(inputs, np.float64)
    seen = {"shared": [], "steps/looped": []}
    for name, calls in (("shared", 2), ("steps/looped", 3)):
        for _ in range(calls):
            seen[name].append(x)
            x = apply(name, x)
    for name, rows in seen.items():
        wanted = by_rows(np.concatenate(rows, axis=1))
        np.testing.assert_allclose(found[f"{name}/kernel"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_layers_that_a_loop_stacks_have_a_moment_each(remat):
    model, _, inputs = dense_models.example("scan")
    params = dense_models.example("scan")[1]
    found = moments_of(dense_models.Scanned(remat=remat), params, inputs)
    leaves = {path: np.asarray(x, np.float64) for path, x in trees.leaves_by_path(params).items()}
    x = np.asarray(inputs, np.float64)
    assert found["blocks/key/kernel"].shape == (4, 6, 6)
    for layer in range(4):
        wanted = by_rows(x[:, None])
        np.testing.assert_allclose(found["blocks/key/kernel"][layer], wanted, rtol=1e-5, atol=1e-6)
        bias = leaves["blocks/key/bias"][layer]
        x = x + np.tanh(x @ leaves["blocks/key/kernel"][layer] + bias)
    np.testing.assert_allclose(found["head/kernel"], by_rows(x[:, None]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_attention_kernels_of_linen_and_nnx_agree():
    inputs = jax.random.normal(jax.random.key(0), dense_models.TOKENS)
    model, params, _ = dense_models.example("attention")
    found = moments_of(model, params, inputs)
    module = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    same = {name: params[name] for name in ("query", "key", "value", "out")}
    measure = input_moment(lambda p, x: nnx.merge(graph, p)(x).reshape(len(x), -1))
    nnx.replace_by_pure_dict(state, same)
    other = measure_all(measure, state, Batch(inputs, jnp.zeros(3, int)))
    assert found["out/kernel"].shape == (6, 6) and params["out"]["kernel"].shape == (2, 3, 6)
    for path, moment in found.items():
        np.testing.assert_allclose(other.quadratic.curvature.moments[path], moment, rtol=1e-5)
    np.testing.assert_allclose(found["key/kernel"], by_rows(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_tokens_of_padding_are_left_out_where_a_layer_sees_the_tokens():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            summed = nn.Dense(3, name="of_all")(x.sum(axis=1))
            return nn.Dense(3, name="of_each")(x) + summed[:, None]

    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(4, 5, 2)), jnp.float32)
    params = jax.jit(Model().init)(jax.random.key(0), inputs)["params"]
    weights = np.asarray(rng.integers(0, 3, size=(4, 5)), np.float32)
    weights[3] = 0
    batch = Batch(inputs, jnp.zeros((4, 5), int), jnp.asarray(weights))
    measure = input_moment(lambda p, x: Model().apply({"params": p}, x))
    direction = jax.tree.map(jnp.ones_like, params)
    found = measure_all(measure, params, batch, 3, direction)
    x = np.asarray(inputs[:3], np.float64)
    each = np.einsum("nt,nti,ntj->ij", weights[:3], x, x) / 3
    moments = found.quadratic.curvature.moments
    np.testing.assert_allclose(moments["of_each/kernel"], each, rtol=1e-5)
    np.testing.assert_allclose(moments["of_all/kernel"], by_rows(x.sum(axis=1)[:, None]), rtol=1e-5)
    np.testing.assert_allclose(found.along, found.quadratic.curvature_along(direction), rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_computation_is_summed_in_float32_and_a_state_is_an_argument():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, dtype=jnp.bfloat16, name="a")(x)

    inputs = jax.random.normal(jax.random.key(0), (300, 4)).astype(jnp.bfloat16)
    params = jax.jit(Model().init)(jax.random.key(1), inputs)["params"]
    measure = input_moment(lambda p, x, factor: Model().apply({"params": p}, factor * x))
    batch = Batch(inputs, jnp.zeros(300, int))
    factor = jnp.asarray([[1.0, 2.0, 4.0, 0.5]], jnp.bfloat16)
    found = measure_all(measure, params, batch, 64, model_state=factor)
    wanted = by_rows(np.asarray(factor * inputs, np.float64)[:, None])
    moment = found.quadratic.curvature.moments["a/kernel"]
    assert moment.dtype == jnp.float32
    np.testing.assert_allclose(moment, wanted, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_not_called_has_no_curvature_and_other_leaves_pass():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((3, 2))}, "step": 1}
    batch = Batch(jnp.ones((2, 2)), jnp.zeros(2, int))
    found = measure_all(input_moment(lambda p, x: x @ p["a"]["kernel"]), params, batch)
    assert found.quadratic.curvature.moments["b/kernel"].tolist() == [[0.0] * 3] * 3
    assert found.quadratic.center["step"] is None
    direction = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((3, 2))}, "step": 2}
    assert float(found.quadratic.curvature_along(direction)) == 8.0


READS = {
    "mul": lambda w, x: x @ (2 * w),
    "reduce_sum": lambda w, x: x @ w + w.sum(),
    "its outputs": lambda w, x: w,
    "a product over other axes": lambda w, x: x @ w.T,
    "cond": lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x),
    "while": lambda w, x: jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ w, x),
}


@pytest.mark.parametrize("how", READS)
def test_a_kernel_that_is_read_in_another_way_is_refused(how):
    measure = input_moment(lambda p, x: READS[how](p["w"], x), "w")
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(InvalidInput, match=f"kernels=w: is read .*{how}") as refused:
        measure.update(measure.init(params), Batch(jnp.ones((2, 2)), jnp.zeros(2, int)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", [slow("einsum, outputs first"), "einsum, heads last", slow("convolution in groups")]
)
def test_layers_of_another_kind_are_refused(name):
    model, params, inputs = dense_models.example(name)
    with pytest.raises(InvalidInput, match="kernels=?.*kernel"):
        moments_of(model, params, inputs)


def test_mistakes_with_kernels():
    zero = InputMomentQuadratic.zero
    with pytest.raises(InvalidInput, match="kernels=None: no leaf is a dense kernel named kernel"):
        zero({"w": jnp.ones((2, 2))})
    with pytest.raises(InvalidInput, match=r"kernels=\(\): name at least one kernel"):
        zero({"w": jnp.ones((2, 2))}, ())
    with pytest.raises(InvalidInput, match="kernels=x: pattern='x'"):
        zero({"w": jnp.ones((2, 2))}, "x")
    with pytest.raises(InvalidInput, match="kernels: cannot have b: of shape"):
        zero({"b": jnp.ones(2)}, ("b",))
    with pytest.raises(InvalidInput, match="kernels: cannot have w: .*may be"):
        zero({"w": jnp.ones((2, 3, 4))}, ("w",))
    both = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    with pytest.raises(InvalidInput, match="kernels=v: were measured, and the memory is of w"):
        zero(both, "w").plus(zero(both, "v"))
    with pytest.raises(ValueError, match="chunk_size=0: must be at least 1"):
        input_moment(oracles.network, chunk_size=0)


def test_it_joins_its_own_kind_only_and_is_no_curvature_of_the_loss():
    params, _, batch = oracles.problem()
    moments = measured(params, batch).quadratic
    other = measure_all(identity(), params, batch).quadratic
    assert isinstance(moments + moments, InputMomentQuadratic)
    assert isinstance(moments + other, pm_jax.SumQuadratic)
    assert not moments.curvature.of_loss and other.curvature.of_loss and moments.leafwise
