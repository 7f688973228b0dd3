"""Vision transformer: pre-norm blocks, exact GELU, a class token or the mean of the patches."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pm_jax.curvature.dense_layers import PADDING
from pm_jax.models.attention import attend, chosen
from pm_jax.types import Array, InvalidInput


def gelu(x: Array) -> Array:
    """Apply the exact GELU, computed in float32 through erf."""
    # The backward pass computes it again from x: to keep float32 would triple what is kept of x.
    return jax.checkpoint(_gelu)(x) if is_half(x.dtype) else _gelu(x)


def _gelu(x: Array) -> Array:
    # jax.nn.gelu uses erfc, which is slower on a CPU and keeps more in memory.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def layer_norm(epsilon: float, dtype: jnp.dtype | None, name: str) -> nn.Module:
    """Make a layer norm, computed in float32, that keeps no float32 for the backward pass."""
    kind = nn.remat(nn.LayerNorm) if is_half(dtype) else nn.LayerNorm
    return kind(epsilon=epsilon, dtype=dtype, name=name)


def is_half(dtype: jnp.dtype | None) -> bool:
    """Tell whether a type is narrower than float32, which `None` stands for."""
    return dtype is not None and jnp.dtype(dtype).itemsize < 4


def patches(images: Array, side: int) -> Array:
    """Cut images [N, H, W, channels] into squares [N, patches, side, side, channels], row by row.

    Raises:
        InvalidInput: the side does not divide the image.
    """
    count, height, width, channels = images.shape
    if height % side or width % side:
        raise InvalidInput(
            f"patch_size={side}: must divide the image of {height} x {width} pixels; resize it, or "
            "choose another size"
        )
    cut = images.reshape(count, height // side, side, width // side, side, channels)
    return jnp.swapaxes(cut, 2, 3).reshape(count, -1, side, side, channels)


def turns(grid: tuple[int, int], prefix: int, extra: int, head_size: int) -> np.ndarray:
    """Return the angles by which DINOv3 turns queries and keys, [T, head_size / 2].

    Each row has the angles of its patch's place in the image, from -1 to 1 along each side, in
    radians at rising periods; those of the tokens before and after the patches are 0.

    Args:
        grid: rows and columns of patches.
        prefix: number of tokens before the patches.
        extra: number of tokens after them.
        head_size: length of a query of one head, a multiple of 4.
    """
    centers = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
    places = np.stack(np.meshgrid(*centers, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    periods = ROTARY_BASE ** (np.arange(head_size // 4) * 4 / head_size)
    angles = (2 * np.pi * places / periods).reshape(len(places), -1)
    return np.pad(angles, ((prefix, extra), (0, 0))).astype(np.float32)


def turned(x: Array, angles: Array) -> Array:
    """Turn the pairs of entries i and i + H / 2 of x [N, T, heads, H] by angles [T, H / 2]."""
    cosine, sine = (part(angles)[None, :, None].astype(x.dtype) for part in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def padded(x: Array, pad_tokens: int, implementation: str) -> tuple[Array, Array | None]:
    """Pad tokens [N, T, D] as `VisionTransformer.pad_tokens` says.

    The second result is the numbers of real tokens, int32 [N]; `None` where all are real.
    """
    count, tokens, _ = x.shape
    extra = -tokens % (pad_tokens or (8 if implementation == "cudnn" else 1))
    if not extra:
        return x, None
    # The name tells those who look for it in the traced program that there is padding.
    x = checkpoint_name(jnp.pad(x, ((0, 0), (0, extra), (0, 0))), PADDING)
    return x, jnp.full(count, tokens, jnp.int32)


class Attention(nn.Module):
    """Multi-head self-attention with separate `query`, `key`, `value` and `proj` layers."""

    num_heads: int
    dtype: jnp.dtype | None = None
    implementation: str = "own"

    @nn.compact
    def __call__(self, x: Array, real: Array | None = None, angles: Array | None = None) -> Array:
        """Map [N, T, D] to [N, T, D], attending to the `real` tokens, see `attend`.

        With `angles`, see `turns`, queries and keys are turned, and keys have no bias.
        """
        width = x.shape[-1]
        heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (
            nn.Dense(width, use_bias=angles is None or name != "key", dtype=self.dtype, name=name)(
                x
            ).reshape(heads)
            for name in ("query", "key", "value")
        )
        if angles is not None:
            query, key = turned(query, angles), turned(key, angles)
        mixed = attend(query, key, value, real, self.implementation)
        return nn.Dense(width, dtype=self.dtype, name="proj")(mixed.reshape(x.shape))


class MlpBlock(nn.Module):
    """Two dense layers, `fc1` (of the hidden size) and `fc2`, with an activation between them."""

    hidden_size: int
    dtype: jnp.dtype | None = None
    activation: Callable[[Array], Array] = gelu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [N, T, D] to [N, T, D]."""
        hidden = nn.Dense(self.hidden_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(self.activation(hidden))


class LayerScale(nn.Module):
    """Factors `gamma`, one for each entry of a token, which begin at one value."""

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [N, T, D] to [N, T, D]."""
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma.astype(x.dtype)[None, None]


class Block(nn.Module):
    """Transformer block: `norm1`, `attn`, `norm2`, `mlp`, with residual connections."""

    num_heads: int
    mlp_size: int
    layer_norm_epsilon: float
    dtype: jnp.dtype | None = None
    attention: str = "own"
    # Norms after the residual sums, as in BERT, instead of before the layers.
    post_norm: bool = False
    # Initial value of the factors `ls1` and `ls2` of what a pre-norm block adds; 0 for none.
    layer_scale: float = 0.0
    activation: Callable[[Array], Array] = gelu

    @nn.compact
    def __call__(self, x: Array, real: Array | None = None, angles: Array | None = None) -> Array:
        """Map [N, T, D] to [N, T, D]; for `real` and `angles` see `Attention`."""

        def norm(name: str, inputs: Array) -> Array:
            return layer_norm(self.layer_norm_epsilon, self.dtype, name)(inputs)

        attention = Attention(self.num_heads, self.dtype, self.attention, name="attn")
        mlp = MlpBlock(self.mlp_size, self.dtype, self.activation, name="mlp")
        if self.post_norm:
            x = norm("norm1", x + attention(x, real))
            return norm("norm2", x + mlp(x))
        x = x + self._scaled("ls1", attention(norm("norm1", x), real, angles))
        return x + self._scaled("ls2", mlp(norm("norm2", x)))

    def _scaled(self, name: str, x: Array) -> Array:
        return LayerScale(self.layer_scale, name=name)(x) if self.layer_scale else x


ROTARY_BASE = 100.0
"""The longest period of DINOv3's rotary positions, in half sides of the image."""
POSITIONS = ("learned", "rotary")
"""Positions of a `VisionTransformer`: an embedding of each, or DINOv3's turning of queries and keys
by the place of their patch, in which keys have no bias."""
POOLINGS = ("class_token", "mean", "mean_norm")
"""The features of a `VisionTransformer`: the class token after the norm; without a class token the
mean of the patches after the norm, or the norm of their mean (`fc_norm`)."""


def _for_each(x: Array, tokens: Array) -> Array:
    """Repeat learned tokens [1, T, D] for each example of x [N, P, D], in its type."""
    return jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape[1:]))


class VisionTransformer(nn.Module):
    """ViT classifier; module names follow the public checkpoints of timm.

    Attributes:
        num_classes: C, width of the classifier `head`.
        patch_size: side of a square patch in pixels; must divide both sides of the image.
        image_size: side in pixels that images are resized to, bicubically; `None` to leave them as
            they are.
        width: D, the length of a token.
        depth: number of blocks, named `blocks_0`, `blocks_1`, ...
        num_heads: number of heads of every attention; must divide the width.
        mlp_ratio: hidden width of the MLPs over D.
        layer_norm_epsilon: 1e-6 for timm's and AugReg's weights, 1e-12 for transformers'.
        dtype: type of computation; parameters are float32.
        attention: implementation of attention, see `pm_jax.models.attention`. cuDNN's has neither
            forward-mode derivatives nor, in all versions of JAX, those of `jax.vmap`.
        pad_tokens: multiple that the number of tokens is padded to; 0 for none but with cuDNN's
            attention, which needs an even number and gets a multiple of 8. Outputs and gradients
            do not depend on it. The inputs of layers have rows of padding, so that measures which
            count rows, as `input_moment`, refuse it.
        remat: whether the backward pass computes the blocks again, which keeps only their inputs in
            memory and takes a third longer.
        registers: number of learned tokens after the class token that have no position and are read
            by the other tokens only.
        layer_scale: initial value of learned factors, one for each entry of what a layer adds to
            the tokens, as DINOv2's 1e-5; 0 for none.
        pooling: one of `POOLINGS`, the features that the classifier reads.
        positions: one of `POSITIONS`. Rotary ones need heads of a multiple of 4 numbers.

    References:
        Dosovitskiy et al., `An Image is Worth 16x16 Words
        <https://arxiv.org/abs/2010.11929>`_, 2021
        Darcet et al., `Vision Transformers Need Registers
        <https://arxiv.org/abs/2309.16588>`_, 2024
        Simeoni et al., `DINOv3 <https://arxiv.org/abs/2508.10104>`_, 2025

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = VisionTransformer(10, patch_size=2, width=8, depth=1, num_heads=2)
        >>> images = jnp.ones((3, 8, 8, 1))
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
        (3, 10)
    """

    num_classes: int
    patch_size: int = 16
    image_size: int | None = None
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    layer_norm_epsilon: float = 1e-6
    dtype: jnp.dtype | None = None
    attention: str = "own"
    pad_tokens: int = 0
    remat: bool = False
    registers: int = 0
    layer_scale: float = 0.0
    pooling: str = "class_token"
    positions: str = "learned"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return logits [N, C] for images [N, H, W, channels].

        Raises:
            InvalidInput: the pooling or the positions are unknown, or the heads do not fit them.
        """
        self._check_options()
        if self.image_size and images.shape[1:3] != (self.image_size, self.image_size):
            shape = (images.shape[0], self.image_size, self.image_size, images.shape[-1])
            images = jax.image.resize(images, shape, "bicubic")
        # A convolution whose windows do not overlap, as a product: GPUs run that faster.
        x = nn.DenseGeneral(self.width, axis=(-3, -2, -1), dtype=self.dtype, name="patch_embed")(
            patches(images, self.patch_size)
        )
        x = self._with_prefix(x)
        tokens = x.shape[1]
        implementation = chosen(self.attention, self.dtype, self.width // self.num_heads)
        x, real = padded(x, self.pad_tokens, implementation)
        angles = self._angles(images.shape[1:3], tokens, x.shape[1])
        block = nn.remat(Block) if self.remat else Block
        hidden, epsilon = int(self.width * self.mlp_ratio), self.layer_norm_epsilon
        for layer in range(self.depth):
            x = block(
                *(self.num_heads, hidden, epsilon, self.dtype, implementation),
                layer_scale=self.layer_scale,
                name=f"blocks_{layer}",
            )(x, real, angles)
        x = self._pooled(x, tokens)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)

    def _check_options(self) -> None:
        for name, known in (("pooling", POOLINGS), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise InvalidInput(
                    f"{name}={getattr(self, name)}: must be one of {', '.join(known)}"
                )
        if self.positions == "rotary" and self.width // self.num_heads % 4:
            raise InvalidInput(
                f"positions=rotary: needs heads of a multiple of 4 numbers, and these have "
                f"{self.width // self.num_heads}; change width={self.width} or "
                f"num_heads={self.num_heads}"
            )

    def _angles(self, sides: tuple[int, ...], tokens: int, padded: int) -> Array | None:
        """Return the angles of rotary positions, [T, H / 2]; `None` without."""
        if self.positions != "rotary":
            return None
        grid = sides[0] // self.patch_size, sides[1] // self.patch_size
        prefix = tokens - grid[0] * grid[1]
        head_size = self.width // self.num_heads
        return jnp.asarray(turns(grid, prefix, padded - tokens, head_size))

    def _with_prefix(self, x: Array) -> Array:
        """Put class token and registers before patches [N, P, D]; add positions if learned."""
        has_class = self.pooling == "class_token"
        if has_class:
            class_token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([_for_each(x, class_token), x], axis=1)
        if self.positions == "learned":
            positions = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
            x = x + positions.astype(x.dtype)
        if self.registers:
            shape = (1, self.registers, self.width)
            registers = self.param("reg_token", nn.initializers.normal(1e-6), shape)
            first = int(has_class)
            x = jnp.concatenate([x[:, :first], _for_each(x, registers), x[:, first:]], axis=1)
        return x

    def _pooled(self, x: Array, tokens: int) -> Array:
        """Turn the first so many tokens of [N, T, D] into features [N, D]."""
        norm = layer_norm(
            self.layer_norm_epsilon,
            self.dtype,
            "fc_norm" if self.pooling == "mean_norm" else "norm",
        )
        if self.pooling == "class_token":
            return norm(x[:, 0])
        patches_only = x[:, self.registers : tokens]
        if self.pooling == "mean":
            return jnp.mean(norm(patches_only), axis=1)
        return norm(jnp.mean(patches_only, axis=1))
