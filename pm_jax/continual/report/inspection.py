"""The content of a work directory, and whether every file in it is as it was saved."""

import itertools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pm_jax import files
from pm_jax.continual.report.results import Shown, classifiers_of, problem_of, table
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import as_now
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.workdir import (
    COMPARISON_FILE,
    CONFIG_FILE,
    RESULTS_FILE,
    SUMMARY_FILE,
    saved_form,
)
from pm_jax.types import InvalidInput

SEED, CHECKPOINTS = re.compile(r"seed_(\d+)"), "checkpoints"
REMEDIES = {
    r"(.*/)?shared_training(\.deleted)?/.*": "delete the folder shared_training, which no result "
    "depends on",
    r"(?P<seed>.*seed_\d+)/checkpoints.*": "the same command goes on from the newest that is "
    r"whole; where the run is finished, once \g<seed>/results.json is moved away",
    r"(.*/)?manifest\.json": "put back a copy; else the same command begins a new one, and what it "
    "covered cannot be verified",
    r"(.*/)?(comparison_)?config\.json": "put back a copy, or run the command in another directory",
    r"(.*/)?summary\.json": "the same command writes it anew",
    # The command of a comparison writes no report for a single rule.
    r".+/report\.html": "python -m experiments.report writes it anew",
    r"(report|comparison)(_validation)?\.\w+|\w+\.png": "the same command writes it anew",
    r"(?P<seed>.*seed_\d+)/(results\.json|landscape\.npz)": r"without \g<seed>/results.json the "
    "same command goes on from the newest checkpoint and writes it anew",
    r".*seed_\d+/(metrics\.\w+|events\..*)": "put back a copy; no result depends on it",
    r"(?P<seed>.*seed_\d+)/task_models(/.*)?": r"put back a copy, or move \g<seed> away and run "
    "the same command again",
    r".*": "put back a copy, or export it again with overwrite",
}
"""Remedies for damaged files: the first pattern that matches the path in the directory counts."""
UNLISTED = {
    r"(.*/)?([^/]*(\.orbax-checkpoint-tmp|\.tmp)|deleted_[^/]*)": "left by a process that "
    "was killed; no part of a run",
    rf"(.*/)?{manifest.ASIDE}[^/]*": "set aside as damaged; may be deleted",
    r".*": "a run is writing it, or was killed as it did, or it is no run's",
}
"""Reasons why no manifest lists a file: the first pattern that matches its path counts."""


class Inspection(NamedTuple):
    """The content of a work directory, in lines for a person."""

    # The runs, how far they are, and their results.
    holds: list[str]
    # The files that differ from what was saved, with the remedy.
    damaged: list[str]
    # The files, or folders of files, that no manifest lists.
    unlisted: list[str]
    # Number of files that are as they were saved.
    intact: int

    def text(self) -> str:
        """Join all lines, and count the files."""
        end = f"{self.intact} files are as they were saved, {len(self.damaged) or 'none'} damaged"
        text = "\n".join([*self.holds, *self.damaged, *self.unlisted, end])
        # File names need not be UTF-8, and a terminal takes nothing else.
        return text.encode(errors="replace").decode()


def inspect(workdir: Path) -> Inspection:
    """Say what a work directory contains, and compare every file in it with what was saved.

    Raises:
        InvalidInput: there is no such directory, or no run in it.
    """
    remedy = "give the work directory of a run of experiments.train or experiments.compare"
    if not workdir.is_dir():
        raise InvalidInput(f"DIR={workdir}: is no directory; {remedy}")
    # A run that has lost its settings is still a run: the manifest remembers them.
    present = {*manifest.read_or_empty(workdir).files, *(path.name for path in workdir.glob("*"))}
    if not present & {CONFIG_FILE, COMPARISON_FILE}:
        raise InvalidInput(f"DIR={workdir}: holds no run; {remedy}")
    damaged, unlisted, intact = _verified(workdir)

    def line(kind: str, path: Path, what: str, texts: Mapping[str, str]) -> str:
        name = path.relative_to(workdir).as_posix().replace("\n", "?")
        matches = ((re.fullmatch(pattern, name), text) for pattern, text in texts.items())
        return f"{kind}: {name} {what}; {next(m.expand(text) for m, text in matches if m)}"

    return Inspection(
        _holds(workdir, damaged),
        [line("damaged", path, damaged[path], REMEDIES) for path in sorted(damaged)],
        [line("unlisted", path, "is in no manifest", UNLISTED) for path in unlisted],
        intact,
    )


def _below(directory: Path) -> list[Path]:
    """List everything below a directory, in order; what a run deletes meanwhile may be missing."""
    return sorted(
        Path(folder, name)
        for folder, *names in os.walk(directory)
        for name in itertools.chain(*names)
    )


def _verified(workdir: Path) -> tuple[dict[Path, str], list[Path], int]:
    """Compare all files with the manifests: the damaged, the unlisted and the number intact."""
    paths = _below(workdir)
    # Ignore the manifest's temporary file: the files that it will list may not exist yet.
    in_the_making = manifest.FILE + files.TEMPORARY
    contents = [
        path
        for path in paths
        if path.name != in_the_making and (path.is_symlink() or not path.is_dir())
    ]
    # A file belongs to the nearest folder above it that has a manifest.
    owners = {workdir, *(path for path in paths if path.is_dir() and _has_manifest(path))}
    owner = {path: next(above for above in path.parents if above in owners) for path in contents}
    damaged: dict[Path, str] = {}
    covered, blind, intact = {workdir / manifest.FILE}, set(), 0
    for directory in sorted(owners.intersection(owner.values())):
        covered.add(directory / manifest.FILE)
        try:
            saved, damages = _settled(directory)
        except (OSError, manifest.DamagedManifest) as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
            damaged[directory / manifest.FILE] = what
            # Without the manifest nobody knows which of its files should be there.
            blind.add(directory)
            continue
        damaged |= {directory / name: what for name, what in damages}
        covered |= {directory / name for name in saved.files}
        intact += len(saved.files) - len(saved.within(*(name for name, _ in damages)))
    holding = {above for path in covered for above in path.parents}
    # A folder without any listed file is named once, not file by file.
    unlisted = {
        next(part for part in (*reversed(path.parents), path) if part not in holding)
        for path in contents
        if path not in covered and owner[path] not in blind
    }
    return damaged, sorted(unlisted), intact


def _has_manifest(path: Path) -> bool:
    """Tell whether a folder has a manifest, or should have one."""
    folder = path.parent if path.name == CHECKPOINTS else path
    names = (manifest.FILE, CONFIG_FILE, COMPARISON_FILE)
    return bool(SEED.fullmatch(folder.name)) or any((path / name).exists() for name in names)


def _settled(directory: Path) -> tuple[manifest.Manifest, list[manifest.Damage]]:
    """Read a manifest and the damage to its files, less what a run has changed meanwhile."""
    saved = manifest.read(directory)
    damages = manifest.damage(directory, saved.files)
    # A run takes a file out of the manifest before it writes it: then the entry has changed.
    again = manifest.read(directory) if damages else saved
    return saved, [d for d in damages if again.within(d.name) == saved.within(d.name)]


def _holds(workdir: Path, damaged: Collection[Path]) -> list[str]:
    """Say what the runs in a directory are, how far they are, and what came of them."""
    lines, rows = [], {}
    if (workdir / COMPARISON_FILE).exists():
        labels = sorted(path.parent.name for path in workdir.glob(f"*/{CONFIG_FILE}"))
        lines += [f"{workdir}: comparison of {', '.join(labels) or 'nothing yet'}"]
    runs = (path.parent for path in _below(workdir) if path.name == CONFIG_FILE)
    for directory in sorted(runs):
        lines += _run(directory, damaged)
        summary = _content(directory / SUMMARY_FILE, damaged)
        if summary.get("seeds"):
            # An earlier version measured on one split, and named it in the settings only.
            split = _content(directory / CONFIG_FILE, damaged).get("evaluate_on")
            rows[str(directory)] = ({"evaluate_on": split} if split else {}) | summary
    return [*lines, *(table(rows).splitlines() if rows else ())]


def _run(directory: Path, damaged: Collection[Path]) -> list[str]:
    saved = _content(directory / CONFIG_FILE, damaged)
    config = as_now(saved) if saved else {}
    default = saved_form(Config())
    changed = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in config.items()
        if value != default.get(name) and name not in ("rule", "dataset")
    ]
    what = f"{config.get('rule')} on {config.get('dataset')}" if config else "settings unknown"
    lines = [" ".join([f"{directory}: {what}", *changed])]
    before: list[str] = []
    seeds = [path for path in directory.iterdir() if SEED.fullmatch(path.name)]
    for seed in sorted(seeds, key=lambda path: int(path.name[5:])):
        about = manifest.read_or_empty(seed).about
        lines.append(f"  seed {seed.name[5:]}: {_progress(seed, about, damaged)}")
        made_with = [f"    made with {_origin(made)}" for made in about.get("made_with", [])]
        # Most seeds are made with the same versions, which are then said once.
        lines += made_with if made_with != before else []
        before = made_with
    return lines


def _progress(seed: Path, about: Mapping[str, Any], damaged: Collection[Path]) -> str:
    """Say how far a seed's run is, and which checkpoints it has."""
    folder, total = seed / CHECKPOINTS, about.get("total_steps", "?")
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    checkpoints = f"checkpoints {', '.join(map(str, sorted(steps))) or 'none'}"
    if not (seed / RESULTS_FILE).exists():
        return f"at step {max(steps, default=0)} of {total}; {checkpoints}"
    results = _content(seed / RESULTS_FILE, damaged)
    shown = "accuracy cannot be read"
    if not problem_of(results) and (accuracy := results["final_average_accuracy"]) is not None:
        what, several = Shown.of(results), len(classifiers_of(results)) > 1
        of = f" ({what.classifier})" if several else ""
        shown = f"{what.split} accuracy{of} {100 * accuracy:.1f}"
    return f"finished, {total} steps; final {shown}; {checkpoints}"


def _origin(made_with: Mapping[str, Any]) -> str:
    versions = {"python": made_with["python"], **made_with["packages"]}
    parts = [f"{name} {version}" for name, version in versions.items() if version]
    parts += [f"revision {made_with['git_revision']}"] if "git_revision" in made_with else []
    device = f"{made_with['devices']} x {made_with['device']}"
    return ", ".join([*parts, device, f"configuration {made_with['configuration'][:12]}"])


def _content(path: Path, damaged: Collection[Path]) -> dict[str, Any]:
    """Read a JSON file that is as it was saved; any other counts as empty."""
    try:
        return {} if path in damaged else files.read_json(path, {})
    except (OSError, ValueError):
        return {}
