"""Vision transformer: pre-norm blocks, exact GELU, class token, learned positions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax.types import Array, InvalidInput


def attend(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """Mix values [N, S, heads, H] by scaled dot-product attention, its softmax in float32."""
    # jax.nn.dot_product_attention gives the same, and takes a third longer on a CPU.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    logits = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(query.shape[-1])
    if mask is not None:
        # Finite, so that a row of nothing but padding gives numbers and not NaN.
        logits = jnp.where(mask, logits, -1e30)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.swapaxes(weights @ value, 1, 2)


def gelu(x: Array) -> Array:
    """Apply the exact GELU, computed in float32 through erf."""
    # jax.nn.gelu uses erfc, which is slower on a CPU and keeps more in memory.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


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

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Map [N, T, D] to [N, T, D], attending to tokens where `mask`, bool [N, T], is true."""
        width = x.shape[-1]
        heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        seen = None if mask is None else mask[:, None, None, :]
        mixed = attend(query, key, value, seen)
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
    # Norms after the residual sums, as in BERT, instead of before the layers.
    post_norm: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Map [N, T, D] to [N, T, D], attending to the tokens where `mask` is true."""

        def norm(name: str, inputs: Array) -> Array:
            epsilon = self.layer_norm_epsilon
            return nn.LayerNorm(epsilon=epsilon, dtype=self.dtype, name=name)(inputs)

        attention = Attention(self.num_heads, self.dtype, name="attn")
        mlp = MlpBlock(self.mlp_size, self.dtype, name="mlp")
        if self.post_norm:
            x = norm("norm1", x + attention(x, mask))
            return norm("norm2", x + mlp(x))
        x = x + attention(norm("norm1", x), mask)
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
        for layer in range(self.depth):
            hidden, epsilon = int(self.width * self.mlp_ratio), self.layer_norm_epsilon
            x = Block(self.num_heads, hidden, epsilon, self.dtype, name=f"blocks_{layer}")(x)
        x = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x[:, 0])
