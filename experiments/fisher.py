r"""Measure the diagonal Fisher of a fine-tuned model, as a file for experiments.merge --fishers.

python -m experiments.fisher --model=vit_tiny_patch16 --pretrained=tuned.safetensors \
    --dataset=cifar100 --scenario=class_incremental --num_tasks=1 --output=fisher.safetensors
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax.continual import fisher_file
from pm_jax.continual.storage.progress import waiting
from pm_jax.types import InvalidInput

experiment_flags.define_config_flags()
experiment_flags.define_overwrite_flag()
flags.DEFINE_string("output", None, "Name of the .safetensors file to write.")
flags.DEFINE_integer("seed", 0, "Seed of the labels that are drawn, and of the examples held out.")


def main(argv: Sequence[str]) -> None:
    """Check everything, then measure and say what was written."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        if not values.output:
            raise InvalidInput("output=: needs a .safetensors file")
        experiment_flags.check_seeds("seed", (values.seed,))
        config, output = experiment_flags.config_from_flags(), Path(values.output)
        fisher_file.check(config, output, overwrite=values.overwrite)
        with waiting("reading data, compiling, measuring"):
            line = fisher_file.write_fisher(config, values.seed, output, overwrite=values.overwrite)
        print(line)


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
