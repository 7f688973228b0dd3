# %% [markdown]
# # Perturb-and-Merge in a linen training loop: `TrainState`, BatchNorm and Dropout
#
# Two tasks, the digits upright and turned by 60 degrees. Lines that end in `# <-` are what pm_jax
# adds to an ordinary loop: three in the step, two at the end of a task.

# %%
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import pm_jax
from pm_jax import data
from pm_jax.integrations.linen import recalibrate_batch_statistics


class Network(nn.Module):
    """A small convolutional network, as one writes it."""

    @nn.compact
    def __call__(self, images, train):
        """Logits of uint8 images."""
        x = nn.Conv(32, (3, 3), use_bias=False)(images / 255.0)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10, name="head")(x)


class TrainState(train_state.TrainState):
    """The usual training state, with batch statistics."""

    batch_stats: Any


model, law = Network(), pm_jax.perturbation.symmetric(epsilon=0.5)
digits = data.load_digits()
tasks = [digits, data.rotated(digits, 60)]


# %% [markdown]
# ## The step
#
# The loss returns its new batch statistics as auxiliary output, and takes a dropout key.
# `perturbed` passes both through, and takes the loss at a random point along the task vector, the
# displacement from `base`, the model that the task started from.


# %%
@jax.jit
def train_step(state, base, images, labels, key):
    """One step."""

    def loss_fn(params, dropout_key):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            *(images, True),
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    law_key, dropout_key = jax.random.split(key)  # <-
    loss_fn = pm_jax.perturbed(loss_fn, law, has_aux=True)  # <-
    gradient_fn = jax.grad(loss_fn, argnums=1, has_aux=True)
    gradients, updates = gradient_fn(law_key, state.params, base, dropout_key)  # <-
    return state.apply_gradients(grads=gradients, **updates)


# %% [markdown]
# ## Measure the model as it predicts
#
# Curvature is that of the model as it predicts: with its running statistics, which are an argument.


# %%
def logits_fn(params, images, batch_stats):
    """Logits of the model as it predicts."""
    return model.apply({"params": params, "batch_stats": batch_stats}, images, False)


measure = pm_jax.fisher_exact(logits_fn, num_samples=1)
merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), measure)


@jax.jit
def accuracy(params, batch_stats, images, labels):
    """Share of examples classified right."""
    return jnp.mean(logits_fn(params, images, batch_stats).argmax(-1) == labels)


# %% [markdown]
# ## The tasks, one after the other
#
# Merged weights have batch statistics of their own: they are measured anew on the task's images.


# %%
@jax.jit
def apply_fn(variables, images):
    """The model as it trains, for its batch statistics."""
    rngs = {"dropout": jax.random.key(0)}
    return model.apply(variables, images, True, rngs=rngs, mutable=["batch_stats"])


table: dict[str, list[float]] = {}


def test(name, params, batch_stats):
    """Accuracies on both tasks."""
    scores = [accuracy(params, batch_stats, t.test_inputs, t.test_labels) for t in tasks]
    table[name] = [float(score) for score in scores]
    print(f"  {name}:", " ".join(f"{score:.3f}" for score in scores))


variables = model.init(jax.random.key(0), tasks[0].train_inputs[:1], True)
params, batch_stats = variables["params"], variables["batch_stats"]
memory = merger.init(params)
for number, task in enumerate(tasks):
    images, labels = task.train_inputs, task.train_labels
    state = TrainState.create(
        apply_fn=model.apply, params=params, batch_stats=batch_stats, tx=optax.adam(3e-3)
    )
    for step in range(150):
        rows = np.random.default_rng([number, step]).integers(len(labels), size=64)
        key = jax.random.key(1000 * number + step)
        state = train_step(state, memory.start, images[rows], labels[rows], key)
    trained, batch_stats = state.params, state.batch_stats
    params, memory, info = merger.finish_task(  # <-
        memory, trained, (images, labels), jax.random.key(number), model_state=batch_stats
    )
    print(f"task {number + 1}: alpha {info.alpha:.3f} +- {info.standard_error:.3f}")
    test("trained", trained, batch_stats)
    test("merged", params, batch_stats)
    variables = {"params": params, "batch_stats": batch_stats}
    variables = recalibrate_batch_statistics(apply_fn, variables, np.array_split(images, 20))  # <-
    batch_stats = variables["batch_stats"]
    test("merged, statistics anew", params, batch_stats)

# %%
assert table["merged, statistics anew"][0] > table["trained"][0]
