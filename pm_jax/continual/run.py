"""Runs of a configuration for several seeds, beside a baseline, and what a run would do."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pm_jax import lora, trees
from pm_jax.continual.learner import Learner
from pm_jax.continual.merging import landscape
from pm_jax.continual.merging.programs import StreamShape, initial_rule_state, programs_of
from pm_jax.continual.merging.records import seconds_since
from pm_jax.continual.placement import processes
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.report.results import read_seeds, summarize_seeds, view
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.groups import listed
from pm_jax.continual.settings.own import model_of
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.storage import manifest, reuse
from pm_jax.continual.storage.logs import check_tensorboard
from pm_jax.continual.storage.progress import waiting
from pm_jax.continual.storage.provenance import environment, provenance
from pm_jax.continual.storage.workdir import (
    RESULTS_FILE,
    SUMMARY_FILE,
    check_claim,
    claim,
    locked,
    write_json,
)
from pm_jax.continual.training import own_model
from pm_jax.continual.training.initial_model import (
    blank_example,
    is_built_in,
    kernel_pattern,
    parameter_shapes,
    partitions,
    remarks,
)
from pm_jax.continual.training.partition import Partition
from pm_jax.continual.training.text_columns import check_text_columns

FINISHED_FILES = (RESULTS_FILE, landscape.FILE)


def run_seeds(
    config: Config, seeds: Sequence[int], workdir: Path, options: RunOptions = RunOptions()
) -> dict[str, Any]:
    """Run a configuration for some seeds, go on where an earlier call ended, and summarize them.

    Raises:
        InvalidInput: settings that do not fit, or a work directory of something else.
        TrainingDiverged: the loss is no longer finite.
        Interrupted: a request to end came; the same call goes on from there.
    """
    reuse.check_branch(config, seeds)
    claim(workdir, config)
    # The first process makes the directory, which the others then read.
    processes.wait_for_all("claimed")
    with locked(workdir):
        _check_finished(workdir, config)
        for number, seed in enumerate(seeds):
            directory = workdir / f"seed_{seed}"
            if (directory / RESULTS_FILE).exists():
                # An earlier process may have been killed before it listed what it had written.
                manifest.cover(directory, *FINISHED_FILES)
                if not options.quiet and processes.is_first():
                    place = directory / RESULTS_FILE
                    print(f"seed {seed}: already finished, see {place}", flush=True)
                continue
            # Before the learner is made: loading data and models is part of the time.
            clock = time.perf_counter()
            of_seed = dataclasses.replace(
                options,
                runs_before=options.runs_before + number,
                runs_in_all=max(options.runs_in_all, len(seeds)),
            )
            with waiting(
                f"reading data, compiling; {of_seed.title(config.rule, seed)}", options.quiet
            ):
                learner = Learner(config, seed, directory, of_seed)
            _run_seed(learner, directory, clock)
        processes.wait_for_all("finished")
        summary = summarize_seeds(workdir, config.evaluate_on)
        with manifest.covering(workdir, SUMMARY_FILE):
            write_json(workdir / SUMMARY_FILE, summary)
    return summary


def _check_finished(workdir: Path, config: Config) -> None:
    """Check that the finished seeds of a work directory can be shown; raises `InvalidInput`."""
    for content in read_seeds(workdir):
        view(content, split=config.evaluate_on)


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
    """Note the length of the run and its origin, after the origins of its earlier processes."""
    earlier = manifest.read_or_empty(directory).about.get("made_with", [])
    now = provenance(learner.config)
    # One entry for each change of versions or devices, not for each continued process.
    made_with = earlier if earlier[-1:] == [now] else [*earlier, now]
    manifest.note(directory, total_steps=learner.total_steps, made_with=made_with)
    manifest.uncover(directory, *FINISHED_FILES)


def check_runs(runs: Mapping[Path, Config], seeds: Sequence[int], options: RunOptions) -> None:
    """Check runs by their work directories, before any of them starts; raises `InvalidInput`."""
    for directory, config in runs.items():
        check_claim(directory, config)
        _check_finished(directory, config)
        reuse.check_branch(config, seeds)
    if options.tensorboard:
        check_tensorboard()


def check_matrices(config: Config, seed: int) -> None:
    """Check that a rule that looks at matrices finds its own in the model.

    Of several runs the later ones would otherwise fail after the first have trained.

    Raises:
        InvalidInput: it does not, or the settings do not fit the data or the model.
    """
    if config.merge_rule.needs.parts:
        describe(config, seed)


def run_with_baseline(
    config: Config,
    baseline: Config | None,
    seeds: Sequence[int],
    workdir: Path,
    options: RunOptions = RunOptions(),
) -> dict[str, dict[str, Any]]:
    """Run a configuration and, in `workdir/baseline`, its baseline; return summaries by label.

    Raises:
        InvalidInput: as `run_seeds`; no run has started then.
        TrainingDiverged: as `run_seeds`.
        Interrupted: as `run_seeds`.
    """
    runs = {config.rule: (workdir, config)}
    if baseline:
        differing = [
            f"{name}={getattr(baseline, name)}"
            for name in ("learning_rate", "epochs")
            if getattr(baseline, name) != getattr(config, name)
        ]
        label = f"{baseline.rule} ({', '.join(['baseline', *differing])})"
        runs[label] = workdir / "baseline", baseline
    check_runs(dict(runs.values()), seeds, options)
    with waiting("checking that the rules suit the model", options.quiet):
        for _, settings in runs.values():
            check_matrices(settings, seeds[0])
    return {
        label: run_seeds(
            settings,
            seeds,
            directory,
            dataclasses.replace(
                options, runs_before=number * len(seeds), runs_in_all=len(runs) * len(seeds)
            ),
        )
        for number, (label, (directory, settings)) in enumerate(runs.items())
    }


def describe(config: Config, seed: int = 0) -> str:
    """Describe in lines what a run would do: settings, tasks, and what trains and merges.

    Raises:
        InvalidInput: settings that do not fit the data or the model.
    """
    devices_of(config)  # for its errors
    stream = config.task_stream(seed)
    model = model_of(config, stream.num_classes)
    form = (stream.num_classes, stream.inputs.shape[1:])
    if not is_built_in(model):
        # Compiled once for the run that follows; a model of the user's own is looked at as a whole.
        lessons = stream.together() if config.merge_rule.needs.tasks_at_once else stream
        training = programs_of(config, StreamShape.of(lessons), model).training
        name = own_model.name_of(model, config.model)
        own_model.check_values(name, *training.init_with_state(jax.random.key(seed)))
    shapes = parameter_shapes(config, *form, model=model, input_dtype=str(stream.inputs.dtype))
    blank = blank_example(config, form[1], str(stream.inputs.dtype))
    if config.has_text_columns:
        check_text_columns(config, stream.class_names)
    first, later = partitions(config, shapes, model, None if is_built_in(model) else blank)
    # For its errors.
    leaves = trees.select(shapes, later.merging)
    jax.eval_shape(functools.partial(initial_rule_state, config.merge_rule), leaves)
    total = lora.count(shapes)

    def size(paths: Sequence[str]) -> int:
        return lora.count(trees.select(shapes, tuple(paths)))

    make = functools.partial(later.fresh_adapters, rank=config.lora_rank)
    adapters = lora.count(jax.eval_shape(make, jax.random.key(0), shapes))

    def trained(task: int, partition: Partition) -> int:
        if not config.moves(task):
            return size(partition.head) if config.trains(task) else 0
        return (adapters if partition.adapted else 0) + size(partition.direct + partition.head)

    lines = [
        *listed(config),
        f"tasks: {stream.num_tasks}, training examples {stream.train.sizes.tolist()}, validation "
        f"{stream.validation.sizes.tolist()}, test {stream.test.sizes.tolist()}",
        *(f"data: {note}" for note in stream.notes),
        f"parameters: {total}",
        f"training in the first task: {trained(0, first)}",
        f"training in a later task: {trained(1, later)} (adapters {adapters})",
        f"merging: {size(later.merging)}",
    ]
    if later.adapted:
        pattern = kernel_pattern(config, shapes, model)
        lines += [f"adapted by {pattern!r}:", *(f"  {p}" for p in later.adapted)]
    return "\n".join(lines + remarks(config))
