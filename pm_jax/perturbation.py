"""Train with perturbation: losses taken at random points along the task vector.

A training step of Perturb-and-Merge draws `s` and descends on `L(theta + s Delta)`, where
`Delta = theta - base` is the displacement from the model that the task started from. The mean over
`s` is the loss plus a multiple of the curvature along the task vector, for one forward and one
backward pass a step. The gradient flows through `Delta` too: `(1 + s) grad L(theta + s Delta)`.

References:
    Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, NeurIPS 2025
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pm_jax import lora, task_vectors, trees
from pm_jax.lora import AdaptedKernel, Adapter
from pm_jax.perturbation_checks import (
    base_and_rest,
    check_key,
    check_models,
    is_adapter,
    leaves,
    loss_and_aux,
)
from pm_jax.types import Array, InvalidInput, Key, Params


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """The law of a perturbation: static, hashable, made by the factories of this module.

    Attributes:
        steps: the values that `s` can take.
        probabilities: their probabilities, as many, summing to 1.
        gaussian: move by `s ||Delta||` in a random direction, not by `s Delta`.
        enumerated: take the mean over all values of `s` (one pass each) instead of drawing one.
    """

    steps: tuple[float, ...] = (0.0,)
    probabilities: tuple[float, ...] = (1.0,)
    gaussian: bool = False
    enumerated: bool = False

    def draws(self, key: Key, shape: tuple[int, ...] = ()) -> tuple[tuple[Array, float], ...]:
        """Pairs (s, weight) whose weighted losses add up to the step's loss."""
        if self.enumerated:
            return tuple(
                (jnp.full(shape, step), probability)
                for step, probability in zip(self.steps, self.probabilities, strict=True)
            )
        return ((sample(key, self, shape), 1.0),)


def check_law(perturbation: Any) -> None:
    """Raise `InvalidInput` unless the argument is a `Perturbation`, as a factory returns it."""
    if isinstance(perturbation, Perturbation):
        return
    name = getattr(perturbation, "__name__", repr(perturbation))
    if callable(perturbation) and getattr(perturbation, "__module__", None) == __name__:
        raise InvalidInput(
            f"perturbation={name}: is a function that makes a law; call it, as {name}()"
        )
    raise InvalidInput(
        f"perturbation={name}: is no law; make one with perturbation.symmetric(), "
        "antithetic(), gaussian(), one_sided() or none()"
    )


def _checked_epsilon(epsilon: float) -> float:
    if not 0 < epsilon <= 1:
        raise InvalidInput(f"epsilon={epsilon}: must lie in (0, 1]; the paper uses 0.5")
    return float(epsilon)


def _checked_probabilities(probabilities: tuple[float, ...], count: int) -> tuple[float, ...]:
    if len(probabilities) != count:
        raise InvalidInput(f"probabilities={probabilities}: {count} are needed")
    if min(probabilities) < 0 or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
        raise InvalidInput(
            f"probabilities={probabilities}: must be at least 0 and sum to 1, as 1/3,1/3,1/3"
        )
    return tuple(float(p) for p in probabilities)


def symmetric(
    epsilon: float = 0.5, probabilities: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
) -> Perturbation:
    """The paper's law: `s` in {0, +epsilon, -epsilon}.

    Args:
        epsilon: radius, a fraction of the task vector in (0, 1].
        probabilities: of 0, +epsilon and -epsilon.

    Returns:
        A `Perturbation`; with equal probabilities p of both signs the mean loss is
        `L + lam FD`, `lam = p epsilon^2` (see `curvature_weight`).

    Raises:
        ValueError: epsilon or probabilities out of range.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.2

    Example:
        >>> symmetric(0.5).steps
        (0.0, 0.5, -0.5)
    """
    epsilon = _checked_epsilon(epsilon)
    return Perturbation((0.0, epsilon, -epsilon), _checked_probabilities(probabilities, 3))


def one_sided(epsilon: float = 0.5, probability: float = 0.5) -> Perturbation:
    """Ablation: `s` in {0, +epsilon}, which also adds `p epsilon Delta . grad L` to the loss.

    Args:
        epsilon: radius in (0, 1].
        probability: p of +epsilon.

    Raises:
        ValueError: epsilon or probability out of range.
    """
    pair = _checked_probabilities((1 - probability, probability), 2)
    return Perturbation((0.0, _checked_epsilon(epsilon)), pair)


def antithetic(epsilon: float = 0.5) -> Perturbation:
    """Ablation: the mean of the losses at +epsilon and -epsilon, two passes a step.

    Its weight is `lam = epsilon^2 / 2`; `epsilon sqrt(2/3)` matches the default of `symmetric`.

    Raises:
        ValueError: epsilon outside (0, 1].

    Example:
        >>> curvature_weight(antithetic(0.5))
        0.125
    """
    epsilon = _checked_epsilon(epsilon)
    return Perturbation((epsilon, -epsilon), (0.5, 0.5), enumerated=True)


def gaussian(epsilon: float = 0.5, probability: float = 2 / 3) -> Perturbation:
    """Ablation: noise of global norm `epsilon ||Delta||` in a uniformly random direction.

    Args:
        epsilon: norm of the noise over that of the task vector, in (0, 1].
        probability: of a step that is perturbed at all.

    Raises:
        ValueError: epsilon or probability out of range.
    """
    # 2/3, the probability with which `symmetric` moves away from 0.
    return dataclasses.replace(one_sided(epsilon, probability), gaussian=True)


def none() -> Perturbation:
    """No perturbation: `s = 0`."""
    return Perturbation()


def curvature_weight(perturbation: Perturbation) -> float:
    """The weight `lam = E[s^2] / 2` of the curvature that a perturbation adds to the loss.

    For a symmetric law the mean loss is exactly `L + lam FD`, with the finite difference
    `FD = (L(theta + eps Delta) + L(theta - eps Delta) - 2 L) / eps^2 ~= Delta^T H Delta`. A
    one-sided law adds `E[s] Delta . grad L` as well; the Gaussian one adds
    `lam ||Delta||^2 tr(H) / d`.

    Args:
        perturbation: the law.

    Returns:
        lam, at least 0.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.2

    Example:
        >>> round(curvature_weight(symmetric(0.5)), 6)  # 1/12
        0.083333
    """
    check_law(perturbation)
    pairs = zip(perturbation.steps, perturbation.probabilities, strict=True)
    return 0.5 * sum(p * s * s for s, p in pairs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample(key: Key, perturbation: Perturbation, shape: tuple[int, ...] = ()) -> Array:
    """Draw `s`, float32 (or float64): shape `()` for a batch, `(N,)` for one per example."""
    check_law(perturbation)
    steps = jnp.asarray(perturbation.steps, jnp.result_type(float))
    # A certain value takes no random numbers.
    if len(perturbation.steps) == 1:
        return jnp.broadcast_to(steps[0], shape)
    return jax.random.choice(key, steps, shape, p=jnp.asarray(perturbation.probabilities))


def displace(
    key: Key, perturbation: Perturbation, step: Array | float, params: Params, base: Params
) -> Params:
    """The point at which the loss is taken: `theta + s Delta`, or `theta + s ||Delta|| u`.

    `u` is uniform on the sphere and drawn with `key`; `step` is `s`, scalar, or [N] for a draw per
    example where `params` has adapters only. An `Adapter` stands in the place of a kernel of `base`
    and becomes an `AdaptedKernel`, whose branch `lora.branch` scales by 1 + s. Leaves that are not
    floating point (counters, keys) stay those of `params`.

    Raises:
        InvalidInput: no law; structures or shapes differ; a deleted array; nothing that could move;
            or one draw per example for a leaf that examples share.

    Example:
        >>> displace(jax.random.key(0), symmetric(), 0.5, jnp.asarray([3.0]), jnp.ones(1)).tolist()
        [4.0]
    """
    check_law(perturbation)
    check_models(params, base)

    def along_delta(leaf: Array | Adapter, start: Array) -> Array | AdaptedKernel:
        if isinstance(leaf, Adapter):
            # Delta is A B: scaling one factor scales it, and the gradient has the factor 1 + s.
            return AdaptedKernel(start, leaf, 1.0 + step)
        if not trees.is_floating(leaf):
            return leaf
        return task_vectors.apply(leaf, task_vectors.difference(leaf, start), step)

    if not perturbation.gaussian:
        # A weight that examples share cannot move by a step of every example.
        if jnp.ndim(step):
            _check_adapters_only(params)
        return _map(along_delta, params, base)
    # Where an adapter trains, noise moves the base's kernel, to which the branch is added.
    dense = _map(lambda leaf, start: start if is_adapter(leaf) else leaf, params, base)
    moving = trees.floating(dense)
    delta = _map(
        lambda leaf, start: (
            task_vectors.difference(leaf, start)
            if not is_adapter(leaf) and trees.is_floating(leaf)
            else None
        ),
        params,
        base,
    )
    adapters = {path: leaf for path, leaf in leaves(params).items() if is_adapter(leaf)}
    # ||Delta|| over arrays and adapters together.
    kernels = {path: leaf for path, leaf in leaves(base).items() if path in adapters}
    length = trees.safe_sqrt(trees.inner(delta, delta) + lora.squared_norm(adapters, kernels))
    # A normal vector over its norm is uniform on the sphere.
    noise = trees.gaussian_like(key, moving)
    moved = task_vectors.apply(moving, noise, step * length / trees.norm(noise))
    return _map(
        lambda leaf, point: AdaptedKernel(point, leaf, 1.0) if is_adapter(leaf) else point,
        params,
        trees.with_floating(dense, moved),
    )


_map = functools.partial(jax.tree.map, is_leaf=is_adapter)
"""`jax.tree.map` for which an adapter is one leaf."""


def _check_adapters_only(params: Params) -> None:
    for path, leaf in leaves(params).items():
        if not is_adapter(leaf):
            raise InvalidInput(
                f"examples: one draw per example needs adapters, and {path} is an "
                "array that all examples share; leave examples out for one draw per batch"
            )


def perturbed(
    loss_fn: Callable[..., Any],
    perturbation: Perturbation,
    *,
    has_aux: bool = False,
    examples: int | None = None,
) -> Callable[..., Any]:
    """The loss at a random point along the task vector.

    The loss may have all that losses in training loops have: dropout keys and mutable state are
    arguments or closed over, a train flag is a keyword argument, and updated batch statistics are
    part of `aux`. They are the statistics of the displaced model, one update a step.

    Args:
        loss_fn: `loss_fn(params, *args, **kwargs) -> scalar`, or `(scalar, aux)`. An `Adapter` in
            `params` reaches it as an `AdaptedKernel`, for `lora.branch`.
        perturbation: the law, made by a factory such as `symmetric()`.
        has_aux: whether `loss_fn` returns auxiliary outputs too, as for `jax.grad`.
        examples: N to draw `s` for every example of a batch, which needs `params` of adapters only;
            `None` for one draw per call.

    Returns:
        `perturbed_loss(key, params, base, *args, **kwargs)`: differentiable in `params` (the
        gradient includes the factor 1 + s), jit-compatible, one forward pass.

        - Gradients are `jax.grad(perturbed_loss, argnums=1)`. Without `argnums`, `jax.grad` refuses
          the key by itself: "grad requires real- or complex-valued inputs".
        - `functools.partial(perturbed_loss, key, base=base)` has the arguments of `loss_fn` again,
          and takes its place wherever a loop expects it.
        - `antithetic` has two passes, which see the same arguments and so the same dropout masks
          and batch statistics. Auxiliary outputs are those of the last pass.
        - `base` must outlive the task. Where the jitted step donates `params`, `base` must be a
          copy, as `jax.tree.map(jnp.copy, params)`, and not be donated itself.
        - Leaves of `params` that are not floating point stay as they are; `jax.grad` needs
          `allow_int=True` for them.

    Raises:
        InvalidInput: no law or no function; draws per example of a Gaussian law; and, when called,
            arguments out of order, models that do not match, deleted arrays, or a loss that is no
            scalar.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.2

    Example:
        >>> loss = perturbed(lambda w, x: jnp.sum(w * x), antithetic(0.5))
        >>> float(loss(jax.random.key(0), jnp.asarray([2.0]), jnp.asarray([0.0]), 3.0))
        6.0
    """
    check_law(perturbation)
    check_loss_fn(loss_fn)
    if examples is not None and perturbation.gaussian:
        raise InvalidInput(
            f"examples={examples}: a Gaussian law perturbs the weights, which examples share; "
            "leave it out for one draw per batch"
        )
    if examples is not None and (not isinstance(examples, int) or examples < 1):
        raise InvalidInput(f"examples={examples!r}: must be the number of examples of a batch")
    shape = () if examples is None else (examples,)

    def perturbed_loss(key: Key, params: Params, *args: Any, **kwargs: Any) -> Any:
        base, args = base_and_rest(args, kwargs)
        # Without a perturbation no random number is drawn.
        if perturbation == none():
            loss, aux = loss_and_aux(loss_fn(params, *args, **kwargs), has_aux)
            return (loss, aux) if has_aux else loss
        check_key(key, params)
        step_key, direction_key = jax.random.split(key)
        total, aux = jnp.zeros(()), None
        for step, weight in perturbation.draws(step_key, shape):
            # All values of `s` share one random direction; only their steps differ.
            point = displace(direction_key, perturbation, step, params, base)
            loss, aux = loss_and_aux(loss_fn(point, *args, **kwargs), has_aux)
            total = total + weight * loss
        return (total, aux) if has_aux else total

    return perturbed_loss


def check_loss_fn(loss_fn: Any) -> None:
    """Raise `InvalidInput` unless the argument is a function."""
    if isinstance(loss_fn, Perturbation):
        raise InvalidInput("loss_fn: is a law; the order is perturbed(loss_fn, perturbation)")
    if not callable(loss_fn):
        raise InvalidInput(f"loss_fn={loss_fn!r}: must be a function of the parameters")
