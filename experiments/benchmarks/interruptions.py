"""Kill the default job at random moments, run it again until it ends, and compare the results.

python -m experiments.benchmarks.interruptions --rounds=20

Each round has several kills: SIGKILL, and SIGTERM as a scheduler sends it. Every result must be
equal to that of the uninterrupted run, to the last bit, but for the seconds.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

flags.DEFINE_integer("rounds", 20, "Runs that are killed.")
flags.DEFINE_integer("kills", 4, "Kills of each run, at most: it may end before.")
flags.DEFINE_integer("seed", 0, "Seed of the moments.")
flags.DEFINE_list(
    "train_flags", ["--checkpoint_every=20"], "Flags of the training command, by commas."
)


def main(argv: Sequence[str]) -> None:
    """Print a line for each round, and how many were equal."""
    del argv
    values = flags.FLAGS
    moments = random.Random(values.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as directory:
        clock = time.perf_counter()
        straight = Path(directory) / "straight"
        _end(_started(straight, values.train_flags))
        seconds, wanted = time.perf_counter() - clock, _results(straight)
        for number in range(1, values.rounds + 1):
            workdir = Path(directory) / f"round_{number}"
            sent = _killed(workdir, values.train_flags, values.kills, seconds, moments)
            same = _results(workdir) == wanted
            equal += same
            print(f"round {number}: {', '.join(sent) or 'no kill in time'}; "
                  f"{'equal' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{equal} of {values.rounds} equal to the uninterrupted run")
    if equal < values.rounds:
        sys.exit(1)


def _killed(
    workdir: Path, arguments: Sequence[str], kills: int, seconds: float, moments: random.Random
) -> list[str]:
    """Run to the end with some kills on the way; return what was sent, and when."""
    sent = []
    for _ in range(kills):
        process = _started(workdir, arguments)
        wanted = moments.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        # Late enough for the run to have begun, and early enough for further kills.
        moment = seconds * moments.uniform(0.2, 0.6)
        try:
            process.wait(moment)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(wanted)
            process.wait()
            sent.append(f"{wanted.name} after {moment:.1f} s")
    _end(_started(workdir, arguments))
    return sent


def _started(workdir: Path, arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen) -> None:
    """Wait for a run that should end well."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"error: training ended with code {process.returncode}: {said[-500:]}")


def _results(workdir: Path) -> dict[str, Any]:
    """Read every results.json below a work directory, without its seconds."""
    contents = {}
    for path in sorted(workdir.rglob("results.json")):
        content = json.loads(path.read_text())
        del content["seconds"]
        contents[path.relative_to(workdir).as_posix()] = content
    return contents


if __name__ == "__main__":
    app.run(main)
