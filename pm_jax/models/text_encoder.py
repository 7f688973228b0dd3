"""Text encoder of the BERT family: post-norm blocks, exact GELU, mean pooling."""

import flax.linen as nn
import jax.numpy as jnp

from pm_jax.models.attention import chosen
from pm_jax.models.vit import Block, layer_norm
from pm_jax.types import Array


class TextEncoder(nn.Module):
    """BERT encoder with mean pooling over real tokens and a linear classifier.

    Attributes:
        num_classes: C, width of the classifier `head`.
        vocabulary: number of token ids.
        positions: longest text in tokens.
        width: D, the length of a token.
        depth: number of blocks, named `blocks_0`, `blocks_1`, ...
        num_heads: number of heads of every attention; must divide the width.
        mlp_ratio: hidden width of the MLPs over D.
        padding_id: token id of padding, which is neither attended to nor pooled.
        layer_norm_epsilon: number added to the variance in all norms.
        dtype: type of computation; parameters are float32.
        attention: implementation of attention, see `pm_jax.models.attention`. cuDNN's has neither
            forward-mode derivatives nor, in all versions of JAX, those of `jax.vmap`.
        remat: whether the backward pass computes the blocks again, which keeps only their inputs in
            memory and takes a third longer.

    References:
        Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2019

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = TextEncoder(3, vocabulary=50, positions=8, width=8, depth=1, num_heads=2)
        >>> ids = jnp.asarray([[5, 7, 0], [9, 0, 0]])
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), ids)[0].shape
        (2, 3)
    """

    num_classes: int
    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    depth: int = 6
    num_heads: int = 12
    mlp_ratio: float = 4.0
    padding_id: int = 0
    layer_norm_epsilon: float = 1e-12
    dtype: jnp.dtype | None = None
    attention: str = "own"
    remat: bool = False

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Return logits [N, C] for token ids, int [N, T]."""
        mask = ids != self.padding_id
        words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="word_embed")(ids)
        places = nn.Embed(self.positions, self.width, dtype=self.dtype, name="position_embed")
        # BERT marks two sentences of a pair; a text is all of the first kind.
        kinds = nn.Embed(2, self.width, dtype=self.dtype, name="type_embed")
        x = words + places(jnp.arange(ids.shape[1]))[None] + kinds(jnp.zeros_like(ids))
        epsilon, hidden = self.layer_norm_epsilon, int(self.width * self.mlp_ratio)
        x = layer_norm(epsilon, self.dtype, "embed_norm")(x)
        implementation = chosen(self.attention, self.dtype, self.width // self.num_heads)
        # ViT and BERT share the block; they differ in where its norms stand.
        block = nn.remat(Block) if self.remat else Block
        for layer in range(self.depth):
            x = block(
                *(self.num_heads, hidden, epsilon, self.dtype, implementation),
                post_norm=True,
                name=f"blocks_{layer}",
            )(x, mask)
        # Padding does not count; a text of nothing else has the mean 0, not 0 / 0.
        real = mask[:, :, None].astype(x.dtype)
        pooled = jnp.sum(x * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(pooled)
