# %% [markdown]
# # Merging for a target: weights of tasks from its labels or its features
#
# Two tasks, the digits 0-4 and 5-9, and a target with nine of ten labels from the first. Tunable
# MAGMAX gives a task a share of the parameters; `rules.preferences` computes the shares.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pm_jax
from pm_jax import data, losses, rules


class Network(nn.Module):
    """Any linen model will do."""

    @nn.compact
    def __call__(self, images):
        """Logits of uint8 images, and the hidden features."""
        x = images.reshape(images.shape[0], -1) / 255.0
        features = nn.relu(nn.Dense(64, use_bias=False)(x))
        return nn.Dense(10, use_bias=False)(features), features


model, optimizer = Network(), optax.adam(3e-3)
apply = jax.jit(model.apply)
loss_fn = losses.mean(losses.cross_entropy(lambda p, x: apply({"params": p}, x)[0]))


@jax.jit
def train(params, batch):
    """100 full-batch steps."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, 100)[0][0]


def examples(inputs, labels, chosen):
    """A batch of the chosen examples."""
    return pm_jax.Batch(jnp.asarray(inputs[chosen]), jnp.asarray(labels[chosen]))


# %% [markdown]
# ## A pre-trained model, a model for each task, and the target

# %%
digits = data.load_digits()
turned = data.rotated(digits, 30)
start = model.init(jax.random.key(0), turned.train_inputs[:1])["params"]
start = train(start, examples(turned.train_inputs, turned.train_labels, ...))
class_masks = np.arange(10) // 5 == np.arange(2)[:, None]
inputs, labels = digits.train_inputs, digits.train_labels
tasks = [examples(inputs, labels, mask[labels]) for mask in class_masks]
models = [train(start, task) for task in tasks]

first, second = (np.flatnonzero(mask[digits.test_labels]) for mask in class_masks)
skewed = np.append(first, second[: len(first) // 9])
target = examples(digits.test_inputs, digits.test_labels, skewed)

# %% [markdown]
# ## Weights from the target's labels, or from features where it has none

# %%
*sources, features = [apply({"params": start}, batch.inputs)[1] for batch in [*tasks, target]]
preferences = {
    "equal": (0.5, 0.5),
    "labels": rules.preferences.label_counts(target.labels, class_masks),
    "cosine": rules.preferences.from_features("cosine", sources, features),
    "mmd": rules.preferences.from_features("mmd", sources, features),
}
accuracies = {}
for name, preference in preferences.items():
    rule = rules.tunable_magmax(scale=1.0, preference=preference, max_tasks=2)
    state, update = rule.init(start), jax.jit(rule.update)
    for number, trained in enumerate(models):
        evidence = rules.Evidence(key=jax.random.key(number))
        merged, state, info = update(state, previous=start, trained=trained, evidence=evidence)
    logits, _ = apply({"params": merged}, target.inputs)
    accuracies[name] = float(jnp.mean(logits.argmax(axis=-1) == target.labels))
    print(f"{name} {preference[0]:.2f}, task 2: alpha {info.alpha:.2f}, {accuracies[name]:.3f}")

assert accuracies["labels"] > accuracies["equal"] + 0.03, "the target's labels must pay"
assert preferences["mmd"][0] > 0.9, "nine of ten examples of the target are of task 1"
