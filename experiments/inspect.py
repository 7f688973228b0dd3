"""Show the content of a work directory, and whether every file in it is as it was saved.

python -m experiments.inspect runs/digits

The process ends with code 1 if something is damaged or missing.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from absl import app

from experiments import flags as experiment_flags
from pm_jax.continual.report import inspection
from pm_jax.types import InvalidInput


def main(argv: Sequence[str]) -> int:
    """Print the inspection; return 1 if something is damaged."""
    with experiment_flags.exits():
        if len(argv) != 2:
            raise InvalidInput("DIR: is missing; name one, as experiments.inspect runs/digits")
        inspected = inspection.inspect(Path(argv[1]))
    print(inspected.text())
    return 1 if inspected.damaged else 0


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(experiment_flags.parse, positional=1))
