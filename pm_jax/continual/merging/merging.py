"""What follows the training of a task: evidence, the merge, and what can be seen of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import lora, task_vectors, trees
from pm_jax.continual.merging import landscape, trust
from pm_jax.continual.merging.programs import Programs
from pm_jax.continual.merging.records import Records
from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.data import DeviceData, HostData
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
        statistics: class statistics of the features of all classes seen, or `None`.
        task_vector: leaves of the last task's vector, where planes are looked at.
    """

    params: Params
    start: dict[str, Array]
    rule: PyTree
    statistics: ClassStatistics | None
    task_vector: dict[str, Array]


class TrainedTask(NamedTuple):
    """What the training of a task leaves to its merge.

    Attributes:
        start: the model that the task started from, full parameter tree.
        trained: the model that it ended with.
        adapters: adapters of the task; blank ones where it had none.
        trajectory: snapshots for rules that need them, or `None`.
    """

    start: Params
    trained: Params
    adapters: Adapters
    trajectory: PyTree = None


class Merging:
    """The merges of a run.

    Args:
        config: settings of the run.
        key: PRNG key of the run.
        stream: tasks of the run.
        programs: compiled functions of the run.
        train: training data of the tasks, placed.
        validation: data that the merges are judged by, placed.

    Attributes:
        rule: the merge rule.
        wants_onset: whether the gradient norm at the onset of each task is measured.
    """

    def __init__(
        self,
        config: Config,
        key: Key,
        stream: TaskStream,
        programs: Programs,
        train: DeviceData | HostData,
        validation: DeviceData | HostData,
    ):
        self.rule = config.merge_rule
        self.wants_onset = (
            config.onset_gradients or "onset_gradient_norm" in self.rule.needs.evidence
        )
        self._config, self._key, self._stream = config, key, stream
        self._devices = devices_of(config)
        self.programs, self._train, self._validation = programs, train, validation

    def initial_state(self, params: Params) -> RunState:
        """The state before the first task, at the model that the run starts from."""
        merging = trees.select(params, self.programs.merging)
        statistics = None
        if self._config.classifier == "discriminant":
            width, classes = trees.leaves_by_path(params)["head/kernel"].shape
            statistics = self._devices.place(ClassStatistics.zero(classes, width))
        return RunState(
            params,
            merging if self.rule.needs.next_task_from != "merged" else {},
            self._initial_rule_state(params),
            statistics,
            jax.tree.map(jnp.zeros_like, merging) if self._config.plane_points else {},
        )

    def params_for_prediction(self, state: RunState) -> Params:
        """The merged model, with the classifier that the settings ask for."""
        if state.statistics is None or not state.statistics.counts.any():
            return state.params
        kernel, bias = state.statistics.classifier()
        classifier = self._devices.place({"head/kernel": kernel, "head/bias": bias})
        return trees.replace(state.params, classifier)

    def blank_adapters(self, params: Params) -> Adapters:
        """Adapters of the run's shapes whose products are 0; none without LoRA."""
        kernels = trees.select(params, self.programs.adapted)
        rank = self._config.lora_rank
        return self._devices.place(lora.init(self._key, kernels, ".*", rank)) if kernels else {}

    def tasks_seen(self, task: int) -> int:
        """Number of tasks whose data have been trained on after a task."""
        return self._stream.num_tasks if self.rule.needs.tasks_at_once else task + 1

    def held_out_loss(self, params: Params, task: int) -> float:
        """Mean loss of a model over a task's validation data and own classes."""
        return float(self.programs.training.mean_loss(self._validation, params, number(task)))

    def merge(
        self, task: int, state: RunState, found: TrainedTask, loss: float, records: Records
    ) -> tuple[RunState, dict[str, float]]:
        """Merge a trained task into the run.

        Args:
            task: number of the task, from 0.
            state: state of the run; the rule's state in it is donated.
            found: what training left.
            loss: `held_out_loss` of the trained model.
            records: records of the run; times and figures are added.

        Returns:
            The state after the task, and the figures of the merge by name.
        """
        onset = self._onset_gradient_norm(task, found)
        is_origin = task == 0 and self._config.from_scratch
        task_vector = self._task_vector(found) if state.task_vector else {}
        if is_origin:
            # From scratch the first task is the pre-training: theta_0 := theta_1*.
            found = found._replace(start=found.trained)
            state = state._replace(rule=self._initial_rule_state(found.trained))
        with records.timed("curvature"):
            evidence = jax.block_until_ready(self._evidence(task, found, onset))
        with records.timed("merge"):
            rule_state, leaves, info = self.programs.merge(
                state.rule, found.start, found.trained, evidence
            )
            merged = jax.block_until_ready(trees.replace(found.trained, leaves))
            if self.rule.needs.keeps_tasks:
                rule_state = self._devices.whole(rule_state)
        if self.rule.needs.absorb:
            with records.timed("curvature"):
                rule_state = self._absorbed(rule_state, merged, found.start, task)
        merged, info, change = self._trusted(task, found, merged, info, loss)
        figures = {"actual_loss_change": change, "onset_gradient_norm": onset}
        if self._config.landscape_points:
            with records.timed("landscape"):
                figures |= self._look_along(task, found, merged, records)
        if task and self._config.plane_points:
            with records.timed("landscape"):
                self._look_across(task, found, merged, state.task_vector, records)
        statistics = state.statistics
        if statistics is not None:
            with records.timed("classifier"):
                statistics = self._with_features(statistics, merged, task)
        start = state.start
        # A rule that starts every task from theta_0 has to follow when theta_0 becomes theta_1*.
        if self.rule.needs.next_task_from == "trained" or (start and is_origin):
            start = trees.select(found.trained, self.programs.merging)
        state = RunState(merged, start, rule_state, statistics, task_vector)
        return state, records.add_merge(task, info, **figures)

    def _initial_rule_state(self, theta_0: Params) -> PyTree:
        """The rule's state before any merge, in buffers of its own: merging donates them."""
        leaves = trees.select(theta_0, self.programs.merging)
        takes = "adapters" in self.rule.needs.evidence
        given = {"adapters": self.blank_adapters(theta_0)} if takes else {}
        state = self.rule.init(jax.tree.map(jnp.copy, leaves), **given)
        place = self._devices.whole if self.rule.needs.keeps_tasks else self._devices.place
        return place(state)

    def _onset_gradient_norm(self, task: int, found: TrainedTask) -> float:
        """Norm of the task's gradient at the model that it started from; NaN if it is not asked."""
        if not self.wants_onset:
            return float("nan")
        return float(self.programs.gradient_norm(self._objective(found.start, task), found.start))

    def _task_vector(self, found: TrainedTask) -> dict[str, Array]:
        ends = (trees.select(x, self.programs.merging) for x in (found.trained, found.start))
        return task_vectors.difference(*ends)

    def _objective(self, params: Params, task: int) -> objectives.Objective:
        return self.programs.objective(self._train, self._key, params, number(task))

    def _evidence(self, task: int, found: TrainedTask, onset: float) -> Evidence:
        """All that the rule needs, and the onset's gradient norm where it was measured."""
        needs = self.rule.needs.evidence
        evidence = self.programs.evidence(
            self._train, self._key, found.trained, found.start, number(task)
        )
        evidence = evidence._replace(trajectory=found.trajectory, onset_gradient_norm=onset)
        if "objective" in needs:
            evidence = evidence._replace(objective=self._objective(found.trained, task))
        if "all_objectives" in needs:
            tasks = range(self._stream.num_tasks)
            of_tasks = [self._objective(found.trained, other) for other in tasks]
            together = objectives.stack(of_tasks, jnp.asarray(tasks) <= task)
            evidence = evidence._replace(all_objectives=together)
        return evidence._replace(adapters=found.adapters) if "adapters" in needs else evidence

    def _absorbed(self, rule_state: PyTree, merged: Params, start: Params, task: int) -> PyTree:
        """The rule's state with what it takes in at the merged model."""
        evidence = self.programs.evidence(self._train, self._key, merged, start, number(task))
        objective = self._objective(merged, task)
        return jax.block_until_ready(self.programs.absorb(rule_state, merged, objective, evidence))

    def _trusted(
        self, task: int, found: TrainedTask, merged: Params, info: MergeInfo, loss: float
    ) -> tuple[Params, MergeInfo, float]:
        """The merge as far as it is believed, and its measured change of the task's loss."""
        change = self.held_out_loss(merged, task) - loss
        if task == 0 or self._config.trust != "shrink":
            return merged, info, change
        share = trust.trusted_share(
            float(info.alpha_raw), float(info.predicted_loss_change), change
        )
        alpha = share * info.alpha + (1 - share) / (task + 1)
        merged = self.programs.between(found.start, found.trained, alpha)
        return merged, info._replace(alpha=alpha), self.held_out_loss(merged, task) - loss

    def _with_features(
        self, statistics: ClassStatistics, merged: Params, task: int
    ) -> ClassStatistics:
        """Class statistics with those of the task's features added."""
        return jax.block_until_ready(
            self.programs.statistics(self._train, statistics, merged, number(task))
        )

    def _look_along(
        self, task: int, found: TrainedTask, merged: Params, records: Records
    ) -> dict[str, float]:
        """Keep the scores along a merge's segment; returns what they say of the coefficient."""
        alphas, seen = landscape.grid(self._config.landscape_points), self.tasks_seen(task)
        points = (self.programs.between(found.start, found.trained, alpha) for alpha in alphas)
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
        seen = self.tasks_seen(task)
        rows, columns = landscape.plane(self._config.plane_points)
        scores = records.arrays["plane"][task]
        for row, along in enumerate(rows):
            for column, other in enumerate(columns):
                point = self.programs.in_plane(found.start, found.trained, across, (along, other))
                scores[row, column, :, :seen] = self._scores(point, seen)
        axes = (self._task_vector(found), across)
        offset = self._task_vector(found._replace(trained=merged))
        records.arrays["plane_merged"][task] = landscape.coordinates(axes, offset)

    def _scores(self, params: Params, seen: int) -> np.ndarray:
        """A model's `landscape.SCORES` on the tasks seen, [3, seen]."""
        classes = self._stream.class_masks[:seen].any(axis=0)
        scores = self.programs.training.scores(self._validation, params, classes, number(seen))
        return np.stack(scores)[:, :seen]
