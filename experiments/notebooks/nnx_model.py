# %% [markdown]
# # Perturb-and-Merge on a Flax nnx model
#
# `nnx.split` gives the parameters as a pytree; everything in pm_jax works on it. Here the model is
# trained by its owner's own loop, without perturbation, and pm_jax only merges.

# %%
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import pm_jax
from pm_jax import data, losses, rules, task_vectors, trees


class Network(nnx.Module):
    """Any nnx model will do."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        """Logits of uint8 images."""
        x = images.reshape(images.shape[0], -1) / 255.0
        return self.head(nnx.relu(self.hidden(x)))


model = Network(nnx.Rngs(0))
digits = data.load_digits()
tasks = [digits, data.rotated(digits, 60)]
batches = [pm_jax.Batch(jnp.asarray(t.train_inputs), jnp.asarray(t.train_labels)) for t in tasks]


# %%
@nnx.jit
def train_step(model, optimizer, batch):
    """One step of an ordinary nnx training loop."""

    def loss_fn(model):
        logits = model(batch.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    gradients = nnx.grad(loss_fn)(model)
    optimizer.update(model, gradients)


# %% [markdown]
# ## Train, measure, merge
#
# The state of the model goes in and out of the merge rule as it is; it only has to be a copy, since
# a state shares its variables with the model, which goes on training.


# %%
def snapshot(model):
    """The parameters as they are now."""
    return jax.tree.map(jnp.asarray, nnx.state(model, nnx.Param))


graph, params = nnx.graphdef(model), snapshot(model)
print(trees.match_paths(params, ".*kernel"))


def logits_fn(params, inputs):
    """Logits from a state of parameters."""
    return nnx.merge(graph, params)(inputs)


rule = rules.perturb_and_merge()
fisher = pm_jax.fisher_empirical(losses.cross_entropy(logits_fn))
state = rule.init(params)

for number, batch in enumerate(batches):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for _ in range(150):
        train_step(model, optimizer, batch)
    trained = snapshot(model)
    delta = task_vectors.difference(trained, params)
    found = pm_jax.measure_all(fisher, trained, batch, batch_size=256, direction=delta)
    evidence = rules.Evidence(found.quadratic, found.standard_error)
    params, state, info = rule.update(state, previous=params, trained=trained, evidence=evidence)
    nnx.update(model, params)
    print(f"task {number + 1}: alpha {info.alpha:.3f} +- {info.standard_error:.3f}")

# %% [markdown]
# ## The merged model keeps more of the first task than the trained one


# %%
def accuracy(params, task):
    """Share of a task's test examples classified right."""
    guess = jnp.argmax(logits_fn(params, jnp.asarray(task.test_inputs)), axis=-1)
    return float(jnp.mean(guess == jnp.asarray(task.test_labels)))


for name, candidate in {"trained": trained, "merged": params}.items():
    print(name, [f"{accuracy(candidate, task):.3f}" for task in tasks])

assert accuracy(params, tasks[0]) > accuracy(trained, tasks[0]) + 0.05
