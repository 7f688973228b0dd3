"""Batch statistics and LoRA products of single nnx layers, which a merge needs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pm_jax.curvature import examples
from pm_jax.integrations.linen import running_mean
from pm_jax.types import Array, InvalidInput, PyTree


def check_module(name: str, module: Any) -> None:
    """Raise `InvalidInput` unless the argument is an nnx module."""
    if not isinstance(module, nnx.Module):
        raise InvalidInput(f"{name}: is a {type(module).__name__}; pass the nnx.Module")


def fold_lora(module: nnx.Module) -> None:
    """Add the products of `nnx.LoRA` and `nnx.LoRALinear` to their kernels, in place.

    Afterwards `lora_b` is 0 and the kernels have what the task learned; `finish_task` merges them
    like any other parameters.

    Raises:
        InvalidInput: no module, no such layer, or one without a kernel [in, out] to add to.

    Example:
        >>> layer = nnx.LoRALinear(2, 3, lora_rank=1, rngs=nnx.Rngs(0))
        >>> layer.lora.lora_b[...] += 1.0
        >>> before = layer(jnp.ones((1, 2)))
        >>> fold_lora(layer)
        >>> bool(jnp.allclose(layer(jnp.ones((1, 2))), before)), float(layer.lora.lora_b[...].max())
        (True, 0.0)
    """
    check_module("module", module)
    layers = dict(nnx.iter_modules(module))
    pairs: dict[tuple, tuple[nnx.LoRA, Any]] = {
        path: (layer, layers.get(path[:-1]) if layer.base_module is None else layer.base_module)
        for path, layer in layers.items()
        if isinstance(layer, nnx.LoRA)
    }
    if not pairs:
        raise InvalidInput(f"module: the {type(module).__name__} has no nnx.LoRA layer")
    for path, (layer, target) in pairs.items():
        shape = (layer.in_features, layer.out_features)
        if getattr(getattr(target, "kernel", None), "shape", None) != shape:
            raise InvalidInput(
                f"module: the nnx.LoRA at {'/'.join(map(str, path)) or 'the top'} has no kernel "
                f"{list(shape)} that its product could be added to"
            )
    for layer, target in pairs.values():
        # In float32 and cast once: a small step would be lost in a bfloat16 kernel.
        a, b = (factor[...].astype(jnp.float32) for factor in (layer.lora_a, layer.lora_b))
        step = jnp.matmul(a, b, precision="highest")
        kernel = target.kernel[...]
        target.kernel[...] = (kernel.astype(jnp.float32) + step).astype(kernel.dtype)
        layer.lora_b[...] = jnp.zeros_like(layer.lora_b[...])


def has_batch_statistics(module: nnx.Module) -> bool:
    """True if a layer of the module is an `nnx.BatchNorm`."""
    return any(isinstance(layer, nnx.BatchNorm) for _, layer in nnx.iter_modules(module))


def recalibrate_batch_statistics(
    module: nnx.Module,
    batches: Any,
    call: Callable[[nnx.Module, PyTree], Any] | None = None,
    *,
    batch_size: int = 256,
) -> None:
    """Measure the statistics of all `nnx.BatchNorm` layers anew, in place, as after a merge.

    The running averages of a merged model are those of no model: they were collected while another
    one trained. They become the means over the batches, weighted by examples, of the mean and the
    variance of each batch. Dropout is off. A layer that is called twice keeps its last call.

    Args:
        module: the merged module.
        batches: examples in any form that `measure_all` takes.
        call: `call(module, inputs)` where `module(inputs)` is not right.
        batch_size: examples per batch.

    Raises:
        InvalidInput: no module, no `nnx.BatchNorm`, or no examples.

    References:
        Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization
        <https://arxiv.org/abs/1803.05407>`_, 2018, section 3.2

    Example:
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> inputs, labels = jnp.asarray([[1.0], [3.0], [5.0]]), jnp.zeros(3, int)
        >>> recalibrate_batch_statistics(model, (inputs, labels))
        >>> float(model.mean[0])
        3.0
    """
    check_module("module", module)
    if not has_batch_statistics(module):
        raise InvalidInput(f"module: the {type(module).__name__} has no nnx.BatchNorm layer")
    work = nnx.clone(module)
    work.eval()
    # Without momentum, a running average is what the last batch has. The axis that a module
    # averages over in its own parallel training does not exist here.
    work.set_attributes(nnx.BatchNorm, momentum=0.0, use_running_average=False, axis_name=None)
    graph, *states = nnx.split(work, nnx.BatchStat, ...)
    mean, rest = map(nnx.to_pure_dict, states)
    count = 0
    items = [batches] if examples.are_arrays(batches) else batches
    for _, batch in examples.batches_of(items, batch_size):
        # Padding would count in the statistics.
        real = np.asarray(batch.weights) > 0
        inputs = jax.tree.map(lambda leaf, real=real: leaf[real], batch.inputs)
        count += int(real.sum())
        mean = _moved(graph, call, mean, rest, inputs, real.sum() / max(count, 1))
    nnx.update(module, mean)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moved(
    graph: Any, call: Callable[..., Any] | None, mean: Any, rest: Any, inputs: PyTree, share: Array
) -> PyTree:
    """The mean over earlier batches, moved towards the next one by its share of the examples."""
    module = nnx.merge(graph, mean, rest)
    module(inputs) if call is None else call(module, inputs)
    value = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    return running_mean(mean, value, share)
