"""The merge of a trained task: evidence, the rule's update, and what is measured of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import task_vectors, trees
from pm_jax.classifiers import Linear
from pm_jax.continual.merging import landscape, model_state, trust
from pm_jax.continual.merging.classifying import Fitted, with_head
from pm_jax.continual.merging.programs import Programs
from pm_jax.continual.merging.records import Records
from pm_jax.continual.placement.compiled import number
from pm_jax.continual.placement.data import StreamData
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.data.stream import TaskStream
from pm_jax.lora import Adapters
from pm_jax.rules import Evidence, MergeInfo, objectives
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree


class RunState(NamedTuple):
    """The state of a run between two tasks.

    Attributes:
        params: the merged model, full parameter tree.
        start: leaves of the model that the next task starts from, where that is another one.
        rule: the rule's state.
        statistics: of the merged model's features of all classes seen, by name, for classifiers
            that are made from them; `None` where there are none.
        task_vector: leaves of the last task's vector, where planes are looked at.
        model_state: the merged model's state, such as batch statistics.
        start_state: that of the model that the next task starts from, where that is another one.
    """

    params: Params
    start: dict[str, Array]
    rule: PyTree
    statistics: dict[str, PyTree] | None
    task_vector: dict[str, Array]
    model_state: PyTree = {}
    start_state: PyTree = {}


class TrainedTask(NamedTuple):
    """A task after its training, for its merge.

    Attributes:
        start: the model that the task started from, full parameter tree.
        trained: the model that it ended with.
        adapters: adapters of the task; blank ones where it had none.
        trajectory: snapshots for rules that need them, or `None`.
        model_state: the trained model's state.
        start_state: that of the model that the task started from.
    """

    start: Params
    trained: Params
    adapters: Adapters
    trajectory: PyTree = None
    model_state: PyTree = {}
    start_state: PyTree = {}


class Merging:
    """The merges of a run.

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
        train: StreamData,
        validation: StreamData,
    ):
        self.rule = config.merge_rule
        self.wants_onset = (
            config.onset_gradients or "onset_gradient_norm" in self.rule.needs.evidence
        )
        self._config, self._key, self._stream = config, key, stream
        self._devices = devices_of(config)
        self.programs, self._train, self._validation = programs, train, validation
        self._fitted: tuple[Any, Fitted] | None = None

    def initial_state(self, params: Params, of_model: PyTree) -> RunState:
        """Make the state before the first task, at the model that the run starts from."""
        merging = trees.select(params, self.programs.merging)
        classifying = self.programs.classifying
        statistics = classifying.init(self._key) if classifying else None
        apart = self.rule.needs.next_task_from != "merged"
        return RunState(
            params,
            merging if apart else {},
            self._initial_rule_state(params),
            statistics,
            jax.tree.map(jnp.zeros_like, merging) if self._config.plane_points else {},
            of_model,
            of_model if apart else {},
        )

    def fitted(self, state: RunState) -> Fitted:
        """Make the classifiers after a merge, once for each state."""
        chosen, classifying = self._config.chosen_classifiers, self.programs.classifying
        if classifying is None or state.statistics is None:
            return Fitted((None,) * len(chosen), ({},) * len(chosen))
        if self._fitted is None or self._fitted[0] is not state.statistics:
            found = classifying.fit(state.statistics, state.params, self._key)
            self._fitted = state.statistics, jax.block_until_ready(found)
        return self._fitted[1]

    def params_for_prediction(self, state: RunState, label: str) -> Params:
        """Return the merged model with one of the run's classifiers for its own.

        Raises:
            InvalidInput: it is not linear in the features, or the model has no place for it.
        """
        (place,) = (n for n, x in enumerate(self._config.chosen_classifiers) if x.label == label)
        predictor = self.fitted(state).predictors[place]
        if predictor is None:
            return state.params
        if not isinstance(predictor, Linear):
            raise InvalidInput(
                f"classifiers={label}: is not linear in the features, as the model's own is; only "
                "another can take its place"
            )
        return with_head(self.programs.training.model, state.params, predictor)

    def blank_adapters(self, params: Params) -> Adapters:
        """Make adapters of the run's shapes whose products are 0; none without LoRA."""
        partition = self.programs.training.partition
        adapters = partition.fresh_adapters(self._key, params, self._config.lora_rank)
        return self._devices.place(adapters)

    def tasks_seen(self, task: int) -> int:
        """Return the number of tasks whose data have been trained on after a task."""
        return self._stream.num_tasks if self.rule.needs.tasks_at_once else task + 1

    def held_out_loss(self, params: Params, task: int, of_model: PyTree = None) -> float:
        """Measure the mean loss of a model over a task's validation data and its classes."""
        mean_loss = self.programs.training.mean_loss
        return float(mean_loss(self._validation, params, number(task), of_model))

    def _model_state_at(
        self, task: int, state: RunState, finished: TrainedTask, params: Params, alpha: Any
    ) -> PyTree:
        """Return a model's state for parameters between those of two models."""
        trained = finished.model_state
        if not self.programs.training.traits.has_state or self._config.model_state == "trained":
            return trained
        if not self._config.moves(task):
            # The parameters stay, and their state fits them as it is.
            return trained
        if self._config.model_state == "merged":
            return model_state.between(state.model_state, trained, jnp.asarray(alpha))
        measure = self.programs.batch_statistics
        return measure(self._train, self._key, params, number(task), trained)

    def merge(
        self, task: int, state: RunState, finished: TrainedTask, loss: float, records: Records
    ) -> tuple[RunState, dict[str, float]]:
        """Merge a trained task, whose held-out loss is `loss`; returns also the figures by name.

        The rule's state is donated. Times and figures enter the records.
        """
        onset, before = self._onset_gradient_norm(task, finished), (state.params, state.model_state)
        is_origin = task == 0 and self._config.from_scratch
        task_vector = self._task_vector(finished) if state.task_vector else {}
        if is_origin:
            # From scratch the first task is the pre-training: theta_0 := theta_1*.
            finished = finished._replace(start=finished.trained, start_state=finished.model_state)
            state = state._replace(
                rule=self._initial_rule_state(finished.trained), model_state=finished.model_state
            )
        with records.timed("curvature"):
            # Waits, so that the seconds are those of this phase.
            evidence = jax.block_until_ready(self._evidence(task, finished, onset))
        with records.timed("merge"):
            rule_state, leaves, info = self.programs.merge(
                state.rule, finished.start, finished.trained, evidence
            )
            merged = jax.block_until_ready(trees.replace(finished.trained, leaves))
            # A state that grows by a task each time stays in the host's memory.
            if self.rule.needs.keeps_tasks:
                rule_state = self._devices.whole(rule_state)
            of_model = self._model_state_at(task, state, finished, merged, info.alpha)
            jax.block_until_ready(of_model)
        if self.rule.needs.absorb:
            with records.timed("curvature"):
                rule_state = self._absorbed(rule_state, merged, of_model, finished.start, task)
        merged, of_model, info, change = self._trusted(
            task, state, finished, (merged, of_model), info, loss
        )
        figures = {"actual_loss_change": change, "onset_gradient_norm": onset}
        if self._config.landscape_points:
            with records.timed("landscape"):
                figures |= self._look_along(task, state, finished, (merged, of_model), records)
        if task and self._config.plane_points:
            with records.timed("landscape"):
                self._look_across(task, finished, merged, state, records)
        with records.timed("classifier"):
            statistics, drifted = self._observed(task, state.statistics, before, (merged, of_model))
        figures |= drifted
        start, start_state = state.start, state.start_state
        # A rule that starts every task from theta_0 has to follow when theta_0 becomes theta_1*.
        if self.rule.needs.next_task_from == "trained" or (start and is_origin):
            start = trees.select(finished.trained, self.programs.merging)
            start_state = finished.model_state
        state = RunState(merged, start, rule_state, statistics, task_vector, of_model, start_state)
        return state, records.add_merge(task, info, **figures)

    def _observed(
        self,
        task: int,
        statistics: dict[str, PyTree] | None,
        before: tuple[Params, PyTree],
        merged: tuple[Params, PyTree],
    ) -> tuple[dict[str, PyTree] | None, dict[str, float]]:
        """Add a task to the statistics, which are donated; returns also figures of the drift.

        `before` is the model that the statistics are of, and `merged` the one that they will be of.
        """
        classifying = self.programs.classifying
        if classifying is None or statistics is None:
            return None, {}
        observed = classifying.observe(
            self._train,
            self._key,
            merged[0],
            number(task),
            merged[1],
            before if classifying.follows_drift else None,
        )
        statistics, figures = classifying.joined(statistics, observed)
        # Before the first task there are no classes whose features could have drifted.
        drifted = {name: float(x) if task else float("nan") for name, x in figures.items()}
        return jax.block_until_ready(statistics), drifted

    def _initial_rule_state(self, theta_0: Params) -> PyTree:
        """Make the rule's state before any merge."""
        leaves = trees.select(theta_0, self.programs.merging)
        takes = "adapters" in self.rule.needs.evidence
        given = {"adapters": self.blank_adapters(theta_0)} if takes else {}
        state = self.programs.initial_rule_state(leaves, given)
        place = self._devices.whole if self.rule.needs.keeps_tasks else self._devices.place
        return place(state)

    def _onset_gradient_norm(self, task: int, finished: TrainedTask) -> float:
        """Measure the norm of the task's gradient at its start; NaN where it is not asked for."""
        if not self.wants_onset:
            return float("nan")
        return float(
            self.programs.gradient_norm(
                self._objective(finished.start, task, finished.start_state), finished.start
            )
        )

    def _task_vector(self, finished: TrainedTask) -> dict[str, Array]:
        ends = (trees.select(x, self.programs.merging) for x in (finished.trained, finished.start))
        return task_vectors.difference(*ends)

    def _objective(self, params: Params, task: int, of_model: PyTree) -> objectives.Objective:
        return self.programs.objective(self._train, self._key, params, number(task), of_model)

    def _evidence(self, task: int, finished: TrainedTask, onset: float) -> Evidence:
        """Collect the evidence that the rule needs, and the onset's gradient norm."""
        needs = self.rule.needs.evidence
        models, of_model = (finished.trained, finished.start), finished.model_state
        evidence = self.programs.evidence(self._train, self._key, *models, number(task), of_model)
        evidence = evidence._replace(trajectory=finished.trajectory, onset_gradient_norm=onset)
        if "objective" in needs:
            objective = self._objective(finished.trained, task, of_model)
            evidence = evidence._replace(objective=objective)
        if "all_objectives" in needs:
            tasks = range(self._stream.num_tasks)
            # All tasks, of which those to come are masked: a longer stack would be another shape.
            of_tasks = [self._objective(finished.trained, other, of_model) for other in tasks]
            together = objectives.stack(of_tasks, jnp.asarray(tasks) <= task)
            evidence = evidence._replace(all_objectives=together)
        return evidence._replace(adapters=finished.adapters) if "adapters" in needs else evidence

    def _absorbed(
        self, rule_state: PyTree, merged: Params, of_model: PyTree, start: Params, task: int
    ) -> PyTree:
        """Let the rule's state absorb evidence at the merged model."""
        evidence = self.programs.evidence(
            self._train, self._key, merged, start, number(task), of_model
        )
        objective = self._objective(merged, task, of_model)
        return jax.block_until_ready(self.programs.absorb(rule_state, merged, objective, evidence))

    def _trusted(
        self,
        task: int,
        state: RunState,
        finished: TrainedTask,
        model: tuple[Params, PyTree],
        info: MergeInfo,
        loss: float,
    ) -> tuple[Params, PyTree, MergeInfo, float]:
        """Shrink the merge as far as it is trusted; returns also the change of the task's loss."""
        merged, of_model = model
        change = self.held_out_loss(merged, task, of_model) - loss
        if task == 0 or self._config.trust != "shrink":
            return merged, of_model, info, change
        share = trust.trusted_share(
            float(info.alpha_raw), float(info.predicted_loss_change), change
        )
        alpha = share * info.alpha + (1 - share) / (task + 1)
        merged = self.programs.between(finished.start, finished.trained, alpha)
        of_model = self._model_state_at(task, state, finished, merged, alpha)
        change = self.held_out_loss(merged, task, of_model) - loss
        return merged, of_model, info._replace(alpha=alpha), change

    def _look_along(
        self,
        task: int,
        state: RunState,
        finished: TrainedTask,
        merged: tuple[Params, PyTree],
        records: Records,
    ) -> dict[str, float]:
        """Record the scores along a merge's segment; returns the regret of the coefficient."""
        alphas, seen = landscape.grid(self._config.landscape_points), self.tasks_seen(task)

        def point(alpha: float) -> tuple[Params, PyTree]:
            params = self.programs.between(finished.start, finished.trained, alpha)
            return params, self._model_state_at(task, state, finished, params, alpha)

        points = (point(alpha) for alpha in alphas)
        scores = np.stack([self._scores(*model, seen) for model in (*points, merged)])
        records.arrays["landscape"][task, ..., :seen] = scores
        return landscape.regret(alphas, scores) if task else {}

    def _look_across(
        self, task: int, finished: TrainedTask, merged: Params, state: RunState, records: Records
    ) -> None:
        """Record the scores in the plane of the last two task vectors."""
        seen, across = self.tasks_seen(task), state.task_vector
        rows, columns = landscape.plane(self._config.plane_points)
        scores = records.arrays["plane"][task]
        for row, along in enumerate(rows):
            for column, other in enumerate(columns):
                point = self.programs.in_plane(
                    finished.start, finished.trained, across, (along, other)
                )
                of_model = self._model_state_at(task, state, finished, point, along)
                scores[row, column, :, :seen] = self._scores(point, of_model, seen)
        axes = (self._task_vector(finished), across)
        offset = self._task_vector(finished._replace(trained=merged))
        records.arrays["plane_merged"][task] = landscape.coordinates(axes, offset)

    def _scores(self, params: Params, of_model: PyTree, seen: int) -> np.ndarray:
        """Measure a model's `landscape.SCORES` on the tasks seen, [3, seen]."""
        classes = self._stream.class_masks[:seen].any(axis=0)
        # The trained columns belong to the point, as no other classifier does.
        given = (params, classes, number(seen), of_model, (None,))
        found = self._devices.whole(self.programs.training.scores(self._validation, *given))
        return np.stack([found.accuracy[0], found.task_aware[0], found.loss])[:, :seen]
