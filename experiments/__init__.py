"""The commands for users; from a checkout, `python -m experiments.NAME`."""

import sys

# Importing JAX takes more than a second. `python -m` calls the program "-m" until it has found it.
if sys.argv[:1] == ["-m"] and sys.stderr.isatty():
    print("starting ...", file=sys.stderr, flush=True)
