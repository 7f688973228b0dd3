"""Null-space filter: task vectors act only on inputs that the merged displacement ignores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pm_jax import task_vectors, trees
from pm_jax.curvature.kernels import Axes
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Parts, Requirements
from pm_jax.rules.building import check_starts, key_of, origin_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.matrices import as_matrices, kept_share, matrices, product, singular
from pm_jax.rules.simple import frozen
from pm_jax.types import Array, InvalidInput, Key, Params, require

TASK_RANK = 8
"""Leading input directions of a task vector that the learned part tries to keep."""
SMALL = 0.02
"""Standard deviation of the learned part's first factor at its start."""


class NullSpaceState(NamedTuple):
    """State of the null-space filter.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        origin: the pre-trained model `theta_0`.
        displacement: D, float32, of the matrices that are filtered, `{path: leaf}`.
    """

    tasks: Array
    origin: Params
    displacement: dict[str, Array]


class _Learning(NamedTuple):
    """Settings of the learned part, static."""

    rank: int
    steps: int
    learning_rate: float


def null_space(
    *,
    rank: int = 128,
    pattern: str = "",
    learned_rank: int = 0,
    steps: int = 50,
    learning_rate: float = 1e-3,
    input_axes: int = 0,
    next_task_from: str = "initial",
) -> MergeRule:
    """Add to every matrix the part of the task vector that its earlier displacement does not see.

    With `D = theta_hat - theta_0`, `tau = theta_t* - theta_0`, both [in, out], and U [in, rank] the
    leading singular vectors of D on the side of the inputs,

        D <- D + (I - U U^T) tau,    theta_hat_t = theta_0 + D

    so that `x D` stays as it was for all inputs x in the span of U. Matrices outside of the pattern
    and all other tensors stay at `theta_0`. With `learned_rank` R, Adam then finds factors A
    [in, R], at first small and random, and B [R, in], at first 0, and the task vector that is added
    is `(I - U U^T + A B) tau`:

        min  |W^T (tau - D_t)|^2 + |U^T (D - D_t)|^2,   D_t = D + (I - U U^T + A B) tau

    with W the 8 leading singular vectors of tau on the side of the inputs: what the task does to
    its own strongest inputs, against what the earlier ones did to theirs. The first model's
    matrices are kept; the code takes 128 arbitrary directions from them (singular vectors of the
    value 0), which here are none. The code filters the matrices of attention and the first ones of
    the MLPs (`attn`, `fc1`). Kernels of more than two axes count as matrices (inputs) x (outputs).

    Args:
        rank: directions of D that are kept as they are, at least 1; beyond the rank of D all.
        pattern: regular expression over the whole paths of matrices, for those that are filtered;
            empty for all.
        learned_rank: R, 64 in the paper; 0 leaves the learned part out.
        steps: of Adam, at least 1.
        learning_rate: Adam's, above 0.
        input_axes: see `matrices.matrices`.
        next_task_from: "initial", as the models of the paper are trained independently, "merged" or
            "trained".

    Returns:
        A `MergeRule` that needs nothing, or `key` with the learned part. `figures` has
        `kept_share`, the share of the squared norm of the matrices' task vectors that is added.

    Raises:
        ValueError: a setting out of range.
        InvalidInput: when called, the pattern matches nothing or a leaf that is no matrix, or the
            axes of a kernel may divide in several ways.

    References:
        NUFILT, `arXiv 2509.21413 <https://arxiv.org/abs/2509.21413>`_, ICLR 2026; details as in its
        code

    Example:
        >>> rule, zero = null_space(rank=1), jnp.zeros((2, 2))
        >>> state = rule.init(zero)
        >>> for trained in (jnp.asarray([[0.0, 5.0], [0.0, 0.0]]), jnp.ones((2, 2))):
        ...     merged, state, _ = rule.update(state, previous=None, trained=trained)
        >>> merged.tolist()
        [[0.0, 5.0], [1.0, 1.0]]
    """
    require("rank", rank, rank >= 1, "at least 1; sequential filters nothing")
    require("learned_rank", learned_rank, learned_rank >= 0, "at least 0, where 0 leaves it out")
    require("steps", steps, steps >= 1, "at least 1")
    require("learning_rate", learning_rate, learning_rate > 0, "above 0")
    require("input_axes", input_axes, input_axes >= 0, "at least 0")
    check_starts(next_task_from)
    learning = _Learning(learned_rank, steps, learning_rate)
    needs = Requirements(
        evidence=frozenset({"key"} if learned_rank else ()),
        next_task_from=next_task_from,
        scope="tensor",
        figures=("kept_share",),
        reads_previous=False,
    )
    any_matrix = _Filter(rank, "", learning, input_axes)
    parts = Parts(
        merge_rule(any_matrix.init, any_matrix.update, needs),
        frozen(),
        pattern,
        input_axes=input_axes,
    )
    own = any_matrix._replace(pattern=pattern)
    return merge_rule(own.init, own.update, needs._replace(parts=parts))


class _Filter(NamedTuple):
    """The rule's functions, of its settings."""

    rank: int
    pattern: str
    learning: _Learning
    input_axes: int

    def filtered(self, params: Params) -> dict[str, Axes]:
        """How the axes of the matrices that are filtered divide."""
        found = matrices(params, self.pattern, self.input_axes)
        if not found:
            raise InvalidInput(
                f"pattern={self.pattern!r}: the model has no matrix to filter; use another rule"
            )
        return found

    def init(self, params: Params) -> NullSpaceState:
        origin = origin_of(params)
        chosen = trees.select(origin, tuple(self.filtered(params)))
        displacement = task_vectors.difference(chosen, chosen)
        return NullSpaceState(jnp.zeros((), jnp.int32), origin, displacement)

    def update(
        self,
        state: NullSpaceState,
        *,
        previous: Params,
        trained: Params,
        evidence: Evidence | None = None,
    ) -> tuple[Params, NullSpaceState, MergeInfo]:
        del previous
        tasks, axes = state.tasks + 1, self.filtered(trained)
        own, start = (trees.select(model, tuple(axes)) for model in (trained, state.origin))
        task_vector = task_vectors.difference(own, start)
        keys: dict[str, Key | None] = dict.fromkeys(axes)
        if self.learning.rank:
            keys = trees.leaf_keys(key_of(evidence), task_vector)
        added = {}
        for path, tau in task_vector.items():
            earlier, step = (as_matrices(x, axes[path]) for x in (state.displacement[path], tau))
            added[path] = self._added(keys[path], earlier, step, tasks).reshape(tau.shape)
        displacement = jax.tree.map(jnp.add, state.displacement, added)
        merged = jax.tree.map(
            # The first model to the bit, without the rounding of a sum.
            lambda moved, first: jnp.where(tasks == 1, first, moved),
            task_vectors.apply(start, displacement),
            own,
        )
        info = MergeInfo.of(1.0)._replace(figures=kept_share(added, task_vector))
        state = NullSpaceState(tasks, state.origin, displacement)
        return trees.replace(state.origin, merged), state, info

    def _added(
        self, key: Key | None, displacements: Array, task_vectors: Array, tasks: Array
    ) -> Array:
        """The parts of task vectors [S, in, out] that are added to the displacements."""
        keys = None if key is None else jax.random.split(key, len(task_vectors))
        return jax.vmap(
            lambda key, d, tau: _filtered(d, tau, self.rank, self.learning, key, tasks),
            in_axes=(None if keys is None else 0, 0, 0),
        )(keys, displacements, task_vectors)


def _filtered(
    displacement: Array,
    task_vector: Array,
    rank: int,
    learning: _Learning,
    key: Key | None,
    tasks: Array,
) -> Array:
    """The part of a task vector [in, out] that is added to a displacement."""
    u = singular(displacement)[0][:, :rank]
    outside = task_vector - product(u, product(u.T, task_vector))
    if key is None:
        return outside
    w = singular(task_vector)[0][:, :TASK_RANK]
    rows = jnp.concatenate([w, u], axis=1).T
    # What is wanted of A B tau along both; along U nothing, as the filter has left nothing there.
    wanted = product(w.T, task_vector - displacement - outside)
    wanted = jnp.concatenate([wanted, jnp.zeros((u.shape[1], wanted.shape[1]))])

    def loss(factors: tuple[Array, Array]) -> Array:
        a, b = factors
        return jnp.sum((wanted - product(product(rows, a), product(b, task_vector))) ** 2)

    adam = optax.adam(learning.learning_rate)

    def step(_: Array, carry: tuple) -> tuple:
        factors, state = carry
        updates, state = adam.update(jax.grad(loss)(factors), state)
        return optax.apply_updates(factors, updates), state

    size = len(task_vector)
    a = SMALL * jax.random.normal(key, (size, learning.rank), task_vector.dtype)
    factors = (a, jnp.zeros((learning.rank, size), task_vector.dtype))
    # The first task has nothing to be reconciled with.
    steps = jnp.where(tasks > 1, learning.steps, 0)
    (a, b), _ = jax.lax.fori_loop(0, steps, step, (factors, adam.init(factors)))
    learned = product(a, product(b, task_vector))
    # An overflow of the loss leaves the learned part out.
    return outside + jnp.where(jnp.isfinite(learned).all(), learned, 0)
