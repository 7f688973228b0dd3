"""What follows the training of a task: evidence, the merge, and what can be seen of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import lora, task_vectors, trees
from pm_jax.continual.merging import landscape, trust
from pm_jax.continual.merging.programs import Programs
from pm_jax.continual.merging.records import Records
from pm_jax.continual.placement import feed
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.data.stream import TaskStream
from pm_jax.discriminant import ClassStatistics
from pm_jax.lora import Adapters
from pm_jax.rules import Evidence, MergeInfo, objectives
from pm_jax.types import Array, Key, Params, PyTree


class RunState(NamedTuple):
    """What a run carries from task to task.

    Attributes:
        params: the merged model, full parameter tree.
        start: leaves of the model that the next task starts from, where that is another one.
        rule: the rule's state.
        statistics: of the features of all classes seen, or `None`.
        task_vector: leaves of the last task's, where planes are looked at.
    """

    params: Params
    start: dict[str, Array]
    rule: PyTree
    statistics: ClassStatistics | None
    task_vector: dict[str, Array]


class TrainedTask(NamedTuple):
    """What the training of a task leaves to its merge.

    Attributes:
        start: the model that it started from, full parameter tree.
        trained: the model that it ended with.
        loss: of that model on the task's validation data.
        adapters: of the task; blank ones where it had none.
        trajectory: snapshots for rules that need them, or `None`.
    """

    start: Params
    trained: Params
    loss: float
    adapters: Adapters
    trajectory: PyTree = None


class Merging:
    """The merges of a run.

    Args:
        config: settings.
        key: of the run.
        stream: the tasks.
        programs: the run's compiled functions.
        train: the training data of the tasks, placed.
        validation: data that the merges are judged by, placed.

    Attributes:
        rule: the merge rule.
        wants_onset: whether the gradient norm at the onset of each task is measured.

    Example:
        >>> config, key = Config(num_tasks=2, hidden_sizes=(8,)), jax.random.key(0)
        >>> from pm_jax.continual.merging.programs import programs
        >>> stream = config.task_stream(0)
        >>> made = programs(config, 10, (8, 8, 1), stream.train.positions.shape[1])
        >>> data = feed.placed(config, stream, stream.train)
        >>> Merging(config, key, stream, made, data, data).tasks_seen(0)
        1
    """

    def __init__(
        self,
        config: Config,
        key: Key,
        stream: TaskStream,
        programs: Programs,
        train: feed.DeviceData | feed.HostData,
        validation: feed.DeviceData | feed.HostData,
    ):
        self.rule = config.merge_rule
        self.wants_onset = config.onset_gradients or "onset_gradient_norm" in self.rule.needs
        self._config, self._key, self._stream = config, key, stream
        self._devices = devices_of(config)
        self._programs, self._train, self._validation = programs, train, validation

    def fresh(self, params: Params) -> RunState:
        """The state before the first task, at the model that the run starts from."""
        own = self.rule.next_task_from != "merged"
        start = trees.select(params, self._programs.merging) if own else {}
        statistics = None
        if self._config.classifier == "discriminant":
            width, classes = trees.leaves_by_path(params)["head/kernel"].shape
            statistics = ClassStatistics.zero(classes, width)
        leaves = trees.select(params, self._programs.merging) if self._config.plane_points else {}
        task_vector = jax.tree.map(jnp.zeros_like, leaves)
        statistics = self._devices.place(statistics)
        return RunState(params, start, self._fresh_rule_state(params), statistics, task_vector)

    def predicting(self, state: RunState) -> Params:
        """The model that predicts: the merged one, with the classifier that was asked for."""
        if state.statistics is None or not state.statistics.counts.any():
            return state.params
        kernel, bias = state.statistics.classifier()
        classifier = self._devices.place({"head/kernel": kernel, "head/bias": bias})
        return trees.replace(state.params, classifier)

    def blank_adapters(self, params: Params) -> Adapters:
        """Adapters of the run's shapes whose products are 0; none without LoRA."""
        kernels = trees.select(params, self._programs.adapted)
        rank = self._config.lora_rank
        return self._devices.place(lora.init(self._key, kernels, ".*", rank)) if kernels else {}

    def tasks_seen(self, task: int) -> int:
        """Number of tasks whose data have been trained on after a task."""
        return self._stream.num_tasks if self.rule.tasks_at_once else task + 1

    def held_out_loss(self, params: Params, task: int) -> float:
        """Mean loss of a model over a task's validation data and own classes."""
        return float(self._programs.mean_loss(params, self._validation, np.asarray(task, np.int32)))

    def merge(
        self, task: int, state: RunState, found: TrainedTask, records: Records
    ) -> tuple[RunState, dict[str, float]]:
        """Merge a trained task into the run.

        Args:
            task: counted from 0.
            state: of the run; its rule state is donated.
            found: by training.
            records: of the run; times and figures are added.

        Returns:
            The state after the task and the figures of the merge by name.
        """
        run, number = self._programs, np.asarray(task, np.int32)
        onset = float("nan")
        if self.wants_onset:
            objective = run.objective(self._key, found.start, self._train, number)
            onset = float(run.gradient_norm(objective, found.start))
        task_vector = state.task_vector
        if task_vector:
            ends = (trees.select(x, run.merging) for x in (found.trained, found.start))
            task_vector = task_vectors.difference(*ends)
        is_origin = task == 0 and self._config.from_scratch
        if is_origin:
            # From scratch the first task is the pre-training: theta_0 := theta_1*.
            found = found._replace(start=found.trained)
            state = state._replace(rule=self._fresh_rule_state(found.trained))
        with records.timed("curvature"):
            evidence = jax.block_until_ready(self._evidence(number, found, onset))
        with records.timed("merge"):
            rule_state, leaves, info = run.merge(state.rule, found.start, found.trained, evidence)
            merged = jax.block_until_ready(trees.replace(found.trained, leaves))
            if self.rule.keeps_tasks:
                rule_state = self._devices.whole(rule_state)
        if self.rule.absorb:
            with records.timed("curvature"):
                rule_state = self._absorbed(rule_state, merged, found.start, number)
        merged, info, change = self._trusted(task, found, merged, info)
        figures = {"actual_loss_change": change, "onset_gradient_norm": onset}
        if self._config.landscape_points:
            with records.timed("landscape"):
                figures |= self._look_along(task, found, merged, records)
        if task and self._config.plane_points:
            with records.timed("landscape"):
                self._look_across(task, found, merged, state.task_vector, records)
        start = state.start
        # What a rule that starts from theta_0 has kept moves with theta_0.
        if self.rule.next_task_from == "trained" or (start and is_origin):
            start = trees.select(found.trained, run.merging)
        statistics = state.statistics
        if statistics is not None:
            with records.timed("classifier"):
                statistics = jax.block_until_ready(
                    run.add_statistics(statistics, merged, self._train, number)
                )
        state = RunState(merged, start, rule_state, statistics, task_vector)
        return state, records.add_merge(task, info, **figures)

    def _fresh_rule_state(self, theta_0: Params) -> PyTree:
        """The rule's state before any merge, in buffers of its own: merging donates them."""
        leaves = trees.select(theta_0, self._programs.merging)
        takes = "adapters" in self.rule.needs
        given = {"adapters": self.blank_adapters(theta_0)} if takes else {}
        state = self.rule.init(jax.tree.map(jnp.copy, leaves), **given)
        kept = self._devices.whole if self.rule.keeps_tasks else self._devices.place
        return kept(state)

    def _evidence(self, task: np.ndarray, found: TrainedTask, onset: float) -> Evidence:
        """All that the rule needs, and the onset's gradient norm where it was measured."""
        run, needs = self._programs, self.rule.needs
        start, trained = found.start, found.trained
        evidence = run.measure(self._key, trained, start, self._train, task)
        evidence = evidence._replace(trajectory=found.trajectory, onset_gradient_norm=onset)
        if "objective" in needs:
            objective = run.objective(self._key, trained, self._train, task)
            evidence = evidence._replace(objective=objective)
        if "all_objectives" in needs:
            tasks = np.arange(self._stream.num_tasks, dtype=np.int32)
            each = [run.objective(self._key, trained, self._train, other) for other in tasks]
            together = objectives.stack(each, jnp.asarray(tasks <= task))
            evidence = evidence._replace(all_objectives=together)
        return evidence._replace(adapters=found.adapters) if "adapters" in needs else evidence

    def _absorbed(
        self, rule_state: PyTree, merged: Params, start: Params, task: np.ndarray
    ) -> PyTree:
        """The rule's state with what it takes in at the merged model."""
        run = self._programs
        evidence = run.measure(self._key, merged, start, self._train, task)
        objective = run.objective(self._key, merged, self._train, task)
        return jax.block_until_ready(run.absorb(rule_state, merged, objective, evidence))

    def _trusted(
        self, task: int, found: TrainedTask, merged: Params, info: MergeInfo
    ) -> tuple[Params, MergeInfo, float]:
        """The merge as far as it is believed, and its measured change of the task's loss."""
        change = self.held_out_loss(merged, task) - found.loss
        if task == 0 or self._config.trust != "shrink":
            return merged, info, change
        share = trust.trusted_share(
            float(info.alpha_raw), float(info.predicted_loss_change), change
        )
        alpha = share * info.alpha + (1 - share) / (task + 1)
        merged = self._programs.between(found.start, found.trained, alpha)
        change = self.held_out_loss(merged, task) - found.loss
        return merged, info._replace(alpha=alpha), change

    def _look_along(
        self, task: int, found: TrainedTask, merged: Params, records: Records
    ) -> dict[str, float]:
        """Keep the scores along a merge's segment; returns what it says of the coefficient."""
        alphas, seen = landscape.grid(self._config.landscape_points), self.tasks_seen(task)
        points = (self._programs.between(found.start, found.trained, alpha) for alpha in alphas)
        scores = np.stack([self._scores(params, seen) for params in (*points, merged)])
        records.arrays["landscape"][task, ..., :seen] = scores
        return landscape.regret(alphas, scores) if task else {}

    def _look_across(
        self,
        task: int,
        found: TrainedTask,
        merged: Params,
        across: dict[str, Array],
        records: Records,
    ) -> None:
        """Keep the scores in the plane of the last two task vectors."""
        run, seen = self._programs, self.tasks_seen(task)
        rows, columns = landscape.plane(self._config.plane_points)
        scores = records.arrays["plane"][task]
        for row, along in enumerate(rows):
            for column, other in enumerate(columns):
                point = run.in_plane(found.start, found.trained, across, (along, other))
                scores[row, column, :, :seen] = self._scores(point, seen)
        start, end, model = (
            trees.select(x, run.merging) for x in (found.start, found.trained, merged)
        )
        axes = (task_vectors.difference(end, start), across)
        offset = task_vectors.difference(model, start)
        records.arrays["plane_merged"][task] = landscape.coordinates(axes, offset)

    def _scores(self, params: Params, seen: int) -> np.ndarray:
        """A model's `landscape.SCORES` on the tasks seen, [3, seen]."""
        classes = self._stream.class_masks[:seen].any(axis=0)
        count = np.asarray(seen, np.int32)
        return np.stack(self._programs.scores(params, self._validation, classes, count))[:, :seen]
