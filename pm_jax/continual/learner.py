"""The task loop: train, measure curvature, merge, evaluate, save; one seed of one configuration."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pm_jax import trees
from pm_jax.continual.interruption import StopRequests, end_if
from pm_jax.continual.merging import landscape, trust
from pm_jax.continual.merging.merging import Merging, RunState, TrainedTask
from pm_jax.continual.merging.programs import programs, starting_params
from pm_jax.continual.merging.records import Records
from pm_jax.continual.placement import feed, processes
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.storage import reuse
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.continual.storage.logs import RunLog
from pm_jax.continual.training import hooks, task_program
from pm_jax.continual.training.divergence import check_finite, check_state
from pm_jax.continual.training.task_program import Segment, TaskProgram
from pm_jax.types import InvalidInput, Params, PyTree


class Learner:
    """A continual learner: one seed of one configuration.

    Args:
        config: settings.
        seed: of everything random.
        directory: of checkpoints and logs; `None` to keep nothing.
        options: what to save, show and share; `run` obeys `options.stop` with `Interrupted`.

    Attributes:
        stream: the tasks.

    Raises:
        InvalidInput: settings that do not fit the data or the model.

    Example:
        >>> config = Config(num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(8,))
        >>> results = Learner(config, seed=0, options=RunOptions(quiet=True)).run()
        >>> len(results["accuracy_matrix"]), results["merges"][0]["alpha"]
        (2, 1.0)
    """

    def __init__(
        self,
        config: Config,
        seed: int,
        directory: Path | None = None,
        options: RunOptions = RunOptions(),
    ):
        self._options = options
        self._stop = options.stop or StopRequests()
        self.config, self.seed, self.directory = config, seed, directory
        self.stream = config.task_stream(seed)
        self._by_domain = self.stream.scenario == "domain_incremental"
        self._rule = config.merge_rule
        alone = self._rule.takes_part_in_training or processes.several()
        shared = None if alone else options.shared
        self._shared = reuse.SharedTraining(shared / f"seed_{seed}") if shared else None
        lessons = self.stream.together() if self._rule.tasks_at_once else self.stream
        self._programs = programs(
            config,
            self.stream.num_classes,
            self.stream.inputs.shape[1:],
            lessons.train.positions.shape[1],
            int(lessons.class_masks.sum(axis=1).max()),
        )
        self._devices = devices_of(config)
        self._key = self._devices.place(jax.random.key(seed))
        self._train = feed.placed(config, lessons, lessons.train)
        self._held_out, validation = (
            feed.of_split(self._train, split, self.stream.class_masks)
            for split in (getattr(self.stream, config.evaluate_on), self.stream.validation)
        )
        self._merging = Merging(
            config, self._key, self.stream, self._programs, self._train, validation
        )
        per_epoch = -(-lessons.train.sizes // config.batch_size)
        epochs = np.asarray([config.epochs_of(task) for task in range(lessons.num_tasks)])
        self._steps_per_epoch = per_epoch.tolist()
        self._bounds = [0, *np.cumsum(per_epoch * epochs).tolist()]
        self._reset()

    def _reset(self) -> None:
        params = starting_params(self.config, self._programs.init(self._key))
        theta_0 = self._devices.place(params)
        self._state = self._merging.fresh(theta_0)
        self._trajectory: PyTree = None
        self._adapters = self._merging.blank_adapters(theta_0)
        self._records = Records(
            self.stream.num_tasks,
            self._rule,
            onset=self._merging.wants_onset,
            landscape_points=self.config.landscape_points,
            plane_points=self.config.plane_points,
        )

    @property
    def params(self) -> Params:
        """The merged model so far as it predicts, full parameter tree."""
        return self._merging.predicting(self._state)

    @property
    def total_steps(self) -> int:
        """Steps of all tasks."""
        return self._bounds[-1]

    def run(self) -> dict[str, Any]:
        """Learn all tasks, from the newest checkpoint on that is whole, if there is one.

        Returns:
            What `results.json` holds, but for its configuration, manifest and environment.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            InvalidInput: a checkpoint that is whole and does not fit.
            Interrupted: a request to end came; everything is saved.
            OSError: a checkpoint could not be written.
        """
        if self.directory is None:
            return self._run(None)
        self.directory.mkdir(parents=True, exist_ok=True)
        folder = self.directory / "checkpoints"
        with Checkpoints(folder, self._options.keep_checkpoints, asynchronous=True) as checkpoints:
            return self._run(checkpoints)

    def write_landscape(self, directory: Path) -> None:
        """Write what was seen around the merges, if anything was."""
        points = self.config.landscape_points
        if points or self.config.plane_points:
            landscape.write(directory / landscape.FILE, points, self._records.arrays)

    def finished_params(self) -> Params:
        """The merged model of a run that is finished, from its last checkpoint.

        Returns:
            Full parameter tree, as in `params`.

        Raises:
            InvalidInput: there is no checkpoint of the end, or it is damaged.
        """
        if self.directory is None:
            raise InvalidInput("workdir=: a run without one keeps no checkpoint")
        with Checkpoints(self.directory / "checkpoints") as checkpoints:
            if checkpoints.latest() != self.total_steps:
                raise InvalidInput(
                    f"workdir={self.directory}: has no checkpoint of the end of its run; move its "
                    "results.json away to have it run again"
                )
            self._restore(checkpoints, self.total_steps)
        return self.params

    def _run(self, checkpoints: Checkpoints | None) -> dict[str, Any]:
        self._reset()
        step, training_state, warnings = (
            checkpoints.newest(functools.partial(self._restore, checkpoints))
            if checkpoints
            else (0, None, [])
        )
        first = processes.is_first()
        log = RunLog(
            self.directory if first else None,
            f"{self.config.rule}, seed {self.seed}",
            self.total_steps,
            resume_step=step,
            quiet=self._options.quiet or not first,
            tensorboard=self._options.tensorboard,
        )
        try:
            for warning in warnings:
                log.tell(warning)
            if step:
                log.tell(f"going on from step {step} of {self.total_steps}")
            elif self._by_domain:  # for the forward transfer
                self._records.arrays["initial"] = self._accuracy(self.stream.num_tasks)
            first_task = int(np.searchsorted(self._bounds, step, side="right")) - 1
            for task in range(first_task, len(self._steps_per_epoch)):
                self._learn(task, step, training_state, checkpoints, log)
                step, training_state = self._bounds[task + 1], None
        finally:
            log.close()
        return self._results()

    def _learn(
        self,
        task: int,
        step: int,
        training_state: tuple[PyTree, PyTree] | None,
        checkpoints: Checkpoints | None,
        log: RunLog,
    ) -> None:
        """One task from a step on, to its merge, evaluation and checkpoint."""
        start = trees.replace(self._state.params, self._state.start)
        trained = self._trained_before(task, start, log) if training_state is None else None
        if trained is None:
            trained = self._train_task(task, step, start, training_state, checkpoints, log)
            if self._shared:
                self._shared.keep(task, start, trained, log.lines("epoch", task + 1))
        info = self._merge(task, start, trained)
        seen = self._merging.tasks_seen(task)
        accuracies = self._accuracy(self.stream.num_tasks if self._by_domain else seen)
        self._records.arrays["accuracy"][:, seen - 1] = accuracies
        end, mean = self._bounds[task + 1], float(np.mean(accuracies[0, :seen]))
        log.write("merge", step=end, task=task + 1, **info)
        if task and self.config.trust != "off":
            for warning in trust.of_merge(info):
                log.tell(f"task {task + 1}: {warning}")
        log.write("evaluate", step=end, task=task + 1, accuracy=mean)
        log.tell(
            f"task {task + 1} of {len(self._steps_per_epoch)}: alpha {info['alpha']:.3f}, "
            f"accuracy on the tasks seen {100 * mean:.1f} %"
        )
        if checkpoints:
            checkpoints.save(end, self._saved(None))
        if end < self.total_steps:
            end_if(self._stop.received(), end, self.total_steps)

    def _trained_before(self, task: int, start: Params, log: RunLog) -> Params | None:
        """The trained model if another run has trained the same; its log and time are taken over.

        A run's times are then what they would be had it trained by itself.
        """
        found = self._shared.find(task, start) if self._shared else None
        if task < self.config.from_task:
            found = reuse.branch_model(self.config, self.seed, task, start)
        if found is None:
            return None
        trained, lines = found
        for line in lines:
            log.write(**line)
            self._records.add_time("train", line["seconds"])
        return self._devices.place(trained)

    def _train_task(self, task, step, start, training_state, checkpoints, log) -> Params:
        program, hooked = self._program(task), self._hooked()
        task_array = np.asarray(task, np.int32)
        state = training_state or program.begin(self._key, start, task_array, *hooked)
        begin, per_epoch = self._bounds[task], self._steps_per_epoch[task]
        epochs = self.config.epochs_of(task)
        snapshots = self._programs.snapshots
        cuts = snapshots.steps(epochs * per_epoch)
        if not training_state:
            blank = snapshots.blank(start)
            self._trajectory = snapshots.taken(blank, cuts, 0, start, state[0])
        pieces = task_program.segments(
            step - begin, epochs * per_epoch, per_epoch, self._options.checkpoint_every, cuts
        )
        for epoch, first, stop in pieces:
            state, within = self._train_piece(task, epoch, first, stop, start, state, log)
            if hooks.refreshes(self._rule.hook, within, per_epoch, epochs):
                state = program.refresh(self._key, *state, task_array, within, *hooked)
            self._trajectory = snapshots.taken(self._trajectory, cuts, within, start, state[0])
            due = self._options.checkpoint_every and within % self._options.checkpoint_every == 0
            if within == epochs * per_epoch:
                continue
            asked = self._stop.received()
            if checkpoints and (due or asked):
                checkpoints.save(begin + within, self._saved(state))
            end_if(asked, begin + within, self.total_steps)
        self._adapters = state[0].adapters or self._merging.blank_adapters(start)
        return self._programs.trained(start, state[0])

    def _train_piece(
        self,
        task: int,
        epoch: int,
        first: int,
        stop: int,
        start: Params,
        state: tuple[PyTree, PyTree],
        log: RunLog,
    ) -> tuple[tuple[PyTree, PyTree], int]:
        """Some steps of an epoch, fewer after a request to end; also the step of the task then."""
        clock, program = time.perf_counter(), self._program(task)
        epochs, per_epoch = self.config.epochs_of(task), self._steps_per_epoch[task]
        done = epoch * per_epoch

        def order(data):
            return program.order(self._key, data, np.asarray(task, np.int32), epoch)

        projected = hooks.projects(self._rule.hook, done + first, epochs * per_epoch)
        found, reached = [], first
        stretches = feed.stretches(self._train, order, self.config.batch_size, first, stop)
        for low, reached, data in self._stop.cut(stretches):
            segment = Segment.of(task, epoch, low, reached, epochs, projected)
            trainable, optimizer_state, losses = program.train(
                self._key, *state, start, data, segment, *self._hooked()
            )
            state = trainable, optimizer_state
            # Waits, so that no more windows than planned are on the device.
            found.append(np.asarray(losses)[low:reached])
        values = np.concatenate(found)
        seconds = self._records.time("train", clock)
        check_finite(values, task, done + first, self.config, self.directory)
        moved = dict(zip(("trained", "optimizer"), state, strict=True))
        check_state(moved, task, f"step {done + reached}", self.config, self.directory)
        images = (reached - first) * self.config.batch_size
        log.write(
            "epoch",
            step=self._bounds[task] + done + reached,
            task=task + 1,
            epoch=epoch + 1,
            loss=float(values.mean()),
            seconds=seconds,
            images_per_second=round(images / seconds, 1) if seconds else float("nan"),
        )
        return state, done + reached

    def _merge(self, task: int, start: Params, trained: Params) -> dict[str, float]:
        """Move the run's state on by a trained task; returns what there is to say of the merge."""
        loss = self._merging.held_out_loss(trained, task)
        # The last update can be what diverges.
        last = self._bounds[task + 1] - self._bounds[task] - 1
        check_finite([loss], task, last, self.config, self.directory)
        if self._options.keep_task_models and self.directory:
            pretrained = None if self.config.from_scratch else start
            whole = self._devices.whole((trained, pretrained))
            if processes.is_first():
                reuse.keep_task_model(self.directory, task, self._programs.merging, *whole)
        found = TrainedTask(start, trained, loss, self._adapters, self._trajectory)
        self._trajectory = None
        self._state, info = self._merging.merge(task, self._state, found, self._records)
        check_state(self._state, task, "merge", self.config, self.directory)
        return info

    def _accuracy(self, count: int) -> np.ndarray:
        """Accuracies [2, T] of the merged model on the first tasks, NaN for the others."""
        clock = time.perf_counter()
        seen = self.stream.class_masks[:count].any(axis=0)
        scores = self._programs.scores(
            self.params, self._held_out, seen, np.asarray(count, np.int32)
        )
        found = np.stack([scores.accuracy, scores.task_aware])
        self._records.time("evaluate", clock)
        found[:, count:] = np.nan
        return found

    def _hooked(self) -> tuple[PyTree, ...]:
        """What training is given beyond what every rule's is: the state of a rule with a hook."""
        return (self._state.rule,) if self._rule.hook else ()

    def _program(self, task: int) -> TaskProgram:
        return self._programs.first if task == 0 else self._programs.later

    def _saved(self, training_state: tuple[PyTree, PyTree] | None) -> PyTree:
        """All that a run needs to go on, for a step within a task or at its end."""
        state = {**self._state._asdict(), "records": self._records.arrays}
        if training_state:
            state["trainable"], state["optimizer"] = training_state
            if self._trajectory:
                state["trajectory"] = self._trajectory
        return state

    def _restore(self, checkpoints: Checkpoints, step: int) -> tuple[PyTree, PyTree] | None:
        """Go back to a checkpoint; returns the training state if it lies within a task."""
        training_state = None
        if step not in self._bounds:
            task = int(np.searchsorted(self._bounds, step, side="right")) - 1
            training_state = jax.eval_shape(
                self._program(task).begin,
                self._key,
                self._state.params,
                np.asarray(task, np.int32),
                *self._hooked(),
            )
            self._trajectory = self._programs.snapshots.blank(self._state.params)
        state = checkpoints.restore(step, self._devices.shapes(self._saved(training_state)))
        self._state = RunState(**{name: state[name] for name in RunState._fields})
        self._trajectory = state.get("trajectory")
        self._records.restore(state["records"])
        return (state["trainable"], state["optimizer"]) if training_state else None

    def _results(self) -> dict[str, Any]:
        return {
            **self._records.results(initial=self._by_domain),
            "rule_state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.rule)),
        }
