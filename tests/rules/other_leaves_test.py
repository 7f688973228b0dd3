"""Leaves that are not floating point, and boxes around leaves, through every rule."""

import collections
import functools
import inspect
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from pm_jax import rules, task_vectors, trees
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.curvature import DiagonalQuadratic
from pm_jax.precision import in_full_precision
from pm_jax.rules import Evidence
from pm_jax.rules.checked import merge_rule
from tests.contract_test import VARIANTS, as_written, evidence_for, model
from tests.small_runs import slow

LONG_TO_COMPILE = {"trm", "oracle", "exact_curvature", "tunable_magmax", *VARIANTS}
every_rule = pytest.mark.parametrize(
    "name",
    [
        slow(name) if name in LONG_TO_COMPILE else name
        for name in [*sorted(rules.REGISTRY), *VARIANTS]
    ],
)


def others(seed):
    """Leaves of many kinds, which arithmetic in float32 would change; all depend on the seed."""
    return {
        "step": jnp.int32(16777217 + seed),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "raw": jnp.asarray([0, 123456789 + seed], jnp.uint32),
        "ids": jnp.asarray([7, 50256 + seed]),
        "quantised": jnp.asarray([-128, 127 - seed], jnp.int8),
        "mask": jnp.arange(3) == seed,
        "none": None,
    }


COUNT = len(jax.tree.leaves(others(0)))


def bits(tree):
    """Types, shapes and bytes of all leaves."""

    def of_leaf(leaf):
        if isinstance(leaf, str | int):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
        return str(leaf.dtype), np.shape(leaf), np.asarray(leaf).tobytes()

    return [of_leaf(leaf) for leaf in jax.tree.leaves(tree)]


@every_rule
def test_other_leaves_are_the_trained_models_to_the_bit_and_leave_the_numbers_alone(name):
    rule = as_written(name)
    if name not in LONG_TO_COMPILE:  # these compile their parts themselves
        rule = rule._replace(update=jax.jit(rule.update))

    def stream(with_others):
        models = [model(seed) for seed in range(3)]
        previous, *trained = [
            {"model": m, "other": others(seed)} if with_others else {"model": m}
            for seed, m in enumerate(models)
        ]
        start, state = previous, rule.init(previous)
        for task, new in enumerate(trained):
            evidence = evidence_for(models[task + 1], task)
            center, diagonal = evidence.quadratic.center, evidence.quadratic.diagonal
            if with_others:
                # The one that a measure gives, and the one that is mapped from a whole model.
                diagonal = {"model": diagonal, "other": [None, others(9)][task] or NONE}
                center = {"model": center, "other": [NONE, others(5)][task]}
            else:
                diagonal, center = {"model": diagonal}, {"model": center}
            merged, state, info = rule.update(
                state,
                previous=previous,
                trained=new,
                evidence=evidence._replace(quadratic=DiagonalQuadratic.at(center, diagonal)),
            )
            starts = {"merged": merged, "trained": new, "initial": start}
            previous = starts[rule.needs.next_task_from]
        return merged, state, info, trained

    merged, state, info, trained = stream(with_others=True)
    plain, plain_state, plain_info, _ = stream(with_others=False)
    assert jax.tree.structure(merged) == jax.tree.structure(trained[-1])
    assert bits(merged["other"]) == bits(trained[-1]["other"])
    assert bits((merged["model"], state)) == bits((plain["model"], plain_state))
    assert float(info.comparison.kept) == COUNT and float(plain_info.comparison.kept) == 0
    assert any(f"{COUNT} leaves that are not floating" in remark for remark in info.remarks())
    np.testing.assert_array_equal(info[:7], plain_info[:7])


NONE = dict.fromkeys(others(0))


class Pair(collections.namedtuple("Pair", "params step")):
    """A model as a NamedTuple."""


@flax.struct.dataclass
class TrainState:
    """What many training loops carry, of which only some leaves are parameters."""

    step: Any
    params: Any
    opt_state: Any
    key: Any
    name: str = flax.struct.field(pytree_node=False, default="vit")


def in_frozen_dict(params, seed):
    return freeze({"params": params, "activation": f"gelu{seed}", "step": jnp.int32(seed)})


def in_struct(params, seed):
    moments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return TrainState(
        jnp.int32(16777217 + seed),
        params,
        (jnp.int32(seed), moments, np.int64(2**40 + seed)),
        jax.random.key(seed),
    )


def in_boxes(params, seed):
    names = iter(("bias", "kernel", "scale"))
    boxes = {
        name: nn.Partitioned(leaf, (None,) * leaf.ndim)
        if name == "bias"
        else nn.LogicallyPartitioned(leaf, (name,) * leaf.ndim)
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True)
    }
    return {**boxes, "ids": nn.Partitioned(jnp.arange(3) + seed, ("vocabulary",))}


def in_nnx_state(params, seed):
    rngs = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(seed)))
    tree = jax.tree.map(lambda leaf: nnx.Param(leaf, note="merges"), params)
    return nnx.State({"tree": tree, "dropout": rngs, "count": nnx.BatchStat(jnp.int32(seed))})


CONTAINERS = [in_frozen_dict, in_struct, Pair, in_boxes, in_nnx_state]


@pytest.mark.parametrize("contain", CONTAINERS)
@pytest.mark.parametrize(
    "name", ["averaging", "perturb_and_merge", *map(slow, ("ties", "pam", "dare"))]
)
def test_containers_and_boxes_are_the_trained_models(name, contain):
    rule = rules.make(name)
    start, *models = (contain(model(seed), seed) for seed in range(3))
    plain = [jax.tree.leaves(trees.floating(m)) for m in (start, *models)]

    def merged(start, models):
        previous, state = start, rule.init(start)
        for task, new in enumerate(models):
            ones = jax.tree.map(jnp.ones_like, trees.floating(new))
            evidence = Evidence(DiagonalQuadratic.at(new, ones), key=jax.random.key(task))
            previous, state, info = rule.update(
                state, previous=previous, trained=new, evidence=evidence
            )
        return previous, info

    found, info = merged(start, models)
    assert jax.tree.structure(found) == jax.tree.structure(models[-1])
    assert type(found) is type(models[-1])
    rest = functools.partial(jax.tree.map, lambda x: None if trees.is_floating(x) else x)
    assert bits(rest(found)) == bits(rest(models[-1]))
    before, after = (bits(rest(m)) for m in models)
    differ = sum(a != b for a, b in zip(before, after, strict=True))
    assert differ and float(info.comparison.kept) == differ
    if name == "dare":  # draws by the paths of leaves
        return
    assert bits(trees.floating(found)) == bits(merged(plain[0], plain[1:])[0])


def test_a_boxed_model_keeps_its_names_and_an_nnx_model_takes_its_state_back():
    rule = rules.averaging()
    boxed = in_boxes(model(1), 1)
    found, _, _ = rule.update(
        rule.init(in_boxes(model(0), 0)), previous=in_boxes(model(0), 0), trained=boxed
    )
    assert isinstance(found["kernel"], nn.LogicallyPartitioned)
    assert found["kernel"].names == ("kernel", "kernel") and found["bias"].names == (None,)
    assert nn.get_partition_spec(found) == nn.get_partition_spec(boxed)
    module = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    before = jax.tree.map(jnp.copy, nnx.state(module))
    module(jnp.ones((1, 2)))  # moves the count of the dropout's stream
    trained = nnx.state(module)
    assert any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(trained))
    merged, _, info = rule.update(rule.init(before), previous=before, trained=trained)
    nnx.update(module, merged)
    assert float(info.comparison.kept) == 1 and float(info.comparison.unchanged_by_training) == 1
    assert bits(nnx.state(module)) == bits(trained)


def test_mixed_types_are_each_their_own():
    def mixed(seed):
        rng = np.random.default_rng(seed)
        values = jnp.asarray(rng.normal(size=4), jnp.float32)
        types = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn)
        return {
            **{jnp.dtype(dtype).name: values.astype(dtype) for dtype in types},
            **{jnp.dtype(dtype).name: values.astype(dtype) for dtype in (jnp.int8, jnp.int4)},
        }

    rule, previous, trained = rules.coma(step=0.5), mixed(0), mixed(1)
    merged, state, _ = rule.update(rule.init(previous), previous=previous, trained=previous)
    merged, _, info = rule.update(state, previous=previous, trained=trained)
    assert {name: leaf.dtype.name for name, leaf in merged.items()} == {
        name: name for name in merged
    }
    for name in ("int8", "int4"):
        assert merged[name] is trained[name]
    for name in set(merged) - {"int8", "int4"}:
        low, high = (np.asarray(m[name], np.float64) for m in (previous, trained))
        wanted = jnp.asarray((low + high) / 2, jnp.float32).astype(merged[name].dtype)
        assert merged[name].tolist() == wanted.tolist()
    assert float(info.comparison.leaves) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "perturb_and_merge"])
def test_the_state_of_a_rule_with_other_leaves_survives_a_checkpoint(name, tmp_path):
    rule, start = rules.make(name), {"model": model(0), "other": others(0)}
    state = rule.init(start)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"rule": state})
        restored = checkpoints.restore(1, {"rule": state})["rule"]
    assert bits(restored) == bits(state)
    new = {"model": model(1), "other": others(1)}
    evidence = Evidence(DiagonalQuadratic.at(new, jax.tree.map(jnp.ones_like, trees.floating(new))))
    found, wanted = (
        rule.update(kept, previous=start, trained=new, evidence=evidence)[0]
        for kept in (restored, state)
    )
    assert bits(found) == bits(wanted)


def test_functions_of_trees_pass_other_leaves_on():
    low = {"model": model(0), "other": others(0)}
    high = {"model": model(1), "other": others(1)}
    delta = task_vectors.difference(high, low)
    assert delta["other"] == NONE
    assert bits(delta["model"]) == bits(task_vectors.difference(high["model"], low["model"]))
    assert task_vectors.scale(delta, 0.5)["other"] == NONE
    assert bits(trees.lerp(low, high, 0.25)["other"]) == bits(others(1))
    assert bits(task_vectors.apply(low, delta)["other"]) == bits(others(0))
    assert trees.zeros_like(low)["other"] == trees.gaussian_like(jax.random.key(0), low)["other"]
    assert float(trees.norm(low)) == float(trees.norm(low["model"]))
    quadratic = DiagonalQuadratic.at(low, low)
    plain = DiagonalQuadratic.at(low["model"], low["model"])
    assert float(quadratic.value(high)) == float(plain.value(high["model"]))
    np.testing.assert_array_equal(
        quadratic.by_leaf(high, high), plain.by_leaf(high["model"], high["model"])
    )
    assert bits(quadratic.recentered(high)) == bits(plain.recentered(high["model"]))


@pytest.mark.slow
def test_text_of_whole_models_reaches_the_functions_that_a_rule_calls():
    def logits(whole, inputs):
        assert whole["activation"] == "gelu" and whole["step"].dtype == jnp.int32
        return inputs @ whole["kernel"] + whole["bias"][None]

    from tests.training_evidence import objective

    given = objective()._replace(logits=jax.tree_util.Partial(logits))
    rule = rules.trm(snapshots=1, steps=1)

    def whole(seed):
        return {**model(seed)["layer"], "activation": "gelu", "step": jnp.int32(seed)}

    trained = whole(1)
    trajectory = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, str) else jnp.asarray(leaf)[None], trained
    )
    evidence = Evidence(trajectory=trajectory, objective=given, onset_gradient_norm=1.0)
    state = rule.init(whole(0))
    for _ in range(2):
        merged, state, _ = rule.update(state, previous=whole(0), trained=trained, evidence=evidence)
    assert merged["activation"] == "gelu" and int(merged["step"]) == 1
    assert bool(jnp.isfinite(merged["kernel"]).all())


@pytest.mark.parametrize("name", ["averaging", "perturb_and_merge", "ties", "magmax", "dare"])
def test_checks_of_arguments_add_nothing_to_the_compiled_program(name):
    rule = rules.make(name)
    models = [model(0), model(1)]
    evidence = evidence_for(models[1], 0)
    state = rule.init(models[0])

    def text(update):
        def lowered(state, previous, trained, evidence):
            merged, state, info = update(
                state, previous=previous, trained=trained, evidence=evidence
            )
            return merged, state, info._replace(comparison=())

        return jax.jit(lowered).lower(state, *models, evidence).as_text()

    bare = in_full_precision(inspect.unwrap(rule.update))
    assert text(rule.update) == text(bare)
    # The comparison of the models is the one thing that is computed besides.
    wrapped_twice = merge_rule(rule.init, bare, rule.needs)
    assert text(wrapped_twice.update) == text(bare)
