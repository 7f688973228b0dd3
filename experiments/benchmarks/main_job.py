"""Time and peak memory of the default command, and the cost of importing the library.

The command runs twice: with nothing compiled yet, and with all programs in the cache.

python -m experiments.benchmarks.main_job
"""

import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from absl import app, flags

flags.DEFINE_integer("repeats", 5, "Imports of each kind.")
flags.DEFINE_list("train_flags", [], "Flags for the training command, separated by commas.")

BASE_IMPORT = "import jax, flax.linen, optax, chex"


class Cost(NamedTuple):
    """The costs of a process: wall and processor seconds, seconds to its first line, memory."""

    seconds: float
    processor: float
    first_line: float
    megabytes: float


def run(arguments: Sequence[str]) -> Cost:
    """Run a Python process at a terminal of its own."""
    terminal, of_process = pty.openpty()
    clock = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=of_process
    )
    os.close(of_process)
    first_line, text = float("nan"), b""
    while more := _read(terminal):
        first_line = first_line if text else time.perf_counter() - clock
        text += more
    os.close(terminal)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - clock
    if process.returncode:
        sys.stderr.write(text.decode(errors="replace"))
        raise SystemExit(f"error: {' '.join(arguments)} ended with code {process.returncode}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, first_line, usage.ru_maxrss / 1024)


def _read(terminal: int) -> bytes:
    """Read what a process writes to a terminal, nothing when it has ended."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux ends a terminal so.
        return b""


def main(argv: Sequence[str]) -> None:
    """Print the figures."""
    del argv
    imports: dict[str, list[float]] = {"base": [], "pm_jax": []}
    for _ in range(flags.FLAGS.repeats):
        imports["base"].append(run(["-c", BASE_IMPORT]).seconds)
        imports["pm_jax"].append(run(["-c", f"{BASE_IMPORT}; import pm_jax"]).seconds)
    base, full = (statistics.median(values) for values in imports.values())
    print(f"import pm_jax beyond jax, flax, optax and chex, s  {full - base:8.2f}")
    print("default command                                        cold     warm")
    with tempfile.TemporaryDirectory() as directory:
        command = ["-m", "experiments.train", f"--compilation_cache={directory}/compiled"]
        costs = [
            run([*command, f"--workdir={directory}/{name}", *flags.FLAGS.train_flags])
            for name in ("cold", "warm")
        ]
    names = ("wall s", "processor s", "seconds to the first line", "peak resident MB")
    for name, cold, warm in zip(names, *costs, strict=True):
        print(f"{name:50} {cold:8.1f} {warm:8.1f}")


if __name__ == "__main__":
    app.run(main)
