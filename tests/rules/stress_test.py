"""Measures, quadratics and coefficients on numbers at the edge, against what theory says there.

Merge rules on such numbers are in contract_test.py, whole runs in stress_runs_test.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import coefficients, curvature, losses, trees
from pm_jax.continual.training.partition import Trainable
from pm_jax.continual.training.task_program import training_loss
from pm_jax.curvature import DiagonalQuadratic, ExactQuadratic, kronecker, low_rank
from pm_jax.curvature.measures import in_groups, measure_all
from pm_jax.models import MLP, VisionTransformer
from pm_jax.perturbation import symmetric
from pm_jax.rules import Evidence, objectives, perturb_and_merge
from pm_jax.types import Batch

pytestmark = pytest.mark.slow

N, WIDTH, CLASSES = 6, 4, 3


def network(hidden=(), dtype=jnp.float32):
    """Logits of a classifier, and its leaves by path."""
    model = MLP(CLASSES, hidden, dtype)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, WIDTH)))["params"]

    def logits_fn(leaves, inputs):
        logits = model.apply({"params": trees.replace(params, leaves)}, inputs)
        return logits.astype(jnp.float32)

    return logits_fn, trees.leaves_by_path(params)


LOGITS, LEAVES = network()
LOSSES = losses.cross_entropy(LOGITS)
MEASURES = {
    "fisher_empirical": curvature.fisher_empirical(LOSSES),
    "fisher_exact in more groups than examples": in_groups(curvature.fisher_exact(LOGITS), 8),
    "fisher_exact by layers": curvature.fisher_exact(LOGITS, num_samples=1, dense_layers=("head",)),
    "gauss_newton": curvature.gauss_newton(LOGITS),
    "hessian": curvature.hessian(LOSSES),
    "kronecker": kronecker.fisher_kronecker(LOGITS, ("head/kernel",)),
    "low_rank": low_rank.gauss_newton_low_rank(LOGITS, rank=3),
}
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(N, WIDTH)), jnp.float32)
LABELS = jnp.argmax(LOGITS(LEAVES, INPUTS), axis=-1)  # what the network says: it can be sure of it
DIRECTION = jax.tree.map(jnp.ones_like, LEAVES)
ONE = jnp.asarray([1.0] + [0.0] * (N - 1))


def times(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


SITUATIONS = {  # parameters, examples, direction, and what the curvature along it is
    "ordinary": (LEAVES, Batch(INPUTS, LABELS, jnp.ones(N)), DIRECTION, "positive"),
    "one example": (LEAVES, Batch(INPUTS, LABELS, ONE), DIRECTION, "certain"),
    "padding alone": (LEAVES, Batch(INPUTS, LABELS, 0 * ONE), DIRECTION, "zero"),
    "images of variance 0": (LEAVES, Batch(0 * INPUTS, LABELS, jnp.ones(N)), DIRECTION, "finite"),
    "no displacement": (
        *(LEAVES, Batch(INPUTS, LABELS, jnp.ones(N))),
        *(times(0.0, DIRECTION), "zero"),
    ),
    "a loss of 0": (
        *(times(1e4, LEAVES), Batch(INPUTS, LABELS, jnp.ones(N))),
        *(DIRECTION, "zero"),
    ),
    "gradients that underflow": (
        *(times(0.0, LEAVES), Batch(1e-30 * INPUTS, LABELS, jnp.ones(N))),
        *(DIRECTION, "finite"),
    ),
    "squares that overflow": (
        *(times(1e-30, LEAVES), Batch(1e30 * INPUTS, LABELS, jnp.ones(N))),
        *(DIRECTION, "undefined"),
    ),
    "NaN in an input": (
        *(LEAVES, Batch(INPUTS.at[0, 0].set(jnp.nan), LABELS, jnp.ones(N))),
        *(DIRECTION, "undefined"),
    ),
    "NaN in a parameter": (
        *(times(jnp.nan, LEAVES), Batch(INPUTS, LABELS, jnp.ones(N))),
        *(DIRECTION, "undefined"),
    ),
}


@functools.cache
def measured(name):
    """The measure compiled, once for all situations."""
    return jax.jit(
        lambda params, batch, direction: measure_all(
            MEASURES[name], params, batch, 4, direction, jax.random.key(1)
        )
    )


@pytest.mark.parametrize("name", MEASURES)
def test_measures_under_stress(name):
    for situation, (params, batch, direction, wanted) in SITUATIONS.items():
        found = measured(name)(params, batch, direction)
        figures = np.asarray([found.along, found.standard_error])
        leaves = jax.tree.leaves((found.quadratic, found.left_out))
        defined = wanted != "undefined"
        assert np.isfinite(figures).all() == defined, situation
        if defined:
            assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves), situation
        if wanted == "zero":
            assert found.along == 0 and found.standard_error == 0, situation
        if wanted == "positive":
            assert found.along > 0 and found.standard_error > 0
        if wanted == "certain":
            assert found.examples == 1 and found.standard_error == 0, situation
        if found.quadratic is None:
            continue
        alpha = coefficients.merge_coefficient(
            found.quadratic, times(0.0, DIRECTION), DIRECTION, task=3
        )
        no_minimum = wanted in ("zero", "undefined") and situation != "no displacement"
        assert np.isfinite([alpha.alpha, alpha.alpha_raw]).all(), situation
        assert bool(alpha.degenerate) == no_minimum, situation
        if no_minimum:
            np.testing.assert_allclose(alpha.alpha, 1 / 3, rtol=1e-6)


def test_computation_in_bfloat16_that_overflows_gives_the_average_and_says_so():
    logits_fn, leaves = network((5,), jnp.bfloat16)
    huge, batch = times(1e30, leaves), Batch(INPUTS, LABELS)

    @jax.jit
    def gradient_and_curvature(params):
        loss = losses.mean(losses.cross_entropy(logits_fn))
        found = measure_all(curvature.fisher_exact(logits_fn), params, batch, N)
        return jax.grad(loss)(params, batch), found.quadratic

    gradients, quadratic = gradient_and_curvature(huge)
    assert not all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    alpha = coefficients.merge_coefficient(
        quadratic, leaves, times(1.0, leaves), task=4, curvature_error=jnp.nan
    )
    assert alpha.alpha == 0.25 and alpha.degenerate and np.isnan(alpha.standard_error)


# Quadratics and coefficients.

ZERO = {"w": jnp.zeros((2, 3)), "v": jnp.zeros(2)}
STEP = {"w": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "v": jnp.asarray([1.0, -2.0])}


def diagonal(center, factor=1.0):
    return DiagonalQuadratic.at(center, jax.tree.map(lambda x: factor * (1 + x**2), STEP))


def kronecker_factored(center, factor=1.0):
    inputs, outputs = jnp.asarray([[2.0, 1.0], [1.0, 3.0]]), jnp.eye(3)
    return kronecker.KroneckerQuadratic.at(
        center,
        {"w": factor * inputs[None]},
        {"w": outputs[None]},
        {"v": factor * jnp.asarray([1.0, 5.0])},
    )


def of_low_rank(center, factor=1.0):
    tests = jax.tree.map(lambda x: jnp.stack([x, x**2]), STEP)
    return low_rank.LowRankQuadratic.of_products(center, tests, times(factor, tests))


def exact(center, factor=1.0):
    def logits_fn(leaves, inputs):
        return factor * jnp.matmul(inputs, leaves["w"]) + jnp.sum(leaves["v"])

    return ExactQuadratic.at(center, Batch(jnp.eye(2), jnp.zeros(2, int)), logits_fn)


KINDS = {
    "diagonal": (diagonal, lambda: DiagonalQuadratic.zero(ZERO)),
    "kronecker": (
        kronecker_factored,
        lambda: kronecker.KroneckerQuadratic.zero(ZERO, ("w",), slots=5),
    ),
    "low rank": (of_low_rank, lambda: low_rank.LowRankQuadratic.zero(ZERO, 4)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@jax.jit
def answers(quadratic):
    """To all four questions, at and along the step."""
    return (
        quadratic.value(STEP),
        quadratic.gradient_along(STEP, STEP),
        quadratic.curvature_along(STEP),
        quadratic.gram([STEP, ZERO]),
    )


@jax.jit
def merged(quadratic, displacement, task):
    """The coefficient for all leaves, and one for each."""
    one = coefficients.merge_coefficient(quadratic, ZERO, displacement, task=task)
    return one, coefficients.merge_coefficients(quadratic, ZERO, displacement, (0, 1), task=task)


@pytest.mark.parametrize("kind", [*KINDS, "exact"])
def test_a_quadratic_without_curvature_is_0_everywhere_and_asks_for_the_average(kind):
    quadratic = (exact if kind == "exact" else KINDS[kind][0])(ZERO, 0.0)
    assert not any(np.asarray(answer).any() for answer in answers(quadratic))
    both = quadratic + diagonal(ZERO, 0.0)  # a sum of several kinds but for the diagonal
    one, several = merged(both, STEP, 5)
    assert one.degenerate and several.degenerate.all()
    np.testing.assert_allclose([one.alpha, one.alpha_raw, *several.alpha], 1 / 5, rtol=1e-6)


@every_kind
def test_equal_tasks_are_averaged_whatever_they_change(kind):
    """t - 1 equal quadratics at the previous model and one at the trained one."""
    quadratic, memory = KINDS[kind]
    plus = jax.jit(lambda total, new: total.plus(new))
    total = memory()
    for _ in range(3):
        total = plus(total, quadratic(ZERO))
    one, several = merged(plus(total, quadratic(STEP)), STEP, 4)
    np.testing.assert_allclose(one.alpha_raw, 1 / 4, rtol=1e-5)
    # Low rank ties the groups together, which a ridge of 1e-6 of the diagonal blurs.
    np.testing.assert_allclose(several.alpha, [1 / 4, 1 / 4], rtol=1e-3)
    assert not one.degenerate and not several.degenerate.any()
    still, each_still = merged(plus(total, quadratic(ZERO)), ZERO, 4)
    assert still.alpha == 0.25 and still.degenerate and still.denominator == 0
    assert each_still.degenerate.all()
    for factor in (1e38, jnp.inf, jnp.nan):
        one, several = merged(plus(total, quadratic(STEP).scaled(factor)).scaled(1e3), STEP, 4)
        assert one.alpha == 0.25 and one.degenerate, factor
        np.testing.assert_allclose(several.alpha, [1 / 4, 1 / 4], rtol=1e-6)


def test_a_quotient_that_is_none_is_that_of_the_average():
    none = [(1, 0), (1, -1), (1, 1e-40), (1, np.inf), (np.inf, 1), (np.nan, 1), (1, np.nan)]
    top, bottom = jnp.asarray([*none, (1e30, 1e-30), (1e30, 4e30), (-1, 2)], jnp.float32).T
    found = coefficients.merge_coefficient_of(top, bottom, task=3, curvature_error=1.0)
    assert found.degenerate.tolist() == [True] * 8 + [False] * 2
    np.testing.assert_allclose(found.alpha, [1 / 3] * 8 + [0.25, 0.0], rtol=1e-6)
    assert np.isnan(found.standard_error[:8]).all() and np.isfinite(found.standard_error[8:]).all()


@pytest.mark.parametrize(
    "gram, slopes, wanted",
    [
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [1.0, 1.0], [0.0, 0.25]),
        ([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], None),  # a valley, of which any point will do
        ([[1e30, 0.0], [0.0, 1e30]], [5e29, 2e30], [0.5, 1.0]),
        ([[1e-30, 0.0], [0.0, 1e-30]], [5e-31, 2e-30], [0.5, 1.0]),
        ([[1.0, 2.0], [2.0, 1.0]], [1.0, 1.0], "unsound"),
        ([[np.nan, 0.0], [0.0, 1.0]], [1.0, 1.0], "unsound"),
        ([[1.0, 0.0], [0.0, 1.0]], [np.inf, 1.0], "unsound"),
    ],
)
def test_the_minimum_in_a_box_under_stress(gram, slopes, wanted):
    found, sound = coefficients.box_minimum(jnp.asarray(gram), jnp.asarray(slopes))
    assert bool(sound) == (wanted != "unsound")
    if isinstance(wanted, list):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    elif wanted is None:
        np.testing.assert_allclose(jnp.sum(found), 1.0, rtol=1e-5)


def test_a_task_and_the_same_inputs_under_the_other_labels_meet_halfway():
    """Their optima mirror each other and so do their Fishers: nothing is known at the merge."""
    weights = {"w": jnp.asarray(RNG.normal(size=(WIDTH, 1)), jnp.float32)}

    def logits_fn(leaves, inputs):
        product = jnp.matmul(inputs, leaves["w"])
        return jnp.concatenate([product, -product], axis=1)

    measure, rule = curvature.fisher_exact(logits_fn), perturb_and_merge()
    labels = jnp.argmax(logits_fn(weights, INPUTS), axis=1)
    start = times(0.0, weights)
    state, merged = rule.init(start), start
    for sign, own in ((1.0, labels), (-1.0, 1 - labels)):
        trained = times(sign, weights)
        assert (jnp.argmax(logits_fn(trained, INPUTS), axis=1) == own).all()
        found = measure_all(measure, trained, Batch(INPUTS, own), N)
        merged, state, info = rule.update(
            state, previous=merged, trained=trained, evidence=Evidence(found.quadratic)
        )
    np.testing.assert_allclose(info.alpha, 0.5, rtol=1e-5)
    np.testing.assert_allclose(merged["w"], 0, atol=1e-6)
    assert info.degenerate == 0 and info.predicted_loss_change > 0


# Losses.


def test_images_of_variance_0_have_finite_gradients_through_layer_norms():
    """Under the perturbation too, at no displacement and with a padded example."""
    model = VisionTransformer(3, patch_size=2, width=8, depth=1, num_heads=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    flat = trees.leaves_by_path(params)
    batch = Batch(jnp.zeros((2, 4, 4, 1), jnp.uint8), jnp.zeros(2, int), jnp.asarray([1.0, 0.0]))

    loss = training_loss(model, symmetric())

    @jax.jit
    def gradient(direct):
        return jax.value_and_grad(loss, argnums=1, has_aux=True)(
            jax.random.key(0), Trainable({}, direct, {}), params, batch, jnp.ones(3, bool)
        )

    for leaves in (flat, times(0.0, flat), times(1e4, flat)):
        (value, _), found = gradient(leaves)
        assert np.isfinite(value)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(found))


def test_a_batch_of_padding_alone_has_a_loss_and_a_gradient_of_0():
    batch = Batch(INPUTS, LABELS, jnp.zeros(N))
    value, gradient = jax.value_and_grad(losses.mean(LOSSES))(LEAVES, batch)
    assert value == 0 and not any(g.any() for g in jax.tree.leaves(gradient))
    batches = jax.tree.map(lambda x: x[None], batch)
    seen = jnp.ones(CLASSES, bool)
    objective = objectives.Objective(jax.tree_util.Partial(LOGITS), batches, seen, ~seen)
    assert objective.gradient_norm(LEAVES) == 0
