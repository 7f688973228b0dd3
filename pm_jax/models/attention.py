"""Attention in three implementations, of which each platform has its fastest.

`own` is plain products, the fastest on a CPU; `cudnn` is NVIDIA's fused kernel, for bfloat16 and
float16; `xla` is what JAX computes elsewhere, on TPUs and in float32 on GPUs. `auto` chooses.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pm_jax.types import Array, InvalidInput

IMPLEMENTATIONS = ("auto", "own", "xla", "cudnn")


def chosen(attention: str, dtype: Any, head_size: int) -> str:
    """Choose the implementation for the default backend.

    Args:
        attention: one of `IMPLEMENTATIONS`.
        dtype: type of the computation; `None` for float32.
        head_size: length of a query of one head.

    Raises:
        InvalidInput: no implementation of that name, or one that does not run here.

    Example:
        >>> chosen("own", jnp.float32, 64)
        'own'
    """
    if attention not in IMPLEMENTATIONS:
        raise InvalidInput(f"attention={attention}: must be one of {', '.join(IMPLEMENTATIONS)}")
    lacking = _lacking_for_cudnn(jnp.dtype(dtype or jnp.float32), head_size)
    if attention == "cudnn" and lacking:
        raise InvalidInput(f"attention=cudnn: {lacking}; own and xla run here, and auto chooses")
    if attention != "auto":
        return attention
    if lacking:
        return "own" if jax.default_backend() == "cpu" else "xla"
    return "cudnn"


def _lacking_for_cudnn(dtype: jnp.dtype, head_size: int) -> str:
    """Say why cuDNN's attention cannot run here; empty if it can."""
    if not _has_cudnn():
        backend = jax.default_backend()
        return f"needs an NVIDIA GPU of the year 2020 or later, and this is a {backend}"
    if dtype.itemsize != 2:
        return f"computes in bfloat16 or float16, and compute_dtype is {dtype.name}"
    if head_size % 8 or head_size > 128:
        return f"needs heads of a multiple of 8 numbers, 128 at most, and these have {head_size}"
    return ""


def _has_cudnn() -> bool:
    device = jax.local_devices()[0]
    # ROCm's devices are GPUs too; the kernel needs the tensor cores of Ampere.
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return is_cuda and float(device.compute_capability) >= 8.0


def attend(
    query: Array,
    key: Array,
    value: Array,
    real: Array | None = None,
    implementation: str = "own",
) -> Array:
    """Mix values by scaled dot-product attention, `softmax(q k^T / sqrt(H)) v` in each head.

    The softmax is computed in float32.

    Args:
        query: [N, T, heads, H].
        key: likewise.
        value: likewise.
        real: the keys that are attended to, bool [N, T]; or their numbers, int32 [N], where they
            come first; or, for all but cuDNN, those of each query, bool [N or 1, T, T]; `None` for
            all.
        implementation: a result of `chosen`.

    Returns:
        [N, T, heads, H], in the values' type.

    Example:
        >>> ones, values = jnp.ones((1, 2, 1, 4)), jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1)
        >>> attend(ones, ones, values)[0, :, 0, 0].tolist()
        [0.5, 0.5]
        >>> attend(ones, ones, values, jnp.asarray([1]))[0, :, 0, 0].tolist()
        [0.0, 0.0]
    """
    if implementation == "cudnn":
        return _cudnn(query, key, value, real)
    mask = None if real is None else _mask(real, key.shape[1])
    if implementation == "xla":
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
    return _own(query, key, value, mask)


def _mask(real: Array, tokens: int) -> Array:
    """The mask [N, 1, 1 or T, T] of the keys that are attended to."""
    if real.ndim == 1:
        real = jnp.arange(tokens)[None] < real[:, None]
    return real[:, None] if real.ndim == 3 else real[:, None, None, :]


def _own(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    # jax.nn.dot_product_attention gives the same, and takes a third longer on a CPU.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    logits = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(query.shape[-1])
    if mask is not None:
        # Finite, so that a row of nothing but padding gives numbers and not NaN.
        logits = jnp.where(mask, logits, -1e30)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.swapaxes(weights @ value, 1, 2)


def _cudnn(query: Array, key: Array, value: Array, real: Array | None) -> Array:
    count, tokens = query.shape[:2]
    if tokens % 2:
        # The backward pass takes even numbers of tokens only.
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
        if real is None:
            real = jnp.full(count, tokens, jnp.int32)
        elif real.ndim == 2:
            real = jnp.pad(real, ((0, 0), (0, 1)))
    lengths = mask = None
    if real is not None and real.ndim == 1:
        lengths = real
    elif real is not None:
        # A full mask, because cuDNN takes it as a bias of the logits.
        mask = jnp.broadcast_to(_mask(real, key.shape[1]), (count, 1, *[key.shape[1]] * 2))
    mixed = jax.nn.dot_product_attention(
        query, key, value, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return mixed[:, :tokens]


def plain(module: Any) -> Any:
    """Make a module of the same numbers that can be looked into and differentiated forward.

    Its layers see no tokens of padding, its blocks are computed once, and its attention is not
    cuDNN's. A module that is so here is returned itself, with which it shares compiled programs.

    Args:
        module: a `VisionTransformer`, a `TextEncoder` or a `ClipImageTower`.
    """
    # cuDNN's attention is never chosen for float32.
    forward = "auto" if module.attention == "cudnn" else module.attention
    attention = chosen(forward, jnp.float32, module.width // module.num_heads)
    pad_tokens = getattr(module, "pad_tokens", 1)
    now = chosen(module.attention, module.dtype, module.width // module.num_heads)
    if now == attention and not module.remat and pad_tokens < 2:
        return module
    unpadded = {"pad_tokens": 1} if hasattr(module, "pad_tokens") else {}
    return module.clone(attention=attention, remat=False, **unpadded)
