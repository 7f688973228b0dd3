"""The compiled functions of a run, made once per configuration and shape of stream."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import rules, task_vectors, trees
from pm_jax.continual.merging.classifying import Classifying
from pm_jax.continual.merging.evaluation import MeanLossPass, ScoresPass, scores_batch
from pm_jax.continual.merging.evidence import EvidencePass, Given
from pm_jax.continual.merging.model_state import BatchStatisticsPass
from pm_jax.continual.merging.objective import Objectives
from pm_jax.continual.placement.compiled import compiled
from pm_jax.continual.placement.data import StreamData, resident_bytes
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training import own_model
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.initial_model import (
    blank_example,
    init_fn,
    is_built_in,
    partitions,
    plain,
)
from pm_jax.continual.training.logits import Evaluating
from pm_jax.continual.training.partition import Partition, Trainable, trained_params
from pm_jax.continual.training.purpose_keys import MERGE, purpose_key
from pm_jax.continual.training.snapshots import Snapshots
from pm_jax.continual.training.task_program import TaskProgram
from pm_jax.curvature.dense_layers import kernel_paths, layer_of, layers_called_once
from pm_jax.data.stream import TaskStream
from pm_jax.integrations.linen import LinenModel
from pm_jax.integrations.wrap import as_model
from pm_jax.models.model import Model
from pm_jax.rules import Evidence, MergeInfo, MergeRule, TrainingHook, gradient_projection
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree


class StreamShape(NamedTuple):
    """The numbers of a stream that compiled functions depend on.

    Attributes:
        num_classes: number of classes of all tasks.
        largest_task: number of training examples of the largest task.
        task_classes: largest number of classes of a task.
        input_dtype: type of the inputs; empty for that of the configuration's model.
    """

    num_classes: int
    input_shape: tuple[int, ...]
    largest_task: int
    task_classes: int
    input_dtype: str = ""

    @classmethod
    def of(cls, stream: TaskStream) -> "StreamShape":
        """Return the shape of a stream."""
        return cls(
            stream.num_classes,
            stream.inputs.shape[1:],
            stream.train.positions.shape[1],
            int(stream.class_masks.sum(axis=1).max()),
            str(stream.inputs.dtype),
        )


class TrainingPrograms:
    """The compiled functions that know nothing of the merge rule but its hook.

    Attributes:
        partition: leaves that train and merge, from the second task on at the latest.
        later: trains all tasks but the first; the same object as `first` if the same leaves train.
        columns: trains the classifier's columns alone, in tasks that move nothing that merges.
        shapes: those of the parameters and of the model's state.
        traits: what the model has beside its parameters.

    Raises:
        InvalidInput: a model that cannot be trained or evaluated.
    """

    def __init__(self, config: Config, shape: StreamShape, hook: TrainingHook | None, model: Model):
        self.devices, self.model = devices_of(config), model
        form = (shape.num_classes, shape.input_shape)
        self._init = init_fn(config, *form, model=model, input_dtype=shape.input_dtype)
        self.traits = own_model.Traits()
        blank = None
        if not is_built_in(model):
            name = own_model.name_of(model, config.model)
            blank = blank_example(config, shape.input_shape, shape.input_dtype)
            self.traits = own_model.checked(model, name, self._init, blank, shape.num_classes)
        params, state = self.shapes = jax.eval_shape(self._init, jax.random.key(0))
        first, later = partitions(config, params, model, blank)
        self.partition = later
        if later.adapted and blank is not None:
            make = functools.partial(later.fresh_adapters, rank=config.lora_rank)
            adapters = jax.eval_shape(make, jax.random.key(0), params)
            branches = own_model.takes_branches(model, params, state, blank, adapters)
            self.traits = self.traits._replace(folds=not branches)
            if config.perturb_per == "example" and not branches:
                raise InvalidInput(
                    "perturb_per=example: the layers that lora_pattern adapts take no adapters on "
                    "their activations; use perturb_per=batch"
                )
        self.later, self.first = (
            TaskProgram(config, model, part, shape.largest_task, hook, self.traits)
            for part in (later, first)
        )
        if first == later:
            self.first = self.later
        # Without a task vector there is nothing to perturb along.
        unperturbed = dataclasses.replace(config, perturbation="none", perturb_per="batch")
        self.columns = TaskProgram(
            unperturbed, Evaluating(model), Partition((), (), later.head), shape.largest_task
        )
        # Runs that differ in how they train are evaluated by the same programs.
        by_default = ("learning_rate", "epochs", "first_task_epochs")
        defaults: Any = {name: getattr(Config, name) for name in by_default}
        evaluated = dataclasses.replace(unperturbed, **defaults)
        self.scores, self.mean_loss = evaluation_passes(evaluated, model)

    @compiled(once=True)
    def init_with_state(self, key: Key) -> tuple[Params, PyTree]:
        """Initialise the parameters and the model's state."""
        return self._init(key)

    def init(self, key: Key) -> Params:
        """Initialise the parameters."""
        return self.init_with_state(key)[0]

    @compiled()
    def trained(self, start: Params, trainable: Trainable) -> Params:
        """Return the trained model as a full parameter tree, adapters folded in."""
        return trained_params(start, trainable)


class Programs:
    """The compiled functions of a run, shared by seeds whose shapes agree.

    Attributes:
        merging: paths of the leaves that merge.
        adapted: paths of the leaves that have adapters, from the second task on at the latest.
        objective: makes the loss of a task on some of its examples, see `Objectives.of_task`.
        classifying: functions of the classifiers that are made from features, or `None`.
    """

    def __init__(self, config: Config, shape: StreamShape, model: Model):
        self.devices, self._rule = devices_of(config), config.merge_rule
        # Sharing must not depend on settings of merging, nor on the classes of a single task.
        self.training = training_programs(
            config.without_merging(), shape._replace(task_classes=0), self._rule.needs.hook, model
        )
        partition = self.training.partition
        self.merging, self.adapted = partition.merging, partition.adapted
        params, state = self.training.shapes
        leaves = trees.select(params, self.merging)
        blank = blank_example(config, shape.input_shape, shape.input_dtype)
        called_once = dense_layers_of(model, blank)
        name = own_model.name_of(model, config.model)
        if config.kept_curvature == "kronecker":
            own_model.check_linen(model, name, "curvature=kronecker", "fisher_exact")
            _check_dense(leaves, called_once)
        if config.kept_curvature == "input_moment" and "quadratic" in self._rule.needs.evidence:
            alone = self._rule.needs.curvatures == ("input_moment",)
            setting = f"rule={config.rule}" if alone else "curvature=input_moment"
            example = None if is_built_in(model) else blank
            own_model.check_input_moments(model, name, setting, leaves, self.adapted, example)
        if "input_moments" in self._rule.needs.evidence and not is_built_in(model):
            own_model.check_inputs_of_layers(model, name, config.rule, leaves, self.adapted, blank)
        measured = (
            model if self._differentiates_batches(config, leaves, called_once) else plain(model)
        )
        self.evidence_pass = EvidencePass(
            config,
            measured,
            self._rule,
            leaves,
            shape.largest_task,
            called_once,
            shape.task_classes,
        )
        form = (shape.input_shape, shape.largest_task, shape.input_dtype)
        self.objective = Objectives(config, plain(model), *form).of_task
        self.classifying = None
        if any(each.classifier.statistics for each in config.chosen_classifiers):
            self.classifying = Classifying(config, model, params, state, blank)
        if config.model_state == "measured" and self.training.traits.has_state:
            own_model.check_measurable(model, name, params, state, blank)
        self.batch_statistics = BatchStatisticsPass(config, model)
        self.snapshots = Snapshots(
            self._rule.needs.snapshots, self.merging, resident_bytes(config), self.devices
        )

    def _differentiates_batches(
        self, config: Config, leaves: Params, called_once: tuple[str, ...]
    ) -> bool:
        """Tell whether curvature takes nothing but backward passes of whole batches.

        Otherwise it looks at the inputs of layers, differentiates forward, or takes examples one by
        one, which padded tokens and cuDNN's attention do not suit.
        """
        backward = ("fisher_exact", "fisher_empirical", "gauss_newton_diag")
        by_layers = {layer_of(path) for path in leaves} <= {*called_once}
        one_group = not self._rule.needs.example_groups
        is_backward = config.kept_curvature in backward and config.curvature != "exact_current"
        return is_backward and by_layers and one_group

    def evidence(
        self,
        data: StreamData,
        key: Key,
        trained: Params,
        previous: Params,
        task: Array,
        model_state: PyTree = None,
    ) -> Evidence:
        """Measure the curvature that the rule needs of a task, and add the key of its merge."""
        needs = self._rule.needs.evidence
        evidence = Evidence()
        if needs & {"quadratic", "curvature_error"}:
            evidence = self.evidence_pass.run(
                data, Given(key, trained, previous, task, model_state)
            )
        return evidence._replace(key=purpose_key(key, MERGE, task) if "key" in needs else None)

    @compiled(once=True)
    def initial_rule_state(self, leaves: Params, given: dict[str, PyTree]) -> PyTree:
        """Make the rule's state before any merge, from copies of the leaves that merge."""
        # Merging donates the state, and the model must survive.
        return initial_rule_state(self._rule, jax.tree.map(jnp.copy, leaves), **given)

    @functools.cached_property
    def merge(self) -> jax.stages.Wrapped:
        """The compiled `merge_leaves`, to which the rule's state is donated."""
        return rules.jit_merge(self.merge_leaves)

    def merge_leaves(
        self, rule_state: PyTree, previous: Params, trained: Params, evidence: Evidence
    ) -> tuple[PyTree, Params, MergeInfo]:
        """Return the rule's next state, the merged leaves and the info, from full trees."""
        leaves, rule_state, info = self._rule.update(
            rule_state,
            previous=trees.select(previous, self.merging),
            trained=trees.select(trained, self.merging),
            evidence=evidence,
        )
        # The state comes first: donated buffers go to the first results of their shape.
        return self.devices.keep((rule_state, leaves, info.without_comparison()))

    @compiled(donate_argnums=0)
    def absorb(
        self, rule_state: PyTree, merged: Params, objective: Objective, evidence: Evidence
    ) -> PyTree:
        """Let the state of a rule absorb evidence at the merged model."""
        assert self._rule.needs.absorb
        leaves = trees.select(merged, self.merging)
        kernels = kernel_paths(leaves)
        moments = gradient_projection.input_moments(objective, leaves, kernels)
        return self._rule.needs.absorb(rule_state, evidence._replace(input_moments=moments))

    @compiled()
    def between(self, previous: Params, trained: Params, alpha: Array) -> Params:
        """Return the point of the merge segment with a coefficient."""
        ends = trees.select(previous, self.merging), trees.select(trained, self.merging)
        return trees.replace(trained, trees.lerp(*ends, alpha))

    @compiled()
    def in_plane(
        self, previous: Params, trained: Params, across: Params, coordinates: tuple[Array, Array]
    ) -> Params:
        """Return a point of the plane through `previous` along the task vector and `across`."""
        start = trees.select(previous, self.merging)
        along = task_vectors.difference(trees.select(trained, self.merging), start)
        step = task_vectors.combine([along, across], list(coordinates))
        return trees.replace(trained, task_vectors.apply(start, step))

    @compiled()
    def gradient_norm(self, objective: Objective, params: Params) -> Array:
        """Return the norm of the gradient of a task's loss by the leaves that merge."""
        return objective.gradient_norm(trees.select(params, self.merging))


@functools.lru_cache(maxsize=8)
def evaluation_passes(config: Config, model: Model) -> tuple[ScoresPass, MeanLossPass]:
    """Return the passes that evaluate a model, the same objects for the same arguments."""
    transform, temperature = evaluation_transform(config), config.temperature
    options: Any = {
        "temperature": temperature,
        "transform": transform,
        "devices": devices_of(config),
    }
    scores = ScoresPass(model, scores_batch(config.batch_size), **options)
    return scores, MeanLossPass(model, **options)


@functools.lru_cache(maxsize=8)
def training_programs(
    config: Config, shape: StreamShape, hook: TrainingHook | None, model: Model
) -> TrainingPrograms:
    """Return the programs of training, the same object where only settings of merging differ."""
    return TrainingPrograms(config, shape, hook, model)


@functools.lru_cache(maxsize=8)
def programs_of(config: Config, shape: StreamShape, model: Model | None = None) -> Programs:
    """Return the programs of a run, the same object for the same arguments.

    Without a model they are for that of the configuration.

    Raises:
        InvalidInput: settings that do not fit the model.
    """
    return Programs(config, shape, model or as_model(config.network(shape.num_classes)))


def initial_rule_state(rule: MergeRule, leaves: Params, **given: PyTree) -> PyTree:
    """Make the state of a rule before any merge, from the leaves that merge.

    Raises:
        InvalidInput: the model's leaves do not suit the rule's settings.
    """
    try:
        return rule.init(leaves, **given)
    except InvalidInput as error:
        raise InvalidInput(f"rule_settings={error}") from None


def dense_layers_of(model: Model, blank: Array) -> tuple[str, ...]:
    """Return the names of the dense layers that a model calls exactly once, for linen models."""
    if not isinstance(model, LinenModel):
        return ()
    if is_built_in(model):
        return layers_called_once(model.module, blank)
    return own_model.layers_by_example(model, blank)


def _check_dense(leaves: Params, called_once: tuple[str, ...]) -> None:
    """Check that every kernel that merges can have Kronecker factors.

    Raises:
        InvalidInput: one cannot.
    """
    if not kernel_paths(leaves):
        raise InvalidInput(
            "curvature=kronecker: no kernel of a dense layer merges; use fisher_exact"
        )
    for path in kernel_paths(leaves):
        if layer_of(path) not in called_once:
            raise InvalidInput(
                f"curvature=kronecker: {path} is not the kernel of a dense layer that is called "
                "once; use fisher_exact, or lora_pattern to choose other kernels"
            )
