"""Products of float32 numbers ask for full precision wherever a merge depends on them.

On a CPU the precision changes no number, so the traced programs are read.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.workloads import random_data
from pm_jax import classifiers, coefficients, curvature, lora, losses, matrix_products, rules
from pm_jax.classifiers import drift
from pm_jax.continual import Config
from pm_jax.continual.merging.model_state import BatchStatisticsPass
from pm_jax.continual.merging.programs import StreamShape, programs_of
from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.devices import Devices
from pm_jax.continual.training.task_program import Segment
from pm_jax.curvature import squared_gradients
from pm_jax.curvature.measures import in_groups, with_along
from pm_jax.precision import in_full_precision
from pm_jax.rules import gradient_projection, objectives
from pm_jax.types import Batch
from tests import contract_test
from tests.classifiers import contract_test as of_classifiers
from tests.small_runs import slow

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
FULL = jax.lax.Precision.HIGHEST


@pytest.fixture(autouse=True)
def users_precision():
    """Trace as at a user's: other tests ask for full precision throughout."""
    with jax.default_matmul_precision(None):
        yield


def rounded(function, *args, **kwargs):
    """Equations of a traced function that multiply float32 numbers in less than full precision."""
    return list(_rounded(jax.make_jaxpr(function)(*args, **kwargs).jaxpr))


def _rounded(program):
    for equation in program.eqns:
        if equation.primitive.name in PRODUCTS:
            precision = equation.params["precision"]
            both = precision if isinstance(precision, tuple) else (precision,) * 2
            wide = [x.aval.dtype == jnp.float32 for x in equation.invars[:2]]
            if any(wide) and both != (FULL, FULL):
                yield equation
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _rounded(inner)


class Network(nn.Module):
    """Layers of several kinds."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (2, 2), name="conv")(x)).reshape(len(x), -1, 6)
        x = nn.remat(nn.Dense)(4, name="tokens")(x).mean(axis=1)
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(5, name="hidden")(x)))


NETWORK = Network()
IMAGES = jax.random.normal(jax.random.key(1), (4, 4, 4, 2))
EXAMPLES = Batch(IMAGES, jnp.asarray([0, 2, 1, 1]), jnp.ones(4))
PARAMS = jax.jit(NETWORK.init)(jax.random.key(0), IMAGES)["params"]
DIRECTION = jax.tree.map(jnp.ones_like, PARAMS)
LAYERS = ("tokens", "hidden", "head")
KEY = jax.random.key(2)


def logits_fn(params, inputs):
    return NETWORK.apply({"params": params}, inputs)


LOSSES_FN = losses.cross_entropy(logits_fn)
# Networks of one's own are in the platform's precision, unless they are told otherwise.
CASES = {
    "empirical": lambda: curvature.fisher_empirical(LOSSES_FN),
    "empirical, by layers": lambda: curvature.fisher_empirical(LOSSES_FN, dense_layers=LAYERS),
    "exact, all labels": lambda: curvature.fisher_exact(logits_fn),
    "exact, drawn": lambda: curvature.fisher_exact(logits_fn, num_samples=1, dense_layers=LAYERS),
    "by vmap": lambda: curvature.fisher_exact(logits_fn, num_samples=1, dense_layers=()),
    "identity": curvature.identity,
    "kronecker": lambda: curvature.fisher_kronecker(
        logits_fn, ("tokens/kernel", "hidden/kernel"), num_samples=1, dense_layers=LAYERS
    ),
    "low rank": lambda: curvature.gauss_newton_low_rank(logits_fn, rank=3),
    "input moments": lambda: curvature.input_moment(logits_fn, ("hidden/kernel", "conv/kernel")),
    "gauss_newton": lambda: curvature.gauss_newton(logits_fn),
    "hessian": lambda: curvature.hessian(LOSSES_FN),
    "in groups": lambda: in_groups(curvature.fisher_empirical(LOSSES_FN), 2),
    "with another along": lambda: with_along(
        curvature.fisher_exact(logits_fn), curvature.gauss_newton(logits_fn)
    ),
}


def ask(quadratic):
    """All that merges and reports ask of a quadratic."""
    both = quadratic + quadratic.scaled(0.5)
    return (
        both.value(DIRECTION), both.gradient_along(DIRECTION, PARAMS), both.curvature_along(PARAMS),
        both.curvature.times(PARAMS), both.curvature.gram([DIRECTION, PARAMS]),
        both.curvature.trace(),
    )  # fmt: skip


@pytest.mark.parametrize("name", [slow(x) if "along" in x or "groups" in x else x for x in CASES])
def test_measures_and_their_quadratics(name):
    measure = CASES[name]()

    def measured(params, examples, direction, key):
        state = measure.update(measure.init(params, direction, key), examples)
        result = measure.finalize(state)
        return result, ask(result.quadratic) if result.quadratic else ()

    assert not rounded(measured, PARAMS, EXAMPLES, DIRECTION, KEY)


@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
def test_exact_quadratics(matrix):
    def small_logits(w, x):
        return jnp.tanh(x @ w) @ w.T

    model = small_logits if matrix == "gauss_newton" else losses.cross_entropy(small_logits)

    def asked(w, batch):
        quadratic = curvature.ExactQuadratic.at(w, batch, model, matrix)
        trace = () if matrix == "hessian" else quadratic.curvature.trace()
        return quadratic.value(2 * w), quadratic.curvature.gram([w, 2 * w]), trace

    assert not rounded(asked, jnp.ones((3, 2)), Batch(jnp.ones((4, 3)), jnp.zeros(4, int)))


def test_products_with_matrices_and_squared_gradients():
    def products(p, d, batch):
        several = jax.tree.map(lambda x: jnp.stack([x, x]), d)
        return (
            matrix_products.directional_derivative(lambda q: logits_fn(q, batch.inputs), p, d),
            matrix_products.hessian_vector_product(lambda q, b: LOSSES_FN(q, b).sum(), p, d, batch),
            matrix_products.hessian_along(LOSSES_FN, p, d, batch),
            matrix_products.gauss_newton_along(logits_fn, p, d, batch),
            matrix_products.gauss_newton_times(logits_fn, p, several, batch),
            *(
                way(lambda q, b: logits_fn(q, b.inputs), squared_gradients.label_passes(None),
                    p, batch, None, d)
                for way in (squared_gradients.by_vmap, squared_gradients.by_program)
            ),
        )  # fmt: skip

    assert not rounded(products, PARAMS, DIRECTION, EXAMPLES)


def test_coefficients():
    def found(center, trained, diagonal):
        quadratic = curvature.DiagonalQuadratic.at(center, diagonal)
        delta = jax.tree.map(jnp.subtract, trained, center)
        return (
            coefficients.merge_coefficient(quadratic, center, delta, task=2),
            coefficients.merge_coefficients(quadratic, center, delta, (0, 1), task=2),
        )

    tree = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    assert not rounded(found, tree, tree, tree)


@pytest.mark.parametrize("name", [*sorted(rules.REGISTRY), *map(slow, contract_test.VARIANTS)])
def test_rules(name):
    """All rules of the registry, on a model whose loss has the platform's precision."""
    rule = contract_test.as_written(name)

    def merged(start, *trained):
        return contract_test.run(rule, trained, start)[0]

    assert not rounded(merged, *(contract_test.model(seed) for seed in range(3)))


def test_objectives_and_the_memory_of_inputs():
    def asked(params, examples):
        stacked = jax.tree.map(lambda x: x[None], examples)
        logits = jax.tree_util.Partial(logits_fn)
        objective = objectives.Objective(logits, stacked, jnp.ones(3, bool), jnp.zeros(3, bool))
        paths = ("tokens/kernel", "hidden/kernel")
        moments = gradient_projection.input_moments(objective, params, paths)
        grown = gradient_projection.grown(jnp.zeros((4, 4)), moments["hidden/kernel"], 0.9)
        return objective.gradient_norm(params), moments, grown

    assert not rounded(asked, PARAMS, EXAMPLES)


def test_adapters():
    adapters = {"k": lora.Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)))}
    for function in (lora.fold, lambda p, a: (lora.displacement(a), lora.squared_norm(a))):
        assert not rounded(function, {"k": jnp.ones((3, 4))}, adapters)


@pytest.mark.parametrize("name", sorted(classifiers.REGISTRY))
def test_classifiers(name):
    """Statistics, their sums and moves, the fit and the predictor."""
    classifier = of_classifiers.made(name)
    features, labels = of_classifiers.examples()

    def learned(features, labels, weights, columns):
        statistics = classifier.statistics
        if statistics is None:
            return classifier.fit(None, columns, None)(features)
        state = of_classifiers.start(statistics)
        state = statistics.observe(state, features, labels, weights)
        if statistics.moved:
            identity = classifiers.FeatureMap.identity(of_classifiers.WIDTH)
            state = statistics.moved(state, identity)
        state = statistics.plus(state, state)
        predictor = classifier.fit(state, columns, of_classifiers.KEY)
        return predictor(features), classifier.figures(state, predictor)

    weights = np.ones(len(labels), np.float32)
    assert not rounded(learned, features, labels, weights, of_classifiers.columns())


def test_drift():
    def fitted(before, after, weights):
        found = drift.observe(drift.init(3), before, after, weights)
        return drift.fit(found), drift.size(found)

    assert not rounded(fitted, jnp.ones((10, 3)), jnp.ones((10, 3)), jnp.ones(10))


RUN = Config(
    hidden_sizes=(4, 4), scenario="class_incremental", classifiers=("discriminant", "aligned"),
    drift_correction="affine", curvature="exact_current",
)  # fmt: skip
"""A run with everything that is measured after a task."""


def traced(precision):
    """The functions of a run with the arguments of its second task."""
    run = programs_of(
        dataclasses.replace(RUN, matmul_precision=precision), StreamShape(10, (2, 2, 1), 6, 5)
    )
    data, task, seen = random_data((2, 2, 1), 6), number(1), jnp.ones(10, bool)
    params = run.training.init(KEY)
    started = run.training.later.begin(KEY, params, task)
    segment = Segment.of(1, 0, 0, 1, 1)
    given = (KEY, params, task, {}, (params, {}))
    return {
        "train": (run.training.later.train, (KEY, *started, params, data, segment)),
        "scores": (run.training.scores, (data, params, seen, task)),
        "mean loss": (run.training.mean_loss, (data, params, task)),
        "evidence": (run.evidence, (data, KEY, params, params, task)),
        "statistics": (run.classifying.observe, (data, *given)),
    }


@pytest.mark.parametrize("precision", ["default", slow("high"), slow("highest")])
def test_training_and_evaluation_follow_the_setting_and_statistics_do_not(precision):
    wanted = getattr(jax.lax.Precision, precision.upper())
    # Without a choice, JAX's own setting holds, and that is none here.
    named = None if precision == "default" else (wanted, wanted)
    for name, (function, arguments) in traced(precision).items():
        found = {equation.params["precision"] for equation in rounded(function, *arguments)}
        follows = name in ("train", "scores", "mean loss") and wanted != FULL
        assert found == ({named} if follows else set()), name


def test_batch_statistics_of_a_merged_model_have_full_precision():
    class Normed:
        def batch_statistics(self, params, state, inputs, key):
            return {"mean": jnp.mean(inputs.reshape(len(inputs), -1) @ params, axis=0)}

    data = random_data((2, 2, 1), 6)
    measure = BatchStatisticsPass(Config(), Normed())
    state = {"mean": jnp.zeros(2)}
    assert not rounded(measure, data, KEY, jnp.ones((4, 2)), number(1), state)


def test_the_precision_belongs_to_a_compiled_function():
    def product(x):
        return x @ x

    high, full = (Devices.of(precision=name).jit(product) for name in ("high", "highest"))
    x = jnp.ones((2, 2))
    # JAX remembers the traces of a function, which must not stand for one another.
    assert [bool(rounded(compiled, x)) for compiled in (high, full, high)] == [True, False, True]


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x @ x,
        jax.jit(lambda x: x @ x),
        lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=2)[0],
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x),
        lambda x: jax.vmap(lambda row: x @ row)(x),
        lambda x: jnp.matmul(x, x, precision="high"),
        lambda x: jnp.convolve(x[0], x[1]),
        jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda y: y @ y)(x))),
    ],
)
def test_a_planted_product_is_found(planted):
    x = jnp.ones((2, 2))
    assert rounded(planted, x)
    assert not rounded(planted, x.astype(jnp.bfloat16))
    # The last but two names its precision, which stays.
    named = any(e.params["precision"] == (jax.lax.Precision.HIGH,) * 2 for e in rounded(planted, x))
    assert bool(rounded(in_full_precision(planted), x)) == named
