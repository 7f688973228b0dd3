"""The object for one's own loop against the same steps written out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict

import pm_jax
from experiments.benchmarks.compilations import compilations
from pm_jax import losses, rules, task_vectors, trees
from pm_jax.curvature import kronecker, low_rank, measures
from pm_jax.rules.checked import merge_rule
from pm_jax.types import InvalidInput
from tests import oracles

EXAMPLES = 13
FISHER = pm_jax.fisher_exact(oracles.network)
WITHOUT = [
    *("frozen", "first_session", "sequential", "averaging", "slao", "coma", "task_arithmetic"),
    *("ties", "magmax", "opcm", "null_space"),
]
DRAWING = ["dare", "random_mix", "tunable_magmax"]
REFUSED = ["became", "trm", "pam", "oracle", "exact_curvature", "joint"]
WITH = {
    "perturb_and_merge": (rules.perturb_and_merge(), FISHER),
    "fisher_averaging": (rules.fisher_averaging(), FISHER),
    "cofima": (rules.cofima(), pm_jax.fisher_empirical(oracles.losses)),
    "regmean": (
        rules.regmean(memory=lambda p: pm_jax.InputMomentQuadratic.zero(p, "w|v")),
        pm_jax.input_moment(oracles.network, "w|v"),
    ),
    "jackknifed": (rules.perturb_and_merge(jackknife=3), FISHER),
    "low rank": (
        rules.perturb_and_merge(memory=lambda p: low_rank.LowRankQuadratic.zero(p, 4), clip=False),
        low_rank.gauss_newton_low_rank(oracles.network, rank=2),
    ),
    "sampled": (
        rules.perturb_and_merge(per="tensor"),
        pm_jax.fisher_exact(oracles.network, num_samples=1),
    ),
}


def tasks(count=3):
    """Trained models and their examples, unlike each other."""
    return [(oracles.problem(EXAMPLES, seed)[0], oracles.problem(EXAMPLES, seed)[2])
            for seed in range(1, count + 1)]  # fmt: skip


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def identical(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("name", WITH)
def test_finishing_a_task_is_measuring_and_merging(name):
    rule, measure = WITH[name]
    merger = pm_jax.merger(rule, measure)
    start, key = oracles.problem(1, 0)[0], jax.random.key(3)
    state, rule_state = merger.init(start), rule.init(start)
    if groups := rule.needs.example_groups:
        measure = measures.in_groups(measure, groups)
    for number, (trained, batch) in enumerate(tasks(2)):
        folded = jax.random.fold_in(key, number)
        found = pm_jax.measure_all(
            measure, trained, batch, 5, task_vectors.difference(trained, start),
            jax.random.fold_in(folded, 0),
        )  # fmt: skip
        evidence = rules.Evidence(found.quadratic, found.standard_error, left_out=found.left_out)
        merged, rule_state, wanted = jax.jit(rule.update)(
            rule_state, previous=start, trained=trained, evidence=evidence
        )
        params, state, info = merger.finish_task(state, trained, batch, key, batch_size=5)
        assert_same(params, merged)
        assert_same(info, wanted)
        assert_same(state.rule, rule_state)
        assert_same(state.start, merged)
        start = merged
    assert int(state.tasks) == 2 and 0 < abs(float(info.alpha)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WITHOUT, *DRAWING])
def test_rules_without_a_measure_merge_as_by_hand(name):
    rule = rules.make(name, max_tasks=3)
    merger, start = pm_jax.merger(rule), oracles.problem(1, 0)[0]
    state, rule_state, key = merger.init(start), rule.init(start), jax.random.key(5)
    for number, (trained, _) in enumerate(tasks()):
        rule_key = jax.random.fold_in(jax.random.fold_in(key, number), 1)
        merged, rule_state, _ = rule.update(
            rule_state, previous=start, trained=trained, evidence=rules.Evidence(key=rule_key)
        )
        drawing = {"key": key} if name in DRAWING else {}
        params, state, _ = merger.finish_task(state, trained, **drawing)
        assert_same(params, merged)
        starts = {"merged": merged, "trained": trained, "initial": start}
        start = starts[rule.needs.next_task_from]
        assert_same(state.start, start)


def test_a_rule_that_starts_every_task_from_the_first_model_keeps_it():
    average = rules.averaging()
    rule = average._replace(needs=average.needs._replace(next_task_from="initial"))
    merger, start = pm_jax.merger(rule), oracles.problem(1, 0)[0]
    state = merger.init(start)
    for trained, _ in tasks():
        params, state, _ = merger.finish_task(state, trained)
        assert identical(state.start, start) and not identical(params, start)


@pytest.mark.parametrize("name", ["perturb_and_merge", "jackknifed", "low rank"])
def test_only_the_first_task_compiles(name):
    merger = pm_jax.merger(*WITH[name])
    state = merger.init(oracles.problem(1, 0)[0])
    counts = []
    for number, (trained, batch) in enumerate(tasks(4)):
        # Of different sizes, two batches all of them.
        some = jax.tree.map(lambda x, n=number: np.asarray(x)[: EXAMPLES - n], batch[:2])
        with compilations() as compiled:
            *_, state, _ = merger.finish_task(
                state, trained, some, jax.random.key(number), batch_size=8
            )
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[1:] == [0, 0, 0]
    counts = []
    for trained, batch in tasks(2):
        pieces = ((batch.inputs[n : n + 3], batch.labels[n : n + 3]) for n in range(0, 13, 3))
        with compilations() as compiled:
            *_, state, _ = merger.finish_task(
                state, trained, pieces, jax.random.key(0), batch_size=4
            )
        counts.append(len(compiled))
    assert counts[1] == 0


def test_measures_made_anew_for_every_task_share_what_is_compiled():
    params, _, batch = oracles.problem(EXAMPLES)
    counts = []
    for _ in range(2):
        with compilations() as compiled:
            pm_jax.measure_all(
                pm_jax.fisher_empirical(losses.cross_entropy(oracles.network), chunk_size=5),
                params, batch, 4,
            )  # fmt: skip
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[1] == 0


def test_a_saved_state_goes_on_to_the_same_bits(tmp_path):
    odd = {"step": np.int32(7), "ids": jnp.arange(2)}
    start = {**oracles.problem(1, 0)[0], **odd}
    fisher = pm_jax.fisher_exact(lambda p, x: oracles.network(p, x))
    merger = pm_jax.merger(rules.perturb_and_merge(jackknife=3), fisher)
    state = merger.init(start)
    first, second = (({**trained, **odd}, batch) for trained, batch in tasks(2))
    _, state, _ = merger.finish_task(state, *first, batch_size=5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", merger.init(start))
    assert isinstance(restored, pm_jax.MergerState) and identical(restored, state)
    other = pm_jax.merger(rules.perturb_and_merge(jackknife=3), fisher)
    wanted = merger.finish_task(state, *second, batch_size=5)
    found = other.finish_task(restored, *second, batch_size=5)
    assert identical(found, wanted)


def mlp(x):
    return nn.Dense(3, name="out")(nn.relu(nn.Dense(6, name="in")(x)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return mlp(x)


def linen_tree(kind):
    model, x = Linen(), jnp.ones((1, 4))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    params = FrozenDict(params) if kind == "frozen" else params
    return params, lambda p, x: model.apply({"params": p}, x)


def nnx_tree():
    model = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)
    return params, lambda p, x: nnx.merge(graph, p)(x)


TREES = {
    "dict": functools.partial(linen_tree, "dict"),
    "frozen": functools.partial(linen_tree, "frozen"),
    "nnx": nnx_tree,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TREES)
def test_any_tree_keeps_its_structure_and_its_other_leaves(kind):
    params, logits_fn = TREES[kind]()
    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(9, 4)).astype(np.float32), rng.integers(3, size=9))
    odd = {
        "model": params, "step": 16777217, "rng": jax.random.key(1), "name": "net",
        "ids": np.asarray([2**40, 3]), "flag": True,
    }  # fmt: skip
    merger = pm_jax.merger(
        rules.perturb_and_merge(), pm_jax.fisher_exact(lambda p, x: logits_fn(p["model"], x))
    )
    state = merger.init(odd)
    for number in (1, 2):
        moved = jax.tree.map(lambda x, n=number: x + 0.1 * jnp.cos(n + x), params)
        trained = {**odd, "model": moved, "step": 16777217 + number, "rng": jax.random.key(number)}
        merged, state, info = merger.finish_task(state, trained, batch)
    assert jax.tree.structure(merged) == jax.tree.structure(odd)
    assert merged["step"] == state.start["step"] == 16777219 and merged["name"] == "net"
    assert merged["ids"].tolist() == [2**40, 3] and merged["flag"] is True
    assert merged["rng"] == jax.random.key(2) and state.start["rng"] == jax.random.key(2)
    assert 0 < float(info.alpha) < 1 and float(info.comparison.kept) == 2
    plain = pm_jax.merger(rules.perturb_and_merge(), pm_jax.fisher_exact(logits_fn))
    state = plain.init(params)
    for number in (1, 2):
        moved = jax.tree.map(lambda x, n=number: x + 0.1 * jnp.cos(n + x), params)
        alone, state, _ = plain.finish_task(state, moved, batch)
    assert_same(alone, merged["model"])


def test_a_training_step_may_donate_what_it_is_given():
    merger = pm_jax.merger(*WITH["perturb_and_merge"])
    train = jax.jit(lambda p, by: jax.tree.map(lambda x: x + by, p), donate_argnums=0)
    params = oracles.problem(1, 0)[0]
    state = merger.init(params)
    batch = tasks(1)[0][1]
    for number in range(3):
        params = train(params, 0.1 * (number + 1))
        params, state, info = merger.finish_task(state, params, batch)
    assert np.isfinite(float(info.alpha))
    kept = state.start
    train(kept, 0.1)
    with pytest.raises(InvalidInput, match="arrays have been deleted.*jnp.copy"):
        merger.finish_task(state, params, batch)


def test_neither_the_state_nor_the_trained_model_is_donated():
    merger = pm_jax.merger(*WITH["perturb_and_merge"])
    state = merger.init(oracles.problem(1, 0)[0])
    trained, batch = tasks(1)[0]
    before = jax.tree.map(np.array, (state, trained))
    first = merger.finish_task(state, trained, batch)
    second = merger.finish_task(state, trained, batch)
    assert identical(first, second) and identical((state, trained), before)


def test_a_rule_that_absorbs_gets_curvature_at_the_merged_model():
    def update(state, *, previous, trained, evidence):
        del evidence
        merged = trees.lerp(previous, trained, 0.5)
        return merged, state, rules.MergeInfo.of(0.5)

    def absorb(state, evidence):
        return jax.tree.map(jnp.add, state, evidence.quadratic.diagonal)

    needs = rules.Requirements(frozenset({"quadratic"}), absorb=absorb)
    rule = merge_rule(trees.zeros_like, update, needs)
    merger = pm_jax.merger(rule, FISHER)
    state, total = merger.init(oracles.problem(1, 0)[0]), None
    for trained, batch in tasks(2):
        params, state, _ = merger.finish_task(state, trained, [batch])
        diagonal = pm_jax.measure_all(FISHER, params, batch).quadratic.diagonal
        total = diagonal if total is None else jax.tree.map(jnp.add, total, diagonal)
    assert_same(state.rule, total)
    with pytest.raises(InvalidInput, match="batches=list_iterator: can be read once"):
        merger.finish_task(state, trained, iter([batch]))


def test_exact_curvature_along_the_task_vector_takes_the_place_of_the_stored_one():
    rule, start = rules.perturb_and_merge(), oracles.problem(1, 0)[0]
    both = measures.with_along(FISHER, pm_jax.gauss_newton(oracles.network))
    state, by_hand = pm_jax.merger(rule, both).init(start), rule.init(start)
    for trained, batch in tasks(2):
        delta = task_vectors.difference(trained, start)
        stored = pm_jax.measure_all(FISHER, trained, batch)
        exact = pm_jax.measure_all(
            pm_jax.gauss_newton(oracles.network), trained, batch, direction=delta
        )
        evidence = rules.Evidence(
            stored.quadratic, exact.standard_error, curvature_along=exact.along
        )
        merged, by_hand, wanted = rule.update(
            by_hand, previous=start, trained=trained, evidence=evidence
        )
        params, state, info = pm_jax.merger(rule, both).finish_task(state, trained, batch)
        assert_same((params, info), (merged, wanted))
        start = merged
    plain = rule.update(
        by_hand, previous=start, trained=trained, evidence=evidence._replace(curvature_along=None)
    )[2]
    assert abs(float(plain.denominator / info.denominator) - 1) > 0.01


def test_the_state_of_the_model_and_progress_reach_the_measure(capsys):
    def logits_fn(params, inputs, mask):
        return losses.mask_logits(oracles.network(params, inputs), mask)

    trained, batch = tasks(1)[0]
    start, mask = oracles.problem(1, 0)[0], jnp.arange(oracles.CLASSES) < 3
    batch = batch._replace(labels=batch.labels % 3)
    merger = pm_jax.merger(rules.perturb_and_merge(), pm_jax.fisher_exact(logits_fn))
    state = merger.init(start)
    _, masked, _ = merger.finish_task(state, trained, batch, model_state=mask, progress=True)
    assert "curvature" in capsys.readouterr().err
    assert float(jnp.abs(masked.rule.memory.diagonal["v"][:, 3]).max()) == 0
    _, plain, _ = merger.finish_task(state, trained, batch, model_state=mask | True)
    assert float(jnp.abs(plain.rule.memory.diagonal["v"][:, 3]).max()) > 0


def test_every_task_draws_other_numbers_from_one_key():
    merger, start = pm_jax.merger(rules.dare(drop=0.5)), {"w": jnp.zeros(64)}
    trained, key = {"w": jnp.ones(64)}, jax.random.key(0)
    state = merger.init(start)
    first, _, _ = merger.finish_task(state, trained, key=key)
    again, _, _ = merger.finish_task(state, trained, key=key)
    later, _, _ = merger.finish_task(state._replace(tasks=state.tasks + 1), trained, key=key)
    assert identical(first, again) and not identical(first, later)


def test_a_merge_without_effect_is_said():
    merger, start = pm_jax.merger(rules.averaging()), {"w": jnp.zeros(3)}
    with pytest.warns(UserWarning, match="finish_task: the trained model equals the previous one"):
        merger.finish_task(merger.init(start), start)


@pytest.mark.parametrize("name", REFUSED)
def test_rules_that_need_more_than_a_merger_has_are_refused(name):
    with pytest.raises(InvalidInput, match="^rule: needs .*a merger does not have.*averaging"):
        pm_jax.merger(rules.make(name, max_tasks=3))


def kronecker_rule():
    memory = functools.partial(kronecker.KroneckerQuadratic.zero, kernels=("in/kernel",), slots=2)
    return rules.perturb_and_merge(memory=memory)


STATE = pm_jax.merger(rules.averaging()).init({"w": jnp.zeros(3)})
MISTAKES = {
    "rule=perturb_and_merge: is a function that makes a rule": lambda: pm_jax.merger(
        rules.perturb_and_merge
    ),
    "rule=ties: is no MergeRule": lambda: pm_jax.merger("ties"),
    "measure=None: the rule reads curvature_along, curvature_error, quadratic": lambda: (
        pm_jax.merger(rules.perturb_and_merge())
    ),
    "measure=fisher_exact: must be a Measure; call it": lambda: pm_jax.merger(
        rules.perturb_and_merge(), pm_jax.fisher_exact
    ),
    "measure=fisher_exact: the rule reads no curvature": lambda: pm_jax.merger(
        rules.averaging(), FISHER
    ),
    "measure=str: must be a Measure": lambda: pm_jax.merger(rules.perturb_and_merge(), "fisher"),
    "measure=gauss_newton: does not fit .*quadratic=NoneType": lambda: pm_jax.merger(
        rules.perturb_and_merge(), pm_jax.gauss_newton(oracles.network)
    ).init(oracles.problem()[0]),
    "measure=fisher_exact: does not fit .*must be a KroneckerQuadratic": lambda: pm_jax.merger(
        kronecker_rule(), FISHER
    ).init(linen_tree("dict")[0]),
    "state=dict: must be a MergerState.*target": lambda: pm_jax.merger(
        rules.averaging()
    ).finish_task({}, {"w": jnp.zeros(3)}),
    r"trained=float32\[2\] at w: state.start is float32\[3\] there": lambda: pm_jax.merger(
        rules.averaging()
    ).finish_task(STATE, {"w": jnp.zeros(2)}),
    "trained: has v, which state.start lacks": lambda: pm_jax.merger(rules.averaging()).finish_task(
        STATE, {"v": jnp.zeros(3)}
    ),
    "key=None: the rule draws random numbers": lambda: pm_jax.merger(rules.dare()).finish_task(
        STATE, {"w": jnp.zeros(3)}
    ),
    "batches=None: the rule reads the curvature": lambda: pm_jax.merger(
        rules.perturb_and_merge(), FISHER
    ).finish_task(STATE, {"w": jnp.zeros(3)}),
    "state=TaskCount: this rule's is a PerturbAndMergeState": lambda: pm_jax.merger(
        rules.perturb_and_merge(), pm_jax.curvature.identity()
    ).finish_task(STATE, {"w": jnp.ones(3)}, (np.ones((2, 1)), np.zeros(2, int))),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    with pytest.raises(InvalidInput, match=message) as error:
        MISTAKES[message]()
    assert "\n" not in str(error.value)
