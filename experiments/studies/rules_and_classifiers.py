"""Run a grid of rules and classifiers on a stream; the same command goes on where it was stopped.

Every cell is one training, evaluated with all of --classifiers on test and on validation data, and
one line of the ledger. In this order: every rule at --learning_rate for the first of --grid_seeds
and then the others; the --leading rules of these, by validation accuracy, at --learning_rates;
every rule at its best rate for the other --seeds. A cell that would end after --minutes does not
begin, and the same command goes on later. --tables prints the tables of a ledger, of all its
streams, alone.

python -m experiments.studies.rules_and_classifiers --preset=clinc150_10_minilm_study \
    --workdir=runs/study_clinc150 --ledger=runs/ledger.jsonl --minutes=60 --learning_rate=3e-5 \
    --classifiers=trained,discriminant,ridge --seeds=0,1,2 --data_dir=DIR \
    --pretrained=DIR/model.safetensors
python -m experiments.studies.rules_and_classifiers --tables --ledger=runs/ledger.jsonl
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags

from experiments import flags as experiment_flags
from experiments.studies import ledger, study

RULES = [
    *("frozen", "first_session", "sequential", "averaging", "slao"),
    *("perturb_and_merge", "perturb_and_merge+curvature=input_moment", "pam", "became"),
    *("null_space", "opcm", "regmean"),
]

study.define_flags("runs/rules_and_classifiers", "WORKDIR/ledger.jsonl")
experiment_flags.define_tuple("seeds", (0,), "Seeds of the tables.")
experiment_flags.define_tuple("grid_seeds", (0,), "Seeds that rates are chosen with.")
experiment_flags.define_tuple(
    "learning_rates", (), "Rates that the leading rules are tried with; empty for none.", float
)
flags.DEFINE_integer("leading", 5, "How many rules are tried with them.", 0)
flags.DEFINE_list("rules", RULES, "Rules, as experiments.compare takes them.")


class Grid(study.Study):
    """The grid of one stream."""

    def cells(self) -> Iterator[study.Cell]:
        """Yield the cells in their order; later ones depend on the lines of those before."""
        values, base_rate = flags.FLAGS, self.base.learning_rate
        for seed in values.grid_seeds:
            yield from (self.cell(rule, base_rate, seed) for rule in self.rules)
        # Lines of other seeds come later, and must not change what leads.
        grid = [line for line in self.own_lines() if line["seed"] in values.grid_seeds]
        for rule in ledger.leading(grid, base_rate, values.leading):
            for rate in values.learning_rates:
                yield from (self.cell(rule, rate, seed) for seed in values.grid_seeds)
        for seed in values.seeds:
            for rule in self.rules:
                # Asked anew for every cell: by now the lines of the grid are there.
                own = [line for line in self.own_lines() if line["rule"] == rule]
                rate = ledger.chosen_rate(own, rule) if own else base_rate
                yield self.cell(rule, rate, seed)


def main(argv: Sequence[str]) -> None:
    """Run the cells that are missing, as long as there is time, and print the tables."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        workdir = Path(values.workdir)
        path = Path(values.ledger or workdir / "ledger.jsonl")
        if values.tables:
            return study.print_ledger(path)
        base = experiment_flags.config_from_flags()
        experiment_flags.check_seeds("seeds", values.seeds)
        experiment_flags.check_seeds("grid_seeds", values.grid_seeds)
        grid = Grid(base, values.rules, values.learning_rates, workdir=workdir, path=path)
        for cell in grid.cells():
            grid.find(cell)  # for its errors
        grid.run_missing(grid.cells())


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
