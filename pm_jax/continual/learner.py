"""The task loop: train, measure curvature, merge, evaluate, save; one seed of one configuration."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pm_jax import lapack, trees
from pm_jax.continual import evaluation_lines
from pm_jax.continual.interruption import end_if
from pm_jax.continual.merging import landscape, trust
from pm_jax.continual.merging.merging import Merging, RunState, TrainedTask
from pm_jax.continual.merging.programs import Programs, StreamShape, programs_of
from pm_jax.continual.merging.records import Records
from pm_jax.continual.placement import processes
from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.data import of_splits, place_stream
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.own import model_of, stream_of
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.settings.settings import SPLITS
from pm_jax.continual.storage import reuse
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.continual.storage.logs import RunLog
from pm_jax.continual.storage.progress import waiting
from pm_jax.continual.training import own_model
from pm_jax.continual.training.divergence import check_finite, check_state
from pm_jax.continual.training.initial_model import is_built_in, remarks, starting_params
from pm_jax.continual.training.steps import TaskSteps
from pm_jax.continual.training.text_columns import text_columns
from pm_jax.continual.training.trainer import Trainer, TrainingState
from pm_jax.data.stream import TaskStream
from pm_jax.models.model import classifier_pattern
from pm_jax.types import InvalidInput, Params, PyTree

OF_MODEL = ("model_state", "start_state", "model_in_training")
"""Parts of a checkpoint that only models with state have."""


class Learner:
    """A continual learner: one seed of one configuration.

    Args:
        directory: gets checkpoints and logs; `None` keeps nothing.
        model: instead of the settings' model, a linen module, an nnx module or a
            `pm_jax.models.Model`; its classifier has a column for each class of all tasks.
        stream: instead of the settings' data, a `TaskStream`, or a list of tasks as
            `pm_jax.data.own.stream_of_data` takes them.
        programs: compiled functions to use instead of the configuration's own. These, and the
            methods `train_task`, `merge_task` and `accuracy`, are where a test plants a fault.

    Attributes:
        key: PRNG key of the seed.
        training_data: the examples to train on, where they lie.
        steps: the optimiser steps of every task.
        merging: what is measured and merged after a task.
        splits: examples of each of `SPLITS`, on which accuracies are measured; merges are judged
            by those for validation.
        state: what the run carries from task to task.

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
        *,
        model: Any = None,
        stream: TaskStream | Sequence[Any] | None = None,
        programs: Programs | None = None,
    ):
        self.config, self.seed, self.directory, self.options = config, seed, directory, options
        self.stream = stream_of(config, seed, stream)
        self._by_domain = self.stream.scenario == "domain_incremental"
        rule = config.merge_rule
        # A rule that takes part in training cannot use a model that was trained without it.
        alone = rule.needs.takes_part_in_training or processes.several()
        shared = None if alone else options.shared
        self._shared = reuse.SharedTraining(shared / f"seed_{seed}") if shared else None
        # Joint training has one lesson, the examples of all tasks, and is evaluated task by task.
        lessons = self.stream.together() if rule.needs.tasks_at_once else self.stream
        model = model_of(config, self.stream.num_classes, model)
        self.programs = programs or programs_of(config, StreamShape.of(lessons), model)
        self._devices = devices_of(config)
        self.key = self._devices.place(jax.random.key(seed))
        self.training_data = place_stream(config, lessons, lessons.train)
        self.splits = of_splits(self.training_data, self.stream, SPLITS)
        self.steps = TaskSteps.of(config, lessons.train.sizes)
        self.merging = Merging(
            config,
            self.key,
            self.stream,
            self.programs,
            self.training_data,
            self.splits["validation"],
        )
        training = self.programs.training
        self._trainer = Trainer(
            config,
            self.key,
            (training.first, training.later, training.columns),
            self.programs.snapshots,
            self.training_data,
            self.steps,
            options,
            directory,
        )
        self._stop = self._trainer.stop
        self._reset()

    def _reset(self) -> None:
        """Go back to the state before the first task."""
        training = self.programs.training
        params, model_state = training.init_with_state(self.key)
        if not is_built_in(training.model):
            own_model.check_values(
                own_model.name_of(training.model, self.config.model), params, model_state
            )
        params = starting_params(self.config, params)
        if self.config.has_text_columns:
            params = trees.replace(params, text_columns(self.config, self.stream.class_names))
        self.state = self.merging.initial_state(
            self._devices.place(params), self._devices.place(model_state)
        )
        self._records = Records(self.stream.num_tasks, self.config, self.merging.wants_onset)
        self._class_hits: np.ndarray | None = None

    @property
    def params(self) -> Params:
        """Parameters of the merged model with the first classifier, as a full parameter tree.

        Raises:
            InvalidInput: that classifier is not linear in the model's features.
        """
        return self._params_with(self.config.classifiers[0])

    def _params_with(self, classifier: str) -> Params:
        # Before the first merge there are no statistics to make a classifier of.
        if not self._records.merged:
            return self.state.params
        return self.merging.params_for_prediction(self.state, classifier)

    @property
    def model_state(self) -> PyTree:
        """The state of the merged model, such as batch statistics; `{}` for models without."""
        return self.state.model_state

    @property
    def total_steps(self) -> int:
        """The number of steps of all tasks."""
        return self.steps.total

    def run(self) -> dict[str, Any]:
        """Learn all tasks, from the newest whole checkpoint on; returns the results as JSON.

        Raises:
            TrainingDiverged: a number is no longer finite.
            InvalidInput: a whole checkpoint does not fit.
            Interrupted: `options.stop` had a request to end; everything is saved.
            OSError: a checkpoint could not be written.
        """
        with lapack.one_thread():
            if self.directory is None:
                return self._run(None)
            self.directory.mkdir(parents=True, exist_ok=True)
            folder, kept = self.directory / "checkpoints", self.options.keep_checkpoints
            with Checkpoints(folder, kept, asynchronous=True) as checkpoints:
                return self._run(checkpoints)

    def write_landscape(self, directory: Path) -> None:
        """Write the scores around the merges, if the settings ask for any."""
        points = self.config.landscape_points
        if points or self.config.plane_points:
            landscape.write(directory / landscape.FILE, points, self._records.arrays)

    def finished_params(self, classifier: str | None = None) -> Params:
        """Read the merged model of a finished run, with a classifier, from its last checkpoint.

        Raises:
            InvalidInput: there is no checkpoint of the end, or it is damaged; a classifier that is
                not linear in the model's features.
        """
        if self.directory is None:
            raise InvalidInput("workdir=: a run without one keeps no checkpoint")
        with Checkpoints(self.directory / "checkpoints") as checkpoints:
            if checkpoints.latest() != self.total_steps:
                raise InvalidInput(
                    f"workdir={self.directory}: has no checkpoint of the end of its run; move its "
                    "results.json away to have it run again"
                )
            self.restore(checkpoints, self.total_steps)
        return self._params_with(classifier or self.config.classifiers[0])

    def _run(self, checkpoints: Checkpoints | None) -> dict[str, Any]:
        # The others would write the same lines into the same files.
        first = processes.is_first()
        quiet = self.options.quiet or not first
        title = self.options.title(self.config.rule, self.seed)
        with waiting(f"beginning; {title}", quiet):
            self._reset()
            step, training_state, warnings = (
                checkpoints.newest(functools.partial(self.restore, checkpoints))
                if checkpoints
                else (0, None, [])
            )
        log = RunLog(
            self.directory if first else None,
            f"{self.options.label or self.config.rule}, seed {self.seed}",
            self.total_steps,
            resume_step=step,
            quiet=quiet,
            tensorboard=self.options.tensorboard,
            title=title,
            inputs="texts" if self.config.reads_text else "images",
        )
        try:
            for line in [*warnings, *([] if step else [*remarks(self.config), *self.stream.notes])]:
                log.tell(line)
            if step:
                log.tell(f"going on from step {step} of {self.total_steps}")
            elif self._by_domain:
                log.show(1, len(self.steps.epochs), "evaluate")
                # Forward transfer compares with the accuracies before the first task.
                self._records.arrays["initial_scores"] = self.accuracy(self.stream.num_tasks)
            for task in range(self.steps.task_at(step), len(self.steps.epochs)):
                self._learn(task, step, training_state, checkpoints, log)
                step, training_state = self.steps.bounds[task + 1], None
        finally:
            log.close()
        by_class = self._accuracy_by_class()
        return {
            **self._records.results(initial=self._by_domain, by_class=by_class),
            "rule_state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.rule)),
        }

    def _learn(
        self,
        task: int,
        step: int,
        training_state: TrainingState | None,
        checkpoints: Checkpoints | None,
        log: RunLog,
    ) -> None:
        """Learn one task from a step on: its training, merge, evaluation and checkpoint."""
        self._records.on_phase = functools.partial(log.show, task + 1, len(self.steps.epochs))
        start = trees.replace(self.state.params, self.state.start)
        finished = self._not_to_train(task, start, log) if training_state is None else None
        if finished is None:
            finished = self.train_task(task, step, start, training_state, checkpoints, log)
            # Others train what merges too: the columns alone are of no use to them.
            if self._shared and self.config.moves(task):
                models = (
                    reuse.joined(start, self._start_state),
                    reuse.joined(finished.trained, finished.model_state),
                )
                self._shared.keep(task, *models, log.lines("epoch", task + 1))
        figures = self.merge_task(task, finished)
        seen = self.merging.tasks_seen(task)
        accuracies = self.accuracy(self.stream.num_tasks if self._by_domain else seen)
        self._records.arrays["scores"][..., seen - 1, :] = accuracies
        end, means = self.steps.bounds[task + 1], np.mean(accuracies[:, :, 0, :seen], axis=-1)
        log.write("merge", step=end, task=task + 1, **figures)
        if task and self.config.trust != "off":
            for warning in trust.of_merge(figures).values():
                log.tell(f"task {task + 1}: {warning}")
        fits, tasks = self.merging.fitted(self.state).figures, len(self.steps.epochs)
        evaluation_lines.write(log, self.config, end, task, tasks, figures["alpha"], means, fits)
        # Logged before it is saved: a run that goes on from a checkpoint has all lines up to it.
        if checkpoints:
            checkpoints.save(end, self._saved(None))
        if end < self.total_steps:
            end_if(self._stop.received(), end, self.total_steps)

    def _not_to_train(self, task: int, start: Params, log: RunLog) -> TrainedTask | None:
        """Return a task that needs no training of its own; `None` for one that does."""
        if not self.config.trains(task):
            if task == 0 and self._by_domain:
                log.tell(
                    f"rule={self.config.rule} trains nothing, not even the classifier, which the "
                    "tasks share: it stays as it was drawn, and accuracies are those of chance"
                )
            return self._finished(start, start, self._start_state)
        # Models of other runs have moved, which this task must not.
        return self._trained_before(task, start, log) if self.config.moves(task) else None

    def _finished(self, start: Params, trained: Params, model_state: PyTree) -> TrainedTask:
        """Return a task that was trained without adapters, or elsewhere."""
        adapters = self.merging.blank_adapters(start)
        return TrainedTask(start, trained, adapters, None, model_state, self._start_state)

    def _trained_before(self, task: int, start: Params, log: RunLog) -> TrainedTask | None:
        """Take over the trained model of another run that has trained the same, and its log."""
        whole = reuse.joined(start, self._start_state)
        model_and_log = self._shared.find(task, whole) if self._shared else None
        if task < self.config.from_task:
            model_and_log = reuse.branch_model(self.config, self.seed, task, whole)
        if model_and_log is None:
            return None
        leaves, lines = model_and_log
        trained, model_state = reuse.parted(self._devices.place(leaves), start, self._start_state)
        # The times become those of a run that has trained by itself.
        for line in lines:
            log.write(**line)
            self._records.add_time("train", line["seconds"])
        return self._finished(start, trained, model_state)

    @property
    def _start_state(self) -> PyTree:
        """The state of the model that the next task starts from."""
        apart = self.merging.rule.needs.next_task_from != "merged"
        return self.state.start_state if apart else self.state.model_state

    def train_task(
        self,
        task: int,
        step: int,
        start: Params,
        state: TrainingState | None,
        checkpoints: Checkpoints | None,
        log: RunLog,
    ) -> TrainedTask:
        """Train a task from a step of the run on, saving and obeying requests to end on the way."""
        begin, every = self.steps.bounds[task], self.options.checkpoint_every
        self._records.on_phase("train")
        state = state or self._trainer.begin(task, start, self.state.rule, self._start_state)

        def show(step_of_task: int, loss: float, examples: int, seconds: float) -> None:
            log.trained(begin + step_of_task, loss, examples, seconds)

        pieces = self._trainer.pieces(task, step - begin, start, self.state.rule, state, show)
        for piece in pieces:
            state = piece.state
            seconds = self._records.add_time("train", piece.seconds)
            log.write(
                "epoch",
                step=begin + piece.step,
                task=task + 1,
                epoch=piece.epoch + 1,
                loss=piece.loss,
                seconds=seconds,
                images_per_second=round(piece.examples / seconds, 1) if seconds else float("nan"),
            )
            self._records.on_phase("train")
            if piece.step == self.steps.of_task(task):
                # The task is saved after its merge.
                break
            asked = self._stop.received()
            due = every and piece.step % every == 0
            if checkpoints and (due or asked):
                checkpoints.save(begin + piece.step, self._saved(state))
            end_if(asked, begin + piece.step, self.total_steps)
        trained = self.programs.training.trained(start, state.trainable)
        adapters = state.trainable.adapters or self.merging.blank_adapters(start)
        return TrainedTask(
            start, trained, adapters, state.trajectory, state.model, self._start_state
        )

    def merge_task(self, task: int, finished: TrainedTask) -> dict[str, float]:
        """Merge a trained task into the run's state; returns the figures of the merge."""
        loss = self.merging.held_out_loss(finished.trained, task, finished.model_state)
        # The last update can be what diverges, and no later loss would show it.
        last = self.steps.of_task(task) - 1
        check_finite(np.asarray([loss]), task, last, self.config, self.directory)
        if self.options.keep_task_models and self.directory:
            pretrained = None if self.config.from_scratch else finished.start
            # All processes take part in putting the parts together; one writes.
            trained, pretrained, model_state = self._devices.whole(
                (finished.trained, pretrained, finished.model_state)
            )
            if processes.is_first():
                paths = (self.programs.merging, classifier_pattern(self.programs.training.model))
                reuse.keep_task_model(
                    self.directory, task, *paths, trained, pretrained, model_state
                )
        self.state, figures = self.merging.merge(task, self.state, finished, loss, self._records)
        if self.state.statistics is not None:
            what = "features of the merged model"
            check_state(self.state.statistics, task, what, self.config, self.directory)
        check_state(self.state, task, "merge", self.config, self.directory)
        return figures

    def accuracy(self, count: int) -> np.ndarray:
        """Measure accuracies of the merged model on the first tasks, NaN for the others.

        They are by classifier, by split as `SPLITS` has them, over all classes seen and over the
        task's own, and by task: [classifiers, 2, 2, T].
        """
        seen, scores = self.stream.class_masks[:count].any(axis=0), self.programs.training.scores
        predictors: tuple[Any, ...] = (None,) * len(self.config.classifiers)
        if self._records.merged:
            with self._records.timed("classifier"):
                predictors = self.merging.fitted(self.state).predictors
        given = self.state.params, seen, number(count), self.state.model_state, predictors
        with self._records.timed("evaluate"):
            # Waits for the device, so that the time is the evaluation's.
            results = [self._devices.whole(scores(data, *given)) for data in self.splits.values()]
            by_split = [np.stack([r.accuracy, r.task_aware], axis=1) for r in results]
        self._class_hits = np.stack([r.class_hits for r in results], axis=1)
        accuracies = np.stack(by_split, axis=1)
        accuracies[..., count:] = np.nan
        return accuracies

    def _accuracy_by_class(self) -> np.ndarray | None:
        """Return the final accuracy of each class, NaN without examples: [classifiers, 2, C]."""
        if self._class_hits is None:
            # Nothing was left to learn in this process.
            self.accuracy(self.stream.num_tasks)
        if self._class_hits is None:
            return None
        counts = [
            np.bincount(
                self.stream.labels[np.concatenate(getattr(self.stream, split).rows())],
                minlength=self.stream.num_classes,
            )
            for split in SPLITS
        ]
        with np.errstate(invalid="ignore"):
            return self._class_hits / np.stack(counts)

    def _saved(self, training_state: TrainingState | None) -> PyTree:
        """Collect all that a run needs to go on from a step within a task, or at its end."""
        tree = {**self.state._asdict(), "records": self._records.arrays}
        if training_state:
            tree["trainable"], tree["optimizer"], tree["model_in_training"], trajectory = (
                training_state
            )
            if trajectory:
                tree["trajectory"] = trajectory
        # A model without state has checkpoints without a word of it, as they always were.
        absent = [name for name in OF_MODEL if name in tree and not jax.tree.leaves(tree[name])]
        return {name: part for name, part in tree.items() if name not in absent}

    def restore(self, checkpoints: Checkpoints, step: int) -> TrainingState | None:
        """Go back to a checkpoint; returns the training state of one within a task.

        Raises:
            InvalidInput: the checkpoint is damaged, or is of another form.
        """
        training_state = None
        if step not in self.steps.bounds:
            task = self.steps.task_at(step)
            training_state = self._trainer.shapes(
                task, self.state.params, self.state.rule, self.state.model_state
            )
        # The present state has the form of the saved one, whatever its values.
        tree = checkpoints.restore(step, self._devices.shapes(self._saved(training_state)))
        self.state = self.state._replace(
            **{name: tree[name] for name in RunState._fields if name in tree}
        )
        self._records.restore(tree["records"])
        if training_state is None:
            return None
        of_model = tree.get("model_in_training", training_state.model)
        return TrainingState(tree["trainable"], tree["optimizer"], of_model, tree.get("trajectory"))
