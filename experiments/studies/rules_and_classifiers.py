"""Run a grid of rules and classifiers on a stream; the same command goes on where it was stopped.

Every cell is one training, evaluated with all of --classifiers on test and on validation data, and
one line of the ledger. In this order: every rule at --learning_rate for the first of --grid_seeds
and then the others; the --leading rules of these, by validation accuracy, at --learning_rates;
every rule at its best rate for the other --seeds. After --minutes no cell begins any more, and the
same command goes on later. --tables prints the tables of a ledger, of all its streams, alone.

python -m experiments.studies.rules_and_classifiers --preset=clinc150_10_minilm_study \
    --workdir=runs/study_clinc150 --ledger=runs/ledger.jsonl --minutes=60 --learning_rate=3e-5 \
    --classifiers=trained,discriminant,ridge --seeds=0,1,2 --data_dir=DIR \
    --pretrained=DIR/model.safetensors
python -m experiments.studies.rules_and_classifiers --tables --ledger=runs/ledger.jsonl
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from experiments import compiled_programs
from experiments import flags as experiment_flags
from experiments.studies import ledger
from pm_jax.continual import Config, RunOptions
from pm_jax.continual.rule_comparison import configurations, forget_shared_training, run_rules
from pm_jax.types import InvalidInput

RULES = [
    *("frozen", "first_session", "sequential", "averaging", "slao"),
    *("perturb_and_merge", "perturb_and_merge+curvature=input_moment", "pam", "became"),
    *("null_space", "opcm", "regmean"),
]

experiment_flags.define_config_flags()
compiled_programs.define_flag()
experiment_flags.define_tuple("seeds", (0,), "Seeds of the tables.")
experiment_flags.define_tuple("grid_seeds", (0,), "Seeds that rates are chosen with.")
experiment_flags.define_tuple(
    "learning_rates", (), "Rates that the leading rules are tried with; empty for none.", float
)
flags.DEFINE_integer("leading", 5, "How many rules are tried with them.", 0)
flags.DEFINE_list("rules", RULES, "Rules, as experiments.compare takes them.")
flags.DEFINE_float(
    "minutes", 0, "No run but the first begins after so many minutes; 0 for no bound.", 0
)
flags.DEFINE_string("stream", "", "Name in the ledger; empty for that of preset or dataset.")
flags.DEFINE_string("workdir", "runs/rules_and_classifiers", "Where the runs go.")
flags.DEFINE_string("ledger", "", "The file of lines; empty for WORKDIR/ledger.jsonl.")
flags.DEFINE_boolean("tables", False, "Print the tables of the ledger and run nothing.")


class Cell(NamedTuple):
    """One training of the grid."""

    rule: str
    config: Config
    base: Config
    seed: int


class Study:
    """The grid of one stream: its cells, and the lines of those that are finished."""

    def __init__(self, base: Config, stream: str, workdir: Path, path: Path):
        self.base, self.stream, self.workdir, self.path = base, stream, workdir, path
        self.lines = ledger.read(path)
        values = flags.FLAGS
        rates = {base.learning_rate, *values.learning_rates}
        # All are made, and so checked, before any runs.
        self._bases = {rate: dataclasses.replace(base, learning_rate=rate) for rate in rates}
        self._configs = {
            rate: configurations(one, values.rules, (), experiment_flags.parse_setting)
            for rate, one in self._bases.items()
        }
        for cell in self.cells():
            self.find(cell)

    @property
    def rules(self) -> list[str]:
        """The labels of the rules."""
        return list(self._configs[self.base.learning_rate])

    def cells(self) -> Iterator[Cell]:
        """Yield the cells in their order; later ones depend on the lines of those before."""
        values, base_rate = flags.FLAGS, self.base.learning_rate
        for seed in values.grid_seeds:
            yield from (self._cell(rule, base_rate, seed) for rule in self.rules)
        # Lines of other seeds come later, and must not change what leads.
        grid = [line for line in self._own_lines() if line["seed"] in values.grid_seeds]
        for rule in ledger.leading(grid, base_rate, values.leading):
            for rate in values.learning_rates:
                yield from (self._cell(rule, rate, seed) for seed in values.grid_seeds)
        for seed in values.seeds:
            for rule in self.rules:
                # Asked anew for every cell: by now the lines of the grid are there.
                own = [line for line in self._own_lines() if line["rule"] == rule]
                rate = ledger.chosen_rate(own, rule) if own else base_rate
                yield self._cell(rule, rate, seed)

    def find(self, cell: Cell) -> ledger.Line | None:
        """Find the line of a cell."""
        return ledger.find(self.lines, self.stream, cell.rule, cell.config, cell.seed)

    def run(self, cell: Cell) -> None:
        """Run a cell and enter its line."""
        directory = self.workdir / f"rate_{cell.config.learning_rate:g}"
        results = run_rules(
            {cell.rule: cell.config},
            cell.base,
            [cell.seed],
            directory,
            RunOptions(quiet=True),
            keep_shared_training=True,
        )
        [run] = results[cell.rule]
        place = f"{directory.name}/{cell.rule}/seed_{cell.seed}"
        line = ledger.line_of(self.stream, cell.rule, cell.config, run, results=place)
        ledger.append(self.path, line)
        self.lines.append(line)

    def forget_shared_training(self) -> None:
        """Delete what the rules have in common, when all are finished."""
        for rate in self._bases:
            forget_shared_training(self.workdir / f"rate_{rate:g}")

    def _own_lines(self) -> list[ledger.Line]:
        return [
            line
            for line in self.lines
            if line["stream"] == self.stream and line["rule"] in self.rules
        ]

    def _cell(self, rule: str, rate: float, seed: int) -> Cell:
        return Cell(rule, self._configs[rate][rule], self._bases[rate], seed)


def main(argv: Sequence[str]) -> None:
    """Run the cells that are missing, as long as there is time, and print the tables."""
    del argv
    values = flags.FLAGS
    start = time.monotonic()
    with experiment_flags.exits():
        workdir = Path(values.workdir)
        path = Path(values.ledger) if values.ledger else workdir / "ledger.jsonl"
        if values.tables:
            lines = ledger.read(path)
            if not lines:
                raise InvalidInput(f"ledger={path}: has no line yet; run the study first")
            return _print(lines)
        base = experiment_flags.config_from_flags()
        experiment_flags.check_seeds("seeds", values.seeds)
        experiment_flags.check_seeds("grid_seeds", values.grid_seeds)
        study = Study(base, values.stream or values.preset or base.dataset, workdir, path)
        known = len(study.lines)
        for cell in study.cells():
            if study.find(cell):
                continue
            late = values.minutes and time.monotonic() - start > 60 * values.minutes
            # The first one begins in any case, so that every call gets further.
            if late and len(study.lines) > known:
                print(f"stopped after {values.minutes:g} minutes; the same command goes on")
                break
            study.run(cell)
            print(_told(study.lines[-1]), flush=True)
        else:
            study.forget_shared_training()
        _print(study.lines)


def _told(line: ledger.Line) -> str:
    """Say in a line what came of a cell; accuracies on test data."""
    accuracies = (
        f"{name} {100 * by_split['test']['final_average_accuracy']:.1f}"
        for name, by_split in line["scores"].items()
    )
    head = f"{line['stream']}, {line['rule']}, rate {line['learning_rate']:g}, seed {line['seed']}"
    return f"{head}: test {', '.join(accuracies)}; {line['seconds']:.0f} s"


def _print(lines: Sequence[ledger.Line]) -> None:
    for stream in dict.fromkeys(line["stream"] for line in lines):
        print(f"\n{ledger.table(lines, stream)}")
    print(f"\n{ledger.rule_of_thumb(lines)}")


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
