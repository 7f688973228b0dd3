"""Growth with the number of tasks: memory, checkpoints, time and compilations, task by task.

python -m experiments.benchmarks.many_tasks
python -m experiments.benchmarks.many_tasks --run_rules=perturb_and_merge,magmax

Rotated digits, turned a little more in every task, learned by a small network. The slopes are least
squares over the tasks from the fourth on; beside each stands the growth over 100 tasks, relative
to the mean. Evaluation is of all domains after every task, for the forward transfer; with
--scenario=class_incremental it is of the tasks seen, and grows with them.
"""

import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments import flags as experiment_flags
from experiments.benchmarks.compilations import compilations
from pm_jax.continual import Config, Learner, RunOptions
from pm_jax.continual.merging.records import PHASES
from pm_jax.types import InvalidInput

experiment_flags.define_config_flags()
flags.DEFINE_list("run_rules", ["perturb_and_merge"], "Rules, of each a run.")
flags.DEFINE_integer("every", 10, "Tasks from one line of the table to the next.")

SMALL: dict[str, Any] = {
    **{"num_tasks": 100, "rotation_step": 3.6, "epochs": 1, "first_task_epochs": 1},
    "hidden_sizes": (256, 256),
}
"""Settings of the stream and the model, unless flags say otherwise."""
WARM_UP = 3
MEGABYTE = 1e6


def resident_bytes() -> int:
    """Return this process's memory, or its peak if the system does not say."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class WatchedLearner(Learner):
    """A learner that measures memory, time and compilations after every task, a row each."""

    def run(self) -> dict[str, Any]:
        """Learn all tasks, with the compilations counted."""
        self.rows: list[dict[str, float]] = []
        with compilations() as self._compiled:
            results = super().run()
        self._measure_checkpoint(self.total_steps)
        return results

    def _learn(self, task: int, step: int, *rest: Any) -> None:
        before = self._records.arrays["seconds"].copy()
        counted, clock = len(self._compiled), time.perf_counter()
        super()._learn(task, step, *rest)
        whole = time.perf_counter() - clock
        # The checkpoint of the task before is whole now; this task's is being written.
        self._measure_checkpoint(step)
        spent = dict(zip(PHASES, self._records.arrays["seconds"] - before, strict=True))
        phases = {name: spent[name] for name in ("train", "curvature", "merge", "evaluate")}
        self.rows.append(
            {
                "compilations": len(self._compiled) - counted,
                "resident MB": resident_bytes() / MEGABYTE,
                "device MB": sum(array.nbytes for array in jax.live_arrays()) / MEGABYTE,
                "state MB": _bytes_of(self._saved(None)) / MEGABYTE,
                **{f"{name} s": seconds for name, seconds in phases.items()},
                "rest s": whole - sum(phases.values()),
            }
        )

    def _measure_checkpoint(self, step: int) -> None:
        if self.rows and self.directory:
            files = (self.directory / "checkpoints" / str(step)).rglob("*")
            size = sum(path.stat().st_size for path in files if path.is_file())
            self.rows[-1]["checkpoint MB"] = size / MEGABYTE


def _bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Trend(NamedTuple):
    """A line fitted by least squares to the tasks after the warm-up."""

    mean: float
    slope: float
    error: float


def trends(rows: Sequence[dict[str, float]]) -> dict[str, Trend]:
    """Fit the trend of every figure to rows, one a task: more than the warm-up and two.

    Example:
        >>> trends([{"MB": 9.0}] * 3 + [{"MB": float(size)} for size in (1, 2, 3)])
        {'MB': Trend(mean=2.0, slope=1.0, error=0.0)}
    """
    tasks = np.arange(len(rows) - WARM_UP)
    away = tasks - tasks.mean()
    fitted = {}
    for name in rows[0]:
        values = np.asarray([row[name] for row in rows[WARM_UP:]], np.float64)
        slope = away @ values / (away @ away)
        rest = values - values.mean() - slope * away
        error = np.sqrt(rest @ rest / (len(rest) - 2) / (away @ away))
        fitted[name] = Trend(*map(float, (values.mean(), slope, error)))
    return fitted


def measured(config: Config, directory: Path) -> list[dict[str, float]]:
    """Run a configuration and return the figures of each task."""
    learner = WatchedLearner(config, 0, directory, RunOptions(quiet=True))
    learner.run()
    return learner.rows


def main(argv: Sequence[str]) -> None:
    """Print a table for each rule, and the slopes."""
    del argv
    values = flags.FLAGS
    defaults = {name: value for name, value in SMALL.items() if not values[name].present}
    try:
        configs = [
            experiment_flags.config_from_flags(rule=rule, **defaults) for rule in values.run_rules
        ]
        if configs[0].num_tasks < WARM_UP + 3:
            raise InvalidInput(f"num_tasks={configs[0].num_tasks}: must be at least {WARM_UP + 3}")
        for config in configs:
            with tempfile.TemporaryDirectory() as directory:
                _print(config, measured(config, Path(directory)), values.every)
    except InvalidInput as error:
        experiment_flags.fail(str(error))


def _print(config: Config, rows: Sequence[dict[str, float]], every: int) -> None:
    print(f"{config.rule}, {config.num_tasks} tasks")
    print("task " + "".join(f"{name:>15s}" for name in rows[0]))
    for task, row in enumerate(rows, 1):
        if task <= WARM_UP or task % every == 0:
            print(f"{task:4d} " + "".join(f"{value:15.4f}" for value in row.values()))
    print(f"from task {WARM_UP + 1} on       mean     slope a task       in 100 tasks, of the mean")
    for name, (mean, slope, error) in trends(rows).items():
        share = f"{100 * 100 * slope / mean:8.1f} %" if mean else ""
        print(f"{name:14s}{mean:13.4f}{slope:13.1e} +- {error:.1e}{share}")
    late = sum(row["compilations"] for row in rows[WARM_UP:])
    print(f"compilations after task {WARM_UP}: {late:.0f}", flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
