"""Merge rules side by side on one stream: a table with error bars, and plots.

python -m experiments.compare --rules=all --dataset=digits --seeds=0,1,2 --workdir=runs/rules
python -m experiments.compare --rules=sequential,ties+keep=0.1,averaging+epochs=9 --workdir=...
python -m experiments.compare --rules=perturb_and_merge --curvature=kronecker,low_rank --workdir=...

Every rule runs with the settings that the flags give, but training is perturbed for
perturb_and_merge alone. A rule may have its own after it: settings of the rule, or any flag of
experiments.train, as averaging+perturbation=symmetric. With a list of curvatures, rules that take
curvature run with each. Every rule has a column of final accuracy for each of --classifiers, all
from one training. Runs that are finished in the work directory are kept, and training that rules
have in common is done once. What needs the data of all tasks is shown apart, as a bound. The last
sentence says whether adapting pays: the best rule that adapts against the frozen model. All of it
is in WORKDIR/report.html, with plots.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import flags as experiment_flags
from pm_jax import rules
from pm_jax.continual import Config
from pm_jax.continual.interruption import StopRequests
from pm_jax.continual.report import comparison, comparison_plots, sentences
from pm_jax.continual.report.adapting import UNKNOWN
from pm_jax.continual.report.comparison_report import write_report
from pm_jax.continual.rule_comparison import (
    configurations,
    directories_of,
    run_rules,
    table_of,
    write_tables,
)
from pm_jax.continual.run import describe
from pm_jax.continual.settings.groups import changes
from pm_jax.continual.storage.progress import waiting
from pm_jax.types import InvalidInput

experiment_flags.define_config_flags()
experiment_flags.define_run_flags()
flags.DEFINE_list(
    "rules",
    ["all"],
    "Rules to compare, with commas between them; all: each once. A rule may have settings of its "
    "own after it as name+setting=value+flag=value, with colons between the numbers of a tuple. "
    "The flag --rule is not read.\n"
    f"Each is one of {', '.join(rules.REGISTRY)}.",
)
flags.DEFINE_boolean(
    "keep_shared_training",
    False,
    "Keep the training that rules have in common when all are finished. Rules that a later call "
    "adds then begin with it, in the folder shared_training.",
)


def main(argv: Sequence[str]) -> None:
    """Check everything, then run, and print the table."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        curvatures = values.curvature.split(",")
        base = experiment_flags.config_from_flags(curvature=curvatures[0])
        if values["rule_settings"].present:
            raise InvalidInput(
                f"rule_settings={base.rule_settings}: belongs to one rule; write it after the "
                "rule's name, as --rules=perturb_and_merge+clip=false"
            )
        configs = configurations(base, values.rules, curvatures, experiment_flags.parse_setting)
        stop = StopRequests()
        options = experiment_flags.options_from_flags(stop=stop)
        workdir = Path(values.workdir) if values.workdir else None
        # For its errors; once for all that train alike.
        with waiting("reading data, compiling"):
            for config in dict.fromkeys(map(_what_is_described, configs.values())):
                describe(config, values.seeds[0])
        if values.dry_run:
            print(describe(base, values.seeds[0]))
            for label, config in configs.items():
                print(f"{label}: {changes(base, config) or 'as above'}")
            directories = directories_of(configs, workdir).values() if workdir else ()
            print(sentences.duration(list(directories), values.seeds))
            return
        if not workdir:
            raise InvalidInput("workdir=: needs a directory, as --workdir=runs/rules")
        with stop:
            keep = values.keep_shared_training
            results = run_rules(
                configs, base, values.seeds, workdir, options, keep_shared_training=keep
            )
        rows, verdict = table_of(results, configs)
        print(comparison.as_text(rows), comparison.caption(rows), sep="\n")
        print(verdict.sentence() if verdict else UNKNOWN)
        files = write_tables(rows, values.seeds, workdir, verdict)
        try:
            with waiting("drawing the plots, writing the report"):
                plots = comparison_plots.plots_of(rows, results)
                files += comparison_plots.write_plots(plots, base.evaluate_on, workdir)
                own = {label: changes(base, config) for label, config in configs.items()}
                report = write_report(rows, results, plots, (base, own), workdir, verdict)
            files.append(report)
        except ImportError:
            missing = "matplotlib is not installed; pip install 'pm_jax[plots]'"
            print(f"plots, report: skipped, {missing}")
        print("written:", *files)


def _what_is_described(config: Config) -> Config:
    """Return the settings of training, with those of merging that a model may not go with."""
    return dataclasses.replace(
        config.without_merging(),
        classifiers=config.classifiers,
        drift_correction=config.drift_correction,
        model_state=config.model_state,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
