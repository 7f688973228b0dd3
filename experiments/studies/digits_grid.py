"""Every arm at its own best learning rate and epochs, chosen on validation data; then tested.

One grid for all arms. An arm's setting is the one with the highest mean final average accuracy on
the validation split over the seeds; test data is read only after that, for that setting alone.

python -m experiments.studies.digits_grid --workdir=runs/digits_grid
python -m experiments.studies.digits_grid --workdir=runs/digits_grid_classes \
    --scenario=class_incremental
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax.continual.run import run_seeds, table

ARMS: dict[str, dict[str, Any]] = {
    "perturb_and_merge": {"rule": "perturb_and_merge", "perturbation": "symmetric"},
    "perturb_and_merge with exact Fisher": {"curvature": "fisher_exact"},
    "perturb_and_merge unperturbed": {"perturbation": "none"},
    "averaging": {"rule": "averaging", "perturbation": "none"},
    "averaging perturbed": {"rule": "averaging", "perturbation": "symmetric"},
    "sequential": {"rule": "sequential", "perturbation": "none"},
}

experiment_flags.define_config_flags()
experiment_flags.define_tuple("seeds", (0, 1, 2), "One run per seed.")
experiment_flags.define_tuple("learning_rates", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "Of the grid.")
experiment_flags.define_tuple("grid_epochs", (1, 3, 9), "Epochs a task, of the grid.")
flags.DEFINE_list("arms", list(ARMS), "Arms to run.")
flags.DEFINE_string("workdir", "runs/digits_grid", "Where the runs go; finished ones are kept.")


def main(argv: Sequence[str]) -> None:
    """Run the grid, choose, test, and print two tables."""
    del argv
    values = flags.FLAGS
    workdir, seeds = Path(values.workdir), values.seeds
    workdir.mkdir(parents=True, exist_ok=True)
    base = experiment_flags.config_from_flags()
    validated, tested = {}, {}
    for arm in values.arms:
        if arm not in ARMS:
            experiment_flags.fail(f"arms={arm}: must be one of {', '.join(ARMS)}")
        folder = workdir / arm.replace(" ", "_")
        found = {}
        for rate, epochs in itertools.product(values.learning_rates, values.grid_epochs):
            config = dataclasses.replace(
                base, **ARMS[arm], learning_rate=rate, epochs=epochs, evaluate_on="validation"
            )
            cell = folder / f"rate_{rate:g}_epochs_{epochs}"
            found[config] = run_seeds(config, seeds, cell, quiet=True)
            validated[f"{arm}, rate {rate:g}, {epochs} epochs"] = found[config]
        best = max(found, key=lambda config: found[config]["final_average_accuracy"]["mean"])
        chosen = dataclasses.replace(best, evaluate_on="test")
        label = f"{arm} (learning_rate={best.learning_rate:g}, epochs={best.epochs})"
        tested[label] = run_seeds(chosen, seeds, folder / "test", quiet=True)
    print("Validation\n" + table(validated))
    print("\nTest, at each arm's best validation setting\n" + table(tested))


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
