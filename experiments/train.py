"""Train a continual learner: Perturb-and-Merge by default, and a baseline beside it.

python -m experiments.train --workdir=runs/digits --seeds=0,1,2
"""

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import flags as experiment_flags
from experiments import processes
from pm_jax.continual import export
from pm_jax.continual.interruption import StopRequests
from pm_jax.continual.placement.processes import is_first
from pm_jax.continual.report import advice, sentences
from pm_jax.continual.report.report import write_report
from pm_jax.continual.report.results import table
from pm_jax.continual.run import describe, run_with_baseline
from pm_jax.continual.settings.groups import changes
from pm_jax.continual.storage.progress import waiting
from pm_jax.types import InvalidInput

experiment_flags.define_config_flags()
experiment_flags.define_baseline_flags()
experiment_flags.define_export_flags()
experiment_flags.define_run_flags()
processes.define_process_flags()
flags.DEFINE_boolean(
    "keep_task_models",
    False,
    "Keep the models that are merged. branch_from and experiments.merge read them.",
)
flags.DEFINE_boolean(
    "report", True, "Write report.html into the work directory. It needs pip install '.[plots]'."
)
flags.DEFINE_boolean("tour", False, "Run five small examples instead, as preset=tour does.")


def main(argv: Sequence[str]) -> None:
    """Check everything, then train and print the table."""
    del argv
    values = flags.FLAGS
    if values.tour:
        from experiments import tour

        with experiment_flags.exits():
            return tour.run()
    with experiment_flags.exits(), processes.joined("experiments.train"):
        config = experiment_flags.config_from_flags()
        baseline = experiment_flags.baseline_from_flags(config)
        stop = StopRequests()
        options = experiment_flags.options_from_flags(
            stop=stop, keep_task_models=values.keep_task_models
        )
        workdir = Path(values.workdir) if values.workdir else None
        destinations = experiment_flags.export_from_flags()
        export.check(destinations, config, values.seeds, workdir)
        with waiting("reading data, compiling"):
            description = describe(config, values.seeds[0])
        if values.dry_run:
            directories = [workdir, *[workdir / "baseline"] * bool(baseline)] if workdir else []
            beside = f"baseline: {changes(config, baseline)}" if baseline else "baseline: none"
            print(description, beside, sentences.duration(directories, values.seeds), sep="\n")
            return
        if not workdir:
            raise InvalidInput("workdir=: needs a directory, as --workdir=runs/digits")
        if values.report:
            threading.Thread(target=_import_plots).start()
        with stop:
            summaries = run_with_baseline(config, baseline, values.seeds, workdir, options)
        if not is_first():
            return
        if values.report:
            with waiting("writing the report"):
                line = _write_report(workdir, config.evaluate_on)
            print(f"report: {line}")
        lines = [table(summaries), sentences.gain(summaries), sentences.method(summaries)]
        lines += advice.in_short(workdir, values.seeds)
        print(*filter(None, lines), sep="\n")
        export.write(destinations, config, values.seeds[0], workdir)


def _import_plots() -> None:
    """Import what draws the report, while the run waits for the first programs to compile."""
    with contextlib.suppress(ImportError):
        import matplotlib.figure  # noqa: F401


def _write_report(workdir: Path, split: str) -> str:
    try:
        return str(write_report(workdir, split))
    except ImportError:
        return "skipped, matplotlib is not installed; pip install 'pm_jax[plots]'"


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
