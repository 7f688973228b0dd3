r"""Merge checkpoints in files, without training.

python -m experiments.merge --base=base.safetensors --models=first.safetensors,second.safetensors \
    --rule=averaging --output=merged.safetensors
python -m experiments.merge --models=first_adapter/,second_adapter/ --output=merged_adapter/
python -m experiments.merge --base=base/ --models=first/,second/ --rule=ties --output=merged/
python -m experiments.merge --recipe=merge.toml --output=merged/
python -m experiments.merge --run=runs/digits/seed_0 --rule=averaging --output=merged.safetensors
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax import registries
from pm_jax.continual.storage import reuse
from pm_jax.offline import recipes
from pm_jax.offline.adapters import are_adapters, merge_adapters
from pm_jax.offline.merging import merge_files
from pm_jax.offline.requests import DTYPES, Merge
from pm_jax.types import InvalidInput


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags; not on import, because experiments.train has some of the same names."""
    for name, default, description in (
        (
            "base",
            None,
            "The model before the first task: a .safetensors or .npz file, a folder of "
            "transformers, sharded or not, or one of Orbax (of a CheckpointManager the newest "
            "step, or PATH@STEP). Adapters of PEFT merge into an adapter without a base, and into "
            "a model with one.",
        ),
        (
            "run",
            None,
            "Folder seed_<n> of a run with keep_task_models, for base and models.",
        ),
        (
            "output",
            None,
            "The .safetensors file to write, or a folder in the form of the base: its shards, "
            "config and tokenizer, or a tree of Orbax.",
        ),
        (
            "recipe",
            None,
            "A TOML file with the other flags as its keys; a flag that is given goes before it.",
        ),
        ("rule", "averaging", "Merge rule; one that needs no data."),
        ("rule_settings", "", "Settings of the rule: name=value,name=value."),
        (
            "layout",
            "",
            "Order of the axes of matrices: flax for [in, out], torch for [out, in]; empty: by "
            "their names, kernel or weight. For rules that look at matrices (opcm, null_space).",
        ),
        ("dtype", "", f"Type of the output, one of {', '.join(DTYPES)}; empty for the base's."),
        (
            "shard_size",
            "",
            "Most bytes in a file of a folder, as 5GB; empty to divide it as the base is divided.",
        ),
    ):
        flags.DEFINE_string(name, default, description, values)
    for name, description in (
        (
            "models",
            "Models after each task, in order, in files or folders as the base; or adapters of "
            "PEFT.",
        ),
        ("fishers", "Files of each model's diagonal Fisher, for a rule that needs it."),
        (
            "weights",
            "Weight of each model, for averaging (linear), where they sum to 1, task_arithmetic, "
            "ties and dare; fractions may be given.",
        ),
    ):
        flags.DEFINE_list(name, [], description, values)
    for name, description in (
        (
            "settings",
            "PATTERN:name=value,... for the tensors whose whole name matches the regular "
            "expression; may be given several times, the first that matches counts.",
        ),
        (
            "leave",
            "PATTERN of tensors that stay the base's and may differ between models, as a "
            "classifier; may be given several times.",
        ),
    ):
        flags.DEFINE_multi_string(name, [], description, values)
    flags.DEFINE_integer("seed", 0, "Seed of a rule that draws at random.", flag_values=values)
    flags.DEFINE_integer(
        "rank",
        0,
        "Rank that a merged adapter is cut to; 0 for the sum of the adapters', with which "
        "averaging and other linear rules are exact.",
        flag_values=values,
    )
    flags.DEFINE_boolean("overwrite", False, "Replace an output that is there.", values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check everything, then merge and say what was done."""
    del argv
    with experiment_flags.exits(values):
        merge = _merge_of(values)
        print(merge_adapters(merge) if are_adapters(merge) else merge_files(merge))


def _merge_of(values: flags.FlagValues) -> Merge:
    """Read the request from flags and recipe; raises `InvalidInput`."""
    recipe = recipes.read(Path(values.recipe)) if values.recipe else {}

    def given(name: str) -> Any:
        return values[name].value if values[name].present else recipe.get(name, values[name].value)

    base, models, run = (given(name) for name in ("base", "models", "run"))
    if run and (base or models):
        raise InvalidInput(f"run={run}: stands for base and models; leave them out")
    if not given("output"):
        raise InvalidInput("output=: needs a .safetensors file or a folder")
    experiment_flags.check_seeds("seed", (given("seed"),))
    paths: tuple[Path | None, tuple[Path, ...]]
    paths = Path(base) if base else None, tuple(map(Path, models))
    return Merge(
        *(reuse.task_model_files(Path(run)) if run else paths),
        Path(given("output")),
        given("rule"),
        given("rule_settings"),
        tuple(given("settings")),
        tuple(map(Path, given("fishers"))),
        given("seed"),
        values.overwrite,
        given("layout"),
        _numbers(given("weights")),
        tuple(given("leave")),
        given("dtype"),
        given("shard_size"),
        given("rank"),
    )


def _numbers(weights: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(map(registries.number, weights))
    except ValueError:
        raise InvalidInput(
            f"weights={','.join(weights)}: must be numbers or fractions separated by commas"
        ) from None


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=experiment_flags.parse)
