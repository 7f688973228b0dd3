"""What a work directory holds, and whether every file in it is as it was saved."""

import itertools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pm_jax import files
from pm_jax.continual.report.results import table
from pm_jax.continual.settings.config import Config
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
    r"(.*/)?shared_training/.*": "delete the folder shared_training, which no result depends on",
    r"(?P<seed>.*seed_\d+)/checkpoints.*": "the same command goes on from the newest that is "
    r"whole; where the run is finished, once \g<seed>/results.json is moved away",
    r"(.*/)?manifest\.json": "put back a copy; else the same command begins a new one, and what it "
    "covered cannot be verified",
    r"(.*/)?(comparison_)?config\.json": "put back a copy, or run the command in another directory",
    r"(.*/)?summary\.json": "the same command writes it anew",
    r"report\.html": "python -m experiments.report writes it anew",
    r"comparison\.\w+|\w+\.png": "the same command writes it anew",
    r"(?P<seed>.*seed_\d+)/(results\.json|landscape\.npz)": r"without \g<seed>/results.json the "
    "same command goes on from the newest checkpoint and writes it anew",
    r".*seed_\d+/(metrics\.\w+|events\..*)": "put back a copy; no result depends on it",
    r"(?P<seed>.*seed_\d+)/task_models(/.*)?": r"put back a copy, or move \g<seed> away and run "
    "the same command again",
    r".*": "put back a copy, or export it again with overwrite",
}
"""What to do about a damaged file, by the first pattern that its path in the directory fits."""
UNLISTED = {
    r"(.*/)?([^/]*(\.orbax-checkpoint-tmp|\.tmp)|deleted_[^/]*)": "left by a process that "
    "was killed; no part of a run",
    rf"(.*/)?{manifest.ASIDE}[^/]*": "set aside as damaged; may be deleted",
    r".*": "a run is writing it, or was killed as it did, or it is no run's",
}
"""What a file is that no manifest speaks of, by the first pattern that its path fits."""


class Inspection(NamedTuple):
    """What was found in a work directory.

    Attributes:
        holds: lines that say what runs there are.
        damaged: a line for each file that is not as it was saved, with the remedy.
        unlisted: a line for each file, or folder of files, that no manifest speaks of.
        intact: number of files that are as they were saved.
    """

    holds: list[str]
    damaged: list[str]
    unlisted: list[str]
    intact: int

    def text(self) -> str:
        """All of it, for a person."""
        end = f"{self.intact} files are as they were saved, {len(self.damaged) or 'none'} damaged"
        text = "\n".join([*self.holds, *self.damaged, *self.unlisted, end])
        return text.encode(errors="replace").decode()  # names need not be UTF-8


def inspect(workdir: Path) -> Inspection:
    """Say what a work directory holds, and compare every file in it with what was saved.

    Nothing is written, and what a run writes meanwhile is not taken for damaged.

    Args:
        workdir: of `experiments.train` or `experiments.compare`.

    Returns:
        Lines for a person.

    Raises:
        InvalidInput: there is no such directory, or it is none of a run.

    Example:
        >>> inspect(Path("/nonexistent"))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: DIR=/nonexistent: is no directory; give the work directory ...
    """
    wanted = "give the work directory of a run of experiments.train or experiments.compare"
    if not workdir.is_dir():
        raise InvalidInput(f"DIR={workdir}: is no directory; {wanted}")
    # A run whose settings are lost is one still.
    present = {*manifest.read_or_empty(workdir).files, *(path.name for path in workdir.glob("*"))}
    if not present & {CONFIG_FILE, COMPARISON_FILE}:
        raise InvalidInput(f"DIR={workdir}: holds no run; {wanted}")
    found = _verified(workdir)

    def line(kind: str, path: Path, what: str, texts: Mapping[str, str]) -> str:
        name = path.relative_to(workdir).as_posix().replace("\n", "?")
        matches = ((re.fullmatch(pattern, name), text) for pattern, text in texts.items())
        return f"{kind}: {name} {what}; {next(m.expand(text) for m, text in matches if m)}"

    return Inspection(
        _holds(workdir, found.damaged),
        [line("damaged", path, found.damaged[path], REMEDIES) for path in sorted(found.damaged)],
        [line("unlisted", path, "is in no manifest", UNLISTED) for path in found.unlisted],
        found.intact,
    )


class _Verified(NamedTuple):
    damaged: dict[Path, str]
    unlisted: list[Path]
    intact: int


def _below(directory: Path) -> list[Path]:
    """All there is below a directory, in order, but what a run deletes meanwhile."""
    return sorted(
        Path(folder, name)
        for folder, *names in os.walk(directory)
        for name in itertools.chain(*names)
    )


def _verified(workdir: Path) -> _Verified:
    """All files below a directory against the manifests that there are, or should be."""
    paths = _below(workdir)
    # Of a manifest in the making there may be nothing yet that it would be missed beside.
    in_the_making = manifest.FILE + files.TEMPORARY
    contents = [
        path
        for path in paths
        if path.name != in_the_making and (path.is_symlink() or not path.is_dir())
    ]
    owners = {workdir, *(path for path in paths if path.is_dir() and _has_manifest(path))}
    owner = {path: next(above for above in path.parents if above in owners) for path in contents}
    damaged: dict[Path, str] = {}
    covered, blind, intact = {workdir / manifest.FILE}, set(), 0
    for directory in sorted(owners.intersection(owner.values())):
        covered.add(directory / manifest.FILE)
        try:
            saved, found = _settled(directory)
        except (OSError, manifest.DamagedManifest) as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
            damaged[directory / manifest.FILE] = what
            blind.add(directory)
            continue
        damaged |= {directory / name: what for name, what in found}
        covered |= {directory / name for name in saved.files}
        intact += len(saved.files) - len(saved.within(*(name for name, _ in found)))
    holding = {above for path in covered for above in path.parents}
    unlisted = {
        next(part for part in (*reversed(path.parents), path) if part not in holding)
        for path in contents
        if path not in covered and owner[path] not in blind
    }
    return _Verified(damaged, sorted(unlisted), intact)


def _has_manifest(path: Path) -> bool:
    """Whether there is one, or should be."""
    folder = path.parent if path.name == CHECKPOINTS else path
    names = (manifest.FILE, CONFIG_FILE, COMPARISON_FILE)
    return bool(SEED.fullmatch(folder.name)) or any((path / name).exists() for name in names)


def _settled(directory: Path) -> tuple[manifest.Manifest, list[manifest.Damage]]:
    """A manifest and what is not as it says, less what a run has written meanwhile."""
    saved = manifest.read(directory)
    found = manifest.damage(directory, saved.files)
    again = manifest.read(directory) if found else saved
    return saved, [each for each in found if again.within(each.name) == saved.within(each.name)]


def _holds(workdir: Path, damaged: Collection[Path]) -> list[str]:
    """What the runs in a directory are, how far they are, and what came of them."""
    lines, rows = [], {}
    if (workdir / COMPARISON_FILE).exists():
        labels = sorted(path.parent.name for path in workdir.glob(f"*/{CONFIG_FILE}"))
        lines += [f"{workdir}: comparison of {', '.join(labels) or 'nothing yet'}"]
    runs = (path.parent for path in _below(workdir) if path.name == CONFIG_FILE)
    for directory in sorted(runs):
        lines += _run(directory, damaged)
        summary = _content(directory / SUMMARY_FILE, damaged)
        if summary.get("seeds"):
            rows[str(directory)] = summary
    return [*lines, *(table(rows).splitlines() if rows else ())]


def _run(directory: Path, damaged: Collection[Path]) -> list[str]:
    config = _content(directory / CONFIG_FILE, damaged)
    default = saved_form(Config())
    own = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in config.items()
        if value != default.get(name) and name not in ("rule", "dataset")
    ]
    what = f"{config.get('rule')} on {config.get('dataset')}" if config else "settings unknown"
    lines = [" ".join([f"{directory}: {what}", *own])]
    before: list[str] = []
    seeds = [path for path in directory.iterdir() if SEED.fullmatch(path.name)]
    for seed in sorted(seeds, key=lambda path: int(path.name[5:])):
        about = manifest.read_or_empty(seed).about
        lines.append(f"  seed {seed.name[5:]}: {_progress(seed, about, damaged)}")
        made_with = [f"    made with {_origin(each)}" for each in about.get("made_with", [])]
        lines += made_with if made_with != before else []
        before = made_with
    return lines


def _progress(seed: Path, about: Mapping[str, Any], damaged: Collection[Path]) -> str:
    """How far a seed's run is, and its checkpoints."""
    folder, total = seed / CHECKPOINTS, about.get("total_steps", "?")
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    checkpoints = f"checkpoints {', '.join(map(str, sorted(steps))) or 'none'}"
    if not (seed / RESULTS_FILE).exists():
        return f"at step {max(steps, default=0)} of {total}; {checkpoints}"
    accuracy = _content(seed / RESULTS_FILE, damaged).get("final_average_accuracy")
    shown = f"{100 * accuracy:.1f}" if accuracy is not None else "cannot be read"
    return f"finished, {total} steps; final accuracy {shown}; {checkpoints}"


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
