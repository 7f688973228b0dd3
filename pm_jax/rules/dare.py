"""DARE: drop entries of the task vector at random and rescale the rest, then merge."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.rules.base import Evidence, MergeRule
from pm_jax.rules.building import key_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.simple import averaging
from pm_jax.rules.task_arithmetic import task_arithmetic
from pm_jax.rules.ties import ties
from pm_jax.types import Array, InvalidInput, Params, require

MERGED_BY: dict[str, Callable[..., MergeRule]] = {
    "averaging": averaging,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
}


def dare(
    *,
    on: str = "averaging",
    drop: float = 0.5,
    scale: float = 0.0,
    keep: float = 0.0,
    model_weights: tuple[float, ...] = (),
) -> MergeRule:
    """Merge by another rule after dropping entries of the task vector at random.

        tau' = mask tau / (1 - drop),   mask = 0 with probability `drop`, else 1

    whose mean is tau. The task vector begins at the merged model that the task started from for
    averaging, at `theta_0` for the others. The next task starts where the other rule says.

    Args:
        on: "averaging", "task_arithmetic" or "ties".
        drop: probability in [0, 1); with 0 it is the other rule.
        scale: the other rule's, which averaging lacks; 0 for its default.
        keep: of ties, in (0, 1]; 1 leaves out the trimming, so that `drop` alone makes the task
            vector sparse. 0 for the default of ties.
        model_weights: the other rule's; empty for its default.

    Returns:
        A `MergeRule` that needs `key`.

    Raises:
        ValueError: a setting out of range.

    References:
        Yu et al., `Language Models are Super Mario: Absorbing Abilities from Homologous Models as
        a Free Lunch <https://arxiv.org/abs/2311.03099>`_, ICML 2024

    Example:
        >>> rule = dare(drop=0.75)
        >>> zero, one = jnp.zeros(8), jnp.ones(8)
        >>> merged, _, _ = rule.update(rule.init(zero), previous=zero, trained=one,
        ...                            evidence=Evidence(key=jax.random.key(0)))
        >>> set(merged.tolist()) <= {0.0, 4.0}
        True
    """
    if on not in MERGED_BY:
        raise InvalidInput(f"on={on}: must be one of {', '.join(MERGED_BY)}")
    require("drop", drop, 0 <= drop < 1, "in [0, 1)")
    require("scale", scale, scale >= 0, "at least 0, where 0 is the default of the rule merged by")
    if scale and on == "averaging":
        raise InvalidInput(f"scale={scale}: averaging has none; leave it out")
    require("keep", keep, 0 <= keep <= 1, "in [0, 1], where 0 is the default of ties")
    if keep and on != "ties":
        raise InvalidInput(f"keep={keep}: belongs to ties, and on={on}; leave it out")
    given = {"scale": scale, "keep": keep, "model_weights": model_weights}
    rule = MERGED_BY[on](**{name: value for name, value in given.items() if value})

    def update(state, *, previous: Params, trained: Params, evidence: Evidence):
        base = previous if rule.needs.next_task_from == "merged" else state.origin
        sparse = _sparsified(key_of(evidence), base, trained, drop)
        # In the type of the sparsified model, as the two models of a merge must be.
        start = previous
        if previous is not None:
            start = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), previous, sparse)
        merged, state, info = rule.update(state, previous=start, trained=sparse, evidence=evidence)
        # The sparsified model is float32, and so is a merge with it.
        return jax.tree.map(lambda x, y: x.astype(y.dtype), merged, trained), state, info

    return merge_rule(rule.init, update, rule.needs._replace(evidence=frozenset({"key"})))


def _sparsified(key: Array, base: Params, trained: Params, drop: float) -> Params:
    """The trained model with its task vector sparsified, float32 (float64 for such leaves)."""

    def leaf(leaf_key, low, high):
        # float32 even for bfloat16 models, whose rounding would drop small entries of tau'.
        dtype = trees.compute_dtype(low, high)
        low, high = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
        kept = jax.random.bernoulli(leaf_key, 1 - drop, low.shape)
        return jnp.where(kept, trees.lerp(low, high, 1 / (1 - drop)), low)

    return jax.tree.map(leaf, trees.leaf_keys(key, base), base, trained)
