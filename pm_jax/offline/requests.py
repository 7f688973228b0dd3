"""The request for an offline merge, checked before any tensor is loaded."""

import dataclasses
import re
from pathlib import Path

from pm_jax import registries, rules, trees
from pm_jax.offline import npz_files, orbax_files, recipes
from pm_jax.offline.adapted_files import AdaptedFile, changed_tensors
from pm_jax.offline.agreement import Agreement, agreement
from pm_jax.offline.interpolation import OF_FILES
from pm_jax.offline.matrices import LAYOUTS
from pm_jax.offline.tensor_files import TensorFile
from pm_jax.rules import MergeRule
from pm_jax.types import InvalidInput
from pm_jax.weights import checkpoint_files
from pm_jax.weights.peft_folder import PeftFolder, is_adapter

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""Types that an output may have, by the names of their numbers; values are those of headers."""

OF_FISHERS = frozenset({"quadratic", "curvature_error", "curvature_along"})
"""Fields of `Evidence` that come from curvature; Fisher files provide the quadratic only."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Request for a merge: which files to merge, how, and where to.

    Attributes:
        base: file or folder of theta_0. Like the others it may be an `.npz` or a folder of Orbax,
            which is turned into a temporary file beside the output first. `None` where adapters
            merge alone.
        models: files of theta_1*, theta_2*, ... in the order of the tasks, or adapters of PEFT.
        output: file or folder that the merge is written to.
        rule: a key of `rules.REGISTRY`.
        rule_settings: settings of the rule, "name=value,...".
        settings: settings "PATTERN:name=value,..." for the tensors whose whole name matches the
            pattern; the first match counts, and adds to `rule_settings`.
        fishers: files of the diagonal Fisher at each model, with the model's names; for rules that
            need curvature.
        seed: seed of rules that draw.
        overwrite: replace an existing output, which must not be one of the inputs.
        layout: how matrices are stored, a key of `LAYOUTS`, for rules that look at them; empty to
            tell by their names.
        weights: weights of the models, in their order, for rules that take them; empty for equal
            ones.
        leave: patterns of the names of tensors that stay the base's, and may differ between the
            models.
        dtype: type of the output's floating-point numbers, a key of `DTYPES`; empty for the base's.
        shard_size: most bytes in a file of an output that is a folder, as 5GB; empty to divide it
            as the base is.
        rank: rank that a merged adapter is cut to; 0 for the sum of the adapters' ranks.
    """

    base: Path | None
    models: tuple[Path, ...]
    output: Path
    rule: str = "averaging"
    rule_settings: str = ""
    settings: tuple[str, ...] = ()
    fishers: tuple[Path, ...] = ()
    seed: int = 0
    overwrite: bool = False
    layout: str = ""
    weights: tuple[float, ...] = ()
    leave: tuple[str, ...] = ()
    dtype: str = ""
    shard_size: str = ""
    rank: int = 0

    @property
    def written_weights(self) -> str:
        """The weights as an argument, for messages."""
        return f"weights={','.join(f'{weight:g}' for weight in self.weights)}"

    def recipe(self) -> str:
        """Write the merge as a recipe in TOML; folders of files are left out."""
        paths = {
            name: tuple(path.name for path in getattr(self, name)) for name in ("models", "fishers")
        }
        return recipes.written(
            {
                **{"base": self.base.name if self.base else "", **paths},
                **{"weights": self.weights, "rank": self.rank or ""},
                **{"rule": self.rule, "rule_settings": self.rule_settings},
                **{"settings": self.settings, "leave": self.leave, "layout": self.layout},
                **{"dtype": self.dtype, "seed": self.seed},
            }
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Opened files, whose headers agree.

    Attributes:
        base: theta_0, which gives the output its names, shapes and types.
        models: theta_1*, theta_2*, ...
        fishers: one for each model, or none.
        agreement: the tensors that merge, and those that do not.
    """

    base: TensorFile
    models: tuple[TensorFile, ...]
    fishers: tuple[TensorFile, ...]
    agreement: Agreement

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
    check_paths(merge)
    if merge.base is None:
        raise InvalidInput("base=: needs a .safetensors file or a folder, or adapters as models")
    if merge.rank:
        raise InvalidInput(
            f"rank={merge.rank}: is of a merged adapter; leave it out, or give adapters alone"
        )

    def opened(argument: str, number: int, path: Path) -> TensorFile:
        found = checkpoint_files.find(argument, path)
        if found.kind == "safetensors":
            return TensorFile.open(argument, path, found)
        converted = folder / f"{argument}_{number}.safetensors"
        convert = (npz_files if found.kind == "npz" else orbax_files).to_safetensors
        convert(argument, found.tensors[0], converted)
        # `source` keeps the path that the user gave, for messages.
        return dataclasses.replace(TensorFile.open(argument, converted), source=path, form=found)

    base = opened("base", 0, merge.base)
    models = [
        AdaptedFile.on(base, PeftFolder.open("models", path))
        if is_adapter(path)
        else opened("models", n, path)
        for n, path in enumerate(merge.models)
    ]
    fishers = [opened("fishers", n, path) for n, path in enumerate(merge.fishers)]
    found = agreement(base, models, fishers, merge.leave, changed_tensors(models))
    count = len(models) + 1
    return Inputs(base, found.files[1:count], found.files[count:], found)


def rules_by_settings(merge: Merge, inputs: Inputs) -> list[tuple[MergeRule, tuple[str, ...]]]:
    """Make the rule in each of its settings, with the names of the tensors that it merges.

    Raises:
        InvalidInput: there is no such rule or setting, a pattern matches nothing, or the rule needs
            what the files do not contain.
    """
    names: dict[str, list[str]] = {}
    merging = inputs.agreement.merging
    patterns = [_pattern(setting, merging) for setting in merge.settings]
    for name in merging:
        text = next((text for matched, text in patterns if name in matched), "")
        names.setdefault(_joined(merge.rule, merge.rule_settings, text), []).append(name)
    _check_weights(merge)
    by_settings = [
        parted
        for text, group in names.items()
        for parted in _by_group(_made(merge, text), tuple(group))
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


def _by_group(rule: MergeRule, names: tuple[str, ...]) -> list[tuple[MergeRule, tuple[str, ...]]]:
    """Part tensors into the groups that a rule merges apart, each with the rule of one group.

    Raises:
        InvalidInput: the expression that names the groups matches no tensor.
    """
    if rule.needs.groups is None:
        return [(rule, names)]
    groups: dict[str, list[str]] = {}
    for name, group in zip(names, rule.needs.groups.names(names), strict=True):
        groups.setdefault(group, []).append(name)
    return [(rule.needs.groups.rule, tuple(group)) for group in groups.values()]


def _made(merge: Merge, settings: str) -> MergeRule:
    """Make the rule of a merge with some settings; raises `InvalidInput`."""
    factories = {**rules.REGISTRY, **OF_FILES}
    given = {"max_tasks": len(merge.models), "model_weights": merge.weights}
    try:
        return registries.make("rule", factories, merge.rule, settings, **given)
    except InvalidInput as error:
        # The rule knows of the weights by another name.
        name, _, rest = str(error).partition(": ")
        if not name.startswith("rule_settings=model_weights="):
            raise
        raise InvalidInput(f"{merge.written_weights}: {rest.rpartition('; ')[0]}") from None


def _check_weights(merge: Merge) -> None:
    """Check that weights are as many as models, and that the rule takes them."""
    factories = {**rules.REGISTRY, **OF_FILES}
    takers = [name for name, make in factories.items() if rules.takes_weights(make)]
    if merge.weights and merge.rule in factories and merge.rule not in takers:
        raise InvalidInput(
            f"{merge.written_weights}: rule={merge.rule} takes none; use {', '.join(takers)}"
        )
    if merge.weights and len(merge.weights) != len(merge.models):
        raise InvalidInput(
            f"{merge.written_weights}: needs one for each of {len(merge.models)} models, in their "
            "order"
        )
    if merge.rule == "slerp" and len(merge.models) < 2:
        raise InvalidInput(
            "rule=slerp: goes from one model to the next, and there is one; name the base as the "
            "first of models to begin there"
        )


def _joined(rule: str, default: str, particular: str) -> str:
    """Join settings "name=value,...", of which the second replace the first."""
    texts = (rules.with_own_names(rule, text) for text in (default, particular))
    parts = [part for text in texts for part in text.split(",") if part]
    return ",".join({part.partition("=")[0]: part for part in parts}.values())


def check_paths(merge: Merge) -> None:
    """Check that there are models, and that the output is not among the files of a request.

    Raises:
        InvalidInput: there are none, or the output is.
    """
    if not merge.models:
        raise InvalidInput("models=: needs one or more files")
    if merge.fishers and len(merge.fishers) != len(merge.models):
        raise InvalidInput(
            f"fishers={','.join(map(str, merge.fishers))}: needs one for each of "
            f"{len(merge.models)} models, in their order"
        )
    if merge.dtype and merge.dtype not in DTYPES:
        raise InvalidInput(f"dtype={merge.dtype}: must be one of {', '.join(DTYPES)}, or left out")
    for path in (*([merge.base] if merge.base else []), *merge.models, *merge.fishers):
        if not merge.output.exists() or not path.exists():
            continue
        if merge.output.samefile(path):
            raise InvalidInput(f"output={merge.output}: is one of the inputs; choose another name")
        if merge.output.resolve() in path.resolve().parents:
            raise InvalidInput(f"output={merge.output}: holds {path}; choose another name")
