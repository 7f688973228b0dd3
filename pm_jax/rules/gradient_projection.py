"""Gradient projection memory: directions of a layer's inputs that earlier tasks have used.

A change D of a dense kernel [in, out] alters the outputs `x W` of an earlier input x by `x D`. The
memory keeps orthonormal directions with most of the energy of the earlier inputs; a D without a
component in them leaves those outputs nearly as they were. The memory of a kernel is the projector
`P = U U^T` [in, in], whose shape does not grow with the tasks.

References:
    Saha et al., `Gradient Projection Memory for Continual Learning
    <https://arxiv.org/abs/2103.09762>`_, 2021
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp

from pm_jax import losses
from pm_jax.curvature import dense_layers
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, Params


def removed(projector: Array, change: Array) -> Array:
    """A change of a kernel without its component in the memory, `D - P D`.

    Args:
        projector: P [in, in].
        change: D [in, ...], such as a gradient.

    Returns:
        Array of the shape of `change`.

    Example:
        >>> removed(jnp.diag(jnp.asarray([1.0, 0.0])), jnp.ones((2, 1))).tolist()
        [[0.0], [1.0]]
    """
    return change - jnp.matmul(projector, change, precision="highest")


def grown(projector: Array, moments: Array, threshold: Array | float) -> Array:
    """The memory with the directions that a task's inputs need beyond it.

    The principal directions of the part of the inputs outside the memory are added, as few as are
    needed for the memory to hold the share `threshold` of the inputs' energy.

    Args:
        projector: P [in, in].
        moments: second moments of the inputs, `mean_n x_n x_n^T` [in, in], not centred.
        threshold: share of `tr(moments)`, in (0, 1).

    Returns:
        P' [in, in].

    Example:
        >>> moments = jnp.diag(jnp.asarray([90.0, 9.0, 1.0]))
        >>> projector = grown(jnp.zeros((3, 3)), moments, 0.95)
        >>> jnp.diagonal(projector).round(4).tolist()
        [1.0, 1.0, 0.0]
    """
    outside = removed(projector, removed(projector, moments).T)
    values, vectors = jnp.linalg.eigh((outside + outside.T) / 2)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    total = jnp.trace(moments)
    # Energy that is held before a direction is added.
    before = total - jnp.sum(values) + jnp.cumsum(values) - values
    needed = (before < threshold * total) & (values > 0)
    added = vectors * needed[None, :]
    return projector + jnp.matmul(added, added.T, precision="highest")


def input_moments(objective: Objective, leaves: Params, paths: Collection[str]) -> dict[str, Array]:
    """Second moments of the inputs of linen Dense layers, a mean over examples and token axes.

    Args:
        objective: of the task, with the model and examples.
        leaves: that merge, of the model to measure at.
        paths: of the kernels.

    Returns:
        `{path: float32 [in, in]}`, in the order of the paths.

    Raises:
        ValueError: a kernel of no Dense layer that the model calls.

    Example:
        >>> import flax.linen as nn
        >>> from pm_jax.types import Batch
        >>> logits = jax.tree_util.Partial(
        ...     lambda leaves, x: nn.Dense(1).apply({"params": leaves}, x))
        >>> batches = Batch(jnp.asarray([[[1.0, 2.0]]]), jnp.zeros((1, 1), int), jnp.ones((1, 1)))
        >>> objective = Objective(logits, batches, jnp.ones(1, bool), jnp.zeros(1, bool))
        >>> leaves = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
        >>> input_moments(objective, leaves, ["kernel"])["kernel"].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def of_batch(number: Array) -> dict[str, tuple[Array, Array]]:
        batch = objective.batch(number)
        return dense_layers.input_moments(
            lambda: objective.logits(leaves, batch.inputs), paths, losses.weights_of(batch)
        )

    sums = jax.lax.map(of_batch, jnp.arange(objective.batches.labels.shape[0]))
    return {
        path: jnp.sum(products, axis=0) / jnp.sum(count) for path, (products, count) in sums.items()
    }
