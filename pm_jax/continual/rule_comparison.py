"""Runs of several merge rules on the same stream and seeds, in one work directory."""

import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pm_jax.continual.report import comparison
from pm_jax.continual.report.results import read_results
from pm_jax.continual.run import run_seeds
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.storage import branching, manifest
from pm_jax.continual.storage.logs import check_tensorboard
from pm_jax.continual.storage.shared_training import folder_name
from pm_jax.continual.storage.workdir import (
    COMPARISON_FILE,
    RESULTS_FILE,
    check_claim,
    claim,
    write_json,
    write_text,
)
from pm_jax.continual.training.divergence import TrainingDiverged

SHARED_FOLDER = "shared_training"


def run_rules(
    configs: Mapping[str, Config],
    base: Config,
    seeds: Sequence[int],
    workdir: Path,
    options: RunOptions = RunOptions(),
) -> dict[str, list[dict[str, Any]]]:
    """Run each configuration for each seed; what is finished in the work directory is kept.

    Every rule has its own directory, as `run_seeds` leaves it. Training that rules have in common
    is done once and kept in `shared_training`, which may be deleted.

    Args:
        configs: settings by label; a label names the directory below `workdir`.
        base: settings that the comparison is of; its merge rule does not matter.
        seeds: one run each.
        workdir: absent, empty, or of a comparison with the same base.
        options: as for `run_seeds`.

    Returns:
        For each label the contents of `results.json`, in the order of the seeds.

    Raises:
        InvalidInput: as `run_seeds`; nothing has been run then.
        TrainingDiverged: the loss is no longer finite; the message names the rule.
        Interrupted: as `run_seeds`.

    Example:
        >>> import tempfile
        >>> base = Config(num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(8,))
        >>> configs = {"sequential": dataclasses.replace(base, rule="sequential")}
        >>> workdir = Path(tempfile.mkdtemp())
        >>> results = run_rules(configs, base, [0], workdir, RunOptions(quiet=True))
        >>> results["sequential"][0]["config"]["rule"]
        'sequential'
    """
    anything = {name: getattr(Config(), name) for name in ("rule", "rule_settings")}
    owner = dataclasses.replace(base, **anything)
    directories = {label: workdir / urllib.parse.quote(label, safe="+=:") for label in configs}
    check_claim(workdir, owner, COMPARISON_FILE)
    for label, config in configs.items():
        check_claim(directories[label], config)
        branching.check(config, seeds)
    if options.tensorboard:
        check_tensorboard()
    claim(workdir, owner, COMPARISON_FILE)
    for label, config in configs.items():
        try:
            shared = workdir / SHARED_FOLDER / folder_name(config)
            own_options = dataclasses.replace(options, shared=shared)
            run_seeds(config, seeds, directories[label], own_options)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{label}: {error}") from error
    return {
        label: [read_results(directory / f"seed_{seed}" / RESULTS_FILE) for seed in seeds]
        for label, directory in directories.items()
    }


def write_tables(
    rows: Sequence[comparison.Comparison], seeds: Sequence[int], workdir: Path
) -> list[Path]:
    """Write the table as CSV, JSON and LaTeX into the work directory.

    Args:
        rows: of `comparison.compare`.
        seeds: in the order of the rows' figures.
        workdir: where to; earlier tables are replaced.

    Returns:
        The files.

    Example:
        >>> import tempfile
        >>> run = dict.fromkeys(comparison.FIGURES, 0.5) | {"seed": 0, "seconds": {}}
        >>> rows = comparison.compare({"averaging": [run]})
        >>> [path.name for path in write_tables(rows, [0], Path(tempfile.mkdtemp()))]
        ['comparison.csv', 'comparison.json', 'comparison.tex']
    """
    csv, json, latex = (workdir / f"comparison.{kind}" for kind in ("csv", "json", "tex"))
    files = [csv, json, latex]
    records = [
        record | {"over_seeds": row.figures}
        for record, row in zip(comparison.as_records(rows), rows, strict=True)
    ]
    with manifest.covering(workdir, *(path.name for path in files)):
        write_text(csv, comparison.as_csv(rows))
        write_json(json, {"seeds": list(seeds), "rules": records})
        write_text(latex, comparison.as_latex(rows) + "\n")
    return files
