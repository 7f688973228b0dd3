"""A configuration over several seeds: results per seed, their summary, and a table."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pm_jax import lora, trees
from pm_jax.continual.learner import Learner
from pm_jax.continual.merging import landscape
from pm_jax.continual.merging.records import seconds_since
from pm_jax.continual.placement import processes
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.report.results import summarize_seeds
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.storage import branching, manifest
from pm_jax.continual.storage.logs import check_tensorboard
from pm_jax.continual.storage.provenance import environment, provenance
from pm_jax.continual.storage.workdir import (
    RESULTS_FILE,
    SUMMARY_FILE,
    check_claim,
    claim,
    locked,
    write_json,
)
from pm_jax.continual.training.initial_model import parameter_shapes, partitions
from pm_jax.continual.training.partition import Partition

FINISHED_FILES = (RESULTS_FILE, landscape.FILE)


def run_seeds(
    config: Config,
    seeds: Sequence[int],
    workdir: Path,
    options: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Run a configuration for some seeds, going on where an earlier call was interrupted.

    Writes `seed_<n>/results.json` with its checkpoints and logs, and `summary.json` over all seeds
    that are finished in the directory.

    Args:
        config: settings.
        seeds: one run each.
        workdir: absent, empty, or of the same configuration.
        options: what to save, show and share.

    Returns:
        The summary: `{"seeds": [...], metric: {"mean", "standard_deviation", "n"}, ...}`.

    Raises:
        InvalidInput: settings that do not fit, or a work directory of something else.
        TrainingDiverged: the loss is no longer finite.
        Interrupted: a request to end came; the same call goes on from there.

    Example:
        >>> import tempfile
        >>> config = Config(num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(8,))
        >>> summary = run_seeds(config, [0], Path(tempfile.mkdtemp()), RunOptions(quiet=True))
        >>> summary["final_average_accuracy"]["n"]
        1
    """
    branching.check(config, seeds)
    claim(workdir, config)
    processes.wait_for_all("claimed")
    with locked(workdir):
        for seed in seeds:
            directory = workdir / f"seed_{seed}"
            if (directory / RESULTS_FILE).exists():
                manifest.cover(directory, *FINISHED_FILES)  # killed right after they were written
                if not options.quiet and processes.is_first():
                    print(f"seed {seed}: already finished, see {directory / RESULTS_FILE}",
                          flush=True)  # fmt: skip
                continue
            clock = time.perf_counter()
            _run_seed(Learner(config, seed, directory, options), directory, clock)
        processes.wait_for_all("finished")
        summary = summarize_seeds(workdir)
        with manifest.covering(workdir, SUMMARY_FILE):
            write_json(workdir / SUMMARY_FILE, summary)
    return summary


def _run_seed(learner: Learner, directory: Path, clock: float) -> None:
    """Learn all tasks and write the results."""
    _note_start(directory, learner)
    results = learner.run()
    results["seconds"]["this_process"] = seconds_since(clock)
    content = {
        "config": dataclasses.asdict(learner.config),
        "seed": learner.seed,
        **results,
        "manifest": learner.stream.manifest(),
        "environment": environment(),
    }
    with manifest.covering(directory, *FINISHED_FILES):
        if processes.is_first():
            learner.write_landscape(directory)
        write_json(directory / RESULTS_FILE, content)


def _note_start(directory: Path, learner: Learner) -> None:
    """Keep how long the run is and what it is made with, after what it was made with before."""
    earlier = manifest.read_or_empty(directory).about.get("made_with", [])
    now = provenance(learner.config)
    made_with = earlier if earlier[-1:] == [now] else [*earlier, now]
    manifest.note(directory, total_steps=learner.total_steps, made_with=made_with)
    manifest.uncover(directory, *FINISHED_FILES)


def run_with_baseline(
    config: Config,
    baseline: Config | None,
    seeds: Sequence[int],
    workdir: Path,
    options: RunOptions = RunOptions(),
) -> dict[str, dict[str, Any]]:
    """A configuration and, in `workdir/baseline`, another one to compare it with.

    Both directories are checked before either run starts.

    Args:
        config: settings.
        baseline: settings of the second run, or `None`.
        seeds: one run each.
        workdir: as for `run_seeds`.
        options: what to save, show and share.

    Returns:
        `{label: summary}`, the label being the rule's name and what the baseline has of its own.

    Raises:
        InvalidInput: as `run_seeds`.
        TrainingDiverged: the loss is no longer finite.
        Interrupted: as `run_seeds`.

    Example:
        >>> import tempfile
        >>> config = Config(num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(8,))
        >>> options = RunOptions(quiet=True)
        >>> list(run_with_baseline(config, None, [0], Path(tempfile.mkdtemp()), options))
        ['perturb_and_merge']
    """
    runs = {config.rule: (workdir, config)}
    if baseline:
        own = [
            f"{name}={getattr(baseline, name)}"
            for name in ("learning_rate", "epochs")
            if getattr(baseline, name) != getattr(config, name)
        ]
        runs[f"{baseline.rule} ({', '.join(['baseline', *own])})"] = (
            workdir / "baseline",
            baseline,
        )
    for directory, settings in runs.values():
        check_claim(directory, settings)
        branching.check(settings, seeds)
    if options.tensorboard:
        check_tensorboard()
    return {
        label: run_seeds(settings, seeds, directory, options)
        for label, (directory, settings) in runs.items()
    }


def describe(config: Config, seed: int = 0) -> str:
    """What a run would do: resolved settings, tasks, and the parameters that train and merge.

    Args:
        config: settings.
        seed: of the stream described.

    Returns:
        Lines of text.

    Raises:
        InvalidInput: settings that do not fit the data or the model.

    Example:
        >>> "merging parameters: 84042 of 84042" not in describe(Config(hidden_sizes=(8,)))
        True
    """
    devices_of(config)
    stream = config.task_stream(seed)
    shapes = parameter_shapes(config, stream.num_classes, stream.inputs.shape[1:])
    first, later = partitions(config, shapes)
    total = lora.count(shapes)

    def size(paths: Sequence[str]) -> int:
        return lora.count(trees.select(shapes, tuple(paths)))

    kernels = trees.select(shapes, later.adapted)
    adapters = sum(config.lora_rank * sum(kernel.shape) for kernel in kernels.values())

    def trained(partition: Partition) -> int:
        own = adapters if partition.adapted else 0
        return own + size(partition.direct + partition.head)

    lines = [f"{name}={value}" for name, value in dataclasses.asdict(config).items()]
    lines += [
        f"tasks: {stream.num_tasks}, training examples {stream.train.sizes.tolist()}, validation "
        f"{stream.validation.sizes.tolist()}, test {stream.test.sizes.tolist()}",
        f"parameters: {total}",
        f"training in the first task: {trained(first)}",
        f"training in a later task: {trained(later)} (adapters {adapters})",
        f"merging: {size(later.merging)}",
    ]
    if later.adapted:
        lines += [f"adapted by {config.kernel_pattern!r}:", *(f"  {p}" for p in later.adapted)]
    return "\n".join(lines)
