"""Vision transformer: pre-norm blocks, exact GELU, class token, learned positions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
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


class Attention(nn.Module):
    """Multi-head self-attention with separate `query`, `key`, `value` and `proj` layers."""

    num_heads: int
    dtype: jnp.dtype | None = None
    implementation: str = "own"

    @nn.compact
    def __call__(self, x: Array, real: Array | None = None) -> Array:
        """Map [N, T, D] to [N, T, D], attending to the `real` tokens, see `attend`."""
        width = x.shape[-1]
        heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = attend(query, key, value, real, self.implementation)
        return nn.Dense(width, dtype=self.dtype, name="proj")(mixed.reshape(x.shape))


class MlpBlock(nn.Module):
    """Two dense layers, `fc1` (of the hidden size) and `fc2`, with exact GELU between them."""

    hidden_size: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [N, T, D] to [N, T, D]."""
        hidden = nn.Dense(self.hidden_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(gelu(hidden))


class Block(nn.Module):
    """Transformer block: `norm1`, `attn`, `norm2`, `mlp`, with residual connections."""

    num_heads: int
    mlp_size: int
    layer_norm_epsilon: float
    dtype: jnp.dtype | None = None
    attention: str = "own"
    # Norms after the residual sums, as in BERT, instead of before the layers.
    post_norm: bool = False

    @nn.compact
    def __call__(self, x: Array, real: Array | None = None) -> Array:
        """Map [N, T, D] to [N, T, D], attending to the `real` tokens, see `attend`."""

        def norm(name: str, inputs: Array) -> Array:
            return layer_norm(self.layer_norm_epsilon, self.dtype, name)(inputs)

        attention = Attention(self.num_heads, self.dtype, self.attention, name="attn")
        mlp = MlpBlock(self.mlp_size, self.dtype, name="mlp")
        if self.post_norm:
            x = norm("norm1", x + attention(x, real))
            return norm("norm2", x + mlp(x))
        x = x + attention(norm("norm1", x), real)
        return x + mlp(norm("norm2", x))


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

    References:
        Dosovitskiy et al., `An Image is Worth 16x16 Words
        <https://arxiv.org/abs/2010.11929>`_, 2021

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

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return logits [N, C] for images [N, H, W, channels]."""
        if self.image_size and images.shape[1:3] != (self.image_size, self.image_size):
            shape = (images.shape[0], self.image_size, self.image_size, images.shape[-1])
            images = jax.image.resize(images, shape, "bicubic")
        # A convolution whose windows do not overlap, as a product: GPUs run that faster.
        x = nn.DenseGeneral(self.width, axis=(-3, -2, -1), dtype=self.dtype, name="patch_embed")(
            patches(images, self.patch_size)
        )
        class_token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        start = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([start, x], axis=1)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        implementation = chosen(self.attention, self.dtype, self.width // self.num_heads)
        x, real = self._padded(x, implementation)
        block = nn.remat(Block) if self.remat else Block
        hidden, epsilon = int(self.width * self.mlp_ratio), self.layer_norm_epsilon
        for layer in range(self.depth):
            name = f"blocks_{layer}"
            x = block(self.num_heads, hidden, epsilon, self.dtype, implementation, name=name)(
                x, real
            )
        x = layer_norm(epsilon, self.dtype, "norm")(x[:, 0])
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)

    def _padded(self, x: Array, implementation: str) -> tuple[Array, Array | None]:
        """Pad tokens [N, T, D]; the numbers of real ones, [N], are `None` where all are."""
        count, tokens, _ = x.shape
        extra = -tokens % (self.pad_tokens or (8 if implementation == "cudnn" else 1))
        if not extra:
            return x, None
        # The name tells those who look for it in the traced program that there is padding.
        x = checkpoint_name(jnp.pad(x, ((0, 0), (0, extra), (0, 0))), PADDING)
        return x, jnp.full(count, tokens, jnp.int32)
