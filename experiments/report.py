"""Write the report of a finished run, WORKDIR/report.html, and print its path.

python -m experiments.report --workdir=runs/digits
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax.continual.report.report import write_report
from pm_jax.continual.settings.settings import SPLITS
from pm_jax.types import InvalidInput


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flag; an import must not, because experiments.train has the same one."""
    flags.DEFINE_string("workdir", None, "Work directory of a run of experiments.train.", values)
    flags.DEFINE_enum(
        "evaluate_on",
        None,
        SPLITS,
        "Split whose accuracies are shown; by default the one that the run was started with.",
        values,
    )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Write the report."""
    del argv
    with experiment_flags.exits(values):
        if not values.workdir:
            raise InvalidInput("workdir=: needs that of a run, as --workdir=runs/digits")
        try:
            print(write_report(Path(values.workdir), values.evaluate_on))
        except ImportError:
            raise InvalidInput(
                "the report needs matplotlib, which is not installed; pip install 'pm_jax[plots]'"
            ) from None


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=experiment_flags.parse)
