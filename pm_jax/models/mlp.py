"""Multi-layer perceptron."""

import flax.linen as nn
import jax.numpy as jnp

from pm_jax.types import Array


class MLP(nn.Module):
    """Fully connected network with ReLU.

    Attributes:
        num_classes: C, width of the classifier `head`.
        hidden_sizes: width of each hidden layer, named `hidden_0`, `hidden_1`, ...
        dtype: type of computation; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = MLP(num_classes=10, hidden_sizes=(16,))
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))["params"]
        >>> sorted(params)
        ['head', 'hidden_0']
    """

    num_classes: int
    hidden_sizes: tuple[int, ...] = (256, 256)
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Return logits [N, C] for inputs [N, ...]."""
        x = inputs.reshape(inputs.shape[0], -1)
        for layer, width in enumerate(self.hidden_sizes):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden_{layer}")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
