# %% [markdown]
# # Perturb-and-Merge on a Flax linen model, by hand
#
# Two tasks, the digits upright and turned by 60 degrees. Every piece is a pure function of pm_jax;
# nothing here needs its training binary.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import pm_jax
from pm_jax import data, losses, perturbation, rules, task_vectors


class Network(nn.Module):
    """Any linen model will do."""

    @nn.compact
    def __call__(self, images):
        """Logits of uint8 images."""
        x = images.reshape(images.shape[0], -1) / 255.0
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


model = Network()
digits = data.load_digits()
tasks = [digits, data.rotated(digits, 60)]


def examples(inputs, labels):
    """A batch of all examples."""
    return pm_jax.Batch(jnp.asarray(inputs), jnp.asarray(labels))


# %% [markdown]
# ## Train with perturbation
#
# `perturbed` turns a loss into one that is taken at a random point along the task vector, the
# displacement from `base`. It stays one forward and one backward pass.


# %%
def logits_fn(params, inputs):
    """Logits as the loss sees them."""
    return model.apply({"params": params}, inputs)


loss_fn = losses.mean(losses.cross_entropy(logits_fn))
law = perturbation.symmetric(epsilon=0.5)
perturbed_loss = pm_jax.perturbed(loss_fn, law)
optimizer = optax.adam(3e-3)


@jax.jit
def train(key, base, batch):
    """200 full-batch steps from `base`."""

    def step(carry, step_key):
        params, state = carry
        gradient = jax.grad(perturbed_loss, argnums=1)(step_key, params, base, batch)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    start = (base, optimizer.init(base))
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, 200))
    return params


@jax.jit
def accuracy(params, batch):
    """Share of examples classified right."""
    return jnp.mean(jnp.argmax(logits_fn(params, batch.inputs), axis=-1) == batch.labels)


# %% [markdown]
# ## Measure what each task leaves behind, and merge
#
# A merge rule is a pair of functions, like an optax transformation.

# %%
rule = rules.perturb_and_merge()
fisher = pm_jax.fisher_empirical(losses.cross_entropy(logits_fn))
params = model.init(jax.random.key(0), tasks[0].train_inputs[:1])["params"]
state = rule.init(params)

for number, task in enumerate(tasks):
    batch = examples(task.train_inputs, task.train_labels)
    trained = train(jax.random.key(number + 1), params, batch)
    delta = task_vectors.difference(trained, params)
    found = pm_jax.measure_all(fisher, trained, batch, batch_size=256, direction=delta)
    evidence = rules.Evidence(found.quadratic, found.standard_error)
    params, state, info = rule.update(state, previous=params, trained=trained, evidence=evidence)
    print(f"task {number + 1}: alpha {info.alpha:.3f} +- {info.standard_error:.3f}")

# %% [markdown]
# ## What the perturbation adds to the loss: `E[s^2] / 2` times the curvature along the task vector

# %%
hessian = pm_jax.hessian(losses.cross_entropy(logits_fn))
along = pm_jax.measure_all(hessian, trained, batch, batch_size=256, direction=delta).along
print(f"perturbation of task 2 adds {pm_jax.curvature_weight(law) * along:.4f} to the loss")

# %% [markdown]
# ## Compare: the last trained model has forgotten the first task, the merged one less so

# %%
tests = [examples(task.test_inputs, task.test_labels) for task in tasks]
for name, candidate in {"trained": trained, "merged": params}.items():
    print(name, [f"{float(accuracy(candidate, test)):.3f}" for test in tests])

kept = [float(accuracy(candidate, tests[0])) for candidate in (trained, params)]
assert kept[1] > kept[0] + 0.05, "merging must keep more of the first task"
