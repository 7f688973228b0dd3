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
from pm_jax.precision import in_full_precision
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, Params


def removed(projector: Array, change: Array) -> Array:
    """A change [in, ...] of a kernel without its component in the memory, `D - P D`."""
    # On accelerators the default precision would leave a part of the component.
    return change - jnp.matmul(projector, change, precision="highest")


def grown(projector: Array, moments: Array, threshold: Array | float) -> Array:
    """The memory with the fewest directions added that give it enough of a task's inputs.

    `moments` are the inputs' second moments, `mean_n x_n x_n^T` [in, in], not centred; the memory
    is to hold the share `threshold` of their trace, in (0, 1). New directions are principal ones of
    the inputs' part outside the memory.
    """
    outside = removed(projector, removed(projector, moments).T)
    # Rounding makes the matrix asymmetric and its smallest eigenvalues negative.
    values, vectors = jnp.linalg.eigh((outside + outside.T) / 2)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    total = jnp.trace(moments)
    # The energy in the memory before a direction is added: the one that crosses the threshold
    # still belongs to it.
    before = total - jnp.sum(values) + jnp.cumsum(values) - values
    needed = (before < threshold * total) & (values > 0)
    added = vectors * needed[None, :]
    return projector + jnp.matmul(added, added.T, precision="highest")


@in_full_precision
def input_moments(objective: Objective, leaves: Params, paths: Collection[str]) -> dict[str, Array]:
    """Second moments [in, in] of the inputs of linen Dense layers, by the path of their kernel.

    They are means over examples and token axes at the model of the leaves.

    Raises:
        ValueError: a kernel of no Dense layer that the model calls.
    """

    def of_batch(number: Array) -> dict[str, tuple[Array, Array]]:
        batch = objective.batch(number)
        return dense_layers.input_moments(
            lambda: objective.logits(leaves, batch.inputs), paths, losses.weights_of(batch)
        )

    # One batch at a time, for the memory of its activations.
    sums = jax.lax.map(of_batch, jnp.arange(objective.batches.labels.shape[0]))
    return {
        path: jnp.sum(products, axis=0) / jnp.sum(count) for path, (products, count) in sums.items()
    }
