"""What the functions say of arguments that do not fit together: one line each, by name."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from pm_jax import coefficients, rules, task_vectors, trees
from pm_jax.curvature import DiagonalQuadratic, kronecker, low_rank, measures
from pm_jax.rules import Evidence
from pm_jax.rules.checked import check_rule
from pm_jax.types import InvalidInput

MODEL = {"layer": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))}, "step": jnp.int32(4)}
VECTOR = jnp.ones(3)
AVERAGING, MERGE, TIES = rules.averaging(), rules.perturb_and_merge(), rules.ties()
TURNED = {**MODEL, "layer": {**MODEL["layer"], "kernel": jnp.ones((3, 2))}}
WITHOUT_BIAS = {**MODEL, "layer": {"kernel": jnp.ones((2, 3))}}
QUADRATIC = DiagonalQuadratic.at(MODEL, MODEL)
MEASURED = measures.Measurement(QUADRATIC, 0.0, 0.0, 1.0)


def cast(dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), MODEL)


def update(rule=AVERAGING, state=None, previous=MODEL, trained=MODEL, evidence=None):
    state = rule.init(MODEL) if state is None else state
    return rule.update(state, previous=previous, trained=trained, evidence=evidence)


class Tensor:
    """An array of another library."""

    shape, dtype = (3,), "their.float32"


MISTAKES = {
    "a kernel of another shape": (
        lambda: update(trained=TURNED),
        r"trained=float32\[3, 2\] at layer/kernel: previous is float32\[2, 3\] there; give trees",
    ),
    "a leaf that is missing": (
        lambda: update(trained=WITHOUT_BIAS),
        "trained: lacks layer/bias, which previous has; give",
    ),
    "a leaf too many": (
        lambda: update(previous=WITHOUT_BIAS),
        "trained: has layer/bias, which previous lacks; give",
    ),
    "another container": (
        lambda: update(trained=freeze(MODEL)),
        "trained=FrozenDict: previous is dict; give",
    ),
    "another container inside": (
        lambda: update(trained={**MODEL, "layer": list(MODEL["layer"].values())}),
        "trained=list at layer: previous is dict there; give",
    ),
    "a leaf for a tree": (
        lambda: update(trained=VECTOR),
        r"trained=float32\[3\]: previous is dict; give",
    ),
    "boxes on one side": (
        lambda: update(trained={**MODEL, "layer": nn.Partitioned(MODEL["layer"], ())}),
        "trained=Partitioned at layer: previous is dict there; give",
    ),
    "boxes of other names": (
        lambda: update(
            previous=nn.Partitioned(MODEL, ("a",)),
            trained=nn.Partitioned(MODEL, ("b",)),
        ),
        "trained=Partitioned: its metadata are not those of previous; give",
    ),
    "another precision": (
        lambda: update(trained={**MODEL, "layer": cast(jnp.bfloat16)["layer"]}),
        r"trained=bfloat16\[3\] at layer/bias: previous is float32\[3\] there; convert",
    ),
    "whole numbers for parameters": (
        lambda: update(trained=cast(jnp.int32)),
        r"trained=int32\[3\] at layer/bias: previous is float32\[3\] there; give",
    ),
    "no previous model": (
        lambda: AVERAGING.update(AVERAGING.init(MODEL), previous=None, trained=MODEL),
        "trained=dict: previous is None; give",
    ),
    "no trained model": (
        lambda: update(trained=None),
        "trained=None: previous is dict; give",
    ),
    "a file name for a model": (
        lambda: AVERAGING.init("model.ckpt"),
        "params=str: has no array among its leaves; give a pytree of arrays",
    ),
    "a tree of text": (
        lambda: update(trained={"w": "model.ckpt"}),
        "trained=dict: has no array among its leaves; give a pytree of arrays",
    ),
    "a linen module": (
        lambda: AVERAGING.init(nn.Dense(3)),
        "params=Dense: has no array among its leaves; give a pytree .* linen module's params",
    ),
    "another library's array": (
        lambda: AVERAGING.init({"w": Tensor(), "v": VECTOR}),
        "params=.*Tensor at w: is no array of JAX or NumPy; convert it by numpy.asarray",
    ),
    "complex parameters": (
        lambda: AVERAGING.init({"layer": {"w": jnp.ones(2, jnp.complex64)}}),
        r"layer/w=complex64\[2\]: complex leaves do not merge; hold",
    ),
    "complex vectors": (
        lambda: task_vectors.difference(1j * np.ones(2), 1j * np.ones(2)),
        r"leaf=complex128\[2\]: complex leaves do not merge; hold",
    ),
    "no evidence": (
        lambda: update(MERGE),
        "evidence=None: the rule reads quadratic; give .*fisher_empirical",
    ),
    "no evidence of left out examples": (
        lambda: update(rules.perturb_and_merge(jackknife=3)),
        "evidence=None: the rule reads quadratic and left_out; give .*in_groups",
    ),
    "no key": (
        lambda: update(rules.dare()),
        r"evidence=None: the rule reads key; give a rules.Evidence with key=jax.random.key\(seed\)",
    ),
    "no key in the evidence": (
        lambda: update(rules.random_mix(), evidence=Evidence()),
        "evidence.key=None: the rule draws random numbers; give a PRNG key",
    ),
    "no trajectory": (
        lambda: update(rules.trm(), evidence=Evidence()),
        "evidence.trajectory=None: trm needs",
    ),
    "no snapshot": (
        lambda: update(rules.became(), evidence=Evidence(QUADRATIC)),
        "evidence.trajectory=None: became needs .*snapshot",
    ),
    "too few snapshots": (
        lambda: update(
            rules.trm(snapshots=2),
            evidence=Evidence(trajectory=jax.tree.map(lambda x: x[None], MODEL)),
        ),
        r"evidence.trajectory=float32\[1, 3\] at layer/bias: 2 snapshots of trained is float32\[2,",
    ),
    "no quadratic": (
        lambda: update(MERGE, evidence=Evidence()),
        "evidence.quadratic=NoneType: must be a DiagonalQuadratic; measure it by fisher_empirical",
    ),
    "a quadratic for evidence": (
        lambda: update(MERGE, evidence=QUADRATIC),
        r"evidence=DiagonalQuadratic: must be an Evidence; give rules.Evidence\(quadratic\)",
    ),
    "a measurement for evidence": (
        lambda: update(MERGE, evidence=MEASURED),
        r"evidence=Measurement: must be an Evidence; give rules.Evidence\(measurement.quadratic, m",
    ),
    "a measurement for a quadratic": (
        lambda: update(MERGE, evidence=Evidence(MEASURED)),
        "evidence.quadratic=Measurement: holds the quadratic in a field; give",
    ),
    "gradients for evidence": (
        lambda: update(MERGE, evidence=MODEL),
        "evidence=dict: must be an Evidence; give",
    ),
    "evidence of another model": (
        lambda: update(
            MERGE, evidence=Evidence(DiagonalQuadratic.at({"w": VECTOR}, {"w": VECTOR}))
        ),
        "evidence.quadratic.center: has w, which trained lacks; give",
    ),
    "evidence of other shapes": (
        lambda: update(MERGE, evidence=Evidence(DiagonalQuadratic.at(TURNED, TURNED))),
        r"evidence.quadratic.center=float32\[3, 2\] at layer/kernel: trained is float32\[2, 3\] ",
    ),
    "evidence of another measure": (
        lambda: update(MERGE, evidence=Evidence(low_rank.LowRankQuadratic.zero(MODEL, 2))),
        "evidence.quadratic=LowRankQuadratic: must be a DiagonalQuadratic; measure it by fisher",
    ),
    "evidence of the measure of another memory": (
        lambda: update(
            rules.perturb_and_merge(
                memory=lambda p: kronecker.KroneckerQuadratic.zero(p, ("layer/kernel",), 2)
            ),
            evidence=Evidence(QUADRATIC),
        ),
        "evidence.quadratic=DiagonalQuadratic: must be a KroneckerQuadratic; measure it by f",
    ),
    "the state of another rule": (
        lambda: update(MERGE, AVERAGING.init(MODEL), evidence=Evidence(QUADRATIC)),
        "state=TaskCount: this rule's is a PerturbAndMergeState; give",
    ),
    "parameters for a state": (
        lambda: update(TIES, MODEL),
        "state=dict: this rule's is a TiesState; give",
    ),
    "the state of another model": (
        lambda: update(TIES, TIES.init({"w": VECTOR})),
        "state: has origin/w, which the state for such a model lacks; give",
    ),
    "the state of a model of other shapes": (
        lambda: update(MERGE, MERGE.init(TURNED), evidence=Evidence(QUADRATIC)),
        r"state=float32\[3, 2\] at memory/center/layer/kernel: the state for .* is float32\[2, 3\]",
    ),
    "the state of another memory": (
        lambda: update(
            MERGE,
            rules.perturb_and_merge(memory=lambda p: low_rank.LowRankQuadratic.zero(p, 2)).init(
                MODEL
            ),
            evidence=Evidence(QUADRATIC),
        ),
        "state=LowRankQuadratic at memory: the state for such a model is DiagonalQuadratic there",
    ),
    "the state of more tasks": (
        lambda: update(
            rules.tunable_magmax(max_tasks=2),
            rules.tunable_magmax(max_tasks=3).init(MODEL),
            evidence=Evidence(key=jax.random.key(0)),
        ),
        r"state=float32\[3, 3\] at task_vectors/layer/bias: the state .* is float32\[2, 3\] there",
    ),
    "a factory to jackknife": (
        lambda: rules.jackknifed(rules.perturb_and_merge, 4),
        r"rule=perturb_and_merge: is a function that makes a rule; call it: perturb_and_merge\(\)",
    ),
    "a name to jackknife": (
        lambda: rules.jackknifed("ties", 4),
        r"rule=ties: is no MergeRule; make one, .* rules.make\(name\)",
    ),
    "a measure for a rule": (
        lambda: check_rule("rule", measures.Measure(None, None, None)),
        "rule=Measure: is no MergeRule; make one",
    ),
    "a difference of other shapes": (
        lambda: task_vectors.difference(TURNED, MODEL),
        r"trained=float32\[3, 2\] at layer/kernel: previous is float32\[2, 3\] there; give",
    ),
    "a difference of other structures": (
        lambda: task_vectors.difference([VECTOR], (VECTOR,)),
        "trained=list: previous is tuple; give",
    ),
    "a task vector of another model": (
        lambda: task_vectors.apply(MODEL, {"layer": MODEL["layer"]}),
        "task_vector: lacks step, which params has; give",
    ),
    "task vectors of two models": (
        lambda: task_vectors.combine([VECTOR, VECTOR[:2]], [1.0, 1.0]),
        r"task_vectors\[1\]=float32\[2\]: task_vectors\[0\] is float32\[3\]; give",
    ),
    "an inner product that would broadcast": (
        lambda: trees.inner({"a": VECTOR}, {"a": VECTOR[None]}),
        r"right=float32\[1, 3\] at a: left is float32\[3\] there; give",
    ),
    "weights of other shapes": (
        lambda: trees.inner({"a": VECTOR}, {"a": VECTOR}, {"a": 1.0}),
        "weight=float at a: left is float32.3. there; give",
    ),
    "an inner product of whole numbers": (
        lambda: trees.inner(jnp.arange(3), jnp.arange(3)),
        r"left=int32\[3\]: has no floating-point leaf; convert",
    ),
    "models of other structures to interpolate": (
        lambda: trees.lerp({"a": VECTOR}, {"b": VECTOR}, 0.5),
        "new: has b, which previous lacks; give",
    ),
    "a tree of other numbers": (
        lambda: trees.with_floating(MODEL, {"w": VECTOR}),
        "floating_tree: has w, which tree lacks; give",
    ),
    "a coefficient along another model's task vector": (
        lambda: coefficients.merge_coefficient(QUADRATIC, MODEL, TURNED, task=2),
        r"task_vector=float32\[3, 2\] at layer/kernel: previous is float32\[2, 3\] there; give",
    ),
    "a coefficient of another model's quadratic": (
        lambda: coefficients.merge_coefficient(QUADRATIC, VECTOR, VECTOR, task=2),
        r"theta=float32\[3\]: center is dict; give",
    ),
    "a group for some of the leaves": (
        lambda: coefficients.merge_coefficients(QUADRATIC, MODEL, MODEL, (0,), task=2),
        r"groups=\[0\]: must be a number for each of 2 floating-point leaves",
    ),
    "groups with a gap": (
        lambda: coefficients.merge_coefficients(QUADRATIC, MODEL, MODEL, (0, 2), task=2),
        r"groups=\[0, 2\]: must be a number .*; number them from 0 on without a gap",
    ),
    "a diagonal of another model": (
        lambda: DiagonalQuadratic.at(MODEL, {"layer": VECTOR}),
        r"diagonal=float32\[3\] at layer: center is dict there; give",
    ),
    "a direction of another model": (
        lambda: QUADRATIC.curvature_along(TURNED),
        r"direction=float32\[3, 2\] at layer/kernel: center is float32\[2, 3\] there; give",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_argument_value_and_remedy(mistake):
    call, pattern = MISTAKES[mistake]
    with pytest.raises(InvalidInput) as refused:
        call()
    line = str(refused.value)
    assert re.match(pattern, line), line
    assert "\n" not in line and "; " in line and len(line) < 250


def test_mistakes_are_found_while_a_merge_is_traced():
    def merge(state, trained):
        return AVERAGING.update(state, previous=MODEL, trained=trained)

    with pytest.raises(InvalidInput, match="trained: lacks layer/bias"):
        jax.eval_shape(merge, AVERAGING.init(MODEL), WITHOUT_BIAS)


def test_rules_that_do_not_read_the_previous_model_take_none_for_it():
    for name in ("task_arithmetic", "ties", "magmax", "pam", "dare:on=ties"):
        rule = rules.make(*name.split(":"))
        evidence = Evidence(key=jax.random.key(0))
        state = rule.init(MODEL)
        merged, _, info = rule.update(state, previous=None, trained=MODEL, evidence=evidence)
        again, _, _ = rule.update(state, previous=MODEL, trained=MODEL, evidence=evidence)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, merged, again))
        assert np.isnan(info.comparison.kept) and info.remarks() == ()


def remarks_of(rule, *models, evidence=None, wrap=lambda f: f):
    """What is said after each model of a stream."""
    previous, *others = models
    state, said, update = rule.init(previous), [], wrap(rule.update)
    for trained in others:
        previous, state, info = update(
            state, previous=previous, trained=trained, evidence=evidence and evidence(trained)
        )
        said.append(info.remarks())
    return said


def moved(factor, step=4):
    layer = jax.tree.map(lambda leaf: leaf + factor, MODEL["layer"])
    return {"layer": layer, "step": jnp.int32(step)}


def flat(trained):
    return Evidence(DiagonalQuadratic.at(trained, jax.tree.map(jnp.zeros_like, trained)))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_the_info_says_what_may_not_be_meant(wrap):
    healthy = remarks_of(AVERAGING, MODEL, moved(1.0), moved(2.0), wrap=wrap)
    assert healthy == [(), ()]
    same = "the trained model equals the previous one: there was nothing new to merge"
    assert remarks_of(AVERAGING, MODEL, MODEL, wrap=wrap) == [(same,)]
    assert remarks_of(TIES, MODEL, MODEL, wrap=wrap) == [(same,)]
    kept = "1 leaf that is not floating point differs between the models: the trained model's is"
    said = remarks_of(AVERAGING, MODEL, moved(1.0, step=5), wrap=wrap)[0]
    assert len(said) == 1 and said[0].startswith(kept)
    no_minimum = remarks_of(MERGE, MODEL, moved(1.0), moved(2.0), evidence=flat, wrap=wrap)
    assert no_minimum == [
        (),
        ("the evidence gave no coefficient: the rule fell back on alpha = 0.5",),
    ]
    empty = "the models have no floating-point leaf: there was nothing to merge"
    for model in ({}, [], {"step": 3}):
        assert remarks_of(AVERAGING, model, model, wrap=wrap) == [(empty,)]
        assert remarks_of(TIES, model, model, wrap=wrap) == [(empty,)]


def test_a_merge_that_gives_back_its_base_says_so():
    def evidence(trained):
        # All curvature is in the first task, so that alpha is 0 for the second.
        first = float(trained["layer"]["bias"][0]) == 1.0
        fill = jax.tree.map(lambda x: jnp.full_like(x, 1.0 if first else 0.0), trained)
        return Evidence(DiagonalQuadratic.at(trained, fill))

    said = remarks_of(MERGE, MODEL, moved(1.0), moved(2.0), evidence=evidence)
    assert said[0] == () and len(said[1]) == 1
    assert said[1][0].startswith("the merged model is the previous one: nothing of the trained")


def test_empty_models_come_back_with_the_figures_of_the_rule():
    rule = rules.trm()
    state = rule.init({"step": jnp.int32(1)})
    merged, after, info = rule.update(
        state, previous={"step": jnp.int32(1)}, trained={"step": jnp.int32(2)}
    )
    assert int(merged["step"]) == 2 and jax.tree.structure(after) == jax.tree.structure(state)
    assert set(info.figures) == set(rule.needs.figures) and float(info.comparison.kept) == 1
