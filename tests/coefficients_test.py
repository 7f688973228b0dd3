import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from pm_jax import coefficients, curvature, rules, task_vectors
from pm_jax.curvature import DiagonalQuadratic, measures
from pm_jax.curvature.input_moments import InputMomentQuadratic
from pm_jax.curvature.kronecker import KroneckerQuadratic
from pm_jax.curvature.low_rank import LowRank, LowRankQuadratic
from pm_jax.types import InvalidInput
from tests import oracles
from tests.curvature.quadratics_test import listed_value, random_tree, running_sum, task_list
from tests.small_runs import slow


def test_closed_form_by_hand():
    old = DiagonalQuadratic.at(jnp.asarray([0.0, 1.0]), jnp.asarray([2.0, 1.0]))
    new = DiagonalQuadratic.at(jnp.asarray([3.0, 2.0]), jnp.asarray([1.0, 4.0]))
    previous, delta = jnp.asarray([1.0, 1.0]), jnp.asarray([2.0, 1.0])
    # gradient at previous: old (2, 0), new (-2, -4); along delta 4 - 8 = -4;
    # curvature along delta: old 9, new 8.
    found = coefficients.merge_coefficient(old + new, previous, delta, task=2, curvature_error=0.5)
    assert float(found.numerator) == 4.0 and float(found.denominator) == 17.0
    np.testing.assert_allclose(found.alpha_raw, 4 / 17, rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, (1 - 4 / 17) / 17 * 0.5, rtol=1e-6)
    assert not bool(found.degenerate)


@pytest.mark.parametrize("normalize", ["none", "trace"])
def test_exact_curvature_of_the_current_task_by_hand(normalize):
    """As above with 10 for the new task's 8; over their traces, 3 and 5, it is 2."""
    rule = rules.perturb_and_merge(normalize=normalize)
    old = DiagonalQuadratic.at(jnp.asarray([0.0, 1.0]), jnp.asarray([2.0, 1.0]))
    new = DiagonalQuadratic.at(jnp.asarray([3.0, 2.0]), jnp.asarray([1.0, 4.0]))
    _, state, _ = rule.update(
        rule.init(jnp.zeros(2)),
        previous=jnp.zeros(2),
        trained=old.center,
        evidence=rules.Evidence(old, 0.0, curvature_along=jnp.asarray(5.0)),
    )
    evidence = rules.Evidence(new, 0.5, curvature_along=jnp.asarray(10.0))
    found = rule.update(state, previous=jnp.ones(2), trained=new.center, evidence=evidence)[2]
    before, slope, own = (9.0, -4.0, 10.0) if normalize == "none" else (3.0, -4 / 3, 2.0)
    np.testing.assert_allclose(found.numerator, slope + own, rtol=1e-6)
    np.testing.assert_allclose(found.denominator, before + own, rtol=1e-6)
    alpha = (slope + own) / (before + own)
    np.testing.assert_allclose(found.alpha_raw, alpha, rtol=1e-6)
    error = 0.5 * own / 10 * (1 - alpha) / (before + own)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-6)
    np.testing.assert_allclose(found.predicted_loss_change, (1 - alpha) ** 2 * 10 / 2, rtol=1e-6)


@pytest.mark.parametrize("clip", [True, slow(False)])
def test_closed_form_is_the_minimum_along_the_segment(float64, clip):
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 201) if clip else np.linspace(-3, 3, 601)
    for _ in range(5):
        tasks = task_list(rng, 3, np.float64)
        previous, new = random_tree(rng, np.float64), tasks[-1][0]
        delta = task_vectors.difference(new, previous)
        memory = running_sum(tasks, random_tree(rng, np.float64))
        alpha = coefficients.merge_coefficient(memory, previous, delta, task=3, clip=clip).alpha
        best = listed_value(tasks, task_vectors.apply(previous, delta, alpha))
        start, step = oracles.flat(previous), oracles.flat(delta)
        for a in grid:
            assert best <= listed_value(tasks, start + a * step) * (1 + 1e-12)


def test_a_common_factor_cancels():
    rng = np.random.default_rng(1)
    tasks, previous = task_list(rng, 4), random_tree(rng)
    delta = task_vectors.difference(tasks[-1][0], previous)
    center = random_tree(rng)
    scaled = [(star, jax.tree.map(lambda f: 1e-4 * f, fisher)) for star, fisher in tasks]
    plain, other = (
        coefficients.merge_coefficient(running_sum(t, center), previous, delta, task=4).alpha_raw
        for t in (tasks, scaled)
    )
    np.testing.assert_allclose(other, plain, rtol=1e-5)


def test_standard_error_is_the_spread_over_resampled_data():
    """The Fisher of the new task measured on many fresh samples of its data."""
    params, direction, _ = oracles.problem()
    previous = jax.tree.map(jnp.subtract, params, direction)
    old = DiagonalQuadratic.at(
        jax.tree.map(lambda p: p + 0.05, previous),
        jax.tree.map(lambda p: 0.05 * jnp.ones_like(p), params),
    )
    measure = curvature.fisher_empirical(oracles.losses)

    @jax.jit
    def one(inputs, labels):
        batch = oracles.Batch(inputs, labels)
        found = measures.measure_all(measure, params, batch, 200, direction)
        return coefficients.merge_coefficient(
            old + found.quadratic, previous, direction, task=2,
            curvature_error=found.standard_error,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    found = [
        one(
            jnp.asarray(rng.normal(size=(200, oracles.FEATURES)), jnp.float32),
            jnp.asarray(rng.integers(oracles.CLASSES, size=200)),
        )
        for _ in range(400)
    ]
    spread = np.std([float(f.alpha_raw) for f in found], ddof=1)
    predicted = np.mean([float(f.standard_error) for f in found])
    # 400 repeats know a standard deviation to 3.5 %; three times that.
    np.testing.assert_allclose(predicted, spread, rtol=0.11)
    assert spread > 1e-3


DEGENERATE = {
    "no displacement": (jnp.zeros(2), jnp.ones(2)),
    "no curvature": (jnp.ones(2), jnp.zeros(2)),
    "underflow": (jnp.full(2, 1e-23), jnp.ones(2)),
    "negative curvature": (jnp.ones(2), -jnp.ones(2)),
    "infinite curvature": (jnp.ones(2), jnp.asarray([jnp.inf, 1.0])),
    "undefined curvature": (jnp.ones(2), jnp.asarray([jnp.nan, 1.0])),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("name", DEGENERATE)
def test_no_minimum_falls_back_to_averaging_and_says_so(name, wrap):
    delta, diagonal = DEGENERATE[name]
    quadratic = DiagonalQuadratic.at(jnp.zeros(2), diagonal)
    solve = wrap(functools.partial(coefficients.merge_coefficient, task=4))
    found = solve(quadratic, jnp.ones(2), delta)
    assert float(found.alpha) == 0.25 and float(found.alpha_raw) == 0.25
    assert bool(found.degenerate)


def test_alpha_is_clipped_and_the_raw_value_kept():
    quadratic = DiagonalQuadratic.at(jnp.asarray([5.0]), jnp.ones(1))
    previous, delta = jnp.zeros(1), jnp.ones(1)
    found = coefficients.merge_coefficient(quadratic, previous, delta, task=2)
    assert float(found.alpha) == 1.0 and float(found.alpha_raw) == 5.0
    found = coefficients.merge_coefficient(quadratic, previous, delta, task=2, clip=False)
    assert float(found.alpha) == 5.0
    found = coefficients.merge_coefficient(quadratic, previous, -delta, task=2)
    assert float(found.alpha) == 0.0 and float(found.alpha_raw) == -5.0


def test_the_first_task_is_kept_whole_whatever_its_curvature():
    for diagonal in (jnp.ones(1), jnp.zeros(1), jnp.full(1, jnp.nan)):
        quadratic = DiagonalQuadratic.at(jnp.asarray([5.0]), diagonal)
        found = coefficients.merge_coefficient(quadratic, jnp.zeros(1), jnp.ones(1), task=1)
        assert float(found.alpha) == 1.0 and float(found.standard_error) == 0.0
        assert not bool(found.degenerate)


def test_one_coefficient_a_group_is_the_minimum_in_the_box(float64):
    """Against SciPy on the dense problem: leaves of one group share a column of directions."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        tasks = task_list(rng, 3, np.float64)
        previous, new = random_tree(rng, np.float64), tasks[-1][0]
        delta = task_vectors.difference(new, previous)
        memory = running_sum(tasks, random_tree(rng, np.float64))
        leaves, structure = jax.tree.flatten(delta)
        groups = [number % 2 for number in range(len(leaves))]
        found = coefficients.merge_coefficients(memory, previous, delta, groups, task=3)

        def flat(tree):
            return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])

        directions = np.stack(
            [flat([x * (own == group) for x, own in zip(leaves, groups, strict=True)])
             for group in range(2)], axis=1,
        )  # fmt: skip
        # sum_i |F_i^(1/2) (previous + directions a - theta_i)|^2
        roots = [np.sqrt(flat(fisher)) for _, fisher in tasks]
        matrix = np.concatenate([root[:, None] * directions for root in roots])
        target = np.concatenate(
            [root * (flat(star) - flat(previous))
             for root, (star, _) in zip(roots, tasks, strict=True)]
        )  # fmt: skip
        wanted = scipy.optimize.lsq_linear(matrix, target, (0, 1), tol=1e-14).x
        np.testing.assert_allclose(found.alpha, wanted, atol=1e-7)
        raw = np.linalg.lstsq(matrix, target, rcond=None)[0]
        np.testing.assert_allclose(found.alpha_raw, raw, rtol=1e-9)
        one = coefficients.merge_coefficients(memory, previous, delta, [0] * len(leaves), task=3)
        scalar = coefficients.merge_coefficient(memory, previous, delta, task=3)
        np.testing.assert_allclose(one.alpha_raw[0], scalar.alpha_raw, rtol=1e-12)


def flat_directions(delta, groups):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(delta)]
    return np.stack(
        [np.concatenate([(x * (own == group)).ravel()
                         for x, own in zip(leaves, groups, strict=True)])
         for group in range(max(groups) + 1)], axis=1,
    )  # fmt: skip


@pytest.mark.slow
def test_coefficients_of_correlated_groups_are_the_minimum_in_the_box(float64):
    """Against SciPy, for curvature with entries between the groups."""
    rng = np.random.default_rng(6)
    moved = 0
    for _ in range(10):
        tasks = [random_tree(rng, np.float64) for _ in range(3)]
        previous = random_tree(rng, np.float64)
        delta = task_vectors.difference(tasks[-1], previous)
        memory = LowRankQuadratic.zero(previous, 24)
        matrix, target = [], []
        groups = [number % 2 for number in range(len(jax.tree.leaves(delta)))]
        directions = flat_directions(delta, groups)
        for star in tasks:
            columns = [random_tree(rng, np.float64) for _ in range(8)]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *columns)
            memory = memory.plus(LowRankQuadratic.zero(star, 8).replace(curvature=LowRank(stacked)))
            rows = np.stack([oracles.flat(column) for column in columns])
            matrix.append(rows @ directions)
            target.append(rows @ (oracles.flat(star) - oracles.flat(previous)))
        matrix, target = np.concatenate(matrix), np.concatenate(target)
        found = coefficients.merge_coefficients(memory, previous, delta, groups, task=3)
        wanted = scipy.optimize.lsq_linear(matrix, target, (0, 1), tol=1e-14).x
        np.testing.assert_allclose(found.alpha, wanted, atol=1e-5)  # the ridge
        free = coefficients.merge_coefficients(memory, previous, delta, groups, task=3, clip=False)
        raw = np.linalg.lstsq(matrix, target, rcond=None)[0]
        np.testing.assert_allclose(free.alpha, raw, atol=1e-4)
        moved += np.abs(np.clip(raw, 0, 1) - wanted).max() > 1e-3
    assert moved  # where clipping the free minimum would not do


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_the_minimum_in_a_box_of_many_coefficients(float64, condition):
    rng = np.random.default_rng(7)
    for _ in range(5):
        q, _ = np.linalg.qr(rng.normal(size=(24, 24)))
        scales = np.geomspace(1, condition**-0.5, 24)
        matrix, target = q * scales @ q.T, rng.normal(size=24)
        found, sound = coefficients.box_minimum(matrix.T @ matrix, matrix.T @ target)
        wanted = scipy.optimize.lsq_linear(matrix, target, (0, 1), tol=1e-14).x
        assert bool(sound)
        value = np.sum((matrix @ found - target) ** 2)
        least = np.sum((matrix @ wanted - target) ** 2)
        np.testing.assert_allclose(value, least, rtol=1e-5)


def test_a_gram_matrix_that_is_none_is_called_degenerate():
    slopes = jnp.ones(2)
    for gram in ([[1.0, 2.0], [2.0, 1.0]], [[jnp.nan, 0.0], [0.0, 1.0]]):
        assert not bool(coefficients.box_minimum(jnp.asarray(gram), slopes)[1])
    a, sound = coefficients.box_minimum(jnp.asarray([[2.0, 0.0], [0.0, 0.0]]), slopes)
    assert bool(sound)
    np.testing.assert_allclose(a, [0.5, 0.0], rtol=1e-5)

    class Hessian(LowRank):
        def gram(self, directions):
            return jnp.asarray([[1.0, 2.0], [2.0, 1.0]])[: len(directions), : len(directions)]

    delta = [jnp.ones(1)] * 2
    memory = LowRankQuadratic.at(delta, Hessian([jnp.zeros((1, 1))] * 2))
    found = coefficients.merge_coefficients(memory, delta, delta, (0, 1), task=3)
    assert found.degenerate.all() and np.isfinite(found.alpha).all()


def dense_tasks(kind, rng, count):
    """Tasks' quadratics of one kind, their matrices and minima, and an empty memory."""
    found = []
    for _ in range(count):
        star = random_tree(rng, np.float64)
        names = sorted(star)
        if kind == "diagonal":
            fisher = jax.tree.map(jnp.abs, random_tree(rng, np.float64))
            quadratic, matrix = DiagonalQuadratic.at(star, fisher), np.diag(oracles.flat(fisher))
        elif kind == "low_rank":
            columns = [random_tree(rng, np.float64) for _ in range(3)]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *columns)
            quadratic = LowRankQuadratic.zero(star, 3).replace(curvature=LowRank(stacked))
            rows = np.stack([oracles.flat(column) for column in columns])
            matrix = rows.T @ rows
        elif kind == "input_moment":
            moments, blocks = {}, []
            for name in names:
                if star[name].ndim < 2:
                    blocks.append(np.zeros((star[name].size,) * 2))
                    continue
                width, outputs = star[name].shape
                rows = rng.normal(size=(2 * width, width))
                moments[name] = jnp.asarray(rows.T @ rows)
                blocks.append(np.kron(moments[name], np.eye(outputs)))
            quadratic = InputMomentQuadratic.at(star, moments)
            matrix = scipy.linalg.block_diag(*blocks)
        else:
            sides = [{}, {}]
            diagonal, blocks = {}, []
            for name in names:
                if star[name].ndim < 2:
                    diagonal[name] = jnp.abs(random_tree(rng, np.float64)[name])
                    blocks.append(np.diag(np.ravel(diagonal[name])))
                    continue
                for side, width in zip(sides, star[name].shape, strict=True):
                    rows = rng.normal(size=(2 * width, width))
                    side[name] = jnp.asarray(rows.T @ rows)[None]
                blocks.append(np.kron(sides[0][name][0], sides[1][name][0]))
            quadratic = KroneckerQuadratic.at(star, *sides, diagonal)
            matrix = scipy.linalg.block_diag(*blocks)
        found.append((quadratic, matrix, star))
    kernels = [name for name in star if star[name].ndim == 2]
    return found, {
        "diagonal": DiagonalQuadratic.zero,
        "kronecker": lambda params: KroneckerQuadratic.zero(params, kernels, count),
        "low_rank": lambda params: LowRankQuadratic.zero(params, 3 * count),
        "input_moment": lambda params: InputMomentQuadratic.zero(params, kernels),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["none", "trace"])
@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "low_rank", "input_moment"])
def test_the_rule_follows_the_formula_for_every_kind_of_memory(float64, kind, normalize):
    """alpha by the sums over all tasks written out with dense matrices."""
    rng = np.random.default_rng(8)
    tasks, memory = dense_tasks(kind, rng, 4)
    origin = random_tree(rng, np.float64)
    rule = rules.perturb_and_merge(memory=memory, normalize=normalize, clip=False)
    state, previous = rule.init(origin), origin
    for count, (quadratic, _, star) in enumerate(tasks, 1):
        delta = oracles.flat(star) - oracles.flat(previous)
        listed = [
            (matrix / np.trace(matrix) if normalize == "trace" else matrix, oracles.flat(minimum))
            for _, matrix, minimum in tasks[:count]
        ]
        numerator = -sum((oracles.flat(previous) - s) @ m @ delta for m, s in listed)
        denominator = sum(delta @ m @ delta for m, _ in listed)
        last = tasks[count - 1][1]
        previous, state, info = rule.update(
            state, previous=previous, trained=star, evidence=rules.Evidence(quadratic, 0.1)
        )
        alpha = 1.0 if count == 1 else numerator / denominator
        np.testing.assert_allclose(info.alpha, alpha, rtol=1e-5)
        change = (1 - alpha) ** 2 * delta @ last @ delta / 2
        if kind == "input_moment":  # which is not of the loss
            change = np.nan
        np.testing.assert_allclose(info.predicted_loss_change, change, rtol=1e-4, atol=1e-9)


def test_evidence_of_another_kind_than_the_memory_is_refused():
    rule = rules.perturb_and_merge(memory=lambda params: LowRankQuadratic.zero(params, 2))
    params = jnp.zeros(2)
    evidence = rules.Evidence(DiagonalQuadratic.at(params, params))
    with pytest.raises(ValueError, match="quadratic=DiagonalQuadratic: must be a LowRankQuad"):
        rule.update(rule.init(params), previous=params, trained=params, evidence=evidence)


def test_tasks_of_any_scale_count_alike_over_their_traces():
    rng = np.random.default_rng(4)
    models = [random_tree(rng) for _ in range(4)]
    fishers = [jax.tree.map(jnp.abs, random_tree(rng)) for _ in range(3)]

    def alphas(scales, **settings):
        rule = rules.perturb_and_merge(**settings)
        state, previous, found = rule.init(models[0]), models[0], []
        for trained, fisher, scale in zip(models[1:], fishers, scales, strict=True):
            fisher = jax.tree.map(lambda f, s=scale: s * f, fisher)
            evidence = rules.Evidence(DiagonalQuadratic.at(trained, fisher), 0.1 * scale)
            previous, state, info = rule.update(
                state, previous=previous, trained=trained, evidence=evidence
            )
            found += [info.alpha_raw, info.standard_error]
        return found

    alike, apart = (1.0, 1.0, 1.0), (1.0, 1e-6, 1e3)
    np.testing.assert_allclose(
        alphas(alike, normalize="trace"), alphas(apart, normalize="trace"), rtol=1e-5
    )
    traces = [float(DiagonalQuadratic.at(f, f).trace()) for f in fishers]
    np.testing.assert_allclose(
        traces, [sum(float(x.sum()) for x in jax.tree.leaves(f)) for f in fishers], rtol=1e-6
    )
    over_trace = [1 / trace for trace in traces]
    np.testing.assert_allclose(alphas(over_trace), alphas(alike, normalize="trace"), rtol=1e-5)
    assert abs(float(alphas(apart)[2] - alphas(alike)[2])) > 0.1


def test_a_merge_by_tensor_is_on_each_tensors_own_segment():
    rng = np.random.default_rng(5)
    first, second = random_tree(rng), random_tree(rng)
    fishers = [jax.tree.map(jnp.abs, random_tree(rng)) for _ in range(2)]
    rule = rules.perturb_and_merge(per="tensor")
    state = rule.init(first)
    merged = first
    for trained, fisher in zip((first, second), fishers, strict=True):
        evidence = rules.Evidence(DiagonalQuadratic.at(trained, fisher))
        merged, state, info = rule.update(
            state, previous=merged, trained=trained, evidence=evidence
        )
    steps = []
    for a, b, f, g, m in zip(*map(jax.tree.leaves, (first, second, *fishers, merged)), strict=True):
        square = (np.asarray(b) - np.asarray(a)) ** 2
        alpha = (g * square).sum() / ((f + g) * square).sum()  # of two tasks, from the first
        np.testing.assert_allclose(m, (1 - alpha) * a + alpha * b, rtol=1e-5, atol=1e-6)
        steps.append((alpha, a.size, (1 - alpha) ** 2 * (g * square).sum() / 2))
    alphas, sizes, changes = np.asarray(steps).T
    np.testing.assert_allclose(info.alpha, np.average(alphas, weights=sizes), rtol=1e-5)
    np.testing.assert_allclose(info.predicted_loss_change, changes.sum(), rtol=1e-5)


def test_settings_of_the_rule_out_of_range_are_refused():
    with pytest.raises(ValueError, match="normalize=norm: must be one of none, trace"):
        rules.make("perturb_and_merge", "normalize=norm")
    with pytest.raises(ValueError, match=r"per=\(: must be model, block, module, tensor or a reg"):
        rules.make("perturb_and_merge", "per=(")
    rule = rules.make("perturb_and_merge", "per=tensors")
    with pytest.raises(InvalidInput, match="per=tensors: matches no leaf that merges; they are a,"):
        rule.init(random_tree(np.random.default_rng(0)))
