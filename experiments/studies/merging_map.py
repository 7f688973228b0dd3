r"""Where merging pays: final accuracy over sequential training against steps, rate and temperature.

Every cell runs each of the rules from the same seed with the same setting and nothing chosen, so
it reads test data (or what --evaluate_on says). Finished runs are kept.

python -m experiments.studies.merging_map --workdir=runs/map --preset=clinc150_10_minilm_study \
    --data_dir=DIR --pretrained=DIR/model.safetensors
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import compiled_programs
from experiments import flags as experiment_flags
from pm_jax.continual import RunOptions
from pm_jax.continual.run import run_seeds
from pm_jax.types import InvalidInput

REFERENCE = "sequential"
RULES: dict[str, dict[str, Any]] = {
    REFERENCE: {"rule": "sequential", "perturbation": "none"},
    "averaging": {"rule": "averaging", "perturbation": "none"},
    "merge only": {"rule": "perturb_and_merge", "perturbation": "none"},
    "perturb and merge": {"rule": "perturb_and_merge"},
}

experiment_flags.define_config_flags()
compiled_programs.define_flag()
experiment_flags.define_tuple("seeds", (0,), "One run per seed.")
experiment_flags.define_tuple("map_epochs", (2, 8), "Epochs a task, of the map.")
experiment_flags.define_tuple("learning_rates", (3e-4, 1e-3, 3e-3), "Learning rates of the map.")
experiment_flags.define_tuple("temperatures", (1.0, 28.0), "Temperatures of the map.")
flags.DEFINE_list("rules", list(RULES), f"Rules to run, of {', '.join(RULES)}.")
flags.DEFINE_string("workdir", "runs/merging_map", "Where the runs go; finished ones are kept.")


def main(argv: Sequence[str]) -> None:
    """Run all cells; print one line for each as soon as it is there."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        base = experiment_flags.config_from_flags()
        for rule in values.rules:
            if rule not in RULES:
                raise InvalidInput(f"rules={rule}: must be one of {', '.join(RULES)}")
        experiment_flags.check_seeds("seeds", values.seeds)
        grid = itertools.product(values.map_epochs, values.learning_rates, values.temperatures)
        cells = [
            dataclasses.replace(base, epochs=epochs, learning_rate=rate, temperature=temperature)
            for epochs, rate, temperature in grid
        ]
        steps = base.task_stream(0).train.sizes.max() / base.batch_size
        rest = [rule for rule in values.rules if rule != REFERENCE]
        print(f"Final accuracy on {base.evaluate_on} data, percent\n")
        print(f"| steps a task | rate | temperature | {REFERENCE} | {' | '.join(rest)} |")
        print("|---" * (4 + len(rest)) + "|", flush=True)
        for cell in cells:
            epochs, rate, temperature = cell.epochs, cell.learning_rate, cell.temperature
            where = Path(values.workdir) / f"epochs_{epochs}_rate_{rate:g}_temp_{temperature:g}"
            accuracies = {}
            for rule in (REFERENCE, *rest):
                config = dataclasses.replace(cell, **RULES[rule])
                directory = where / rule.replace(" ", "_")
                summary = run_seeds(config, values.seeds, directory, RunOptions(quiet=True))
                accuracies[rule] = 100 * summary["final_average_accuracy"]["mean"]
            gains = " | ".join(f"{accuracies[rule] - accuracies[REFERENCE]:+.1f}" for rule in rest)
            head = f"| {round(epochs * steps)} | {rate:g} | {temperature:g} "
            print(f"{head}| {accuracies[REFERENCE]:.1f} | {gains} |", flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
