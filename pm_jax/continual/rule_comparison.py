"""Runs of several merge rules on the same stream and seeds, in one work directory."""

import dataclasses
import inspect
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pm_jax import rules
from pm_jax.continual.report import adapting, comparison
from pm_jax.continual.report.results import read_results, view
from pm_jax.continual.run import check_matrices, check_runs, run_seeds
from pm_jax.continual.settings.chosen_classifiers import CORRECTION
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.storage import manifest, reuse
from pm_jax.continual.storage.progress import waiting
from pm_jax.continual.storage.workdir import (
    COMPARISON_FILE,
    RESULTS_FILE,
    check_claim,
    claim,
    write_json,
    write_text,
)
from pm_jax.continual.training.divergence import TrainingDiverged
from pm_jax.types import InvalidInput

SHARED_FOLDER = "shared_training"
OF_TABLE = ("classifiers", CORRECTION, "evaluate_on")
"""Settings that are columns of the table, or choose what it shows, and make no row of their own."""


def configurations(
    base: Config, labels: Sequence[str], curvatures: Sequence[str], parse: Callable[[str, str], Any]
) -> dict[str, Config]:
    """Make the settings of each rule that a comparison names, as `ties+keep=0.1+epochs=9`.

    Classifiers change no training, so every rule has all that any of the labels names, and labels
    that differ in nothing else are one rule.

    Raises:
        InvalidInput: a label with an unknown rule, or with settings that the rule cannot have.
    """
    labels = [part for label in labels for part in (rules.REGISTRY if label == "all" else [label])]
    if not labels:
        raise InvalidInput("rules=: needs one or more, or all")
    if len(curvatures) > 1:
        labels = [part for label in labels for part in _with_curvatures(label, curvatures)]
    configs: dict[str, Config] = {}
    classifiers = dict.fromkeys(base.classifiers)
    for label in labels:
        name, *pairs = label.split("+")
        try:
            settings = _settings_of(name, pairs, parse)
            # The perturbation belongs to that method; other rules are compared as published.
            if name != "perturb_and_merge":
                settings.setdefault("perturbation", "none")
            config = dataclasses.replace(base, rule=name, **settings)
        except InvalidInput as error:
            raise InvalidInput(f"rules={label}: {error}") from None
        if config.evaluate_on != base.evaluate_on:
            raise InvalidInput(
                f"rules={label}: evaluate_on={config.evaluate_on} is for the whole table, which "
                f"shows {base.evaluate_on} data; both are measured: give it as evaluate_on"
            )
        classifiers |= dict.fromkeys(_columns(config, base))
        row = "+".join([name, *(pair for pair in pairs if pair.partition("=")[0] not in OF_TABLE)])
        configs.setdefault(row, config)
    names, correction = tuple(classifiers), base.drift_correction
    return {
        row: dataclasses.replace(config, classifiers=names, drift_correction=correction)
        for row, config in configs.items()
    }


def _columns(config: Config, base: Config) -> list[str]:
    """Return the classifiers of a rule by names that mean the same with the settings of all."""
    if config.drift_correction == base.drift_correction:
        return list(config.classifiers)
    own = f":{CORRECTION}={config.drift_correction}"
    return [
        each.label if CORRECTION in each.label or not each.movable else each.label + own
        for each in config.chosen_classifiers
    ]


def _with_curvatures(label: str, curvatures: Sequence[str]) -> list[str]:
    """Return a rule once for each curvature, if it uses any and its label names none."""
    name, *pairs = label.split("+")
    if name not in rules.REGISTRY:
        return [label]
    needs = rules.make(name).needs
    # A rule that takes one kind only has it in any case.
    takes = "quadratic" in needs.evidence and len(needs.curvatures) != 1
    if not takes or any(pair.startswith("curvature=") for pair in pairs):
        return [label]
    return [f"{label}+curvature={curvature}" for curvature in curvatures]


def _settings_of(
    rule: str, pairs: Sequence[str], parse: Callable[[str, str], Any]
) -> dict[str, Any]:
    """Read `setting=value` after a rule's name; a setting of the rule hides one of the run."""
    of_rule = inspect.signature(rules.REGISTRY[rule]).parameters if rule in rules.REGISTRY else {}
    fields = {field.name for field in dataclasses.fields(Config)} - {"rule", "rule_settings"}
    settings: dict[str, Any] = {}
    rule_settings = []
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name in of_rule or name not in fields:
            rule_settings.append(pair)  # The rule says what is wrong with it.
            continue
        try:
            # A comma would end the label, so the parts of a tuple have colons between them; those
            # of a classifier's own settings stay: ridge:features=500:discriminant.
            settings[name] = parse(name, re.sub(r":(?![^:=]*=)", ",", value))
        except ValueError as error:
            raise InvalidInput(f"{name}={value}: {error}") from None
    return {**settings, "rule_settings": ",".join(rule_settings)}


def run_rules(
    configs: Mapping[str, Config],
    base: Config,
    seeds: Sequence[int],
    workdir: Path,
    options: RunOptions = RunOptions(),
    *,
    keep_shared_training: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Run each configuration for each seed, and return the results by label, one a seed.

    The training that rules have in common is deleted when all are finished, unless it is to be
    kept for rules that another call adds.

    Raises:
        InvalidInput: as `run_seeds`; nothing has been run then.
        TrainingDiverged: the loss is no longer finite; the message names the label.
        Interrupted: as `run_seeds`.
    """
    # The rules differ, so the comparison's directory belongs to the settings without one.
    owner = dataclasses.replace(
        base,
        rule=Config.rule,
        rule_settings=Config.rule_settings,
        classifiers=next(iter(configs.values())).classifiers,
    )
    directories = directories_of(configs, workdir)
    check_claim(workdir, owner, COMPARISON_FILE)
    check_runs({directories[label]: configs[label] for label in configs}, seeds, options)
    with waiting("checking that the rules suit the model", options.quiet):
        for label, config in configs.items():
            try:
                check_matrices(config, seeds[0])
            except InvalidInput as error:
                raise InvalidInput(f"rules={label}: {error}") from None
    claim(workdir, owner, COMPARISON_FILE)
    for number, (label, config) in enumerate(configs.items()):
        try:
            # Rules whose training is the same find it here, under a name made of its settings.
            shared = workdir / SHARED_FOLDER / reuse.training_name(config)
            options = dataclasses.replace(
                options,
                shared=shared,
                label=label,
                runs_before=number * len(seeds),
                runs_in_all=len(configs) * len(seeds),
            )
            run_seeds(config, seeds, directories[label], options)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{label}: {error}") from error
    if not keep_shared_training:
        forget_shared_training(workdir)
    return {
        label: [
            view(
                read_results(directory / f"seed_{seed}" / RESULTS_FILE),
                split=base.evaluate_on,
            )
            for seed in seeds
        ]
        for label, directory in directories.items()
    }


def directories_of(labels: Iterable[str], workdir: Path) -> dict[str, Path]:
    """Return the folder of each label in the directory of a comparison."""
    return {label: workdir / urllib.parse.quote(label, safe="+=:") for label in labels}


def forget_shared_training(workdir: Path) -> None:
    """Delete the training that rules had in common, which no result depends on."""
    shared, leaving = workdir / SHARED_FOLDER, workdir / f"{SHARED_FOLDER}.deleted"
    # A process that was killed may have left half of an earlier deletion.
    shutil.rmtree(leaving, ignore_errors=True)
    if shared.exists():
        # Renamed first: a process that is killed meanwhile leaves no half of it to be used again.
        shared.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def table_of(
    results: Mapping[str, Sequence[Mapping[str, Any]]], configs: Mapping[str, Config]
) -> tuple[list[comparison.Comparison], adapting.Verdict | None]:
    """Return the rows of a comparison, and whether adapting pays, where that can be said."""
    first = next(iter(configs.values()))
    needs = {label: config.merge_rule.needs for label, config in configs.items()}
    split, classifiers = first.evaluate_on, first.classifiers
    bounds = [label for label, one in needs.items() if one.analysis_only]
    frozen = [label for label, config in configs.items() if config.rule == "frozen"]
    adapted = [
        label for label, one in needs.items() if one.moving_tasks is None and not one.analysis_only
    ]
    verdict = adapting.verdict(results, frozen, adapted, split=split, classifiers=classifiers)
    rows = comparison.compare(results, bounds, split=split, classifiers=classifiers)
    return rows, verdict


def write_tables(
    rows: Sequence[comparison.Comparison],
    seeds: Sequence[int],
    workdir: Path,
    verdict: adapting.Verdict | None = None,
) -> list[Path]:
    """Write the table as CSV, JSON and LaTeX into a directory, and return the files."""
    stem = comparison.file_stem("comparison", rows[0].split)
    files = [csv, json, latex] = [workdir / f"{stem}.{kind}" for kind in ("csv", "json", "tex")]
    # The JSON also has the values over the seeds, for tests of significance.
    records = comparison.as_records(rows)
    for record, row in zip(records, rows, strict=True):
        record["over_seeds"] = comparison.all_figures(row)
    content = {
        "seeds": list(seeds),
        "evaluate_on": rows[0].split,
        "classifiers": list(rows[0].by_classifier),
        "rules": records,
        "adapting": verdict.as_record() if verdict else None,
    }
    with manifest.covering(workdir, *(path.name for path in files)):
        write_text(csv, comparison.as_csv(rows))
        write_json(json, content)
        write_text(latex, f"% {comparison.caption(rows)}\n{comparison.as_latex(rows)}\n")
    return files
