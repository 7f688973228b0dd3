"""Trains the tasks of a run, piece by piece, so that a run can be saved and stopped in between."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pm_jax.continual.interruption import StopRequests
from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.data import DeviceData, StreamData
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import RunOptions, Stop
from pm_jax.continual.training import hooks
from pm_jax.continual.training.divergence import check_finite, check_state
from pm_jax.continual.training.partition import Trainable
from pm_jax.continual.training.snapshots import Snapshots
from pm_jax.continual.training.steps import TaskSteps, segments
from pm_jax.continual.training.task_program import Segment, TaskProgram
from pm_jax.types import Array, Key, Params, PyTree


class TrainingState(NamedTuple):
    """The state of a task's training between two steps.

    Attributes:
        model: the model's state, `{}` for one without.
        trajectory: snapshots so far, for rules that need them, or `None`.
    """

    trainable: Trainable
    optimizer: PyTree
    model: PyTree
    trajectory: dict[str, Any] | None


class Piece(NamedTuple):
    """A piece of an epoch that was trained, with the state after it.

    Attributes:
        step: steps of the task made so far.
        loss: mean over the piece.
        examples: number of examples in the piece, padding included.
    """

    state: TrainingState
    epoch: int
    step: int
    loss: float
    examples: int
    seconds: float


def _ignore(step: int, loss: float, examples: int, seconds: float) -> None:
    """Show nothing of the steps that were just made."""


class Trainer:
    """Trains the tasks of a run.

    Args:
        programs: program of the first task, of the later ones, and of tasks that move nothing that
            merges and train the classifier's columns alone.
        options: say how often to end a piece for a checkpoint, and when to stop.
        directory: named in messages if the run saves anything.

    Attributes:
        stop: says when to end early.
    """

    def __init__(
        self,
        config: Config,
        key: Key,
        programs: tuple[TaskProgram, TaskProgram, TaskProgram],
        snapshots: Snapshots,
        data: StreamData,
        steps: TaskSteps,
        options: RunOptions,
        directory: Path | None,
    ):
        self._config, self._key, self._directory = config, key, directory
        self._programs, self._snapshots = programs, snapshots
        self._data, self._steps, self._every = data, steps, options.checkpoint_every
        self._hook = config.merge_rule.needs.hook
        self.stop: Stop = options.stop or StopRequests()

    def begin(
        self, task: int, start: Params, rule_state: PyTree, model_state: PyTree
    ) -> TrainingState:
        """Make the state before the first step of a task."""
        trainable, optimizer, model_state = self._program(task).begin(
            self._key, start, number(task), *self._for_hook(rule_state), model_state=model_state
        )
        blank = self._snapshots.blank(start)
        trajectory = self._snapshots.updated(blank, self._cuts(task), 0, start, trainable)
        return TrainingState(trainable, optimizer, model_state, trajectory)

    def shapes(
        self, task: int, params: Params, rule_state: PyTree, model_state: PyTree
    ) -> TrainingState:
        """Make a state with the shapes of a task's, for a checkpoint to be restored into."""
        trainable, optimizer, of_model = jax.eval_shape(
            self._program(task).begin,
            *(self._key, params, number(task), *self._for_hook(rule_state)),
            model_state=model_state,
        )
        return TrainingState(trainable, optimizer, of_model, self._snapshots.blank(params))

    def pieces(
        self,
        task: int,
        first: int,
        start: Params,
        rule_state: PyTree,
        state: TrainingState,
        show: Callable[[int, float, int, float], None] = _ignore,
    ) -> Iterator[Piece]:
        """Train a task from a step on; a yielded piece is complete and may be saved.

        The buffers of the state are donated to the next piece. `show` is called every second or so
        with the step of the task, the mean loss since, the number of examples and the seconds.

        Raises:
            TrainingDiverged: a loss or a number of the state is not finite.
        """
        per_epoch, total = self._steps.per_epoch[task], self._steps.of_task(task)
        program, cuts, epochs = self._program(task), self._cuts(task), self._steps.epochs[task]
        hook_state = self._for_hook(rule_state)
        for epoch, low, high in segments(first, total, per_epoch, self._every, cuts):
            clock, done = time.perf_counter(), epoch * per_epoch + low
            projected = hooks.projects(self._hook, done, total)
            trainable, optimizer, model_state, trajectory = state
            losses_of_windows = []
            rows = functools.partial(self._rows, task, epoch)
            windows = program.batches.windows(self._data, rows, low, high)
            # After a request to end, there are fewer steps than planned.
            for begin, end, data in self.stop.cut(windows):
                clock_of_window = time.perf_counter()
                segment = Segment.of(task, epoch, begin, end, epochs, projected)
                trainable, optimizer, model_state, values = program.train(
                    *(self._key, trainable, optimizer, model_state, start, data, segment),
                    *hook_state,
                )
                # Waits, so that no more windows than planned are on the device.
                window = np.asarray(values)[begin:end]
                losses_of_windows.append(window)
                show(
                    epoch * per_epoch + end,
                    float(window.mean()),
                    len(window) * self._config.batch_size,
                    time.perf_counter() - clock_of_window,
                )
            losses = np.concatenate(losses_of_windows)
            # The clock of a machine may be set back.
            seconds = max(0.0, time.perf_counter() - clock)
            step = done + len(losses)
            # Checked before anything is saved, so that every checkpoint is worth going on from.
            check_finite(losses, task, done, self._config, self._directory)
            trained = {"trained": trainable, "optimizer": optimizer, "model_state": model_state}
            check_state(trained, task, f"step {step}", self._config, self._directory)
            if hooks.refreshes(self._hook, step, per_epoch, epochs):
                trainable, optimizer = program.refresh(
                    self._key, trainable, optimizer, number(task), step, rule_state
                )
            trajectory = self._snapshots.updated(trajectory, cuts, step, start, trainable)
            state = TrainingState(trainable, optimizer, model_state, trajectory)
            examples = len(losses) * self._config.batch_size
            yield Piece(state, epoch, step, float(losses.mean()), examples, seconds)

    def _rows(self, task: int, epoch: int, data: DeviceData) -> Array:
        return self._program(task).order(self._key, data, number(task), epoch).rows

    def _program(self, task: int) -> TaskProgram:
        return self._programs[min(task, 1) if self._config.moves(task) else 2]

    def _cuts(self, task: int) -> tuple[int, ...]:
        """Return the steps of a task at which snapshots are due."""
        return self._snapshots.steps(self._steps.of_task(task))

    def _for_hook(self, rule_state: PyTree) -> tuple[PyTree, ...]:
        # Without a hook the state is no argument: one that grows would have all compiled anew.
        return (rule_state,) if self._hook else ()
