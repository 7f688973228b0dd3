"""The request for an offline merge, checked before any tensor is loaded."""

import dataclasses
import re
from pathlib import Path

from pm_jax import files, rules, trees
from pm_jax.offline import orbax_files
from pm_jax.offline.matrices import LAYOUTS
from pm_jax.offline.tensor_files import FLOATS, WHOLE_NUMBERS, TensorFile
from pm_jax.rules import MergeRule
from pm_jax.types import InvalidInput

OF_FISHERS = frozenset({"quadratic", "curvature_error", "curvature_along"})
"""Fields of `Evidence` that come from curvature; Fisher files provide the quadratic only."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Request for a merge: which files to merge, how, and where to."""

    # File of theta_0, in safetensors; like the others it may be a folder of Orbax, which is turned
    # into a temporary file beside the output first.
    base: Path
    # Files of theta_1*, theta_2*, ... in the order of the tasks.
    models: tuple[Path, ...]
    output: Path
    # A key of `rules.REGISTRY`.
    rule: str = "averaging"
    # Settings of the rule, "name=value,...".
    rule_settings: str = ""
    # Settings "PATTERN:name=value,..." for the tensors whose whole name matches the pattern; the
    # first match counts, and adds to `rule_settings`.
    settings: tuple[str, ...] = ()
    # Files of the diagonal Fisher at each model, with the model's names; for rules that need
    # curvature.
    fishers: tuple[Path, ...] = ()
    # Seed of rules that draw.
    seed: int = 0
    # Replace an existing output, which must not be one of the inputs.
    overwrite: bool = False
    # How matrices are stored, a key of `LAYOUTS`, for rules that look at them; empty to tell by
    # their names.
    layout: str = ""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Opened files, whose headers agree."""

    # theta_0, which gives the output its names, shapes and types.
    base: TensorFile
    # theta_1*, theta_2*, ...
    models: tuple[TensorFile, ...]
    # One for each model, or none.
    fishers: tuple[TensorFile, ...]
    # Names of the tensors that merge: those of floating-point numbers, and not empty.
    merging: tuple[str, ...]

    @property
    def files(self) -> tuple[TensorFile, ...]:
        """Base, models and Fisher files, in this order."""
        return (self.base, *self.models, *self.fishers)


def open_inputs(merge: Merge, folder: Path) -> Inputs:
    """Read all headers and check that they fit together; `folder` is for converted files.

    Raises:
        InvalidInput: a file cannot be read or has other tensors, there are not as many Fisher files
            as models, or the output is one of the inputs.
    """
    _check_paths(merge)

    def opened(argument: str, number: int, path: Path) -> TensorFile:
        if not path.is_dir():
            return TensorFile.open(argument, path)
        # `source` keeps the path that the user gave, for messages.
        converted = folder / f"{argument}_{number}.safetensors"
        orbax_files.to_safetensors(argument, path, converted)
        return dataclasses.replace(TensorFile.open(argument, converted), source=path)

    base = opened("base", 0, merge.base)
    models = tuple(opened("models", n, path) for n, path in enumerate(merge.models))
    fishers = tuple(opened("fishers", n, path) for n, path in enumerate(merge.fishers))
    for file in (base, *models, *fishers):
        for name, entry in file.entries.items():
            if entry.dtype not in FLOATS and entry.dtype not in WHOLE_NUMBERS:
                raise InvalidInput(
                    f"{file.argument}={file.source}: {name} is of type {entry.dtype}; convert "
                    f"it to one of {', '.join(FLOATS)}"
                )
    merging = tuple(
        name for name, entry in base.entries.items() if entry.dtype in FLOATS and entry.size
    )
    if not merging:
        raise InvalidInput(f"base={base.source}: has no floating-point tensor; nothing to merge")
    for file in models:
        _check_same(base, file, tuple(base.entries))
    for file in fishers:
        _check_same(base, file, merging)
    return Inputs(base, models, fishers, merging)


def rules_by_settings(merge: Merge, inputs: Inputs) -> list[tuple[MergeRule, tuple[str, ...]]]:
    """Make the rule in each of its settings, with the names of the tensors that it merges.

    Raises:
        InvalidInput: there is no such rule or setting, a pattern matches nothing, or the rule needs
            what the files do not contain.
    """
    names: dict[str, list[str]] = {}
    patterns = [_pattern(setting, inputs.merging) for setting in merge.settings]
    for name in inputs.merging:
        text = next((text for matched, text in patterns if name in matched), "")
        names.setdefault(_joined(merge.rule_settings, text), []).append(name)
    by_settings = [
        (rules.make(merge.rule, text, max_tasks=len(merge.models)), tuple(group))
        for text, group in names.items()
    ]
    for rule, _ in by_settings:
        if rule.needs.tasks_at_once:
            raise InvalidInput(
                f"rule={merge.rule}: trains all tasks at once, which needs their data; use "
                "experiments.train, or another rule"
            )
        if rule.needs.moving_tasks is not None:
            kept = "the first model" if rule.needs.moving_tasks else "the base"
            raise InvalidInput(
                f"rule={merge.rule}: keeps {kept} as it is, so there is nothing to merge; copy the "
                "file, or use another rule"
            )
        if beyond := rule.needs.evidence - OF_FISHERS - {"key"}:
            raise InvalidInput(
                f"rule={merge.rule}: needs {' and '.join(sorted(beyond))} from training, which "
                "checkpoints do not hold; use experiments.train, or another rule"
            )
        if rule.needs.curvatures and "diagonal" not in rule.needs.curvatures:
            raise InvalidInput(
                f"rule={merge.rule}: needs moments of the inputs of layers from training, which "
                "files of models and fishers do not have; use experiments.train, or another rule"
            )
        if rule.needs.evidence & OF_FISHERS and not merge.fishers:
            raise InvalidInput(
                f"rule={merge.rule}: needs curvature; give fishers, a file for each model"
            )
    if merge.layout and merge.layout not in LAYOUTS:
        raise InvalidInput(f"layout={merge.layout}: must be {' or '.join(LAYOUTS)}, or left out")
    if merge.layout and not by_settings[0][0].needs.parts:
        raise InvalidInput(
            f"layout={merge.layout}: rule={merge.rule} tells no matrices from other tensors; leave "
            "it out"
        )
    if merge.fishers and not any(rule.needs.evidence & OF_FISHERS for rule, _ in by_settings):
        raise InvalidInput(
            f"fishers={merge.fishers[0]}: rule={merge.rule} reads none; leave them out"
        )
    return by_settings


def _pattern(setting: str, names: tuple[str, ...]) -> tuple[frozenset[str], str]:
    """Split "PATTERN:name=value,..." into the matching tensors and the text of the settings."""
    # The pattern takes as little as it can up to ":name=", as it may hold colons itself.
    split = re.fullmatch(r"(.+?):(\w+=.*)", setting)
    if not split:
        raise InvalidInput(f"settings={setting}: must read PATTERN:name=value,...")
    try:
        matched = trees.match_paths(dict.fromkeys(names, 0), split[1])
    except ValueError as error:
        raise InvalidInput(f"settings={setting}: {error}") from None
    return frozenset(matched), split[2]


def _joined(default: str, particular: str) -> str:
    """Join settings "name=value,...", of which the second replace the first."""
    parts = [part for text in (default, particular) for part in text.split(",") if part]
    return ",".join({part.partition("=")[0]: part for part in parts}.values())


def _check_paths(merge: Merge) -> None:
    if not merge.models:
        raise InvalidInput("models=: needs one or more files")
    if merge.fishers and len(merge.fishers) != len(merge.models):
        raise InvalidInput(
            f"fishers={','.join(map(str, merge.fishers))}: needs one for each of "
            f"{len(merge.models)} models, in their order"
        )
    for path in (merge.base, *merge.models, *merge.fishers):
        if merge.output.exists() and path.exists() and merge.output.samefile(path):
            raise InvalidInput(f"output={merge.output}: is one of the inputs; choose another name")


def _check_same(base: TensorFile, other: TensorFile, names: tuple[str, ...]) -> None:
    differences = [f"lacks {name}" for name in names if name not in other.entries]
    differences += [f"also has {name}" for name in other.entries if name not in base.entries]
    for name in names:
        ours, theirs = base.entries[name], other.entries.get(name)
        # A missing tensor is in the list already.
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            differences.append(f"{name} is {list(theirs.shape)}, not {list(ours.shape)}")
        elif (theirs.dtype in FLOATS) != (ours.dtype in FLOATS):
            differences.append(f"{name} is {theirs.dtype}, not {ours.dtype}")
    if differences:
        raise InvalidInput(
            f"{other.argument}={other.source}: does not hold the tensors of the base: "
            f"{files.listed(differences)}; give files of one architecture"
        )
