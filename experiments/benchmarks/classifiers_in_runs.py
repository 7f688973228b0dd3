"""The cost of several classifiers on one training, over that of one.

python -m experiments.benchmarks.classifiers_in_runs

Whole runs on digits, resized for a ViT-Ti/16, are repeated in one process after a first one that
compiles; a run's seconds are those of training, measuring, merging, classifiers and evaluation. The
bound is 1.15 for five classifiers.
Processor seconds are of all cores, and hardly depend on what else the machine does.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

from absl import app, flags

from experiments.benchmarks.workloads import VIT
from pm_jax.continual import Config, Learner, RunOptions

CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "trained": ("trained",),
    "discriminant": ("discriminant",),
    "five": ("trained", "discriminant", "nearest_mean", "aligned", "ridge"),
    "five and a corrected drift": (
        *("trained", "discriminant", "nearest_mean", "aligned", "ridge"),
        "discriminant:drift_correction=affine",
    ),
}

flags.DEFINE_integer("image_size", 96, "Side of the images in pixels.")
flags.DEFINE_integer("epochs", 10, "Epochs a task.")
flags.DEFINE_integer("num_tasks", 2, "Tasks of the digits' classes.")
flags.DEFINE_integer("train_per_class", 0, "Training images of each class; 0 for all.")
flags.DEFINE_integer("depth", 12, "Blocks of the ViT.")
flags.DEFINE_list("choices", list(CLASSIFIERS), "Which to measure; ratios are to the first.")
flags.DEFINE_integer("repeats", 3, "Runs of each, after one that compiles.")


def costs(
    config: Config, names: Sequence[str], repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Measure the median seconds, processor seconds and seconds for classifiers, by their names."""
    learners = {
        name: Learner(
            dataclasses.replace(config, classifiers=labels), 0, options=RunOptions(quiet=True)
        )
        for name, labels in CLASSIFIERS.items()
        if name in names
    }
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in learners}
    for turn in range(repeats + 1):
        for name, learner in learners.items():
            processor = time.process_time()
            seconds = learner.run()["seconds"]
            if turn:
                spent = time.process_time() - processor
                measured[name].append((sum(seconds.values()), spent, seconds["classifier"]))
    medians = {}
    for name, values in measured.items():
        wall, spent, own = (statistics.median(each) for each in zip(*values, strict=True))
        medians[name] = wall, spent, own
    return medians


def main(argv: Sequence[str]) -> None:
    """Print the seconds of each, and the ratios to one classifier."""
    del argv
    values = flags.FLAGS
    config = dataclasses.replace(
        VIT,
        patch_size=16,
        image_size=values.image_size,
        depth=values.depth,
        epochs=values.epochs,
        first_task_epochs=0,
        num_tasks=values.num_tasks,
        train_per_class=values.train_per_class,
    )
    found = costs(config, values.choices, values.repeats)
    for name, (wall, processor, own) in found.items():
        print(f"{name}: {wall:.1f} s, {processor:.1f} of processors, {own:.2f} for classifiers")
    first, *others = found
    for name in others:
        ratios = [a / b for a, b in zip(found[name], found[first], strict=True)][:2]
        print(f"{name} / {first}: {ratios[0]:.3f}, of processor time {ratios[1]:.3f}")


if __name__ == "__main__":
    app.run(main)
