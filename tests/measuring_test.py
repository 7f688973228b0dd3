"""Measuring models and data as people have them: every form, state, warnings and mistakes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import FrozenDict

import pm_jax
from experiments.benchmarks.compilations import compilations
from pm_jax import Batch, curvature, losses, trees
from pm_jax.curvature import ExactQuadratic, kronecker, low_rank, measures
from tests import oracles
from tests.small_runs import slow

EXAMPLES = 13
SAMPLED = curvature.fisher_exact(oracles.network, num_samples=2)
PARAMS, DIRECTION, BATCH = oracles.problem(EXAMPLES)
INPUTS, LABELS = (np.asarray(x) for x in BATCH[:2])


def measured(examples, **given):
    given = {"batch_size": 5, "direction": DIRECTION, "key": jax.random.key(1), **given}
    return pm_jax.measure_all(SAMPLED, PARAMS, examples, **given)


def assert_close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def identical(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def pieces(*sizes):
    """Inputs and labels cut into batches of some sizes, and the rest."""
    edges = np.cumsum(sizes)
    return list(zip(np.split(INPUTS, edges), np.split(LABELS, edges), strict=True))


class Tensor:
    """Like a tensor of another library: no array, but one that NumPy reads."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return "torch.float32"

    def __len__(self):
        return len(self.values)


class Loader:
    """Like torch's: iterable again and again, with a length, and batches that are lists."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return -(-EXAMPLES // self.size)

    def __iter__(self):
        for start in range(0, EXAMPLES, self.size):
            rows = slice(start, start + self.size)
            yield [Tensor(INPUTS[rows]), Tensor(LABELS[rows])]


FORMS = {
    "a tuple of NumPy's arrays": lambda: (INPUTS, LABELS),
    "with weights": lambda: (INPUTS, LABELS, np.ones(EXAMPLES)),
    "labels of another type": lambda: (INPUTS, LABELS.astype(np.uint8)),
    "a list of labels": lambda: (INPUTS, LABELS.tolist()),
    "tensors": lambda: (Tensor(INPUTS), Tensor(LABELS)),
    "a list of one batch": lambda: [BATCH],
    "a tuple of batches": lambda: tuple(Batch(*piece) for piece in pieces(6)),
    "a generator": lambda: (Batch(*piece) for piece in pieces(4, 4, 4)),
    "small batches in the middle": lambda: iter(pieces(5, 1, 3)),
    "an empty batch": lambda: pieces(2, 0, 7),
    "batches larger than batch_size": lambda: pieces(12),
    "single examples": lambda: pieces(*[1] * (EXAMPLES - 1)),
    "a loader": lambda: Loader(4),
    "JAX's arrays in a generator": lambda: (jax.tree.map(jnp.asarray, p) for p in pieces(3, 9)),
}


@pytest.mark.parametrize("form", FORMS)
def test_examples_in_every_form_give_the_same_bits(form):
    assert identical(measured(FORMS[form]()), measured(BATCH))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [slow(1), 3, slow(8), slow(256)])
def test_sampled_labels_and_sums_do_not_depend_on_the_batch_size(batch_size):
    wanted = measured(BATCH)
    for examples in (BATCH, pieces(4, 4, 4)):
        assert_close(measured(examples, batch_size=batch_size), wanted)
    groups = measures.in_groups(SAMPLED, 3)
    key = jax.random.key(1)
    found = pm_jax.measure_all(groups, PARAMS, Loader(5), batch_size, DIRECTION, key)
    assert_close(found, pm_jax.measure_all(groups, PARAMS, BATCH, 13, DIRECTION, key))


def test_inputs_are_any_tree_and_examples_with_weight_0_do_not_count():
    def logits_fn(params, inputs):
        return oracles.network(params, inputs["x"] - inputs["more"][0])

    measure = pm_jax.fisher_exact(logits_fn)
    inputs = {"x": INPUTS + 1.0, "more": [np.ones((EXAMPLES, 1), np.float32)]}
    wanted = pm_jax.measure_all(pm_jax.fisher_exact(oracles.network), PARAMS, BATCH, 5)
    assert_close(pm_jax.measure_all(measure, PARAMS, (inputs, LABELS), 5), wanted)
    twice = jax.tree.map(lambda x: np.concatenate([x, 7 + x]), inputs)
    weights = np.arange(2 * EXAMPLES) < EXAMPLES
    # Padding may have any label.
    labels = np.concatenate([LABELS, np.full(EXAMPLES, -1)])
    for examples in ((twice, labels, weights), [(twice, labels, weights)]):
        assert_close(pm_jax.measure_all(measure, PARAMS, examples, 5), wanted)


@pytest.mark.parametrize("dtype", [np.float16, *map(slow, (ml_dtypes.bfloat16, float, np.uint8))])
def test_inputs_of_any_type_reach_the_model(dtype):
    inputs = (4 * INPUTS).clip(0).astype(dtype)

    def logits_fn(params, inputs):
        assert inputs.dtype == (np.float32 if dtype is float else dtype)
        return oracles.network(params, inputs.astype(jnp.float32))

    measure = pm_jax.fisher_exact(logits_fn)
    found = pm_jax.measure_all(measure, PARAMS, [(inputs, LABELS)], 5)
    wanted = pm_jax.measure_all(
        pm_jax.fisher_exact(oracles.network), PARAMS, (inputs.astype(np.float32), LABELS), 5
    )
    assert_close(found, wanted)


def test_a_progress_bar_counts_examples(capsys):
    assert identical(measured(BATCH, progress=True), measured(BATCH))
    assert f"{EXAMPLES}/{EXAMPLES}" in capsys.readouterr().err
    measured(iter(pieces(6)), progress=True)
    assert f"{EXAMPLES}example" in capsys.readouterr().err
    measured(BATCH)
    assert not capsys.readouterr().err


def test_measuring_again_compiles_nothing():
    """Other values, other sizes of the task, another state, measures made anew."""

    def logits_fn(params, inputs, mask):
        return losses.mask_logits(oracles.network(params, inputs), mask)

    def run(number, examples):
        with compilations() as compiled:
            pm_jax.measure_all(
                pm_jax.fisher_empirical(losses.cross_entropy(logits_fn), chunk_size=3),
                jax.tree.map(lambda x: x + number, PARAMS),
                examples, 4, DIRECTION, model_state=jnp.arange(4) < 4 - number,
            )  # fmt: skip
        return len(compiled)

    labels = LABELS % 2
    assert run(0, (INPUTS, labels)) > 0
    # Four batches of four each: their last one is padded.
    assert run(1, (INPUTS[:13], labels[:13])) == 0
    assert run(2, (np.concatenate([INPUTS, INPUTS[:3]]), np.append(labels, labels[:3]))) == 0
    assert run(0, [(INPUTS, labels)]) > 0
    assert run(1, ((INPUTS[n : n + 2], labels[n : n + 2]) for n in range(0, 12, 2))) == 0


@pytest.mark.slow
def test_a_model_that_reads_changed_variables_is_measured_as_it_is_now():
    table = {"mask": jnp.ones(4), "scale": 1.0}

    def logits_fn(params, inputs):
        return table["scale"] * oracles.network(params, inputs) * table["mask"][None]

    measure, found = pm_jax.fisher_exact(logits_fn), []
    for change in ({}, {"mask": jnp.arange(4.0)}, {"scale": 2.0}):
        table.update(change)
        frozen = dict(table)
        anew = pm_jax.fisher_exact(
            lambda p, x, frozen=frozen: (
                frozen["scale"] * oracles.network(p, x) * frozen["mask"][None]
            )
        )
        for examples in (BATCH, [BATCH]):
            result = pm_jax.measure_all(measure, PARAMS, examples, 5)
            assert_close(result, pm_jax.measure_all(anew, PARAMS, examples, 5))
        found.append(float(result.quadratic.trace()))
    assert len(set(found)) == 3
    # Equal values in new arrays are no change.
    table["mask"] = jnp.arange(4.0) + 0
    with compilations() as compiled:
        pm_jax.measure_all(measure, PARAMS, BATCH, 5)
    assert not [seconds for seconds in compiled if seconds > 0.5]


# The state of a model.


def some_of(names, *fast):
    """All names, most of them left to the slow lane."""
    return [name if name in fast else slow(name) for name in names]


MASK = jnp.asarray([True, True, False, True])


def masked(params, inputs, mask):
    return losses.mask_logits(oracles.network(params, inputs), mask["classes"])


def masked_by_closure(params, inputs):
    return losses.mask_logits(oracles.network(params, inputs), MASK)


STATEFUL = {
    "fisher_empirical": lambda fn: curvature.fisher_empirical(losses.cross_entropy(fn)),
    "fisher_exact": curvature.fisher_exact,
    "in_groups": lambda fn: measures.in_groups(curvature.fisher_exact(fn, num_samples=1), 2),
    "gauss_newton": curvature.gauss_newton,
    "hessian": lambda fn: curvature.hessian(losses.cross_entropy(fn)),
    "low_rank": functools.partial(low_rank.gauss_newton_low_rank, rank=2),
    "identity": lambda fn: curvature.identity(),
    "with_along": lambda fn: measures.with_along(
        curvature.fisher_exact(fn), curvature.gauss_newton(fn)
    ),
}


@pytest.mark.parametrize("name", some_of(STATEFUL, "fisher_empirical", "low_rank", "with_along"))
def test_the_state_of_a_model_is_an_argument_of_every_measure(name):
    labels = np.where(LABELS == 2, 0, LABELS)
    given = (5, DIRECTION, jax.random.key(0))
    found = pm_jax.measure_all(
        STATEFUL[name](masked), PARAMS, (INPUTS, labels), *given, model_state={"classes": MASK}
    )
    wanted = pm_jax.measure_all(STATEFUL[name](masked_by_closure), PARAMS, (INPUTS, labels), *given)
    assert_close(found, wanted)


@pytest.mark.slow
def test_exact_quadratics_have_the_state_of_each_task():
    state = {"classes": MASK}
    quadratic = ExactQuadratic.at(PARAMS, BATCH, masked, batch_size=4, model_state=state)
    wanted = ExactQuadratic.at(PARAMS, BATCH, masked_by_closure, batch_size=4)
    assert_close(quadratic.curvature_along(DIRECTION), wanted.curvature_along(DIRECTION))
    assert_close(quadratic.trace(), wanted.trace())
    all_classes = ExactQuadratic.at(
        PARAMS, BATCH, masked, batch_size=4, model_state={"classes": MASK | True}
    )
    both = quadratic + all_classes
    terms = [q.curvature_along(DIRECTION) for q in (quadratic, all_classes)]
    assert_close(both.curvature_along(DIRECTION), sum(terms))
    assert abs(terms[0] / terms[1] - 1) > 0.01


# Trees.


class Linen(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        x = nn.relu(dense(6, name="hidden")(x))
        return dense(3, name="head")(x)


KERNELS = ("hidden/kernel", "head/kernel")


def linen(kind):
    model = Linen(remat=kind == "remat")
    nested = jax.jit(Linen().init)(jax.random.key(0), INPUTS)["params"]
    if kind == "flat":
        return trees.leaves_by_path(nested), lambda p, x: model.apply(
            {"params": {name: {k: p[f"{name}/{k}"] for k in ("kernel", "bias")}
                        for name in ("hidden", "head")}}, x
        )  # fmt: skip
    if kind == "with others":
        return {**nested, "step": 3}, lambda p, x: model.apply(
            {"params": {name: p[name] for name in ("hidden", "head")}}, x
        )
    params = FrozenDict(nested) if kind == "frozen" else nested
    return params, lambda p, x: model.apply({"params": p}, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frozen", "remat", "with others"])
def test_kronecker_and_dense_layers_take_any_tree_by_path(kind):
    params, logits_fn = linen(kind)
    flat, of_flat = linen("flat")
    examples = (INPUTS, LABELS % 3)
    directions = [jax.tree.map(lambda x: jnp.cos(1.0 + x), trees.floating(x))
                  for x in (params, flat)]  # fmt: skip

    def both(make):
        found = pm_jax.measure_all(make(logits_fn), params, examples, 5, directions[0])
        wanted = pm_jax.measure_all(make(of_flat), flat, examples, 5, directions[1])
        assert_close((found.along, found.standard_error), (wanted.along, wanted.standard_error))
        center = found.quadratic.center
        assert jax.tree.structure(center) == jax.tree.structure(trees.floating(params))
        for theta in (0.1, 0.2):
            moved = [jax.tree.map(lambda x, by=theta: x + by, trees.floating(x))
                     for x in (params, flat)]  # fmt: skip
            assert_close(found.quadratic.value(moved[0]), wanted.quadratic.value(moved[1]))
        return found.quadratic

    quadratic = both(lambda fn: kronecker.fisher_kronecker(fn, KERNELS, dense_layers=("head",)))
    both(lambda fn: kronecker.fisher_kronecker(fn, ".*/kernel"))
    fast = both(lambda fn: curvature.fisher_exact(fn, dense_layers=("hidden", "head")))
    plain = pm_jax.measure_all(pm_jax.fisher_exact(logits_fn), params, examples, 5).quadratic
    assert_close(fast.diagonal, plain.diagonal)
    zero = kronecker.KroneckerQuadratic.zero(params, KERNELS, slots=2)
    assert_close((zero + quadratic).value(params), quadratic.value(params))


OTHERS = {
    "step": 7, "rng": jax.random.key(0), "ids": np.arange(3), "name": "net", "flag": True,
    "none": None,
}  # fmt: skip


def with_others(params, inputs):
    assert params.get("name", "net") == "net"
    return oracles.network(params, inputs)


@pytest.mark.parametrize("name", some_of(STATEFUL, "fisher_exact", "hessian", "identity"))
def test_leaves_that_are_not_floating_point_are_passed_over(name):
    params = {**PARAMS, **OTHERS}
    direction = pm_jax.task_vectors.difference(
        {**params, **jax.tree.map(jnp.add, PARAMS, DIRECTION)}, params
    )
    key, measure = jax.random.key(0), STATEFUL[name](with_others)
    wanted = pm_jax.measure_all(measure, PARAMS, BATCH, 5, DIRECTION, key)
    for examples in (BATCH, [BATCH]):
        found = pm_jax.measure_all(measure, params, examples, 5, direction, key)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if found.quadratic is not None:
        assert found.quadratic.center["step"] is None and found.quadratic.gradient["name"] is None
    exact = ExactQuadratic.at(params, BATCH, with_others)
    plain = ExactQuadratic.at(PARAMS, BATCH, with_others)
    assert_close(exact.curvature_along(direction), plain.curvature_along(DIRECTION))
