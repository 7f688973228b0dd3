"""The task loop: train, measure curvature, merge, evaluate, save; one seed of one configuration."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import lora, objectives, trees
from pm_jax.continual import feed, landscape, merge_warnings, task_models, training, training_hooks
from pm_jax.continual.checkpoints import Checkpoints
from pm_jax.continual.config import Config
from pm_jax.continual.divergence import check_finite
from pm_jax.continual.logs import RunLog
from pm_jax.continual.programs import programs, starting_params
from pm_jax.continual.records import Records
from pm_jax.continual.shared_training import SharedTraining
from pm_jax.continual.training import Segment, TaskProgram
from pm_jax.lora import Adapters
from pm_jax.rules import Evidence
from pm_jax.types import Array, InvalidInput, Params, PyTree


class Learner:
    """A continual learner: one seed of one configuration.

    Args:
        config: settings.
        seed: of everything random.
        directory: of checkpoints and logs; `None` to keep nothing.
        checkpoint_every: steps between checkpoints within a task; 0 for task boundaries only.
        quiet: print nothing.
        tensorboard: write TensorBoard events into the directory.
        keep_task_models: write what is merged into the directory too, for `experiments.merge`.
        shared: task training in common with runs of the same training settings and seed.

    Attributes:
        params: the merged model so far, full parameter tree.
        stream: the tasks.

    Raises:
        InvalidInput: settings that do not fit the data or the model, or a damaged checkpoint.

    Example:
        >>> config = Config(num_tasks=2, epochs=1, first_task_epochs=1, hidden_sizes=(8,))
        >>> results = Learner(config, seed=0, quiet=True).run()
        >>> len(results["accuracy_matrix"]), results["merges"][0]["alpha"]
        (2, 1.0)
    """

    def __init__(
        self,
        config: Config,
        seed: int,
        directory: Path | None = None,
        *,
        checkpoint_every: int = 0,
        quiet: bool = False,
        tensorboard: bool = False,
        keep_task_models: bool = False,
        shared: SharedTraining | None = None,
    ):
        self.config, self.seed, self.directory = config, seed, directory
        self._checkpoint_every, self._quiet = checkpoint_every, quiet
        self._tensorboard, self._keep_task_models = tensorboard, keep_task_models
        self.stream = config.task_stream(seed)
        self._by_domain = self.stream.scenario == "domain_incremental"
        self._rule = config.merge_rule()
        # A rule that watches training, or takes part in it, has to be there.
        watches = self._rule.hook or self._rule.needs & {"trajectory", "adapters"}
        self._shared = None if watches or self._rule.tasks_at_once else shared
        lessons = self.stream.together() if self._rule.tasks_at_once else self.stream
        self._wants_onset = config.onset_gradients or "onset_gradient_norm" in self._rule.needs
        self._programs = programs(
            config,
            self.stream.num_classes,
            self.stream.inputs.shape[1:],
            lessons.train.positions.shape[1],
        )
        self._key = jax.random.key(seed)
        self._train = feed.placed(config, lessons, lessons.train)
        self._held_out, self._validation = (
            feed.of_split(self._train, split, self.stream.class_masks)
            for split in (getattr(self.stream, config.evaluate_on), self.stream.validation)
        )
        per_epoch = -(-lessons.train.sizes // config.batch_size)
        epochs = np.asarray([config.epochs_of(task) for task in range(lessons.num_tasks)])
        self._steps_per_epoch = per_epoch.tolist()
        self._bounds = [0, *np.cumsum(per_epoch * epochs).tolist()]
        self._reset()

    def _reset(self) -> None:
        self.params = starting_params(self.config, self._programs.init(self._key))
        self._start: dict[str, Array] = {}
        self._trajectory: PyTree = None
        self._adapters: Adapters = {}
        if self._rule.next_task_from != "merged":
            self._start = trees.select(self.params, self._programs.merging)
        self._rule_state = self._fresh_rule_state(self.params)
        self._records = Records(
            self.stream.num_tasks,
            self._rule,
            onset=self._wants_onset,
            landscape_points=self.config.landscape_points,
        )

    def _fresh_rule_state(self, theta_0: Params) -> PyTree:
        """The rule's state before any merge, in buffers of its own: merging donates them."""
        leaves = trees.select(theta_0, self._programs.merging)
        given = {"adapters": self._no_adapters()} if "adapters" in self._rule.needs else {}
        return self._rule.init(jax.tree.map(jnp.copy, leaves), **given)

    @property
    def total_steps(self) -> int:
        """Steps of all tasks."""
        return self._bounds[-1]

    def run(self) -> dict[str, Any]:
        """Learn all tasks, from the newest checkpoint on if there is one.

        Returns:
            What `results.json` holds, but for its configuration, manifest and environment.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            InvalidInput: a damaged checkpoint.
        """
        if self.directory is None:
            return self._run(None)
        self.directory.mkdir(parents=True, exist_ok=True)
        with Checkpoints(self.directory / "checkpoints") as checkpoints:
            return self._run(checkpoints)

    def write_landscape(self, directory: Path) -> None:
        """Write what was seen around the merges, if anything was."""
        if self.config.landscape_points:
            alphas = landscape.grid(self.config.landscape_points)
            landscape.write(directory / landscape.FILE, alphas, self._records.arrays["landscape"])

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
        step = (checkpoints.latest() if checkpoints else None) or 0
        training_state = self._restore(checkpoints, step) if checkpoints and step else None
        log = RunLog(
            self.directory,
            f"{self.config.rule}, seed {self.seed}",
            self.total_steps,
            resume_step=step,
            quiet=self._quiet,
            tensorboard=self._tensorboard,
        )
        try:
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
        start = trees.replace(self.params, self._start)
        trained = self._trained_before(task, start, log) if training_state is None else None
        if trained is None:
            trained = self._train_task(task, step, start, training_state, checkpoints, log)
            if self._shared:
                self._shared.keep(task, start, trained, log.lines("epoch", task + 1))
        info = self._merge_task(task, start, trained)
        seen = self._tasks_seen(task)
        accuracies = self._accuracy(self.stream.num_tasks if self._by_domain else seen)
        self._records.arrays["accuracy"][:, seen - 1] = accuracies
        end, mean = self._bounds[task + 1], float(np.mean(accuracies[0, :seen]))
        log.write("merge", step=end, task=task + 1, **info)
        if task and self.config.trust != "off":
            for warning in merge_warnings.of_merge(info):
                log.tell(f"task {task + 1}: {warning}")
        log.write("evaluate", step=end, task=task + 1, accuracy=mean)
        log.tell(
            f"task {task + 1} of {len(self._steps_per_epoch)}: alpha {info['alpha']:.3f}, "
            f"accuracy on the tasks seen {100 * mean:.1f} %"
        )
        if checkpoints:
            checkpoints.save(end, self._state(None))

    def _trained_before(self, task: int, start: Params, log: RunLog) -> Params | None:
        """The trained model if another run has trained the same; its log and time are taken over.

        A run's times are then what they would be had it trained by itself.
        """
        found = self._shared.find(task, start) if self._shared else None
        if found is None:
            return None
        trained, lines = found
        for line in lines:
            log.write(**line)
            self._records.add_time("train", line["seconds"])
        return trained

    def _train_task(self, task, step, start, training_state, checkpoints, log) -> Params:
        program = self._program(task)
        task_array = np.asarray(task, np.int32)
        hooked = self._hooked()
        trainable, optimizer_state = training_state or program.begin(
            self._key, start, task_array, *hooked
        )
        epochs, begin = self.config.epochs_of(task), self._bounds[task]
        per_epoch = self._steps_per_epoch[task]
        snapshots = self._programs.snapshots
        cuts = snapshots.steps(epochs * per_epoch)
        if not training_state:
            blank = snapshots.blank(start)
            self._trajectory = snapshots.taken(blank, cuts, 0, start, trainable)
        pieces = training.segments(
            step - begin, epochs * per_epoch, per_epoch, self._checkpoint_every, cuts
        )
        for epoch, first, stop in pieces:
            clock = time.perf_counter()
            found = []

            def order(data, epoch=epoch):
                return program.order(self._key, data, task_array, epoch)

            stretches = feed.stretches(self._train, order, self.config.batch_size, first, stop)
            for low, high, data in stretches:
                projected = training_hooks.projects(
                    self._rule.hook, epoch * per_epoch + first, epochs * per_epoch
                )
                segment = Segment.of(task, epoch, low, high, epochs, projected)
                trainable, optimizer_state, step_losses = program.train(
                    self._key, trainable, optimizer_state, start, data, segment, *hooked
                )
                # Waits, so that no more windows than planned are on the device.
                found.append(np.asarray(step_losses)[low:high])
            values = np.concatenate(found)
            seconds = self._records.time("train", clock)
            check_finite(values, task, epoch * per_epoch + first, self.config, self.directory)
            within = epoch * per_epoch + stop
            images = (stop - first) * self.config.batch_size
            log.write(
                "epoch",
                step=begin + within,
                task=task + 1,
                epoch=epoch + 1,
                loss=float(values.mean()),
                seconds=seconds,
                images_per_second=round(images / seconds, 1),
            )
            if training_hooks.refreshes(self._rule.hook, within, per_epoch, epochs):
                trainable, optimizer_state = program.refresh(
                    self._key, trainable, optimizer_state, task_array, within, *hooked
                )
            self._trajectory = snapshots.taken(self._trajectory, cuts, within, start, trainable)
            due = self._checkpoint_every and within % self._checkpoint_every == 0
            if checkpoints and due and within < epochs * per_epoch:
                checkpoints.save(begin + within, self._state((trainable, optimizer_state)))
        self._adapters = trainable.adapters or self._no_adapters()
        return self._programs.trained(start, trainable)

    def _merge_task(self, task: int, start: Params, trained: Params) -> dict[str, float]:
        """Merge, and say what came of it; the learner's model and rule state move on."""
        run, task_array = self._programs, np.asarray(task, np.int32)
        trained_loss = float(run.mean_loss(trained, self._validation, task_array))
        # The last update can be what diverges.
        last = self._bounds[task + 1] - self._bounds[task] - 1
        check_finite([trained_loss], task, last, self.config, self.directory)
        onset = float("nan")
        if self._wants_onset:
            objective = run.objective(self._key, start, self._train, task_array)
            onset = float(run.gradient_norm(objective, start))
        is_origin = task == 0 and self.config.from_scratch
        if is_origin:
            # From scratch the first task is the pre-training: theta_0 := theta_1*.
            start = trained
            self._rule_state = self._fresh_rule_state(trained)
        if self._keep_task_models and self.directory:
            if task == 0:
                task_models.keep(self.directory, 0, trees.select(start, run.merging))
            task_models.keep(self.directory, task + 1, trees.select(trained, run.merging))
        clock = time.perf_counter()
        evidence = jax.block_until_ready(self._evidence(task_array, start, trained, onset))
        self._trajectory = None
        self._records.time("curvature", clock)
        clock = time.perf_counter()
        self._rule_state, leaves, info = run.merge(self._rule_state, start, trained, evidence)
        self.params = jax.block_until_ready(trees.replace(trained, leaves))
        self._records.time("merge", clock)
        if self._rule.absorb:
            clock = time.perf_counter()
            evidence = run.measure(self._key, self.params, start, self._train, task_array)
            objective = run.objective(self._key, self.params, self._train, task_array)
            self._rule_state = jax.block_until_ready(
                run.absorb(self._rule_state, self.params, objective, evidence)
            )
            self._records.time("curvature", clock)
        # What a rule that starts from theta_0 has kept moves with theta_0.
        if self._rule.next_task_from == "trained" or (self._start and is_origin):
            self._start = trees.select(trained, run.merging)
        change = float(run.mean_loss(self.params, self._validation, task_array)) - trained_loss
        if task and self.config.trust == "shrink":
            share = merge_warnings.trusted_share(
                float(info.alpha_raw), float(info.predicted_loss_change), change
            )
            alpha = share * info.alpha + (1 - share) / (task + 1)
            info = info._replace(alpha=alpha)
            self.params = run.between(start, trained, alpha)
            change = float(run.mean_loss(self.params, self._validation, task_array)) - trained_loss
        more = {"actual_loss_change": change, "onset_gradient_norm": onset}
        if self.config.landscape_points:
            more |= self._look_around(task, start, trained)
        return self._records.add_merge(task, info, **more)

    def _look_around(self, task: int, start: Params, trained: Params) -> dict[str, float]:
        """Keep the landscape of a merge; returns what it says of the coefficient."""
        clock = time.perf_counter()
        run, alphas = self._programs, landscape.grid(self.config.landscape_points)
        seen = self._tasks_seen(task)
        classes = self.stream.class_masks[:seen].any(axis=0)
        points = (run.between(start, trained, alpha) for alpha in alphas)
        found = np.stack([
            np.stack(run.scores(params, self._validation, classes, np.asarray(seen, np.int32)))
            for params in (*points, self.params)
        ])  # fmt: skip
        self._records.arrays["landscape"][task, ..., :seen] = found[..., :seen]
        self._records.time("landscape", clock)
        return landscape.regret(alphas, found[..., :seen]) if task else {}

    def _evidence(self, task: np.ndarray, start: Params, trained: Params, onset: float) -> Evidence:
        """All that the rule needs, and the onset's gradient norm where it was measured."""
        run, needs = self._programs, self._rule.needs
        found = run.measure(self._key, trained, start, self._train, task)
        found = found._replace(trajectory=self._trajectory, onset_gradient_norm=onset)
        if "objective" in needs:
            objective = run.objective(self._key, trained, self._train, task)
            found = found._replace(objective=objective)
        if "all_objectives" in needs:
            tasks = np.arange(self.stream.num_tasks, dtype=np.int32)
            each = [run.objective(self._key, trained, self._train, other) for other in tasks]
            found = found._replace(
                all_objectives=objectives.stack(each, jnp.asarray(tasks <= task))
            )
        return found._replace(adapters=self._adapters) if "adapters" in needs else found

    def _tasks_seen(self, task: int) -> int:
        """Number of tasks whose data have been trained on after a task."""
        return self.stream.num_tasks if self._rule.tasks_at_once else task + 1

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
        return (self._rule_state,) if self._rule.hook else ()

    def _no_adapters(self) -> Adapters:
        """Adapters of the run's shapes whose products are 0; none without LoRA."""
        kernels = trees.select(self.params, self._programs.adapted)
        return lora.init(self._key, kernels, ".*", self.config.lora_rank) if kernels else {}

    def _program(self, task: int) -> TaskProgram:
        return self._programs.first if task == 0 else self._programs.later

    def _state(self, training_state: tuple[PyTree, PyTree] | None) -> PyTree:
        """All that a run needs to go on, for a step within a task or at its end."""
        state = {
            "params": self.params,
            "start": self._start,
            "rule": self._rule_state,
            "records": self._records.arrays,
        }
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
                self.params,
                np.asarray(task, np.int32),
                *self._hooked(),
            )
            self._trajectory = self._programs.snapshots.blank(self.params)
        state = checkpoints.restore(step, self._state(training_state))
        self.params, self._start = state["params"], state["start"]
        self._rule_state, self._trajectory = state["rule"], state.get("trajectory")
        self._records.restore(state["records"])
        return (state["trainable"], state["optimizer"]) if training_state else None

    def _results(self) -> dict[str, Any]:
        return {
            **self._records.results(initial=self._by_domain),
            "rule_state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._rule_state)),
        }
