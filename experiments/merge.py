"""Merge checkpoints in files, without training.

python -m experiments.merge --base=base.safetensors --models=first.safetensors,second.safetensors \
    --rule=averaging --output=merged.safetensors
python -m experiments.merge --run=runs/digits/seed_0 --rule=averaging --output=merged.safetensors
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax.continual.storage import reuse
from pm_jax.offline.merging import merge_files
from pm_jax.offline.requests import Merge
from pm_jax.types import InvalidInput


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags; not on import, because experiments.train has some of the same names."""
    for name, default, description in (
        ("base", None, "The model before the first task: a .safetensors or a folder of Orbax."),
        ("run", None, "Instead of base and models: seed_<n> of a run with keep_task_models."),
        ("output", None, "The .safetensors file to write."),
        ("rule", "averaging", "Merge rule; one that needs no data."),
        ("rule_settings", "", "Settings of the rule: name=value,name=value."),
        (
            "layout",
            "",
            "For rules that look at matrices (opcm, null_space): flax if the files store them as "
            "[in, out], torch for [out, in]; empty to tell by their names, kernel or weight.",
        ),
    ):
        flags.DEFINE_string(name, default, description, values)
    flags.DEFINE_list("models", [], "Files of the models after each task, in order.", values)
    flags.DEFINE_list(
        "fishers", [], "Files of each model's diagonal Fisher, for a rule that needs it.", values
    )
    flags.DEFINE_multi_string(
        "settings",
        [],
        "PATTERN:name=value,... for the tensors whose whole name matches the regular expression; "
        "may be given several times, the first that matches counts.",
        values,
    )
    flags.DEFINE_integer("seed", 0, "Of a rule that draws.", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "Replace an output that is there.", values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check everything, then merge and say what was done."""
    del argv
    with experiment_flags.exits(values):
        if values.run and (values.base or values.models):
            raise InvalidInput(f"run={values.run}: stands for base and models; leave them out")
        for name in ("output",) if values.run else ("base", "output"):
            if not values[name].value:
                raise InvalidInput(f"{name}=: needs a .safetensors file")
        experiment_flags.check_seeds("seed", (values.seed,))
        if values.run:
            base, models = reuse.task_model_files(Path(values.run))
        else:
            base, models = Path(values.base), tuple(map(Path, values.models))
        merge = Merge(
            base,
            models,
            Path(values.output),
            values.rule,
            values.rule_settings,
            tuple(values.settings),
            tuple(map(Path, values.fishers)),
            values.seed,
            values.overwrite,
            values.layout,
        )
        print(merge_files(merge))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=experiment_flags.parse)
