"""Every registered rule through one suite; a new rule is tested by being registered."""

import functools
import inspect
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import rules, trees
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.curvature import DiagonalQuadratic
from pm_jax.rules import Evidence, MergeInfo
from tests.small_runs import slow
from tests.training_evidence import as_in_training

VARIANTS = [
    "perturb_and_merge:clip=false",
    "perturb_and_merge:normalize=trace,per=tensor",
    "perturb_and_merge:jackknife=3",
    "cofima:cap=0.5",
    "ties:trim=tensor",
    "dare:on=ties",
    "averaging:power=0.3",
    "null_space:rank=3,pattern=.*kernel,learned_rank=2,steps=3",
]
"""Settings of registered rules that take other paths than the default ones."""

# Identities of the method's section 9 that some rules do not have by their definition; a rule that
# is registered is held to them unless it is named here.
OF_TASK_VECTORS = {"task_arithmetic", "ties", "random_mix", "magmax", "tunable_magmax"}
MERGES_EQUAL_MODELS_TO_ANOTHER = OF_TASK_VECTORS | {
    *("dare:on=ties", "fisher_averaging", "regmean", "trm", "pam", "opcm", "null_space")
}
DOES_NOT_KEEP_THE_FIRST_MODEL = OF_TASK_VECTORS - {"random_mix"} | {
    *("dare", "frozen", "null_space")
}
KEEPS_THE_FIRST_MODEL_TO_ROUNDING = {"fisher_averaging", "random_mix"}
SELECTS = {"magmax", "random_mix", "tunable_magmax"}
SEARCHES = {"trm"}
"""Rules whose many steps carry rounding errors along."""
DECOMPOSES = {"opcm", "null_space"}
"""Rules that take parts of the size of a matrix away from it, whose rounding then remains."""

every_rule = pytest.mark.parametrize("name", [*sorted(rules.REGISTRY), *map(slow, VARIANTS)])


def with_code_of_their_own():
    """One rule of each builder, and every rule and wrapper that has an `update` of its own."""
    by_code = {}
    for name in [*sorted(rules.REGISTRY), *VARIANTS]:
        rule = rules.make(*name.split(":", 1), max_tasks=6)
        # Behind the checks that all rules have in common.
        code = inspect.unwrap(rule.update).__code__
        by_code.setdefault(code, slow(name) if name in VARIANTS else name)
    return list(by_code.values())


def as_written(name):
    return as_in_training(rules.make(*name.split(":", 1), max_tasks=6))


@functools.cache
def made(name):
    """The rule with its update compiled, once for all tests of the same shapes."""
    rule = as_written(name)
    return rule._replace(update=jax.jit(rule.update))


def one_of(name, names):
    """Whether a rule, or this variant of it, is among some."""
    return name in names or name.split(":")[0] in names


def model(seed, dtype=jnp.float32, positive=False):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        values = rng.normal(size=shape) * (1 + seed % 3)
        return jnp.asarray(abs(values) if positive else values, dtype)

    return {"layer": {"kernel": leaf(8, 16), "bias": leaf(16)}, "scale": leaf(8)}


def evidence_for(trained, seed):
    diagonal = model(100 + seed, positive=True)
    center = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    quadratic = DiagonalQuadratic.at(center, diagonal)
    return Evidence(quadratic, jnp.asarray(0.1, jnp.float32), jax.random.key(seed))


def run(rule, trained_models, start, update=None, evidence=evidence_for):
    """Merged models and infos of a stream."""
    state, previous, merged, infos = rule.init(start), start, [], []
    update = update or rule.update
    for task, trained in enumerate(trained_models):
        params, state, info = update(
            state, previous=previous, trained=trained, evidence=evidence(trained, task)
        )
        merged.append(params)
        infos.append(info)
        starts = {"merged": params, "trained": trained, "initial": start}
        previous = starts[rule.needs.next_task_from]
    return merged, infos


def assert_trees(equal, left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        equal(a, b)


def identical(a, b):
    assert a.dtype == b.dtype and jnp.array_equal(a, b)


@every_rule
def test_grammar(name):
    rule = made(name)
    assert rule.needs.next_task_from in ("merged", "trained", "initial")
    assert rule.needs.evidence <= set(Evidence._fields)
    _, infos = run(rule, [model(1), model(2)], model(0))
    for info in infos:
        assert isinstance(info, MergeInfo)
        assert all(x.shape == () and x.dtype == jnp.float32 for x in jax.tree.leaves(info))
        assert set(info.figures) == set(rule.needs.figures)
        assert np.isfinite(float(info.alpha))


@every_rule
def test_state_is_a_pytree_of_arrays_of_fixed_shapes(name):
    rule = made(name)
    state = rule.init(model(0))
    after = rule.update(
        state, previous=model(0), trained=model(1), evidence=evidence_for(model(1), 0)
    )[1]
    assert jax.tree.structure(state) == jax.tree.structure(after)
    # Merging donates them, which the same buffer cannot be twice.
    assert len(set(map(id, jax.tree.leaves(state)))) == len(jax.tree.leaves(state))
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (before.shape, before.dtype) == (now.shape, now.dtype)


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_stream_that_teaches_nothing_changes_nothing(name, dtype):
    start = model(0, dtype)
    merged, _ = run(made(name), [start] * 2, start)
    for params in merged:
        assert_trees(identical, params, start)


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_task_that_changes_nothing_leaves_the_merged_model(name, dtype):
    if one_of(name, MERGES_EQUAL_MODELS_TO_ANOTHER):
        pytest.skip(f"{name} does not have this identity by its definition")
    rule, first = made(name), model(1, dtype)
    merged, state, _ = rule.update(
        rule.init(model(0, dtype)), previous=model(0, dtype), trained=first,
        evidence=evidence_for(first, 0),
    )  # fmt: skip
    for _ in range(2):
        again, state, _ = rule.update(
            state, previous=merged, trained=merged, evidence=evidence_for(merged, 1)
        )
        assert_trees(identical, again, merged)


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_first_task_returns_the_trained_model(name, dtype):
    merged, infos = run(made(name), [model(1, dtype)], model(0, dtype))
    if one_of(name, KEEPS_THE_FIRST_MODEL_TO_ROUNDING):
        scale = 1e-6 if dtype == jnp.float32 else 0.0
        assert_trees(lambda a, b: np.testing.assert_allclose(a, b, scale, 5 * scale),
                     merged[0], model(1, dtype))  # fmt: skip
    elif one_of(name, DOES_NOT_KEEP_THE_FIRST_MODEL):
        assert not jnp.array_equal(merged[0]["scale"], model(1, dtype)["scale"])
        return
    else:
        assert_trees(identical, merged[0], model(1, dtype))
    assert float(infos[0].alpha) == 1.0


@every_rule
def test_jit_equals_eager(name):
    models = [model(seed) for seed in (1, 2, 3)]
    eager, _ = run(as_written(name), models, model(0))
    compiled, _ = run(made(name), models, model(0))

    def close(a, b):
        scale = max(float(jnp.abs(a).max()), float(jnp.abs(b).max()), 1.0)
        bound = 1e-3 if one_of(name, SEARCHES) else 8 * float(jnp.finfo(a.dtype).eps)
        assert float(jnp.abs(a - b).max()) <= bound * scale

    equal = identical if one_of(name, SELECTS) else close
    for a, b in zip(eager, compiled, strict=True):
        assert_trees(equal, a, b)


@every_rule
def test_one_compilation_for_the_stream(name):
    rule = as_written(name)
    traces = []

    @jax.jit
    def update(state, previous, trained, evidence):
        traces.append(1)
        return rule.update(state, previous=previous, trained=trained, evidence=evidence)

    run(rule, [model(seed) for seed in range(1, 7)], model(0), update)
    assert len(traces) == 1


@every_rule
def test_leaf_order_does_not_matter(name):
    def reordered(tree):
        # Ordered dicts keep their order as pytrees, plain ones are sorted.
        layer = OrderedDict((path, tree["layer"][path]) for path in ("kernel", "bias"))
        return OrderedDict(scale=tree["scale"], layer=layer)

    rule = made(name)
    models = [model(seed) for seed in (1, 2, 3)]

    def evidence(trained, seed):
        return mapped_evidence(evidence_for(models[seed], seed), reordered)

    merged, infos = run(rule, models, model(0))
    other, other_infos = run(
        rule, [reordered(m) for m in models], reordered(model(0)), evidence=evidence
    )
    looser = 100 if one_of(name, SEARCHES) else 1
    np.testing.assert_allclose(infos[-1].alpha, other_infos[-1].alpha, rtol=looser * 1e-6)
    wanted = reordered(merged[-1])
    assert jax.tree.structure(other[-1]) == jax.tree.structure(wanted)
    if one_of(name, SELECTS):
        assert_trees(identical, other[-1], wanted)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(other[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=looser * 1e-5, atol=looser * 1e-6)


@every_rule
def test_bfloat16_models_are_merged_in_float32_and_cast_once(name):
    rule = made(name)
    low, _ = run(rule, [model(1, jnp.bfloat16)], model(0, jnp.bfloat16))
    previous, trained = model(1, jnp.bfloat16), model(2, jnp.bfloat16)
    exact = [jax.tree.map(lambda x: x.astype(jnp.float32), m) for m in (previous, trained)]
    state = rule.init(previous)
    _, state, _ = rule.update(
        state, previous=previous, trained=previous, evidence=evidence_for(previous, 0)
    )
    got, _, _ = rule.update(
        state, previous=previous, trained=trained, evidence=evidence_for(trained, 1)
    )
    state = rule.init(exact[0])
    _, state, _ = rule.update(
        state, previous=exact[0], trained=exact[0], evidence=evidence_for(exact[0], 0)
    )
    wanted, _, _ = rule.update(
        state, previous=exact[0], trained=exact[1], evidence=evidence_for(exact[1], 1)
    )
    assert_trees(identical, got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted))
    assert low[0]["scale"].dtype == jnp.bfloat16


@every_rule
def test_state_survives_a_checkpoint(name, tmp_path):
    rule = made(name)
    merged, state, _ = rule.update(
        rule.init(model(0)), previous=model(0), trained=model(1), evidence=evidence_for(model(1), 0)
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"rule": state})
        restored = checkpoints.restore(1, {"rule": rule.init(model(0))})["rule"]
    assert_trees(identical, restored, state)
    arguments = {"previous": merged, "trained": model(2), "evidence": evidence_for(model(2), 1)}
    assert_trees(identical, rule.update(restored, **arguments)[0],
                 rule.update(state, **arguments)[0])  # fmt: skip


# This law takes longest to compile. Rules of one builder differ by one function of two leaves, so
# the law is put to one of them; settings count where they take other code for several leaves.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *with_code_of_their_own(),
        *map(slow, ("perturb_and_merge:normalize=trace,per=tensor", "ties:trim=tensor")),
    ],
)
def test_shardings_are_kept_on_eight_devices(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharded(tree):
        return jax.tree.map(
            lambda x: jax.device_put(
                x, jax.NamedSharding(mesh, jax.P("data") if x.shape[0] % 8 == 0 else jax.P())
            ),
            tree,
        )

    rule = made(name)
    models = [model(seed) for seed in (1, 2, 3)]
    plain, _ = run(rule, models, model(0))

    def evidence(trained, seed):
        return mapped_evidence(evidence_for(models[seed], seed), sharded)

    merged, _ = run(rule, [sharded(m) for m in models], sharded(model(0)), evidence=evidence)
    looser = 100 if one_of(name, SEARCHES) else 5 if one_of(name, DECOMPOSES) else 1
    for a, b in zip(jax.tree.leaves(merged[-1]), jax.tree.leaves(plain[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=looser * 1e-5, atol=looser * 1e-6)
        assert len(a.sharding.device_set) == 8
    assert not merged[-1]["layer"]["kernel"].sharding.is_fully_replicated


def mapped_evidence(evidence, function):
    quadratic = evidence.quadratic
    mapped = DiagonalQuadratic.at(function(quadratic.center), function(quadratic.diagonal))
    return evidence._replace(quadratic=mapped)


A, B, C = (model(seed) for seed in (1, 2, 3))
STRESS = {
    "no curvature": ([A, B], [0.0, 0.0]),
    "no curvature of the first task": ([A, B, C], [0.0, 1.0, 1.0]),
    "no curvature of a later task": ([A, B, C], [1.0, 0.0, 1.0]),
    "curvature that underflows": ([A, B], [1e-40, 1e-40]),
    "curvature whose sums overflow": ([A, B, C], [3e38, 3e38, 3e38]),
    "infinite curvature of one task": ([A, B, C], [1.0, jnp.inf, 1.0]),
    "undefined curvature of one task": ([A, B, C], [1.0, jnp.nan, 1.0]),
    "negative curvature": ([A, B], [-1.0, -1.0]),
    "one task four times": ([A] * 4, [1.0] * 4),
    "tasks that contradict each other": ([A, trees.lerp(A, model(0), 2.0)] * 2, [1.0] * 4),
    "models too small for squares": ([trees.lerp(model(0), m, 1e-25) for m in (A, B)], [1.0] * 2),
    "models too large for squares": (
        [jax.tree.map(lambda x: 1e25 * x, m) for m in (A, B)],
        [1.0] * 2,
    ),
}
"""Models of a stream, and the entries of each task's diagonal curvature."""


@every_rule
def test_streams_under_stress_give_finite_models_and_coefficients(name):
    for stress, (models, fills) in STRESS.items():

        def evidence(trained, task, fills=fills):
            diagonal = jax.tree.map(
                functools.partial(jnp.full_like, fill_value=fills[task]), trained
            )
            error = jnp.asarray(jnp.nan)
            return Evidence(DiagonalQuadratic.at(trained, diagonal), error, jax.random.key(task))

        merged, infos = run(made(name), models, model(0), evidence=evidence)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(merged)), stress
        for info in infos:
            assert np.isfinite([info.alpha, info.alpha_raw, info.degenerate]).all(), stress
        moves = MERGES_EQUAL_MODELS_TO_ANOTHER | DOES_NOT_KEEP_THE_FIRST_MODEL
        if stress == "one task four times" and not one_of(name, moves):
            assert_trees(identical, merged[-1], A)


# Identities between rules.


def test_equal_curvature_makes_perturb_and_merge_the_running_average():
    models = [model(seed) for seed in range(1, 6)]

    def evidence(trained, seed):
        return Evidence(DiagonalQuadratic.at(trained, model(50, positive=True)))

    merged, infos = run(rules.perturb_and_merge(), models, model(0), evidence=evidence)
    averaged, _ = run(rules.averaging(), models, model(0))
    for task, info in enumerate(infos):
        np.testing.assert_allclose(info.alpha_raw, 1 / (task + 1), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(merged[-1]), jax.tree.leaves(averaged[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_perturb_and_merge_equals_the_papers_list_of_tasks():
    models = [model(seed) for seed in range(1, 6)]
    merged, infos = run(rules.perturb_and_merge(clip=False), models, model(0))

    def vector(tree):
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])

    fishers = [vector(model(100 + task, positive=True)) for task in range(5)]
    stars = [vector(m) for m in models]
    theta = stars[0]
    for task in range(1, 5):
        delta = stars[task] - theta
        top = sum((theta - stars[i]) @ (fishers[i] * delta) for i in range(task + 1))
        bottom = sum(delta @ (fishers[i] * delta) for i in range(task + 1))
        alpha = -top / bottom
        np.testing.assert_allclose(infos[task].alpha_raw, alpha, rtol=1e-5)
        np.testing.assert_allclose(infos[task].denominator, bottom, rtol=1e-5)
        change = 0.5 * (1 - alpha) ** 2 * delta @ (fishers[task] * delta)
        np.testing.assert_allclose(infos[task].predicted_loss_change, change, rtol=1e-4)
        theta = theta + alpha * delta
        np.testing.assert_allclose(vector(merged[task]), theta, rtol=1e-4, atol=1e-5)


def test_sequential_keeps_the_trained_model_and_averaging_the_mean():
    models = [model(seed) for seed in (1, 2, 3)]
    kept, _ = run(rules.sequential(), models, model(0))
    assert_trees(identical, kept[-1], models[-1])
    averaged, _ = run(rules.averaging(), models, model(0))
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *models)
    for a, b in zip(jax.tree.leaves(averaged[-1]), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_merge_is_on_the_segment_between_both_models():
    merged, infos = run(rules.perturb_and_merge(), [model(1), model(2)], model(0))
    wanted = trees.lerp(model(1), model(2), infos[1].alpha)
    assert_trees(identical, merged[1], wanted)
    assert 0.0 < float(infos[1].alpha) < 1.0


def test_evidence_of_another_kind_is_refused():
    rule = rules.perturb_and_merge()
    with pytest.raises(ValueError, match="evidence.quadratic=NoneType"):
        rule.update(rule.init(model(0)), previous=model(0), trained=model(1), evidence=Evidence())
