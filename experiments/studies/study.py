"""A study of one stream runs each of its cells once and enters a line of it in a ledger."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import compiled_programs
from experiments import flags as experiment_flags
from experiments.studies import ledger
from pm_jax.continual import Config, RunOptions
from pm_jax.continual.rule_comparison import configurations, forget_shared_training, run_rules
from pm_jax.types import InvalidInput


def define_flags(workdir: str, ledger_file: str) -> None:
    """Define the flags of all studies; a work directory and a description of a ledger differ."""
    experiment_flags.define_config_flags()
    compiled_programs.define_flag()
    flags.DEFINE_float(
        "minutes",
        0,
        "No cell but the first begins that would end after so many minutes, if it took as long as "
        "the longest so far; 0 for no bound.",
        0,
    )
    flags.DEFINE_string("stream", "", "Name in the ledger; empty for that of preset or dataset.")
    flags.DEFINE_string("workdir", workdir, "Where the runs go.")
    flags.DEFINE_string("ledger", "", f"The file of lines; empty for {ledger_file}.")
    flags.DEFINE_string("commit", "", "Commit that lines name, for code without git's history.")
    flags.DEFINE_boolean("tables", False, "Print the tables of the ledger and run nothing.")


class Cell(NamedTuple):
    """One training of a study."""

    rule: str
    config: Config
    base: Config
    seed: int


class Study:
    """The cells of a stream, and the lines of those that are finished.

    Raises:
        InvalidInput: a rule or a rate is none, or the ledger is damaged.
    """

    def __init__(
        self,
        base: Config,
        rules: Sequence[str],
        rates: Iterable[float],
        *,
        workdir: Path,
        path: Path,
    ):
        values = flags.FLAGS
        self.base, self.workdir, self.path = base, workdir, path
        self.stream = values.stream or values.preset or base.dataset
        self.lines = ledger.read(path)
        # All are made, and so checked, before any runs.
        self._bases = {
            rate: dataclasses.replace(base, learning_rate=rate)
            for rate in {base.learning_rate, *rates}
        }
        self._configs = {
            rate: configurations(one, rules, (), experiment_flags.parse_setting)
            for rate, one in self._bases.items()
        }

    @property
    def rules(self) -> list[str]:
        """The labels of the rules."""
        return list(self._configs[self.base.learning_rate])

    def cell(self, rule: str, rate: float, seed: int) -> Cell:
        """Make the cell of a rule."""
        return Cell(rule, self._configs[rate][rule], self._bases[rate], seed)

    def find(self, cell: Cell) -> ledger.Line | None:
        """Find the line of a cell."""
        return ledger.find(self.lines, self.stream, cell.rule, cell.config, cell.seed)

    def own_lines(self) -> list[ledger.Line]:
        """List the lines of this stream and these rules."""
        return [
            line
            for line in self.lines
            if line["stream"] == self.stream and line["rule"] in self.rules
        ]

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
        if commit := flags.FLAGS.commit:
            line["commit"] = commit
        ledger.append(self.path, line)
        self.lines = ledger.read(self.path)

    def run_missing(self, cells: Iterable[Cell]) -> None:
        """Run the cells that have no line as long as there is time, and print the tables."""
        minutes, start, longest = flags.FLAGS.minutes, time.monotonic(), 0.0
        for cell in cells:
            if self.find(cell):
                continue
            begins = time.monotonic()
            # The first one begins in any case, so that every call gets further.
            if minutes and longest and begins - start + longest > 60 * minutes:
                print(f"stopped after {minutes:g} minutes; the same command goes on")
                break
            self.run(cell)
            longest = max(longest, time.monotonic() - begins)
            print(_told(self.lines[-1]), flush=True)
        else:
            for rate in self._bases:
                forget_shared_training(self.workdir / f"rate_{rate:g}")
        print_tables(self.lines)


def print_ledger(path: Path) -> None:
    """Print the tables of a ledger; raises `InvalidInput` if it is empty."""
    lines = ledger.read(path)
    if not lines:
        raise InvalidInput(f"ledger={path}: has no line yet; run the study first")
    print_tables(lines)


def print_tables(lines: Sequence[ledger.Line]) -> None:
    """Print the tables of some lines, stream by stream."""
    for stream in dict.fromkeys(line["stream"] for line in lines):
        print(f"\n{ledger.table(lines, stream)}")
    print(f"\n{ledger.rule_of_thumb(lines)}")


def _told(line: ledger.Line) -> str:
    """Say in a line what came of a cell; accuracies on test data."""
    accuracies = (
        f"{name} {100 * by_split['test']['final_average_accuracy']:.1f}"
        for name, by_split in line["scores"].items()
    )
    head = f"{line['stream']}, {line['rule']}, rate {line['learning_rate']:g}, seed {line['seed']}"
    return f"{head}: test {', '.join(accuracies)}; {line['seconds']:.0f} s"
