"""CLIP's two towers, which map images and texts to unit vectors of one space.

The logits of an image are its products with the vectors of texts, times a scale. A classifier of
such columns needs no training: `pm_jax.classifiers.text_columns` makes it.

References:
    Radford et al., `Learning Transferable Visual Models From Natural Language Supervision
    <https://arxiv.org/abs/2103.00020>`_, ICML 2021
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax.models.attention import chosen
from pm_jax.models.vit import Block, gelu, is_half, layer_norm, padded, patches
from pm_jax.types import Array

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of red, green and blue, in 0..1, of the images that OpenAI trained CLIP on."""


def quick_gelu(x: Array) -> Array:
    """Apply OpenAI's approximation of GELU, `x sigmoid(1.702 x)`, computed in float32."""
    return jax.checkpoint(_quick_gelu)(x) if is_half(x.dtype) else _quick_gelu(x)


def _quick_gelu(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
"""Activations by the names that configs of public models have for them."""


class ClipImageTower(nn.Module):
    """CLIP's image tower with a linear classifier of its unit vectors.

    Attributes:
        num_classes: C, width of the classifier `head`.
        patch_size: side of a square patch in pixels; must divide both sides of the image.
        image_size: side in pixels that images are resized to, bicubically; `None` to leave them as
            they are.
        width: the length of a token.
        depth: number of blocks, named `blocks_0`, `blocks_1`, ...
        num_heads: number of heads of every attention; must divide the width.
        mlp_size: hidden width of the MLPs.
        embedding: D, the length of the unit vectors, which the classifier reads.
        activation: a key of `ACTIVATIONS`.
        layer_norm_epsilon: number added to the variance in all norms.
        pixel_mean: mean by channel of pixels in 0..1, which is subtracted.
        pixel_deviation: their deviation, which the difference is divided by.
        dtype: type of computation; parameters, unit vectors and logits are float32.
        attention: as for `VisionTransformer`.
        pad_tokens: as for `VisionTransformer`.
        remat: as for `VisionTransformer`.

    Example:
        >>> model = ClipImageTower(10, patch_size=4, width=8, depth=1, num_heads=2, mlp_size=16)
        >>> images = jnp.ones((3, 8, 8, 3))
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
        (3, 10)
    """

    num_classes: int
    patch_size: int = 16
    image_size: int | None = None
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    embedding: int = 512
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_deviation: tuple[float, ...] = PIXEL_DEVIATION
    dtype: jnp.dtype | None = None
    attention: str = "own"
    pad_tokens: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return logits [N, C] for images [N, H, W, 3] whose pixels lie in -1..1."""
        if self.image_size and images.shape[1:3] != (self.image_size, self.image_size):
            shape = (images.shape[0], self.image_size, self.image_size, images.shape[-1])
            images = jax.image.resize(images, shape, "bicubic")
        # All models of pm_jax get pixels in -1..1; CLIP was trained with its own mean and spread.
        mean, deviation = (
            jnp.asarray(x)[None, None, None] for x in (self.pixel_mean, self.pixel_deviation)
        )
        images = ((images + 1.0) / 2.0 - mean) / deviation
        x = nn.DenseGeneral(
            self.width, axis=(-3, -2, -1), use_bias=False, dtype=self.dtype, name="patch_embed"
        )(patches(images, self.patch_size))
        class_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        start = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([start, x], axis=1)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = layer_norm(self.layer_norm_epsilon, self.dtype, "norm_pre")(
            x + positions.astype(x.dtype)
        )
        implementation = chosen(self.attention, self.dtype, self.width // self.num_heads)
        x, real = padded(x, self.pad_tokens, implementation)
        x = _blocks(self, x, real, implementation, self.remat)
        x = layer_norm(self.layer_norm_epsilon, self.dtype, "norm")(x[:, 0])
        x = nn.Dense(self.embedding, use_bias=False, dtype=self.dtype, name="projection")(x)
        # In float32, because columns of texts are long: the scale, about 100, multiplies rounding.
        return nn.Dense(self.num_classes, name="head")(unit(x))


class ClipTextTower(nn.Module):
    """CLIP's text tower: causal attention, and the vector at the end of the text.

    Attributes:
        vocabulary: number of token ids.
        positions: longest text in tokens.
        width: the length of a token.
        depth: number of blocks, named `blocks_0`, `blocks_1`, ...
        num_heads: number of heads of every attention; must divide the width.
        mlp_size: hidden width of the MLPs.
        embedding: D, the length of the unit vectors.
        activation: a key of `ACTIVATIONS`.
        layer_norm_epsilon: number added to the variance in all norms.
        dtype: type of computation; parameters and unit vectors are float32.

    Example:
        >>> model = ClipTextTower(50, positions=8, width=8, depth=1, num_heads=2, mlp_size=16)
        >>> ids = jnp.asarray([[48, 7, 49, 0], [48, 9, 3, 49]])
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), ids)[0].shape
        (2, 512)
    """

    vocabulary: int = 49408
    positions: int = 77
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_size: int = 2048
    embedding: int = 512
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Return unit vectors [N, D] of token ids, int [N, T], among which the end's is highest."""
        tokens = ids.shape[1]
        words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="word_embed")(ids)
        places = nn.Embed(self.positions, self.width, dtype=self.dtype, name="position_embed")
        x = words + places(jnp.arange(tokens))[None]
        # No token sees those behind it, so that padding behind the end changes nothing.
        earlier = jnp.tril(jnp.ones((1, tokens, tokens), bool))
        # Texts are few: the tower makes the columns of a classifier once.
        x = _blocks(self, x, earlier, "own", remat=False)
        x = layer_norm(self.layer_norm_epsilon, self.dtype, "norm")(x)
        end = jnp.take_along_axis(x, jnp.argmax(ids, axis=1)[:, None, None], axis=1)[:, 0]
        return unit(
            nn.Dense(self.embedding, use_bias=False, dtype=self.dtype, name="projection")(end)
        )


def _blocks(
    tower: ClipImageTower | ClipTextTower,
    x: Array,
    real: Array | None,
    implementation: str,
    remat: bool,
) -> Array:
    """Apply the blocks of a tower, from within its `__call__`, to tokens [N, T, width]."""
    block = nn.remat(Block) if remat else Block
    for layer in range(tower.depth):
        x = block(
            *(tower.num_heads, tower.mlp_size, tower.layer_norm_epsilon),
            *(tower.dtype, implementation),
            activation=ACTIVATIONS[tower.activation],
            name=f"blocks_{layer}",
        )(x, real)
    return x


def unit(x: Array) -> Array:
    """Divide vectors [N, D] by their norms, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
