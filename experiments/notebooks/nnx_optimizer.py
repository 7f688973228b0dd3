# %% [markdown]
# # Perturb-and-Merge in an nnx training loop: a module and its `nnx.Optimizer`
#
# Two tasks, the digits upright and turned by 60 degrees. Lines that end in `# <-` are what pm_jax
# adds to an ordinary loop: two for the step and three around a task.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import pm_jax
from pm_jax import data
from pm_jax.integrations import nnx as pm_nnx


class Network(nnx.Module):
    """A convolutional network with batch statistics and dropout, as one writes it."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, images):
        """Logits of uint8 images."""
        x = nnx.relu(self.norm(self.conv(images / 255.0)))
        x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        return self.head(self.dropout(x))


digits = data.load_digits()
tasks = [digits, data.rotated(digits, 60)]


def loss_fn(model, images, labels):
    """The loss of an ordinary loop."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


loss_fn = pm_nnx.perturbed(loss_fn, pm_jax.perturbation.symmetric(epsilon=0.5))  # <-


# %% [markdown]
# ## The step
#
# While the loss runs, the module has displaced parameters; afterwards it has its own again. Dropout
# keys and batch statistics go on as ever. The module and its optimiser are donated: no second copy
# of them is in memory.


# %%
@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model, optimizer, key, base, images, labels):
    """One step."""
    gradients = nnx.grad(loss_fn, argnums=1)(key, model, base, images, labels)  # <-
    optimizer.update(model, gradients)


@nnx.jit
def accuracy(model, images, labels):
    """Share of examples classified right."""
    return jnp.mean(model(images).argmax(-1) == labels)


# %% [markdown]
# ## The tasks, one after the other
#
# `logits_fn` sees the module in evaluation mode, with its running statistics. `finish_task`
# measures the trained module, merges it with the previous model, and leaves the merged model in
# it.

# %%
model = Network(nnx.Rngs(0))
measure = pm_jax.fisher_exact(pm_nnx.logits_fn(model), num_samples=1)  # <-
merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), measure)  # <-
memory = merger.init(pm_nnx.snapshot(model))  # <-
table: dict[str, list[float]] = {}


def test(name):
    """Accuracies on both tasks."""
    model.eval()
    table[name] = [float(accuracy(model, t.test_inputs, t.test_labels)) for t in tasks]
    print(f"  {name}:", " ".join(f"{score:.3f}" for score in table[name]))


for number, task in enumerate(tasks):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    model.train()
    for step in range(150):
        rows = np.random.default_rng([number, step]).integers(len(task.train_labels), size=64)
        images, labels = task.train_inputs[rows], task.train_labels[rows]
        key = jax.random.key(1000 * number + step)
        train_step(model, optimizer, key, memory.start, images, labels)
    test(f"trained on task {number + 1}")
    examples, key = (task.train_inputs, task.train_labels), jax.random.key(number)
    memory, info = pm_nnx.finish_task(merger, memory, model, examples, key)  # <-
    print(f"task {number + 1}: alpha {info.alpha:.3f}")
    test(f"merged after task {number + 1}")

# %% [markdown]
# ## Merging keeps most of both tasks

# %%
figure, axes = plt.subplots(figsize=(6, 2.5))
scores, places = np.array(list(table.values())), np.arange(len(table))
for column in (0, 1):
    axes.barh(places + 0.35 * column, scores[:, column], 0.35, label=f"task {column + 1}")
axes.set(yticks=places + 0.175, yticklabels=list(table), xlim=(0, 1), xlabel="test accuracy")
axes.invert_yaxis()
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
assert table["merged after task 2"][0] > table["trained on task 2"][0] + 0.2
