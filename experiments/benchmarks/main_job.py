"""Wall time and peak memory of the default command, and the cost of importing the library.

python -m experiments.benchmarks.main_job
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app, flags

flags.DEFINE_integer("repeats", 5, "Imports of each kind.")
flags.DEFINE_list("train_flags", [], "Flags for the training command, separated by commas.")

BASE_IMPORT = "import jax, flax.linen, optax, chex"


def run(arguments: Sequence[str]) -> tuple[float, float]:
    """Run a Python process; return seconds and peak resident megabytes."""
    clock = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {' '.join(arguments)} ended with code {process.returncode}")
    return time.perf_counter() - clock, usage.ru_maxrss / 1024


def main(argv: Sequence[str]) -> None:
    """Print the figures."""
    del argv
    imports: dict[str, list[float]] = {"base": [], "pm_jax": []}
    for _ in range(flags.FLAGS.repeats):
        imports["base"].append(run(["-c", BASE_IMPORT])[0])
        imports["pm_jax"].append(run(["-c", f"{BASE_IMPORT}; import pm_jax"])[0])
    base, full = (statistics.median(values) for values in imports.values())
    print(f"import pm_jax beyond jax, flax, optax and chex, s  {full - base:8.2f}")
    with tempfile.TemporaryDirectory() as directory:
        command = ["-m", "experiments.train", f"--workdir={directory}/run"]
        seconds, megabytes = run(command + flags.FLAGS.train_flags)
    print(f"default command, wall s                            {seconds:8.1f}")
    print(f"default command, peak resident MB                  {megabytes:8.0f}")


if __name__ == "__main__":
    app.run(main)
