"""Merge rules side by side on one stream: a table with error bars, and plots.

python -m experiments.compare --rules=all --dataset=digits --seeds=0,1,2 --workdir=runs/rules
python -m experiments.compare --rules=sequential,ties+keep=0.1,averaging+epochs=9 --workdir=...
python -m experiments.compare --rules=perturb_and_merge --curvature=kronecker,low_rank --workdir=...

Every rule runs with the settings that the flags give, but training is perturbed for
perturb_and_merge alone. A rule may have its own after it: settings of the rule, or any flag of
experiments.train, as averaging+perturbation=symmetric. With a list of curvatures, rules that take
curvature run with each. Runs that are finished in the work directory are kept, and training that
rules have in common is done once. What needs the data of all tasks is shown apart, as a bound.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax import rules
from pm_jax.continual import Config
from pm_jax.continual.interruption import StopRequests
from pm_jax.continual.report import comparison, comparison_plots
from pm_jax.continual.rule_comparison import run_rules, write_tables
from pm_jax.continual.run import describe
from pm_jax.types import InvalidInput

experiment_flags.define_config_flags()
experiment_flags.define_run_flags()
flags.DEFINE_list(
    "rules",
    ["all"],
    f"Rules to compare, of {', '.join(rules.REGISTRY)}, each with settings of its own after it as "
    "name+setting=value+flag=value, colons between the numbers of a tuple; all for each once. The "
    "flag --rule is not read.",
)
flags.adopt_module_key_flags(experiment_flags)  # --help lists them


def main(argv: Sequence[str]) -> None:
    """Check everything, then run, and print the table."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        curvatures = values.curvature.split(",")
        base = experiment_flags.config_from_flags(curvature=curvatures[0])
        configs = configurations(base, values.rules, curvatures)
        stop = StopRequests()
        options = experiment_flags.options_from_flags(stop=stop)
        for config in dict.fromkeys(each.without_merging() for each in configs.values()):
            describe(config, values.seeds[0])
        if values.dry_run:
            print(describe(base, values.seeds[0]))
            for label, config in configs.items():
                print(f"{label}: {_changes(base, config) or 'as above'}")
            return
        if not values.workdir:
            raise InvalidInput("workdir=: needs a directory, as --workdir=runs/rules")
        workdir = Path(values.workdir)
        with stop:
            results = run_rules(configs, base, values.seeds, workdir, options)
        apart = [label for label, config in configs.items() if config.merge_rule.analysis_only]
        rows = comparison.compare(results, apart)
        print(comparison.as_text(rows))
        files = write_tables(rows, values.seeds, workdir)
        try:
            files += comparison_plots.write_plots(
                {row.rule: results[row.rule] for row in rows}, workdir
            )
        except ImportError:
            print("plots: skipped, matplotlib is not installed; pip install 'pm_jax[plots]'")
        print("written:", *files)


def configurations(
    base: Config, names: Sequence[str], curvatures: Sequence[str] = ()
) -> dict[str, Config]:
    """The settings of each rule, by what was asked for; raises `InvalidInput`."""
    if flags.FLAGS["rule_settings"].present:
        raise InvalidInput(
            f"rule_settings={base.rule_settings}: belongs to one rule; write it after the rule's "
            "name, as --rules=perturb_and_merge+clip=false"
        )
    expanded: list[str] = []
    for name in names:
        expanded += rules.REGISTRY if name == "all" else [name]
    if not expanded:
        raise InvalidInput("rules=: needs one or more, or all")
    if len(curvatures) > 1:
        expanded = [label for each in expanded for label in _with_curvatures(each, curvatures)]
    configs = {}
    for label in expanded:
        name, *pairs = label.split("+")
        try:
            settings = _settings_of(name, pairs)
            if name != "perturb_and_merge":
                settings.setdefault("perturbation", "none")
            configs[label] = dataclasses.replace(base, rule=name, **settings)
        except InvalidInput as error:
            raise InvalidInput(f"rules={label}: {error}") from None
    return configs


def _with_curvatures(label: str, curvatures: Sequence[str]) -> list[str]:
    """A rule once for each curvature, if it takes any and names none of its own."""
    name, *pairs = label.split("+")
    takes = name in rules.REGISTRY and "quadratic" in rules.make(name).needs
    if not takes or any(pair.startswith("curvature=") for pair in pairs):
        return [label]
    return [f"{label}+curvature={curvature}" for curvature in curvatures]


def _changes(base: Config, config: Config) -> str:
    """The settings of a rule's run that are not those of the flags."""
    before, after = dataclasses.asdict(base), dataclasses.asdict(config)
    return ", ".join(f"{name}={after[name]}" for name in before if after[name] != before[name])


def _settings_of(rule: str, pairs: Sequence[str]) -> dict[str, Any]:
    """What `setting=value` after a rule's name stands for; the rule's settings go first."""
    own = inspect.signature(rules.REGISTRY[rule]).parameters if rule in rules.REGISTRY else {}
    fields = {field.name for field in dataclasses.fields(Config)} - {"rule", "rule_settings"}
    settings: dict[str, Any] = {}
    of_rule = []
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name in own or name not in fields:
            of_rule.append(pair)  # The rule says what is wrong with it.
            continue
        try:
            settings[name] = flags.FLAGS[name].parser.parse(value.replace(":", ","))
        except ValueError as error:
            raise InvalidInput(f"{name}={value}: {error}") from None
    return {**settings, "rule_settings": ",".join(of_rule)}


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
