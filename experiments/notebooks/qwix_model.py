# %% [markdown]
# # Tasks that qwix adapters train, merged by Perturb-and-Merge
#
# qwix puts low-rank factors beside the kernels of any linen or nnx model; tunix and MaxText
# fine-tune with it. A small model is trained on the upright digits; two tasks follow, the digits
# turned by 40 and by 80 degrees. Lines that end in `# <-` are what pm_jax adds to a loop with qwix.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx

import pm_jax
from pm_jax import data
from pm_jax.integrations import nnx as pm_nnx
from pm_jax.integrations import qwix as pm_qwix


class Network(nnx.Module):
    """Any nnx model will do."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        """Logits of uint8 images."""
        x = images.reshape(len(images), -1) / 255.0
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


digits = data.load_digits()
upright, *tasks = [digits, data.rotated(digits, 40), data.rotated(digits, 80)]
optimizer = optax.adam(3e-3)


def train(step, moving, task, seed, steps=200):
    """Train what moves on a task."""
    state = optimizer.init(moving)
    for number in range(steps):
        rows = np.random.default_rng([seed, number]).integers(len(task.train_labels), size=64)
        gradients = step(
            jax.random.key(number), moving, task.train_inputs[rows], task.train_labels[rows]
        )
        updates, state = optimizer.update(gradients, state)
        moving = optax.apply_updates(moving, updates)
    return moving


def cross_entropy(logits, labels):
    """The loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## A pre-trained model, and the same with factors of qwix

# %%
model = Network(nnx.Rngs(0))
plain_logits = pm_nnx.logits_fn(model)


@jax.jit
def plain_step(key, params, images, labels):
    """The gradient of all parameters."""
    return jax.grad(lambda p: cross_entropy(plain_logits(p, images), labels))(params)


pm_nnx.write_back(model, train(plain_step, pm_nnx.snapshot(model), upright, seed=0))

ALPHA = 8.0
rule = qwix.LoraRule(module_path="first|second", rank=4, alpha=ALPHA)
example = upright.train_inputs[:1]
adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]), example, rngs=nnx.Rngs(1))
graph, *states = nnx.split(adapted, nnx.Param, ...)
params, rest = states


def separated(params):
    """The factors, and all other parameters."""
    return nnx.split_state(params, nnx.LoRAParam, ...)


factors, kernels = separated(params)

# %% [markdown]
# ## The step: the loss at a random point along `alpha / rank A B`


# %%
def loss_fn(factors, kernels, images, labels):
    """The loss of the model with factors."""
    return cross_entropy(nnx.merge(graph, factors, kernels, rest)(images), labels)


loss_fn = pm_qwix.perturbed(loss_fn, pm_jax.perturbation.symmetric(epsilon=0.5))  # <-


@jax.jit
def step(kernels, key, moving, images, labels):
    """The gradient of the factors."""
    return jax.grad(loss_fn, argnums=1)(key, moving, kernels, images, labels)  # <-


# %% [markdown]
# ## The two tasks: fold, merge, and start again from factors of product 0


# %%
@jax.jit
def accuracy(params, images, labels):
    """Share of examples classified right."""
    return jnp.mean(plain_logits(params, images).argmax(-1) == labels)


def test(name, params):
    """Accuracies on both tasks."""
    scores = [float(accuracy(params, t.test_inputs, t.test_labels)) for t in tasks]
    print(f"  {name}:", " ".join(f"{score:.3f}" for score in scores))
    return scores


measure = pm_jax.fisher_exact(plain_logits)  # <-
merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), measure)  # <-
memory = merger.init(pm_nnx.snapshot(model))  # <-
for number, task in enumerate(tasks):
    factors = train(functools.partial(step, kernels), factors, task, seed=number + 1)
    params = nnx.merge_state(factors, kernels)
    trained, examples = pm_qwix.fold(params, ALPHA), (task.train_inputs, task.train_labels)  # <-
    alone = test(f"trained on task {number + 1}", trained)
    merged, memory, info = merger.finish_task(memory, trained, examples)  # <-
    print(f"task {number + 1}: alpha {info.alpha:.3f} +- {info.standard_error:.3f}")
    together = test(f"merged after task {number + 1}", merged)
    params = pm_qwix.restart(params, memory.start, jax.random.key(number))  # <-
    factors, kernels = separated(params)

# %%
assert together[0] > alone[0]
