"""BECAME: a stage of training with projected gradients, a free stage, and their Bayesian mix."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.coefficients import merge_coefficient_of
from pm_jax.curvature.dense_layers import kernel_paths
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.curvature.quadratics import Curvature, Quadratic
from pm_jax.lora import Adapter
from pm_jax.precision import in_full_precision
from pm_jax.rules import gradient_projection
from pm_jax.rules.base import Evidence, MergeRule, Moving, Requirements, TrainingHook
from pm_jax.rules.building import info_of, quadratic_of
from pm_jax.rules.checked import merge_rule
from pm_jax.types import Array, InvalidInput, Params, require

LARGEST_THRESHOLD = 0.999
"""Beyond this share of the energy the memory would fill with rounding errors."""


class BecameState(NamedTuple):
    """State of BECAME.

    Attributes:
        tasks: int32 scalar, tasks merged so far.
        precision: Lam, the curvature of the tasks so far; the coefficient needs no slope.
        projectors: `{path of a dense kernel: [in, in]}`, see `gradient_projection`.
    """

    tasks: Array
    precision: Curvature
    projectors: dict[str, Array]


def became(
    *,
    projected: float = 0.5,
    threshold: float = 0.97,
    threshold_growth: float = 0.003,
    decay: float = 1.0,
    memory: Callable[[Params], Quadratic] = DiagonalQuadratic.zero,
) -> MergeRule:
    """Mix the model after the projected stage with that after the free stage.

        a = d^T F_t d / d^T (F_t + Lam) d,    d = theta_free - theta_GP
        theta_t = lerp(theta_GP, theta_free, a),    Lam <- F(at theta_t) + decay Lam

    The first task trains freely and is kept as trained. From the second on, a first stage removes
    from gradients and updates all that acts on the inputs of earlier tasks (gradient projection
    memory); the second stage goes on freely. F is the curvature per example, F_t at theta_free:
    diagonal in the paper, here of the memory's kind. A low-rank one is measured along the task
    vector, of which d is a part, and may be too small along d.

    These details are ours, as the paper's text was not at hand:

    - The stages share the task's steps, schedule and optimiser state.
    - The optimiser's updates are projected like the gradients: Adam rescales element by element,
      which alone would leave the complement of the memory.
    - Leaves that are not dense kernels (biases, norms, convolutions, embeddings) rest in the first
      stage: a change of them acts on old inputs too. A classifier with columns per task trains in
      both.
    - With LoRA, A [in, rank] of `W + A B` is projected when it is drawn, and so are its gradients
      and updates: `x A B = 0` for every x in the memory, whatever B is.
    - The memory is of the merged model's inputs on `Evidence.objective`'s examples. The threshold
      of task t, counted from 0, is `threshold + threshold_growth t`, at most 0.999, and the memory
      takes the fewest directions that reach it; the published code of gradient projection memory
      leaves out the one that crosses it.

    A projector takes in^2 numbers a kernel: about twice a ViT-B's parameters if all of it trains.

    Args:
        projected: share of a task's steps with projection, in [0, 1); 0 leaves the stage out.
        threshold: share of the inputs' energy that the memory keeps, in (0, 1); 0.97 is the value
            for CIFAR-100, 0.985 with growth 0.0003 for MiniImageNet.
        threshold_growth: what each task adds to the threshold, at least 0.
        decay: gamma, factor of the earlier tasks' precision, in [0, 1].
        memory: the quadratic that is 0 everywhere, of the kind that the evidence has.

    Returns:
        A `MergeRule` that needs `quadratic` (of the memory's kind), `trajectory` and, to absorb a
        merge, `input_moments`. Its predicted loss change is from theta_free.

    Raises:
        ValueError: a setting out of range.

    References:
        BECAME, `arXiv 2504.02666 <https://arxiv.org/abs/2504.02666>`_, ICML 2025, from a third
        party's code; Saha et al., `Gradient Projection Memory for Continual Learning
        <https://arxiv.org/abs/2103.09762>`_, 2021

    Example:
        >>> rule = became()
        >>> rule.needs.snapshots, rule.needs.hook.project_until
        ((0.5,), 0.5)
    """
    require("projected", projected, 0 <= projected < 1, "in [0, 1)")
    require("threshold", threshold, 0 < threshold < 1, "in (0, 1)")
    require("threshold_growth", threshold_growth, threshold_growth >= 0, "at least 0")
    require("decay", decay, 0 <= decay <= 1, "in [0, 1]")

    def init(params: Params) -> BecameState:
        sizes = trees.select(params, kernel_paths(params))
        projectors = {path: jnp.zeros((x.shape[0],) * 2) for path, x in sizes.items()}
        return BecameState(jnp.zeros((), jnp.int32), memory(params).curvature, projectors)

    def update(state: BecameState, *, previous: Params, trained: Params, evidence: Evidence):
        del previous
        quadratic = quadratic_of(evidence, type(state.precision))
        if evidence.trajectory is None:
            raise InvalidInput(
                "evidence.trajectory=None: became needs the model between its stages; keep one "
                "snapshot of training at rule.needs.snapshots"
            )
        tasks = state.tasks + 1
        projected_model = jax.tree.map(lambda stack: stack[0], evidence.trajectory)
        free_step = task_vectors.difference(trained, projected_model)
        current = quadratic.curvature_along(free_step)
        total = current + state.precision.along(free_step)
        coefficient = merge_coefficient_of(current, total, task=tasks, clip=False)
        info = info_of(coefficient, current if quadratic.curvature.of_loss else jnp.nan)
        info = info._replace(figures={"memory_share": _share(state.projectors)})
        merged = trees.lerp(projected_model, trained, coefficient.alpha)
        return merged, state._replace(tasks=tasks), info

    @in_full_precision
    def absorb(state: BecameState, evidence: Evidence) -> BecameState:
        quadratic = quadratic_of(evidence, type(state.precision))
        moments = evidence.input_moments
        if moments is None:
            raise InvalidInput("evidence.input_moments=None: became absorbs them with a merge")
        precision = state.precision.scaled(decay).plus(quadratic.curvature)
        share = jnp.minimum(threshold + threshold_growth * (state.tasks - 1), LARGEST_THRESHOLD)
        projectors = {
            path: gradient_projection.grown(projector, moments[path], share)
            for path, projector in state.projectors.items()
        }
        return BecameState(state.tasks, precision, projectors)

    hook = TrainingHook(onset=_fresh_outside, project=_outside, project_until=projected)
    needs = Requirements(
        evidence=frozenset({"quadratic", "trajectory", "input_moments"}),
        snapshots=(projected,),
        figures=("memory_share",),
        hook=hook if projected else None,
        absorb=absorb,
        reads_previous=False,
    )
    return merge_rule(init, update, needs)


def _outside(state: BecameState, moving: Moving) -> Moving:
    """Remove from gradients or updates all that acts on the inputs of earlier tasks."""

    def leaf(path: str, change: Array | Adapter) -> Array | Adapter:
        if isinstance(change, Adapter):
            if path not in state.projectors:
                raise InvalidInput(
                    f"adapters={path}: became projects adapters of dense kernels (in, out) only; "
                    "choose other kernels or another rule"
                )
            a = gradient_projection.removed(state.projectors[path], change.a)
            # B may change as it likes: no old input passes through A.
            return change._replace(a=a)
        if path in state.projectors:
            return gradient_projection.removed(state.projectors[path], change)
        # Not 0 in the first task, which has nothing to protect.
        return jnp.where(state.tasks > 0, 0.0, change)

    return {path: leaf(path, change) for path, change in moving.items()}


def _fresh_outside(state: BecameState, moving: Moving) -> Moving:
    """The leaves at the onset of a task: adapters start outside the memory."""
    adapters: Moving = {path: x for path, x in moving.items() if isinstance(x, Adapter)}
    return {**moving, **_outside(state, adapters)}


def _share(projectors: dict[str, Array]) -> Array:
    """Share of the input directions in the memory, mean over kernels."""
    # The trace of a projector is the number of its directions.
    shares = [jnp.trace(p) / p.shape[0] for p in projectors.values()]
    return jnp.mean(jnp.stack(shares)) if shares else jnp.zeros(())
