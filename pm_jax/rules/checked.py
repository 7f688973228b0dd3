"""How a rule is made of two functions of floating-point leaves, with checks of what it is given.

Everything here happens while a merge is traced, from structures, shapes and types; only the
figures of `MergeInfo.comparison` are computed with the models.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.curvature.diagonal import Diagonal
from pm_jax.curvature.measures import Measurement
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.precision import in_full_precision
from pm_jax.rules.base import Comparison, Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, InvalidInput, Params, PyTree

SOURCES = {
    "quadratic": "quadratic=measurement.quadratic, measured by fisher_empirical at the trained "
    "model",
    "left_out": "left_out=measurement.left_out of measures.in_groups(measure, groups)",
    "key": "key=jax.random.key(seed)",
    "trajectory": "trajectory, snapshots of training at rule.needs.snapshots",
    "objective": "objective, the task's loss on some examples",
    "all_objectives": "all_objectives, the losses of all tasks",
}
"""Where the fields of `Evidence` come from; a rule that reads one of the others can do without."""


NUMBERS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float, complex)
"""Types of the leaves that are numbers or arrays; values that are traced are `jax.Array`s."""

NOTHING = Requirements()
"""The requirements of a rule that asks nothing of its caller."""


def merge_rule(
    init: Callable[..., Any], update: Callable[..., Any], needs: Requirements = NOTHING
) -> MergeRule:
    """A rule from two functions that know nothing but floating-point leaves.

    They are called after checks of the arguments, with `None` in place of all other leaves in the
    models and in the evidence; the merged model has those leaves of the trained one. Their matrix
    products have full precision.

    Args:
        init: `init(params, **given) -> state`.
        update: `update(state, *, previous, trained, evidence) -> (merged, state, info)`.
        needs: what the rule asks of its caller.

    Returns:
        The `MergeRule`.

    Example:
        >>> def update(state, *, previous, trained, evidence):
        ...     return trees.lerp(previous, trained, 0.5), state, MergeInfo.of(0.5)
        >>> rule = merge_rule(lambda params: (), update)
        >>> start, end = {"w": 0.0, "step": 1}, {"w": 1.0, "step": 2}
        >>> merged, _, info = rule.update((), previous=start, trained=end)
        >>> float(merged["w"]), merged["step"], float(info.comparison.kept)
        (0.5, 2, 1.0)
    """

    @in_full_precision
    @functools.wraps(init)
    def checked_init(params: Params, *args: Any, **given: Any) -> Any:
        _check_model("params", params)
        return init(trees.floating(params), *args, **given)

    @in_full_precision
    @functools.wraps(update)
    def checked_update(
        state: Any, *, previous: Params, trained: Params, evidence: Evidence | None = None
    ) -> tuple[Params, Any, MergeInfo]:
        _check_models(previous, trained, needs)
        leaves = trees.floating(trained)
        if not jax.tree.leaves(leaves):
            return trained, state, _info_of_nothing(previous, trained, needs)
        _check_evidence(evidence, needs, leaves)
        _check_state(init, state, leaves, evidence)
        start = trees.floating(previous)
        merged, state, info = update(
            state,
            previous=start,
            trained=leaves,
            evidence=None if evidence is None else _of_floating(evidence, trained),
        )
        comparison = _comparison(previous, trained, merged)
        return trees.with_floating(trained, merged), state, info._replace(comparison=comparison)

    return MergeRule(checked_init, checked_update, needs)


def check_rule(argument: str, rule: Any) -> None:
    """Check that an argument is a `MergeRule`, and not a factory of one.

    Raises:
        InvalidInput: it is something else.

    Example:
        >>> from pm_jax import rules
        >>> check_rule("rule", rules.ties)
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: rule=ties: is a function that makes a rule; call it: ties()
    """
    if isinstance(rule, MergeRule):
        return
    name = getattr(rule, "__name__", type(rule).__name__)
    if callable(rule):
        raise InvalidInput(f"{argument}={name}: is a function that makes a rule; call it: {name}()")
    raise InvalidInput(
        f"{argument}={rule if isinstance(rule, str) else name}: is no MergeRule; make one, such as "
        "by rules.perturb_and_merge(), or rules.make(name)"
    )


def _check_model(argument: str, params: Params) -> None:
    """Check that a model is a pytree of arrays."""
    leaves = jax.tree.leaves(params)
    numbers = [isinstance(leaf, NUMBERS) for leaf in leaves]
    strange = [
        number
        for number, leaf in enumerate(leaves)
        if not numbers[number] and hasattr(leaf, "shape")
    ]
    if strange:
        path, leaf = list(trees.leaves_by_path(params).items())[strange[0]]
        place = f" at {path}" if path else ""
        raise InvalidInput(
            f"{argument}={type(leaf).__module__}.{type(leaf).__name__}{place}: is no array of "
            "JAX or NumPy; convert it by numpy.asarray"
        )
    if leaves and not any(numbers):
        raise InvalidInput(
            f"{argument}={type(params).__name__}: has no array among its leaves; give a pytree of "
            "arrays, such as a linen module's params or nnx.state(model)"
        )


def _check_models(previous: Params, trained: Params, needs: Requirements) -> None:
    """Check that both models are pytrees of arrays of one structure, and of the same types."""
    _check_model("trained", trained)
    if previous is None and not needs.reads_previous:
        return
    _check_model("previous", previous)
    trees.check_alike(trained, previous, ("trained", "previous"))
    before, after = (trees.floating(model) for model in (previous, trained))
    for number, pair in enumerate(zip(*map(jax.tree.leaves, (before, after)), strict=True)):
        if _dtype(pair[0]) != _dtype(pair[1]):
            path = list(trees.leaves_by_path(after))[number]
            found = trees.Difference(path, trees.described(pair[1]), trees.described(pair[0]))
            raise InvalidInput(f"{found.written('trained', 'previous')}; convert one of the models")


def _dtype(leaf: Any) -> np.dtype:
    # NumPy's float64 counts as the type that JAX makes of it.
    return jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", np.float32))


def _check_evidence(evidence: Evidence | None, needs: Requirements, leaves: Params) -> None:
    """Check that evidence is there where the rule cannot do without, and fits the model."""
    if evidence is None:
        if missing := [name for name in SOURCES if name in needs.evidence]:
            raise InvalidInput(
                f"evidence=None: the rule reads {' and '.join(missing)}; give a rules.Evidence "
                f"with {' and '.join(SOURCES[name] for name in missing)}"
            )
        return
    if not isinstance(evidence, Evidence):
        fields = "quadratic=..., key=..."
        if isinstance(evidence, Quadratic):
            fields = "quadratic"
        elif isinstance(evidence, Measurement):
            fields = "measurement.quadratic, measurement.standard_error"
        given = type(evidence).__name__
        raise InvalidInput(f"evidence={given}: must be an Evidence; give rules.Evidence({fields})")
    quadratic = evidence.quadratic
    if "quadratic" in needs.evidence and isinstance(quadratic, Quadratic):
        trees.check_alike(quadratic.center, leaves, ("evidence.quadratic.center", "trained"))
        if isinstance(quadratic.curvature, Diagonal):
            trees.check_alike(
                quadratic.curvature.diagonal, leaves, ("evidence.quadratic.diagonal", "trained")
            )
    if "trajectory" in needs.evidence and evidence.trajectory is not None:
        _check_trajectory(evidence.trajectory, leaves, len(needs.snapshots))


def _check_trajectory(trajectory: Params, leaves: Params, count: int) -> None:
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *np.shape(leaf)), _dtype(leaf)), leaves
    )
    wanted = f"{count} snapshots of trained"
    trees.check_alike(trajectory, stacked, ("evidence.trajectory", wanted))


def _check_state(
    init: Callable[..., Any], state: Any, leaves: Params, evidence: Evidence | None
) -> None:
    """Check that a state has the structure and the shapes that the rule's `init` gives it."""
    adapters = evidence.adapters if evidence else None
    wanted = jax.eval_shape(init, leaves, **({"adapters": adapters} if adapters else {}))
    # A state may be a single array, whose type while a merge is traced is that of a tracer.
    if type(state) is not type(wanted) and not isinstance(wanted, jax.ShapeDtypeStruct):
        raise InvalidInput(
            f"state={type(state).__name__}: this rule's is a {type(wanted).__name__}; give the one "
            "of its init(params), or of its last update"
        )
    if difference := trees.first_difference(state, wanted, _alike_in_states):
        raise InvalidInput(
            f"{difference.written('state', 'the state for such a model')}; give the one of "
            "init(params) for this model, or of the last update"
        )


def _alike_in_states(left: Any, right: Any) -> bool:
    return (left is None) == (right is None) and np.shape(left) == np.shape(right)


def _of_floating(evidence: Evidence, trained: Params) -> Evidence:
    """The evidence as a rule reads it that knows nothing but floating-point leaves."""
    leaves, structure = jax.tree.flatten(trained)
    if all(map(trees.is_floating, leaves)):
        return evidence
    # Snapshots of a leaf that does not merge may be of any type.
    trajectory = evidence.trajectory and _masked(evidence.trajectory, trained)
    others = tuple(None if trees.is_floating(leaf) else leaf for leaf in leaves)
    text = tuple((n, x) for n, x in enumerate(others) if isinstance(x, str | bytes))
    arrays = tuple(None if isinstance(x, str | bytes) else x for x in others)

    def whole(objective: Objective | None) -> Objective | None:
        if objective is None:
            return None
        logits = _LogitsOfWhole(objective.logits, arrays, text, structure)
        return objective._replace(logits=logits)

    return evidence._replace(
        trajectory=trajectory,
        objective=whole(evidence.objective),
        all_objectives=whole(evidence.all_objectives),
    )


def _masked(tree: PyTree, model: Params) -> PyTree:
    """A tree with `None` where a model's leaf is not floating point."""
    return jax.tree.map(
        lambda own, leaf: leaf if trees.is_floating(own) else None,
        model,
        tree,
        # A tree that comes from floating-point leaves has `None` there already.
        is_leaf=lambda leaf: leaf is None,
    )


@flax.struct.dataclass
class _LogitsOfWhole:
    """Logits as a function of a model's floating-point leaves, given its others.

    Attributes:
        logits: the function of the whole model.
        others: its leaves in their order, `None` for those of `text` and of floating point.
        text: static; the leaves that are text, by their number.
        structure: static; of the whole model.
    """

    logits: Callable[..., Array]
    others: tuple[Any, ...]
    text: tuple[tuple[int, Any], ...] = flax.struct.field(pytree_node=False)
    structure: Any = flax.struct.field(pytree_node=False)

    def __call__(self, leaves: Params, inputs: PyTree) -> Array:
        numbers, text = iter(jax.tree.leaves(leaves)), dict(self.text)
        whole = [
            text[place] if place in text else next(numbers) if other is None else other
            for place, other in enumerate(self.others)
        ]
        return self.logits(jax.tree.unflatten(self.structure, whole), inputs)


def _info_of_nothing(previous: Params, trained: Params, needs: Requirements) -> MergeInfo:
    """The info of models without a floating-point leaf."""
    nan = jnp.full((), jnp.nan, jnp.float32)
    comparison = _comparison(previous, trained, trees.floating(trained))
    info = MergeInfo.of(nan)._replace(comparison=comparison)
    return info._replace(figures=dict.fromkeys(needs.figures, nan))


def _comparison(previous: Params, trained: Params, merged: Params) -> Comparison:
    """Compare the whole models of a merge with the floating-point leaves of its result."""
    leaves = jax.tree.leaves(trees.floating(trained))
    nan = jnp.full((), jnp.nan, jnp.float32)
    count = jnp.full((), len(leaves), jnp.float32)
    if previous is None:
        return Comparison(count, nan, nan, nan)
    before = jax.tree.leaves(trees.floating(previous))
    equal = _equal(before, leaves, jax.tree.leaves(merged))
    return Comparison(count, _number_that_differ(previous, trained), *equal)


@jax.jit
def _equal(before: list[Array], *others: list[Array]) -> list[Array]:
    """1 for each list whose arrays equal those `before`, else 0."""

    def same(pair: tuple[Array, Array]) -> Array:
        # The barrier keeps the compiler from joining the comparison with the merge, whose results
        # it might then round in another way.
        left, right = jax.lax.optimization_barrier(pair)
        return jnp.all(left == right)

    def all_same(arrays: list[Array]) -> Array:
        each = [same(pair) for pair in zip(before, arrays, strict=True)]
        return jnp.all(jnp.stack(each)).astype(jnp.float32) if each else jnp.ones((), jnp.float32)

    return [all_same(arrays) for arrays in others]


def _number_that_differ(previous: Params, trained: Params) -> Array:
    """Number of leaves that are not floating point and differ between two models."""
    if all(map(trees.is_floating, jax.tree.leaves((previous, trained)))):
        return jnp.zeros((), jnp.float32)
    before, after = (
        {
            path: leaf
            for path, leaf in trees.leaves_by_path(model).items()
            if not trees.is_floating(leaf)
        }
        for model in (previous, trained)
    )
    count = jnp.zeros((), jnp.float32)
    for path in {**before, **after}:
        # Only one of them has the leaf where `None` stands for the other's.
        both = path in before and path in after
        differ = _differ(before[path], after[path]) if both else True
        count = count + jnp.asarray(differ, jnp.float32)
    return count


def _differ(left: Any, right: Any) -> Array | bool:
    """Whether two leaves that are not floating point differ in type, shape or content."""
    if left is right:
        return False
    kinds = [getattr(leaf, "dtype", None) for leaf in (left, right)]
    if np.shape(left) != np.shape(right) or (None not in kinds and kinds[0] != kinds[1]):
        return True
    if all(isinstance(leaf, jax.Array) for leaf in (left, right)):
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = (jax.random.key_data(leaf) for leaf in (left, right))
        return jnp.any(left != right)
    if any(isinstance(leaf, jax.Array) for leaf in (left, right)):
        return jnp.any(jnp.asarray(left) != jnp.asarray(right))
    return bool(np.any(np.asarray(left != right)))
