"""Say what a work directory holds, and whether every file in it is as it was saved.

python -m experiments.inspect runs/digits

Ends with code 1 where something is damaged or missing.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from absl import app

from experiments import flags as experiment_flags
from pm_jax.continual.report import inspection
from pm_jax.types import InvalidInput


def main(argv: Sequence[str]) -> int:
    """Print what is found."""
    with experiment_flags.exits():
        if len(argv) != 2:
            raise InvalidInput("DIR: is missing; name one, as experiments.inspect runs/digits")
        found = inspection.inspect(Path(argv[1]))
    print(found.text())
    return 1 if found.damaged else 0


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(experiment_flags.parse, positional=1))
