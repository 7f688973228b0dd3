# %% [markdown]
# # LoRA-P&M on a ViT as public code writes it: Flax's own attention, kernels [in, heads, size]
#
# A ViT is trained on the upright digits; then two tasks of its own come, the digits turned by 40
# and by 80 degrees, each with fresh low-rank adapters. After each task the adapters are merged
# into the kernels. Lines that end in `# <-` are what changes against a loop that fine-tunes all
# parameters.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pm_jax
from pm_jax import data, lora, trees


class Block(nn.Module):
    """A transformer block."""

    @nn.compact
    def __call__(self, x):
        """Tokens [N, T, D] after attention and a multilayer perceptron."""
        x += nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(96)(nn.LayerNorm()(x)))
        return x + nn.Dense(48)(y)


class ViT(nn.Module):
    """A small ViT over patches of 2 x 2 pixels."""

    @nn.compact
    def __call__(self, images):
        """Logits of uint8 images."""
        x = nn.Conv(48, (2, 2), (2, 2), name="embedding")(images / 255.0)
        x = x.reshape(len(x), -1, 48)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        x = Block(name="block")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(axis=1))


model = ViT()
digits = data.load_digits()
upright, *tasks = [digits, data.rotated(digits, 40), data.rotated(digits, 80)]


def loss_fn(moving, params, images, labels):
    """The loss; the leaves that move are one argument, the whole model is another."""
    whole = trees.replace(params, lora.dense_leaves(moving))
    with lora.branch(moving):  # <-
        logits = model.apply({"params": whole}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## The step
#
# Adapters stand in the place of their kernels. A perturbation along the task vector then scales the
# adapter's branch; no gradient of the size of a kernel is formed.

# %%
law = pm_jax.perturbation.symmetric(epsilon=0.5)
perturbed_loss = pm_jax.perturbed(loss_fn, law)  # <-
optimizer = optax.adam(3e-3)


@jax.jit
def train_step(moving, optimizer_state, key, params, images, labels):
    """One step."""
    base = trees.select(params, tuple(moving))  # <-
    gradient_fn = jax.grad(perturbed_loss, argnums=1)
    gradients = gradient_fn(key, moving, base, params, images, labels)  # <-
    updates, optimizer_state = optimizer.update(gradients, optimizer_state)
    return optax.apply_updates(moving, updates), optimizer_state


def train(moving, params, task, seed, steps=200):
    """Train what moves on a task."""
    optimizer_state = optimizer.init(moving)
    for step in range(steps):
        rows = np.random.default_rng([seed, step]).integers(len(task.train_labels), size=64)
        batch, key = (task.train_inputs[rows], task.train_labels[rows]), jax.random.key(step)
        moving, optimizer_state = train_step(moving, optimizer_state, key, params, *batch)
    return moving


# %% [markdown]
# ## Curvature and merging, in the coordinates of the adapted kernels
#
# The other parameters are the `model_state` of the measure: it reads them, and leaves them alone.


# %%
def logits_fn(kernels, images, params):
    """Logits, as a function of the adapted kernels."""
    return model.apply({"params": trees.replace(params, kernels)}, images)


@jax.jit
def accuracy(params, images, labels):
    """Share of examples classified right."""
    return jnp.mean(logits_fn({}, images, params).argmax(-1) == labels)


params = model.init(jax.random.key(0), upright.train_inputs[:1])["params"]
leaves = trees.leaves_by_path(params)
params = trees.replace(params, train(leaves, params, upright, seed=0, steps=300))

merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(logits_fn))  # <-
pattern = ".*/attention/(query|key|value|out)/kernel"  # <-
kernels = trees.select(params, pattern)
memory = merger.init(kernels)
print(*(f"{path} {kernel.shape}" for path, kernel in kernels.items()), sep="\n")

# %% [markdown]
# ## The two tasks

# %%
table: dict[str, list[float]] = {}


def test(name, params):
    """Accuracies on both tasks."""
    table[name] = [float(accuracy(params, t.test_inputs, t.test_labels)) for t in tasks]
    print(f"  {name}:", " ".join(f"{score:.3f}" for score in table[name]))


test("before", params)
for number, task in enumerate(tasks):
    adapters = lora.init(jax.random.key(number), params, pattern, rank=4)  # <-
    adapters = train(adapters, params, task, seed=number + 1)
    whole = lora.fold(params, adapters)  # <-
    test(f"trained on task {number + 1}", whole)
    trained, examples = trees.select(whole, pattern), (task.train_inputs, task.train_labels)
    kernels, memory, info = merger.finish_task(memory, trained, examples, model_state=params)  # <-
    params = trees.replace(params, kernels)  # <-
    print(f"task {number + 1}: alpha {info.alpha:.3f} +- {info.standard_error:.3f}")
    test(f"merged after task {number + 1}", params)

# %%
assert table["merged after task 2"][0] > table["trained on task 2"][0]
