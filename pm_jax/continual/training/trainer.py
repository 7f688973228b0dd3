"""Trains the tasks of a run, piece by piece, so that a run can be saved and stopped in between."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.data import DeviceData, HostData, Order
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import Stop
from pm_jax.continual.training import hooks
from pm_jax.continual.training.divergence import check_finite, check_state
from pm_jax.continual.training.partition import Trainable
from pm_jax.continual.training.snapshots import Snapshots
from pm_jax.continual.training.steps import TaskSteps, segments
from pm_jax.continual.training.task_program import Segment, TaskProgram
from pm_jax.types import Array, Key, Params, PyTree


class TrainingState(NamedTuple):
    """Where the training of a task stands.

    Attributes:
        trainable: what trains.
        optimizer: the optimiser's state.
        trajectory: snapshots so far, for rules that need them, or `None`.
    """

    trainable: Trainable
    optimizer: PyTree
    trajectory: dict[str, Any] | None


class Piece(NamedTuple):
    """Some steps of an epoch that were made.

    Attributes:
        state: state after them.
        epoch: number of the epoch, from 0.
        step: steps of the task made so far.
        loss: mean loss of the piece.
        examples: examples seen in the piece, padding included.
        seconds: time that it took.
    """

    state: TrainingState
    epoch: int
    step: int
    loss: float
    examples: int
    seconds: float


class Trainer:
    """Trains the tasks of a run.

    Args:
        config: settings of the run.
        key: PRNG key of the run.
        first: program of the first task.
        later: program of the other tasks.
        snapshots: takes the snapshots that the merge rule asks for.
        data: training data of the tasks.
        steps: steps of each task.
        checkpoint_every: steps between checkpoints, at which pieces end; 0 for none.
        stop: cuts pieces short after a request to end.
        directory: where the run saves something, for messages, or `None`.
    """

    def __init__(
        self,
        config: Config,
        key: Key,
        first: TaskProgram,
        later: TaskProgram,
        snapshots: Snapshots,
        data: DeviceData | HostData,
        steps: TaskSteps,
        checkpoint_every: int,
        stop: Stop,
        directory: Path | None,
    ):
        self._config, self._key, self._directory = config, key, directory
        self._first, self._later, self._snapshots = first, later, snapshots
        self._data, self._steps = data, steps
        self._every, self._stop = checkpoint_every, stop
        self._hook = config.merge_rule.needs.hook

    def begin(self, task: int, start: Params, rule_state: PyTree) -> TrainingState:
        """The state before the first step of a task."""
        trainable, optimizer = self._program(task).begin(
            self._key, start, number(task), *self._for_hook(rule_state)
        )
        blank = self._snapshots.blank(start)
        trajectory = self._snapshots.taken(blank, self._cuts(task), 0, start, trainable)
        return TrainingState(trainable, optimizer, trajectory)

    def shapes(self, task: int, params: Params, rule_state: PyTree) -> TrainingState:
        """A state with the shapes of a task's, for a checkpoint to be restored into."""
        trainable, optimizer = jax.eval_shape(
            self._program(task).begin, self._key, params, number(task), *self._for_hook(rule_state)
        )
        return TrainingState(trainable, optimizer, self._snapshots.blank(params))

    def pieces(
        self, task: int, first: int, start: Params, rule_state: PyTree, state: TrainingState
    ) -> Iterator[Piece]:
        """Train a task from its step `first` on; a yielded piece is whole and may be saved.

        The buffers of the state are donated to the next piece.

        Raises:
            TrainingDiverged: a loss or a number of the state is not finite.
        """
        per_epoch, total = self._steps.per_epoch[task], self._steps.of_task(task)
        program, cuts = self._program(task), self._cuts(task)
        for epoch, low, high in segments(first, total, per_epoch, self._every, cuts):
            clock = time.perf_counter()
            trainable, optimizer, losses = self._train(
                task, epoch, low, high, start, rule_state, state
            )
            seconds = max(0.0, time.perf_counter() - clock)
            done = epoch * per_epoch + low
            step = done + len(losses)
            check_finite(losses, task, done, self._config, self._directory)
            moved = {"trained": trainable, "optimizer": optimizer}
            check_state(moved, task, f"step {step}", self._config, self._directory)
            if hooks.refreshes(self._hook, step, per_epoch, self._steps.epochs[task]):
                trainable, optimizer = program.refresh(
                    self._key, trainable, optimizer, number(task), step, rule_state
                )
            trajectory = self._snapshots.taken(state.trajectory, cuts, step, start, trainable)
            state = TrainingState(trainable, optimizer, trajectory)
            examples = len(losses) * self._config.batch_size
            yield Piece(state, epoch, step, float(losses.mean()), examples, seconds)

    def _train(
        self,
        task: int,
        epoch: int,
        first: int,
        stop: int,
        start: Params,
        rule_state: PyTree,
        state: TrainingState,
    ) -> tuple[Trainable, PyTree, np.ndarray]:
        """Make some steps of an epoch, fewer after a request to end; also their losses."""
        program, epochs = self._program(task), self._steps.epochs[task]
        trainable, optimizer = state.trainable, state.optimizer
        per_epoch, total = self._steps.per_epoch[task], self._steps.of_task(task)
        projected = hooks.projects(self._hook, epoch * per_epoch + first, total)

        def rows(data: DeviceData) -> Array:
            order: Order = program.order(self._key, data, number(task), epoch)
            return order.rows

        losses = []
        windows = program.batches.windows(self._data, rows, first, stop)
        for low, high, data in self._stop.cut(windows):
            segment = Segment.of(task, epoch, low, high, epochs, projected)
            trainable, optimizer, values = program.train(
                self._key, trainable, optimizer, start, data, segment, *self._for_hook(rule_state)
            )
            # Waits, so that no more windows than planned are on the device.
            losses.append(np.asarray(values)[low:high])
        return trainable, optimizer, np.concatenate(losses)

    def _program(self, task: int) -> TaskProgram:
        return self._first if task == 0 else self._later

    def _cuts(self, task: int) -> tuple[int, ...]:
        """Steps of a task at which snapshots are due."""
        return self._snapshots.steps(self._steps.of_task(task))

    def _for_hook(self, rule_state: PyTree) -> tuple[PyTree, ...]:
        """The rule's state where its hook takes part in training."""
        return (rule_state,) if self._hook else ()
