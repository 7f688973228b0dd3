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

import jax
import jax.numpy as jnp

from pm_jax import task_vectors, trees
from pm_jax.types import Array, Key, LossFn, Params, PyTree


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


def _checked_epsilon(epsilon: float) -> float:
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon={epsilon}: must lie in (0, 1]; the paper uses 0.5")
    return float(epsilon)


def _checked_probabilities(probabilities: tuple[float, ...], count: int) -> tuple[float, ...]:
    if len(probabilities) != count:
        raise ValueError(f"probabilities={probabilities}: {count} are needed")
    if min(probabilities) < 0 or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
        raise ValueError(
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
        probability: of +epsilon.

    Returns:
        A `Perturbation`.

    Raises:
        ValueError: epsilon or probability out of range.

    Example:
        >>> one_sided(0.5, 0.25).probabilities
        (0.75, 0.25)
    """
    pair = _checked_probabilities((1 - probability, probability), 2)
    return Perturbation((0.0, _checked_epsilon(epsilon)), pair)


def antithetic(epsilon: float = 0.5) -> Perturbation:
    """Ablation: the mean of the losses at +epsilon and -epsilon, two passes a step.

    Its weight is `lam = epsilon^2 / 2`; `epsilon sqrt(2/3)` matches the default of `symmetric`.

    Args:
        epsilon: radius in (0, 1].

    Returns:
        A `Perturbation`.

    Raises:
        ValueError: epsilon out of range.

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
        probability: with which a step is perturbed at all.

    Returns:
        A `Perturbation`.

    Raises:
        ValueError: epsilon or probability out of range.

    Example:
        >>> gaussian().gaussian
        True
    """
    return dataclasses.replace(one_sided(epsilon, probability), gaussian=True)


def none() -> Perturbation:
    """No perturbation: `s = 0`.

    Returns:
        A `Perturbation`.

    Example:
        >>> none().steps
        (0.0,)
    """
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
    pairs = zip(perturbation.steps, perturbation.probabilities, strict=True)
    return 0.5 * sum(p * s * s for s, p in pairs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample(key: Key, perturbation: Perturbation, shape: tuple[int, ...] = ()) -> Array:
    """Draw `s`.

    Args:
        key: PRNG key.
        perturbation: the law (static).
        shape: `()` for one draw a batch, `(N,)` for one per example (static).

    Returns:
        Array of the shape, float32 (float64 where JAX is set to it).

    Example:
        >>> import jax
        >>> sample(jax.random.key(0), symmetric(0.5), (3,)).shape
        (3,)
    """
    steps = jnp.asarray(perturbation.steps, jnp.result_type(float))
    if len(perturbation.steps) == 1:
        return jnp.broadcast_to(steps[0], shape)
    return jax.random.choice(key, steps, shape, p=jnp.asarray(perturbation.probabilities))


def displace(
    key: Key, perturbation: Perturbation, step: Array, params: Params, base: Params
) -> Params:
    """The point at which the loss is taken, for a given draw.

    Args:
        key: PRNG key of the random direction; used by a Gaussian law only.
        perturbation: the law; says which direction.
        step: `s`, scalar.
        params: `theta`, pytree of floating-point arrays.
        base: `theta_hat_{t-1}`, of the same structure.

    Returns:
        `theta + s Delta`, or `theta + s ||Delta|| u` with `u` uniform on the sphere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> displace(jax.random.key(0), symmetric(), 0.5, jnp.asarray([3.0]), jnp.ones(1)).tolist()
        [4.0]
    """
    delta = task_vectors.difference(params, base)
    if perturbation.gaussian:
        return task_vectors.apply(params, noise_of_norm(key, params, step * trees.norm(delta)))
    return task_vectors.apply(params, delta, step)


def noise_of_norm(key: Key, tree: PyTree, length: Array) -> PyTree:
    """Noise in the shape of a tree, of a given global norm and uniformly random direction.

    Args:
        key: PRNG key, folded with each leaf's path.
        tree: pytree of arrays that gives the shapes.
        length: norm over all leaves together, scalar.

    Returns:
        float32 pytree.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pm_jax import trees
        >>> noise = noise_of_norm(jax.random.key(0), [jnp.ones(3), jnp.ones(2)], 2.0)
        >>> round(float(trees.norm(noise)), 5)
        2.0
    """
    noise = trees.gaussian_like(key, tree)
    return task_vectors.scale(noise, length / trees.norm(noise))


def perturbed(loss_fn: LossFn, perturbation: Perturbation) -> Callable[..., Array]:
    """The loss at a random point along the task vector.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`.
        perturbation: the law.

    Returns:
        `perturbed_loss(key, params, base, *args) -> scalar`: differentiable in `params` (the
        gradient includes the factor 1 + s), jit-compatible, one forward pass (two for
        `antithetic`).

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.2

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loss = perturbed(lambda w, x: jnp.sum(w * x), antithetic(0.5))
        >>> float(loss(jax.random.key(0), jnp.asarray([2.0]), jnp.asarray([0.0]), 3.0))
        6.0
    """

    def perturbed_loss(key: Key, params: Params, base: Params, *args) -> Array:
        step_key, direction_key = jax.random.split(key)
        return sum(
            (
                weight * loss_fn(displace(direction_key, perturbation, step, params, base), *args)
                for step, weight in perturbation.draws(step_key)
            ),
            start=jnp.zeros(()),
        )

    return perturbed_loss
