# %% [markdown]
# # One's own model and one's own data in `Learner`
#
# A small ResNet with BatchNorm and Dropout, and tasks that are read example by example, as grain
# and PyTorch read them. `Learner` trains, measures, merges, evaluates and, with a directory,
# saves: there is no loop to write. The binaries take the same model and data as
# `--model=package.module:factory` and `--dataset=package.module:factory`.

# %%
import flax.linen as nn
import matplotlib.pyplot as plt
import numpy as np

from pm_jax import data
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.integrations import linen


class Block(nn.Module):
    """A convolution beside a shortcut."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        """Images [N, H, W, width]."""
        y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(x))
        return x + nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)


class ResNet(nn.Module):
    """A ResNet as one has it: nothing in it knows of pm_jax."""

    num_classes: int
    width: int = 8
    depth: int = 1

    @nn.compact
    def __call__(self, images, train=False):
        """Logits of images scaled to -1..1."""
        x = nn.Conv(self.width, (3, 3))(images)
        for _ in range(self.depth):
            x = Block(self.width)(x, train)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2)).reshape(len(x), -1)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


class Source:
    """Examples one by one, as a source of grain or a data set of PyTorch."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        """Number of examples."""
        return len(self.labels)

    def __getitem__(self, index):
        """One example and its label."""
        return self.images[index], self.labels[index]


# %% [markdown]
# ## The model, the tasks, and the run
#
# A task is a pair of sources, for training and for testing. The wrapper finds the argument by
# which the module learns that it trains, its batch statistics and its dropout; it is told the
# classifier's name.

# %%
digits = data.load_digits()
tasks = []
for angle in (0, 30, 60):
    turned = data.rotated(digits, angle)
    train = Source(turned.train_inputs, turned.train_labels)
    tasks.append((train, Source(turned.test_inputs, turned.test_labels)))

model = linen.model(ResNet(num_classes=10), classifier="classifier")
results = {}
for rule, law in {"sequential": "none", "perturb_and_merge": "symmetric"}.items():
    config = Config(num_tasks=3, epochs=3, first_task_epochs=6, rule=rule, perturbation=law)
    learner = Learner(config, seed=0, options=RunOptions(quiet=True), model=model, stream=tasks)
    results[rule] = learner.run()
    alphas = [round(merge["alpha"], 2) for merge in results[rule]["merges"]]
    print(f"{rule}: alphas {alphas}")

# %% [markdown]
# ## Accuracy on each task after each task

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 3))
for plot, (rule, result) in zip(axes, results.items(), strict=True):
    matrix = 100 * np.array(result["accuracy_matrix"])
    plot.imshow(matrix, vmin=0, vmax=130, cmap="viridis")
    for (row, column), value in np.ndenumerate(matrix):
        plot.text(column, row, f"{value:.0f}", ha="center", va="center", color="white")
    plot.set(title=rule, xlabel="on task", ylabel="after task")
    plot.set(xticks=range(3), xticklabels=(1, 2, 3), yticks=range(3), yticklabels=(1, 2, 3))
    print(f"{rule}: final accuracy {matrix[-1].mean():.0f} %")
figure.tight_layout()
