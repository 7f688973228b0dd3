"""Properties of merge rules on task vectors with many equal entries, drawn by hypothesis."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from pm_jax import rules
from pm_jax.rules import Evidence
from pm_jax.rules.selection import kth_largest, random_members
from pm_jax.rules.tunable_magmax import _entries_of, assigned, quotas

# The same examples in every run; no bound on their time, as the first of a shape compiles.
settings = functools.partial(
    hypothesis.settings, deadline=None, derandomize=True, database=None, max_examples=25
)
TASKS, SIZE = 4, 30
small_numbers = strategies.integers(-3, 3).map(float)


def task_vectors(tasks=TASKS, size=SIZE):
    return arrays.arrays(np.float32, (tasks, size), elements=small_numbers)


@functools.cache
def compiled(name, text=""):
    rule = rules.make(name, text)
    return rule._replace(update=jax.jit(rule.update))


def merged_model(rule, vectors, origin):
    state = rule.init(origin)
    for task, vector in enumerate(vectors):
        trained = jax.tree.map(lambda o, v: o + v, origin, vector)
        evidence = Evidence(key=jax.random.key(task))
        params, state, _ = rule.update(state, previous=origin, trained=trained, evidence=evidence)
    return params


def winners(vectors):
    """The task of largest magnitude by entry, the later one of equals."""
    magnitudes = np.abs(vectors)[::-1]
    return len(vectors) - 1 - magnitudes.argmax(axis=0)


@settings()
@hypothesis.given(task_vectors())
def test_running_magmax_is_that_of_the_list_and_the_later_task_wins_ties(vectors):
    found = merged_model(compiled("magmax"), vectors, jnp.ones(SIZE))
    wanted = 1 + 0.5 * np.take_along_axis(vectors, winners(vectors)[None], 0)[0]
    assert np.array_equal(found, wanted)


def ties_of_the_list(groups, keep):
    """TIES of lists [T, ...] that share a threshold: in float64, as its code goes about it."""
    trimmed = []
    for vector in np.asarray(groups, np.float64):
        count = max(1, int(keep * vector.size + 1e-6))
        trimmed.append(np.where(abs(vector) >= np.sort(abs(vector))[-count], vector, 0.0))
    signs = np.sign(np.sum(trimmed, axis=0))
    signs[signs == 0] = 1 if signs.sum() > 0 else -1
    agreeing = [np.where(np.sign(vector) == signs, vector, 0.0) for vector in trimmed]
    count = np.sum([vector != 0 for vector in agreeing], axis=0)
    return np.sum(agreeing, axis=0) / np.maximum(count, 1)


@pytest.mark.parametrize("trim", ["global", "tensor"])
@settings()
@hypothesis.given(task_vectors())
def test_ties_in_running_sums_is_that_of_the_list(trim, vectors):
    cut = SIZE // 3
    parts = {"a": vectors[:, :cut], "b": vectors[:, cut:]}
    rule = compiled("ties", f"scale=1,keep=0.3,trim={trim}")
    origin = {"a": jnp.zeros(cut), "b": jnp.zeros(SIZE - cut)}
    each = [{"a": a, "b": b} for a, b in zip(parts["a"], parts["b"], strict=True)]
    found = merged_model(rule, each, origin)
    wanted = ties_of_the_list(vectors, 0.3)
    if trim == "tensor":
        wanted = np.concatenate([ties_of_the_list(part, 0.3) for part in parts.values()])
    np.testing.assert_allclose(np.concatenate([found["a"], found["b"]]), wanted, rtol=1e-6)


DRAWS = 4000


@functools.cache
def many_merges(name, drop):
    """Merged models of one stream under many keys."""
    rule = rules.dare(on=name, drop=drop)

    def one(key, vectors):
        state, previous = rule.init(jnp.zeros(8)), jnp.zeros(8)
        for task, vector in enumerate(vectors):
            evidence = Evidence(key=jax.random.fold_in(key, task))
            previous, state, _ = rule.update(
                state, previous=previous, trained=vector, evidence=evidence
            )
        return previous

    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.jit(lambda vectors: jax.vmap(one, (0, None))(keys, vectors))


@pytest.mark.parametrize("name, drop", [("averaging", 0.5), ("task_arithmetic", 0.9)])
@settings(max_examples=10)
@hypothesis.given(task_vectors(2, 8))
def test_the_mean_of_dare_is_the_rule_it_is_on(name, drop, vectors):
    found = np.asarray(many_merges(name, drop)(vectors), np.float64)
    wanted = vectors.mean(axis=0) if name == "averaging" else 0.3 * vectors.sum(axis=0)
    error = found.std(axis=0) / DRAWS**0.5
    assert (abs(found.mean(axis=0) - wanted) <= 5 * error + 1e-6).all()


shares = arrays.arrays(np.float64, TASKS, elements=strategies.sampled_from([0.0, 0.1, 1.0, 2.5]))


@settings()
@hypothesis.given(task_vectors(), shares.filter(lambda x: x.sum() > 0), strategies.integers(0, 99))
def test_tunable_magmax_meets_every_quota_exactly(vectors, weights, seed):
    wanted = quotas(SIZE, weights / weights.sum())
    assert wanted.sum() == SIZE and wanted.min() >= 0
    owners = assigned(jax.random.key(seed), vectors, jnp.asarray(wanted, jnp.int32))
    assert np.bincount(owners, minlength=TASKS).tolist() == wanted.tolist()


@settings()
@hypothesis.given(task_vectors(), strategies.integers(0, 99))
def test_tunable_magmax_with_the_counts_of_magmax_is_magmax(vectors, seed):
    counts = jnp.asarray(np.bincount(winners(vectors), minlength=TASKS), jnp.int32)
    owners = assigned(jax.random.key(seed), vectors, counts)
    assert np.array_equal(owners, winners(vectors))
    found = 1 + 0.5 * _entries_of(jnp.asarray(vectors), owners)
    assert np.array_equal(found, merged_model(compiled("magmax"), vectors, jnp.ones(SIZE)))


@settings()
@hypothesis.given(
    arrays.arrays(np.float32, SIZE, elements=strategies.sampled_from([0.0, 1e-40, 0.5, 1e30, 3.0])),
    strategies.integers(1, SIZE),
)
def test_the_kth_largest_is_that_of_the_sorted_entries(values, count):
    parts = [jnp.asarray(values[:11]), jnp.asarray(values[11:])]
    assert np.asarray(kth_largest(parts, count)) == np.sort(values)[-count]


@settings()
@hypothesis.given(arrays.arrays(bool, SIZE), strategies.integers(0, SIZE), strategies.integers(0))
def test_random_members_are_members_and_as_many_as_asked(members, count, seed):
    chosen = np.asarray(random_members(jax.random.key(seed % 1000), members, count))
    assert not (chosen & ~members).any() and chosen.sum() == min(count, members.sum())


def test_every_subset_of_members_has_the_same_chance():
    members, draws = jnp.asarray([True, False, True, True, True]), 6000
    keys = jax.random.split(jax.random.key(0), draws)
    chosen = np.asarray(jax.vmap(lambda key: random_members(key, members, 2))(keys))
    subsets, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(subsets) == 6 and not chosen[:, 1].any()
    assert (abs(counts - draws / 6) < 5 * (draws * 5 / 36) ** 0.5).all()
