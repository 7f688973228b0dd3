"""TRM, Trajectory Regularized Merging, reconstructed from the abstract of its paper.

The paper's equations are not public. Its abstract says that the merge is an optimisation in an
augmented trajectory subspace with three objectives: task alignment, prediction consistency and
gradient responsiveness. Everything beyond that sentence is our reading.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pm_jax import task_vectors, trees
from pm_jax.rules import subspaces
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements
from pm_jax.rules.building import origin_of
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.objectives import Objective, weighted_mean
from pm_jax.types import Array, InvalidInput, Params, PyTree, require

LOSSES = ("alignment", "consistency", "responsiveness", "gradient_norm")
FIGURES = (
    *(f"{name}_{when}" for name in LOSSES for when in ("before", "after")),
    "subspace_rank",
)


class TrmState(NamedTuple):
    """State of TRM: the tasks merged so far (int32 scalar) and the pre-trained model `theta_0`."""

    tasks: Array
    origin: Params


class _Settings(NamedTuple):
    # Hashable, as a static argument of jit must be.
    steps: int
    learning_rate: float
    alignment: float
    consistency: float
    responsiveness: float
    temperature: float
    cutoff: float
    per: str


def trm(
    *,
    snapshots: int = 5,
    steps: int = 100,
    learning_rate: float = 0.02,
    alignment: float = 1.0,
    consistency: float = 1.0,
    responsiveness: float = 0.1,
    temperature: float = 2.0,
    history: bool = True,
    cutoff: float = 1e-4,
    per: str = "model",
    next_task_from: str = "merged",
) -> MergeRule:
    """TRM (reconstructed from the abstract): optimise the merged model in a trajectory subspace.

    The subspace is spanned by K snapshots of the task's training and the displacement so far,

        theta(c) = theta_hat_{t-1} + V c,   V orthonormal, from theta^(k) - theta_hat_{t-1} and
                                            theta_hat_{t-1} - theta_0
        J(c) = L_align + lam_c L_cons + lam_g L_resp
        L_align  cross-entropy on the current task
        L_cons   T^2 KL(old classes' probabilities of theta_hat_{t-1} || of theta(c)), same inputs
        L_resp   max(0, 1 - g(c) / g_ref)^2, g the norm of the gradient of L_align at theta(c),
                 g_ref the same at the onset of the task

    with one c for the whole model, or one for each tensor. Adam goes from
    theta_hat_{t-1} + Delta_t / t through the batches of `Evidence.objective` in turn. The first
    task is kept as trained: there is nothing to merge it with. If the end is not finite, the merge
    is the start of the search; if lengths overflow, the step of 1/t.

    Args:
        snapshots: K, at least 1; the last one is the trained model.
        steps: number of Adam's steps.
        learning_rate: Adam's on c, in units of `||Delta_t||`, of the model or of the tensor.
        alignment: weight of L_align; 0 leaves the loss out, as do the next two.
        consistency: lam_c.
        responsiveness: lam_g.
        temperature: T.
        history: whether `theta_hat_{t-1} - theta_0` belongs to the subspace.
        cutoff: eigenvalues of the unit directions' Gram matrix below this share of the largest
            are left out, in (0, 1).
        per: "model" for one c, "tensor" for one in the subspace of every tensor.
        next_task_from: "merged" or, as an ablation, "trained".

    Returns:
        A `MergeRule` that needs `trajectory`, `objective` and `onset_gradient_norm`. Its alpha is
        the merged displacement's share along Delta_t; `figures` has the three losses and the
        gradient norm before and after the search, over all batches, and the subspace's rank, the
        mean over tensors where there is one for each.

    Raises:
        ValueError: a setting out of range.

    References:
        `Trajectory Regularized Merging <https://arxiv.org/abs/2605.08311>`_, abstract only

    Example:
        >>> trm(snapshots=2).needs.snapshots
        (0.5, 1.0)
    """
    settings = _Settings(
        steps, learning_rate, alignment, consistency, responsiveness, temperature, cutoff, per
    )
    _check(settings, snapshots, next_task_from)

    def init(params: Params) -> TrmState:
        return TrmState(jnp.zeros((), jnp.int32), origin_of(params))

    def update(state: TrmState, *, previous: Params, trained: Params, evidence: Evidence):
        for name in ("trajectory", "objective"):
            if getattr(evidence, name) is None:
                raise InvalidInput(
                    f"evidence.{name}=None: trm needs a trajectory and an objective; see the "
                    "fields of rules.Evidence"
                )
        tasks = state.tasks + 1
        points = evidence.trajectory
        # The model itself last, whatever type the snapshots were kept in.
        points = jax.tree.map(lambda leaf, last: leaf.at[-1].set(last), points, trained)
        directions = jax.vmap(task_vectors.difference, (0, None))(points, previous)
        if history:
            past = task_vectors.difference(previous, state.origin)
            directions = jax.tree.map(
                lambda leaf, last: jnp.concatenate([leaf, last[None]]), directions, past
            )
        reference = jnp.asarray(evidence.onset_gradient_norm, jnp.float32)
        end = _search(
            settings, snapshots - 1, tasks, previous, directions, evidence.objective, reference
        )
        # An overflow of the lengths makes the share infinite or NaN.
        sound, later = jnp.isfinite(end.share), tasks > 1
        merged = jax.tree.map(
            lambda low, step, plain: jnp.where(
                later & sound, (low + step).astype(plain.dtype), plain
            ),
            previous,
            subspaces.combination(directions, end.weights),
            trees.lerp(previous, trained, 1 / tasks),
        )
        alpha = jnp.where(later & sound, end.share, 1 / tasks)
        degenerate = later & ((end.degenerate > 0) | ~sound)
        info = MergeInfo.of(alpha, degenerate)._replace(figures=end.figures)
        return merged, TrmState(tasks, state.origin), info

    fractions = tuple((number + 1) / snapshots for number in range(snapshots))
    needs = Requirements(
        evidence=frozenset({"trajectory", "objective", "onset_gradient_norm"}),
        next_task_from=next_task_from,
        snapshots=fractions,
        figures=FIGURES,
    )
    return merge_rule(init, update, needs)


class _SearchResult(NamedTuple):
    weights: Array  # the directions' weights, [1 or tensors, directions]
    share: Array  # how far the displacement goes along Delta
    degenerate: Array
    figures: dict[str, Array]


class _Subspace(NamedTuple):
    """Combinations of K displacements, of the whole model (G = 1) or tensor by tensor."""

    base: Params
    directions: PyTree  # [K, ...], Delta at `last`
    last: int
    products: Array  # Gram matrices [G, K, K]
    coordinates: Array  # [G, K, K], how to combine the displacements to orthonormal ones
    lengths: Array  # of Delta, [G, 1]: the unit of a place

    @classmethod
    def of(cls, settings: _Settings, last: int, base: Params, directions: PyTree) -> "_Subspace":
        products = subspaces.gram(directions)
        if settings.per == "model":
            products = jnp.sum(products, axis=0, keepdims=True)
        coordinates = jax.vmap(
            functools.partial(subspaces.orthonormal_coordinates, cutoff=settings.cutoff)
        )(products)
        lengths = trees.safe_sqrt(products[:, last, last])[:, None]
        # float32 inside the search, whose steps are smaller than bfloat16 resolves.
        base = jax.tree.map(lambda leaf: leaf.astype(trees.compute_dtype(leaf)), base)
        return cls(base, directions, last, products, coordinates, lengths)

    def delta(self) -> Array:
        """The place of Delta, [G, K]."""
        along = self.products[:, :, self.last]
        along = jnp.einsum("gkj,gk->gj", self.coordinates, along, precision="highest")
        # 1e-30 is for a tensor that did not move, whose place is 0.
        return along / jnp.maximum(self.lengths, 1e-30)

    def weights(self, place: Array) -> Array:
        """Weights of the displacements at a place, [G, K]."""
        steps = self.lengths * place
        return jnp.einsum("gkj,gj->gk", self.coordinates, steps, precision="highest")

    def point(self, weights: Array) -> Params:
        """The model that the weights stand for."""
        return task_vectors.apply(self.base, subspaces.combination(self.directions, weights))

    def share(self, weights: Array) -> Array:
        """How far along Delta the weights lead, 1 for Delta itself."""
        along = jnp.sum(self.products[:, self.last] * weights)
        return along / jnp.maximum(jnp.sum(self.products[:, self.last, self.last]), 1e-30)

    def rank(self) -> Array:
        """Number of dimensions, the mean over tensors where there is a subspace for each."""
        return jnp.mean(jnp.sum(jnp.any(self.coordinates != 0, axis=1), axis=1, dtype=jnp.float32))


class _Losses(NamedTuple):
    """The three losses on a batch, and the gradient norm, in the order of `LOSSES`."""

    settings: _Settings
    objective: Objective
    reference: Array  # gradient norm at the onset of the task
    old: Array  # log-probabilities of the old model [batches, N, C]

    @classmethod
    def of(
        cls, settings: _Settings, objective: Objective, reference: Array, old: Params
    ) -> "_Losses":
        # Once for all steps: the old model does not move.
        def of_the_old_model(number: Array) -> Array:
            logits = objective.logits(old, objective.batch(number).inputs)
            return objective.old_log_probabilities(logits, settings.temperature)

        numbers = jnp.arange(objective.batches.labels.shape[0])
        return cls(settings, objective, reference, jax.lax.map(of_the_old_model, numbers))

    def on(self, number: Array, leaves: Params) -> Array:
        """The four values on a batch, [4]."""
        batch = self.objective.batch(number)
        (alignment, logits), slope = jax.value_and_grad(self.objective.loss, has_aux=True)(
            leaves, batch
        )
        # Without a gradient at the onset, or with a NaN for it, there is nothing to respond to.
        norm, has_reference = trees.norm(slope), self.reference > 0
        lack = jnp.maximum(0.0, 1 - norm / jnp.where(has_reference, self.reference, 1.0))
        old = self.old[number % len(self.old)]
        new = self.objective.old_log_probabilities(logits, self.settings.temperature)
        divergence = jnp.sum(jnp.exp(old) * (old - new), axis=-1)
        consistency = weighted_mean(divergence, batch) * self.settings.temperature**2
        return jnp.stack([alignment, consistency, jnp.where(has_reference, lack**2, 0.0), norm])

    def total(self, number: Array, leaves: Params) -> Array:
        """J on a batch."""
        weights = [getattr(self.settings, name) for name in LOSSES[:3]]
        terms = zip(weights, self.on(number, leaves), strict=False)
        # A loss without weight is left out, so that it is not differentiated, twice for L_resp.
        return sum((weight * value for weight, value in terms if weight), start=jnp.zeros(()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
    settings: _Settings,
    last: int,
    tasks: Array,
    previous: Params,
    directions: PyTree,
    objective: Objective,
    reference: Array,
) -> _SearchResult:
    """Find the best point of the subspace; `last` is the index of Delta among the directions."""
    space = _Subspace.of(settings, last, previous, directions)
    nowhere = jnp.zeros(space.products.shape[:2])
    functions = _Losses.of(settings, objective, reference, space.point(nowhere))
    adam = optax.adam(settings.learning_rate)

    def step(number, carry):
        place, state = carry
        slope = jax.grad(lambda place: functions.total(number, space.point(space.weights(place))))(
            place
        )
        updates, state = adam.update(slope, state, place)
        return optax.apply_updates(place, updates), state

    beginning = space.delta() / tasks
    # There is nothing to search for at the first task.
    steps = jnp.where(tasks > 1, settings.steps, 0)
    end, _ = jax.lax.fori_loop(0, steps, step, (beginning, adam.init(beginning)))
    # One bad batch can turn the whole place to NaN.
    sound = jnp.isfinite(end).all()
    end = jnp.where(sound, end, beginning)
    before, after = space.weights(beginning), space.weights(end)
    values = jax.lax.map(
        lambda weights: objective.mean_over_batches(
            lambda number: functions.on(number, space.point(weights))
        ),
        jnp.stack([before, after]),
    )
    figures = {
        f"{name}_{when}": value
        for when, row in zip(("before", "after"), values, strict=True)
        for name, value in zip(LOSSES, row, strict=True)
    }
    figures["subspace_rank"] = space.rank()
    return _SearchResult(after, space.share(after), (~sound).astype(jnp.float32), figures)


def _check(settings: _Settings, snapshots: int, next_task_from: str) -> None:
    """Raise ValueError for a setting out of range."""
    values = {**settings._asdict(), "snapshots": snapshots}
    for name in ("snapshots", "steps"):
        require(name, values[name], values[name] >= 1, "at least 1")
    for name in ("learning_rate", "temperature"):
        require(name, values[name], values[name] > 0, "above 0")
    for name in LOSSES[:3]:
        require(name, values[name], values[name] >= 0, "at least 0")
    some = any(values[name] for name in LOSSES[:3])
    require("alignment", settings.alignment, some, "above 0 where no other loss has weight")
    require("cutoff", settings.cutoff, 0 < settings.cutoff < 1, "in (0, 1)")
    require("per", settings.per, settings.per in ("model", "tensor"), "model or tensor")
    starts = ("merged", "trained")
    require("next_task_from", next_task_from, next_task_from in starts, "merged or trained")
