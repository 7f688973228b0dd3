r"""Every arm at its own best learning rate and epochs, chosen on validation data; then tested.

One grid for all arms. An arm's setting is the one with the highest mean final average accuracy on
the validation split over the grid's seeds; test accuracies, which the same runs have measured, are
looked at only after that, for that setting alone. Finished runs are kept: the same command goes on
where it was interrupted.

python -m experiments.studies.ablation --workdir=runs/digits_grid --grid_epochs=1,3,9
python -m experiments.studies.ablation --workdir=runs/digits_grid_classes --grid_epochs=1,3,9 \
    --scenario=class_incremental
python -m experiments.studies.ablation --workdir=runs/clinc150 --preset=clinc150_10_minilm_study \
    --data_dir=DIR --pretrained=DIR/model.safetensors
python -m experiments.studies.ablation --workdir=runs/digits_grid --grid_epochs=1,3,9 --arms=all
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments import compiled_programs
from experiments import flags as experiment_flags
from pm_jax import rules
from pm_jax.continual import Config, RunOptions
from pm_jax.continual.report.results import read_seeds, summarize, table, view
from pm_jax.continual.run import run_seeds
from pm_jax.types import InvalidInput

ARMS: dict[str, dict[str, Any]] = {
    "sequential": {"rule": "sequential", "perturbation": "none"},
    "averaging": {"rule": "averaging", "perturbation": "none"},
    "averaging perturbed": {"rule": "averaging"},
    "merge only": {"perturbation": "none"},
    "merge with Gaussian noise": {"perturbation": "gaussian"},
    "perturb and merge": {},
    "perturb and merge per example": {"perturb_per": "example"},
    "perturb and merge with exact Fisher": {"curvature": "fisher_exact"},
}
"""Arms about perturbation and coefficient; every other rule, not perturbed, is an arm too."""
DEFAULT_ARMS = [arm for arm in ARMS if "Gaussian" not in arm and "per example" not in arm]
ARMS |= {
    rule: {"rule": rule, "perturbation": "none"}
    for rule in rules.REGISTRY
    if rule not in (*ARMS, "perturb_and_merge")
}

experiment_flags.define_config_flags()
compiled_programs.define_flag()
experiment_flags.define_tuple("seeds", (0, 1, 2), "One run per seed.")
experiment_flags.define_tuple("grid_seeds", (), "Seeds of the grid; empty for all.", int)
experiment_flags.define_tuple(
    "learning_rates", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "Learning rates of the grid."
)
experiment_flags.define_tuple(
    "grid_epochs", (), "Epochs a task, of the grid; empty for --epochs.", int
)
flags.DEFINE_list("arms", DEFAULT_ARMS, f"Arms to run, of {', '.join(ARMS)}; or all.")
flags.DEFINE_string("workdir", "runs/ablation", "Where the runs go; finished ones are kept.")


def results_of(directory: Path, seeds: Sequence[int], split: str) -> list[dict[str, Any]]:
    """Read the results of some seeds of a work directory, with the figures of a split."""
    return [view(found, split=split) for found in read_seeds(directory) if found["seed"] in seeds]


def alphas(results: Sequence[dict[str, Any]]) -> str:
    """Average the merge coefficients of the tasks over the seeds."""
    by_seed = [[merge["alpha"] for merge in result["merges"]] for result in results]
    return " ".join(f"{value:.2f}" for value in np.mean(np.asarray(by_seed, float), axis=0))


def main(argv: Sequence[str]) -> None:
    """Run the grid, choose, test, and print the tables."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        base = experiment_flags.config_from_flags()
        arms = [arm for name in values.arms for arm in (ARMS if name == "all" else [name])]
        for arm in arms:
            if arm not in ARMS:
                raise InvalidInput(f"arms={arm}: must be one of {', '.join(ARMS)}, or all")
        if not arms or not values.learning_rates:
            raise InvalidInput("arms and learning_rates need one or more each")
        experiment_flags.check_seeds("seeds", values.seeds)
        experiment_flags.check_seeds("grid_seeds", values.grid_seeds or values.seeds)
        grids = {arm: _grid(dataclasses.replace(base, **ARMS[arm])) for arm in arms}
        _study(grids, Path(values.workdir))


def _grid(config: Config) -> list[Config]:
    """List the settings that an arm is tried with."""
    values = flags.FLAGS
    grid = itertools.product(values.learning_rates, values.grid_epochs or (config.epochs,))
    return [
        dataclasses.replace(config, learning_rate=rate, epochs=epochs, evaluate_on="validation")
        for rate, epochs in grid
    ]


def _study(arms: dict[str, list[Config]], workdir: Path) -> None:
    values = flags.FLAGS
    grid_seeds = values.grid_seeds or values.seeds
    validated, tested, coefficients = {}, {}, []
    for arm, grid in arms.items():
        folder = workdir / arm.replace(" ", "_")
        summaries, directories = {}, {}
        for cell in grid:
            rate, epochs = cell.learning_rate, cell.epochs
            directories[cell] = directory = folder / f"rate_{rate:g}_epochs_{epochs}"
            run_seeds(cell, grid_seeds, directory, RunOptions(quiet=True))
            summaries[cell] = summarize(results_of(directory, grid_seeds, "validation"))
            validated[f"{arm}, rate {rate:g}, {epochs} epochs"] = summaries[cell]
        best = max(summaries, key=lambda cell: summaries[cell]["final_average_accuracy"]["mean"])
        # The seeds of the grid were measured on test data too; only now they are looked at.
        chosen = dataclasses.replace(best, evaluate_on="test")
        run_seeds(chosen, values.seeds, directories[best], RunOptions(quiet=True))
        results = results_of(directories[best], values.seeds, "test")
        label = f"{arm} (learning_rate={best.learning_rate:g}, epochs={best.epochs})"
        tested[label] = summarize(results)
        coefficients.append(f"{arm}: {alphas(results)}")
    print("Validation\n" + table(validated))
    print("\nTest, at each arm's best validation setting\n" + table(tested))
    print("\nMerge coefficients, task by task\n" + "\n".join(coefficients))


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
