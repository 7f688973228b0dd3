"""Logs that a run writes as it goes: metrics.jsonl, metrics.csv, TensorBoard, a progress bar."""

import contextlib
import csv
import json
import sys
from pathlib import Path
from typing import IO, Any

from pm_jax import files
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.progress import Pace, in_words, keep_drawing, progress_line
from pm_jax.types import InvalidInput

JSONL_FILE, CSV_FILE, EVENT_FILES = "metrics.jsonl", "metrics.csv", "events.out.tfevents.*"
COLUMNS = (
    "step",
    "event",
    "task",
    "epoch",
    "loss",
    "alpha",
    "accuracy",
    "split",
    "classifier",
    "images_per_second",
)

PHASES = {
    "train": "training",
    "curvature": "measuring curvature",
    "merge": "merging",
    "classifier": "fitting classifiers",
    "evaluate": "evaluating",
    "landscape": "looking around the merge",
}
"""Words for the phases of a task, as `records.PHASES` has them."""


class RunLog:
    """The logs of one seed's run, cut after `resume_step`; a directory `None` writes no files.

    Raises:
        InvalidInput: TensorBoard is asked for and tensorboardX is not installed.
    """

    def __init__(
        self,
        directory: Path | None,
        label: str,
        total_steps: int,
        resume_step: int = 0,
        quiet: bool = False,
        tensorboard: bool = False,
        *,
        title: str = "",
        inputs: str = "images",
    ):
        self._label, self._quiet, self._directory = label, quiet, directory
        self._title, self._inputs = title or label, inputs
        self._bar = progress_line(
            "{percentage:3.0f}%|{bar:8}| {desc}",
            quiet,
            total=total_steps,
            initial=resume_step,
            desc=self._title,
        )
        self._stop_drawing = keep_drawing(self._bar)
        self._shown: set[tuple[str, bool]] = set()
        self._step, self._total, self._pace = resume_step, total_steps, Pace()
        self._doing, self._speed, self._tasks_left = "", "", 0
        if directory:
            entries = manifest.read_or_empty(directory).within(JSONL_FILE)
            for name, what in manifest.damage(directory, entries):
                self.tell(f"warning: {name} {what}; what can be read of it is kept")
            # Cut, so that an interrupted run leaves the same lines as an uninterrupted one.
            self._jsonl, self._csv_file = _reopened(directory, resume_step)
            self._csv = _csv_writer(self._csv_file)
        self._events = None
        if directory and tensorboard:
            # TensorBoard then hides what an interrupted process wrote after the step resumed from.
            self._events = _summary_writer()(str(directory), purge_step=resume_step + 1)

    def write(self, event: str, *, step: int, **figures: Any) -> None:
        """Add a line; a figure that is not finite becomes null."""
        self._move_to(step)
        if event == "evaluate":
            self._pace.ended()
            self._tasks_left -= 1
        if self._directory:
            self._append({"step": step, "event": event, **files.without_nan(figures)})
        if self._events:
            for name, value in figures.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{event}/{name}", value, step)

    def trained(self, step: int, loss: float, examples: int, seconds: float) -> None:
        """Show the mean loss of some steps of training that ended at a step of the run."""
        if step > self._step:
            self._pace.trained(step - self._step, seconds)
        speed = f", {examples / seconds:,.0f} {self._inputs}/s" if seconds else ""
        self._speed = f", loss {loss:.4f}{speed}"
        self._move_to(step)
        self._describe()

    def show(self, task: int, tasks: int, phase: str) -> None:
        """Show what is going on in a task, which is counted from 1."""
        # JAX compiles a phase when it first runs, and some programs of later tasks are others.
        kind = phase, task == 1
        first = "" if kind in self._shown else "compiling, "
        self._shown.add(kind)
        self._doing = f"task {task} of {tasks}: {first}{PHASES[phase]}"
        self._tasks_left = tasks - task + 1
        # Loss and speed are those of training.
        self._speed = self._speed if phase == "train" else ""
        self._describe()

    def _move_to(self, step: int) -> None:
        self._bar.update(step - self._step)
        self._step = step

    def _describe(self) -> None:
        left = self._pace.left(self._total - self._step, self._tasks_left)
        time_left = f", {in_words(left)} left" if left and left >= 1 else ""
        # A narrow terminal cuts the end off, so the most telling parts come first.
        text = f"{self._doing}{self._speed}{time_left}; {self._title}"
        self._bar.set_description_str(text)

    def lines(self, event: str, task: int) -> list[dict[str, Any]]:
        """Return the lines written so far about an event of a task, which is counted from 1."""
        return lines_about(self._directory / JSONL_FILE, event, task) if self._directory else []

    def tell(self, text: str) -> None:
        """Print a line for a person, above the progress bar."""
        if not self._quiet:
            self._bar.write(f"{self._label}: {text}", file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Close files and bar, and list the files in the manifest."""
        self._stop_drawing()
        self._bar.close()
        if self._directory:
            self._jsonl.close()
            self._csv_file.close()
        if self._events:
            self._events.close()
        # Checksums come last: closing writes what was still buffered.
        if self._directory:
            events = (path.name for path in self._directory.glob(EVENT_FILES))
            manifest.cover(self._directory, JSONL_FILE, CSV_FILE, *events)

    def _append(self, line: dict[str, Any]) -> None:
        self._jsonl.write(json.dumps(line) + "\n")
        self._csv.writerow(line)
        # Flushed line by line, so that a person can follow the run and a kill loses little.
        self._jsonl.flush()
        self._csv_file.flush()


def lines_about(path: Path, event: str, task: int) -> list[dict[str, Any]]:
    """Read the undamaged lines of a metrics.jsonl about an event of a task, counted from 1."""
    return [line for line in _read(path) if (line.get("event"), line.get("task")) == (event, task)]


def check_tensorboard() -> None:
    """Check that TensorBoard files can be written, before any work starts.

    Raises:
        InvalidInput: tensorboardX is not installed.
    """
    _summary_writer()


def _summary_writer():
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InvalidInput(
            "tensorboard=True: needs tensorboardX; pip install 'pm_jax[tensorboard]'"
        ) from None
    return SummaryWriter


def _csv_writer(file) -> csv.DictWriter:
    return csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")


def _reopened(directory: Path, resume_step: int) -> tuple[IO[str], IO[str]]:
    """Cut both logs after a step, in one rename each, and open them to append."""
    # The manifest lists them again when the run closes them.
    manifest.uncover(directory, JSONL_FILE, CSV_FILE)
    jsonl, table = directory / JSONL_FILE, directory / CSV_FILE
    kept = [line for line in _read(jsonl) if line["step"] <= resume_step]
    files.write_text(jsonl, "".join(json.dumps(line) + "\n" for line in kept))
    with files.replacing(table) as temporary, temporary.open("w", newline="") as file:
        writer = _csv_writer(file)
        writer.writeheader()
        writer.writerows(kept)
    return jsonl.open("a"), table.open("a", newline="")


def _read(path: Path) -> list[dict[str, Any]]:
    """Read a log's lines, except those that are damaged or were cut short by a kill."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(files.parse_json(text, {"step": int}))
    return lines
