"""Low-rank adapters of qwix, which tunix and MaxText train: to ours and back, merged and perturbed.

qwix keeps the factors beside their kernel in the parameters, of linen and of nnx models alike:
`kernel_lora_a` and `kernel_lora_b`. The kernel that takes effect is `W + alpha / rank A B`. Tasks
of Perturb-and-Merge with them:

    loss = pm_qwix.perturbed(loss_fn, pm_jax.perturbation.symmetric())
    base, _ = pm_qwix.split(params, alpha)
    state = merger.init(base)
    for task in tasks:
        ...  # train the factors with loss(key, params, batch)
        trained = pm_qwix.fold(params, alpha)
        merged, state, info = merger.finish_task(state, trained, task)
        params = pm_qwix.restart(params, state.start, key)

This module needs trees only, not the library. The alpha is that of qwix's `LoraRule`, which the
parameters do not tell. Neither do they tell of the groups of a convolution
(`feature_group_count`): qwix's branch mixes the groups, so no kernel has its effect, and such
adapters must not be given to this module.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from pm_jax import lora, perturbation, trees
from pm_jax.types import Array, InvalidInput, Key, Params

A, B = "_lora_a", "_lora_b"
"""Endings of the names of the factors."""

Alpha = float | Mapping[str, float]
"""The alpha of all adapters, or by regular expressions over the paths of kernels."""

Contracted = Mapping[str, tuple[int, ...]]
"""Axes that an einsum sums over, by regular expressions over the paths of kernels."""


def split(
    params: Params, alpha: Alpha, *, contracted: Contracted | None = None
) -> tuple[Params, lora.Adapters]:
    """The parameters without the factors, and the adapters `{path of a kernel: Adapter}`.

    Our adapters have no factor alpha / rank, so their B is `alpha / rank` times that of qwix.

    Args:
        params: nested dicts or an `nnx.State`, as `nnx.state(model, nnx.Param)`.
        alpha: of qwix's rule.
        contracted: axes of a kernel that its einsum sums over, needed only where the shapes leave
            them open. A square kernel is [in, out] unless it is named here.

    Returns:
        The base, which a model without qwix takes, and float32 adapters.

    Raises:
        InvalidInput: no adapters, a factor without its kernel or with one that is quantized, an
            alpha that is missing, or shapes that do not fit or fit in several ways.

    Example:
        >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3),
        ...           "kernel_lora_a": jnp.ones((2, 1)), "kernel_lora_b": jnp.ones((1, 3))}
        >>> base, adapters = split(params, 4.0)
        >>> sorted(base), adapters["kernel"].b.tolist()
        (['bias', 'kernel'], [[4.0, 4.0, 4.0]])
    """
    leaves = trees.leaves_by_path(params)
    adapters = {
        path: placement.to_ours(leaves[path + A], leaves[path + B], scale)
        for path, placement, scale in _placements(leaves, alpha, contracted)
    }
    return _without_factors(params), adapters


def with_adapters(
    params: Params, adapters: lora.Adapters, alpha: Alpha, *, contracted: Contracted | None = None
) -> Params:
    """The parameters of qwix with the factors of our adapters: the way back from `split`.

    Args:
        params: a tree with qwix's factors, which tells their shapes.
        adapters: for some or all of the kernels that have factors.
        alpha: as for `split`.
        contracted: as for `split`.

    Raises:
        InvalidInput: as `split`; an adapter of a kernel without factors, or of another rank.

    Example:
        >>> params = {"kernel": jnp.zeros((2, 3)), "kernel_lora_a": jnp.ones((2, 1)),
        ...           "kernel_lora_b": jnp.ones((1, 3))}
        >>> _, adapters = split(params, 4.0)
        >>> with_adapters(params, adapters, 4.0)["kernel_lora_b"].tolist()
        [[1.0, 1.0, 1.0]]
    """
    leaves = trees.leaves_by_path(params)
    placements = {path: rest for path, *rest in _placements(leaves, alpha, contracted)}
    replaced = {}
    for path, adapter in adapters.items():
        if path not in placements:
            raise InvalidInput(
                f"adapters={path}: has no factors in the parameters, which have some for "
                f"{', '.join(placements)}"
            )
        placement, scale = placements[path]
        a, b = placement.to_qwix(path, adapter, scale)
        for ending, factor in ((A, a), (B, b)):
            if factor.size != leaves[path + ending].size:
                raise InvalidInput(
                    f"adapters={path}: has another rank than the parameters, whose {ending[1:]} is "
                    f"{leaves[path + ending].shape}"
                )
            shaped = factor.reshape(leaves[path + ending].shape)
            replaced[path + ending] = shaped.astype(leaves[path + ending].dtype)
    return trees.replace(params, replaced)


def fold(
    params: Params,
    alpha: Alpha,
    coefficient: Array | float = 1.0,
    *,
    contracted: Contracted | None = None,
) -> Params:
    """The parameters of a model without qwix, with kernels `W + coefficient alpha / rank A B`.

    Args:
        params: as for `split`.
        alpha: as for `split`.
        coefficient: scalar; 1 for the trained model.
        contracted: as for `split`.

    Raises:
        InvalidInput: as `split`.

    Example:
        >>> params = {"kernel": jnp.zeros((1, 1)), "kernel_lora_a": jnp.ones((1, 2)),
        ...           "kernel_lora_b": jnp.ones((2, 1))}
        >>> fold(params, 3.0)
        {'kernel': Array([[3.]], dtype=float32)}
    """
    return lora.fold(*split(params, alpha, contracted=contracted), coefficient)


def restart(params: Params, base: Params, key: Key | None = None) -> Params:
    """The parameters from which the next task starts: the model `base`, and factors of product 0.

    Args:
        params: as for `split`.
        base: a model without qwix, as `fold` and a merge give it.
        key: PRNG key to draw new A with, by qwix's default law; `None` keeps A.

    Raises:
        InvalidInput: no adapters, or a base that has not the leaves of the parameters.

    Example:
        >>> params = {"kernel": jnp.zeros((1, 1)), "kernel_lora_a": jnp.ones((1, 2)),
        ...           "kernel_lora_b": jnp.ones((2, 1))}
        >>> start = restart(params, {"kernel": jnp.ones((1, 1))})
        >>> start["kernel"].tolist(), start["kernel_lora_b"].tolist()
        ([[1.0]], [[0.0], [0.0]])
    """
    leaves, kernels = trees.leaves_by_path(params), trees.leaves_by_path(base)
    factors = _factors(leaves)
    if different := set(kernels) ^ {path for path in leaves if not path.endswith((A, B))}:
        raise InvalidInput(
            f"base: {sorted(different)[0]!r} is in one of the trees only; pass the model without "
            "factors, as fold gives it"
        )
    trees.check_alike(_without_factors(params), base, ("params", "base"))
    fresh = {path + B: jnp.zeros_like(leaves[path + B]) for path in factors}
    if key is not None:
        drawn = {path + A: leaves[path + A] for path in factors}
        initialise = jax.nn.initializers.he_uniform()
        fresh |= {
            path: initialise(path_key, drawn[path].shape, drawn[path].dtype)
            for path, path_key in trees.leaf_keys(key, drawn).items()
        }
    return trees.replace(params, {**kernels, **fresh})


def perturbed(
    loss_fn: Callable[..., Any], law: perturbation.Perturbation, *, has_aux: bool = False
) -> Callable[..., Any]:
    """The loss of a qwix model at a random point along its task vector, `alpha / rank A B`.

    Scaling B by `1 + s` moves each kernel by `s` times its task vector. A stays, since scaling both
    would scale the product by the square.

    Args:
        loss_fn: `loss_fn(params, *args, **kwargs) -> scalar`, or `(scalar, aux)`.
        law: made by a factory such as `perturbation.symmetric()`; not a Gaussian one, which moves
            kernels.
        has_aux: whether `loss_fn` returns auxiliary outputs too, as for `jax.grad`.

    Returns:
        `perturbed_loss(key, params, *args, **kwargs)`, differentiable in `params`, which may be all
        parameters or those of `nnx.LoRAParam`.

    Raises:
        InvalidInput: a Gaussian law; when called, parameters without factors.

    Example:
        >>> params = {"kernel_lora_a": jnp.ones((1, 1)), "kernel_lora_b": jnp.full((1, 1), 2.0)}
        >>> loss = perturbed(
        ...     lambda p: jnp.sum(p["kernel_lora_a"] @ p["kernel_lora_b"]),
        ...     perturbation.antithetic(0.5))
        >>> float(loss(jax.random.key(0), params))
        2.0
    """
    perturbation.check_law(law)
    if law.gaussian:
        raise InvalidInput(
            "law: a Gaussian one moves kernels, not the factors of qwix; pass symmetric() or "
            "antithetic(), or train adapters of split with lora.branch"
        )

    def perturbed_loss(key: Key, params: Params, *args: Any, **kwargs: Any) -> Any:
        leaves = trees.leaves_by_path(params)
        moving = {path: leaf for path, leaf in leaves.items() if path.endswith(B)}
        if not moving:
            raise InvalidInput(f"params: has no leaf whose name ends in {B}; pass those of qwix")

        def loss_of_factors(factors: dict[str, Array], *args: Any, **kwargs: Any) -> Any:
            return loss_fn(trees.replace(params, factors), *args, **kwargs)

        # The task vector of B alone is B, since a task starts from 0.
        start = jax.tree.map(jnp.zeros_like, moving)
        loss = perturbation.perturbed(loss_of_factors, law, has_aux=has_aux)
        return loss(key, moving, start, *args, **kwargs)

    return perturbed_loss


class _Placement(NamedTuple):
    """Where the factors of qwix lie in a kernel: A [*stacked, *contracted, rank] and the others.

    Attributes:
        shape: of the kernel.
        stacked: number of leading axes that both factors have, of `nn.scan` or of a batch.
        contracted: axes of the kernel that are A's.
    """

    shape: tuple[int, ...]
    stacked: int
    contracted: tuple[int, ...]

    @property
    def remaining(self) -> tuple[int, ...]:
        """Axes of the kernel that are B's."""
        return tuple(
            axis for axis in range(self.stacked, len(self.shape)) if axis not in self.contracted
        )

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of some axes of the kernel."""
        return tuple(self.shape[axis] for axis in axes)

    def to_ours(self, a: Array, b: Array, scale: float) -> lora.Adapter:
        """Our adapter of the same product."""
        stack, rank = self.shape[: self.stacked], a.shape[-1]
        # qwix joins the axes of a `DenseGeneral`, and not those of an einsum.
        a = a.astype(jnp.float32).reshape(*stack, *self.sizes(self.contracted), rank)
        b = b.astype(jnp.float32).reshape(*stack, rank, *self.sizes(self.remaining)) * scale
        if self.contracted[0] == self.stacked:
            return lora.Adapter(a, b)
        if self.remaining[-1] < self.contracted[0]:
            # A kernel with its outputs first is the transpose of A B.
            return lora.Adapter(
                jnp.moveaxis(b, self.stacked, -1), jnp.moveaxis(a, -1, self.stacked)
            )
        # Axes of the outputs before A's, as heads in [heads, in, size]: the heads share one A.
        lead = self.contracted[0] - self.stacked
        places = (*stack, *self.shape[self.stacked : self.contracted[0]])
        a = a.reshape(*stack, *[1] * lead, *a.shape[self.stacked :])
        a = jnp.broadcast_to(a, (*places, *a.shape[len(places) :]))
        return lora.Adapter(a, jnp.moveaxis(b, self.stacked, self.contracted[0]))

    def to_qwix(self, path: str, adapter: lora.Adapter, scale: float) -> tuple[Array, Array]:
        """A and B of qwix, up to the joining of axes."""
        lora.axes_of_adapter(path, adapter, self.shape)
        a, b = adapter
        if self.contracted[0] == self.stacked:
            return a, b / scale
        if self.remaining[-1] < self.contracted[0]:
            return jnp.moveaxis(b, self.stacked, -1), jnp.moveaxis(a, -1, self.stacked) / scale
        raise InvalidInput(
            f"adapters={path}: the factor A of qwix is one for all of the leading axes of a kernel "
            f"{self.shape}, and ours may differ; use lora.fold"
        )


def _factors(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the kernels that have factors."""
    paths = [path.removesuffix(A) for path in leaves if path.endswith(A)]
    unpaired = {path for path in leaves if path.endswith(B)} ^ {path + B for path in paths}
    if unpaired:
        raise InvalidInput(f"params: {sorted(unpaired)[0]!r} has only one of its two factors")
    if not paths:
        raise InvalidInput(f"params: has no leaf whose name ends in {A}; pass those of qwix")
    return paths


def _placements(leaves: Mapping[str, Any], alpha: Alpha, contracted: Contracted | None):
    """Path, placement and alpha / rank of all kernels that have factors."""
    for path in _factors(leaves):
        if path not in leaves:
            quantized = any(name.startswith(f"{path}/") for name in leaves)
            raise InvalidInput(
                f"params: {path!r} "
                + ("is quantized, and a merge needs" if quantized else "is missing beside")
                + (" the kernel in floating point" if quantized else f" {path + A!r}")
            )
        by_pattern = alpha if isinstance(alpha, Mapping) else {".*": alpha}
        value = next((x for p, x in by_pattern.items() if re.fullmatch(p, path)), None)
        if value is None:
            raise InvalidInput(f"alpha={alpha}: has no pattern that matches {path}; give its alpha")
        a, b = leaves[path + A], leaves[path + B]
        given = next((x for p, x in (contracted or {}).items() if re.fullmatch(p, path)), None)
        yield (
            path,
            _placement(path, leaves[path].shape, a.shape, b.shape, given),
            value / a.shape[-1],
        )


def _placement(
    path: str,
    kernel: tuple[int, ...],
    a: tuple[int, ...],
    b: tuple[int, ...],
    contracted: tuple[int, ...] | None,
) -> _Placement:
    """Find the place of factors in their kernel from the three shapes."""
    possible = []
    for stacked in range(len(kernel) - 1):
        stack, rest = kernel[:stacked], range(stacked, len(kernel))
        if a[:stacked] != stack or b[: stacked + 1] != (*stack, a[-1]):
            continue
        inputs, outputs = a[stacked:-1], b[stacked + 1 :]
        # Products have joined axes, and their inputs come first.
        joined = [
            _Placement(kernel, stacked, tuple(rest[:number]))
            for number in range(1, len(rest))
            if (math.prod(kernel[i] for i in rest[:number]),) == inputs
            and (math.prod(kernel[i] for i in rest[number:]),) == outputs
        ]
        apart = [
            place
            for axes in itertools.combinations(rest, len(inputs))
            if (place := _Placement(kernel, stacked, axes)).sizes(axes) == inputs
            and place.sizes(place.remaining) == outputs
        ]
        if contracted is not None:
            apart = [place for place in apart if place.contracted == contracted]
            joined = [place for place in joined if place.contracted == contracted]
        # Axes of size 1 may belong to either side.
        possible += joined[:1] or apart
    if len(possible) > 1:
        raise InvalidInput(
            f"params: factors {a} and {b} may sum over the axes "
            f"{' or '.join(str(place.contracted) for place in possible)} of {path} {kernel}; give "
            "contracted="
        )
    if not possible:
        raise InvalidInput(f"params: factors {a} and {b} do not fit {path} of shape {kernel}")
    (place,) = possible
    if place.contracted != tuple(range(place.contracted[0], place.contracted[-1] + 1)):
        raise InvalidInput(
            f"params: {path} of shape {kernel} is summed over the axes {place.contracted}, which "
            "are no neighbours; such adapters are not supported"
        )
    return place


def _without_factors(params: Params) -> Params:
    """The tree without the leaves that qwix has added."""
    if isinstance(params, nnx.State):
        return nnx.filter_state(params, lambda path, _: not str(path[-1]).endswith((A, B)))
    flat = {
        path: leaf
        for path, leaf in flatten_dict(params, keep_empty_nodes=True).items()
        if not str(path[-1]).endswith((A, B))
    }
    nested = unflatten_dict(flat)
    return freeze(nested) if isinstance(params, FrozenDict) else nested
