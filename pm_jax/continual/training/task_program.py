"""Training of one task: an optimiser step, and an epoch of them in one compiled loop."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pm_jax import lora, losses, trees
from pm_jax.continual.placement.compiled import compiled
from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import Batches
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training import hooks, optimizer
from pm_jax.continual.training.image_transforms import training_transform
from pm_jax.continual.training.logits import training_logits_of
from pm_jax.continual.training.own_model import Traits
from pm_jax.continual.training.partition import Partition, Trainable, fresh_trainable
from pm_jax.continual.training.purpose_keys import (
    ADAPTERS,
    AUGMENT,
    MODEL,
    REFRESH,
    SHUFFLE,
    STEP,
    purpose_key,
)
from pm_jax.integrations.wrap import as_model
from pm_jax.perturbation import Perturbation, perturbed
from pm_jax.rules import TrainingHook
from pm_jax.types import Array, Batch, Key, Params, PyTree


class Segment(NamedTuple):
    """A piece of an epoch of a task; int32 scalars, so that one program runs all of them.

    Attributes:
        first: first step within the epoch.
        stop: one past the last step; no more steps are made than the task has batches.
        epochs: number of epochs of the task, for the schedule.
        projected: 1 where the rule's hook projects, 0 elsewhere.
    """

    task: Array
    epoch: Array
    first: Array
    stop: Array
    epochs: Array
    projected: Array

    @classmethod
    def of(
        cls, task: int, epoch: int, first: int, stop: int, epochs: int, projected: bool = False
    ) -> "Segment":
        """Make a segment of Python numbers."""
        values = (task, epoch, first, stop, epochs, projected)
        return cls(*(jnp.asarray(value, jnp.int32) for value in values))


def training_loss(
    model: Any,
    law: Perturbation,
    *,
    examples: int | None = None,
    temperature: float = 1.0,
    folds: bool = False,
) -> Callable[..., tuple[Array, PyTree]]:
    """Make the loss of a step of Perturb-and-Merge: at a random point along the task vector.

    The function is `loss(key, trainable, start, batch, class_mask, model_state={}, model_key=None)
    -> (float32 scalar, next state of the model)`, where `start` is the model that the task started
    from. With `examples` N it draws a point for each of them. With `folds` the
    adapters are folded into the kernels, for models whose layers take none.
    """

    def loss_fn(
        moving: dict[str, Array],
        head: dict[str, Array],
        start: Params,
        batch: Batch,
        mask: Array,
        model_state: PyTree,
        model_key: Key | None,
    ) -> tuple[Array, PyTree]:
        params = trees.replace(start, {**lora.dense_leaves(moving), **head})
        if folds:
            params, moving = _folded(params, moving), {}
        next_states: list[PyTree] = []

        def logits_fn(params: Params, inputs: Array) -> Array:
            # Adapters act on activations here, which is cheaper than to build each dense weight.
            with lora.branch(moving):
                logits, next_state = training_logits_of(
                    model, params, model_state, model_key, inputs, mask, temperature
                )
            next_states.append(next_state)
            return logits

        loss = losses.mean(losses.cross_entropy(logits_fn))(params, batch)
        return loss, next_states[-1]

    perturbed_loss = perturbed(loss_fn, law, has_aux=True, examples=examples)

    def loss(
        key: Key,
        trainable: Trainable,
        start: Params,
        batch: Batch,
        class_mask: Array,
        model_state: PyTree = {},  # noqa: B006  never written to
        model_key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        base = trees.select(start, tuple(trainable.moving))
        more = (trainable.head, start, batch, class_mask, model_state, model_key)
        return perturbed_loss(key, trainable.moving, base, *more)

    return loss


def _folded(params: Params, moving: Mapping[str, Any]) -> Params:
    """Fold the adapters among moving leaves into the parameters."""
    for path, leaf in moving.items():
        if isinstance(leaf, lora.AdaptedKernel):
            params = lora.fold(params, {path: leaf.adapter}, leaf.scale)
        elif isinstance(leaf, lora.Adapter):
            params = lora.fold(params, {path: leaf})
    return params


class TaskProgram:
    """The compiled functions that train the same leaves for tasks of any size up to the largest."""

    def __init__(
        self,
        config: Config,
        model: Any,
        partition: Partition,
        largest_task: int,
        hook: TrainingHook | None = None,
        traits: Traits | None = None,
    ):
        traits = traits or Traits()
        # A model with state may compare the examples of a batch, so that padding must be like them.
        self._pads_with_examples, self._is_random = traits.has_state, traits.is_random
        self._config, self._partition, self._hook = config, partition, hook
        self.devices = devices_of(config)
        self.batches = Batches(self.devices, config.batch_size)
        self._most_steps = -(-largest_task // config.batch_size)
        self._transform = training_transform(config)
        self._optimizer, self._rate = optimizer.transformation(config), optimizer.schedule(config)
        # Per-example draws need adapters: without them (the first task from scratch) all examples
        # share the same weights.
        self._per_example = config.perturb_per == "example" and bool(partition.adapted)
        self._classifier = as_model(model).classifier
        self._loss = training_loss(
            model,
            config.perturbation_law,
            examples=config.batch_size if self._per_example else None,
            temperature=config.temperature,
            folds=traits.folds,
        )

    @compiled()
    def begin(
        self,
        key: Key,
        start: Params,
        task: Array,
        rule_state: PyTree = None,
        *,
        model_state: PyTree = {},  # noqa: B006  never written to
    ) -> tuple[Trainable, PyTree, PyTree]:
        """Make the trainable leaves at the onset of a task, and both states, for `train`."""
        adapter_key = purpose_key(key, ADAPTERS, task)
        trainable = fresh_trainable(adapter_key, self._partition, start, self._config.lora_rank)
        trainable = hooks.at_onset(self._hook, rule_state, trainable)
        # Copies: the next call donates them, and `start` must survive.
        trainable, model_state = jax.tree.map(jnp.copy, (trainable, model_state))
        return trainable, self._accumulated()[0].init(trainable), model_state

    @compiled()
    def order(self, key: Key, data: DeviceData, task: Array, epoch: Array) -> Order:
        """Shuffle the examples of a task for an epoch."""
        order = data.shuffled(purpose_key(key, SHUFFLE, task, epoch), task)
        return order.padded_with_examples(self.batches.size) if self._pads_with_examples else order

    @compiled(donate_argnums=(1, 2, 3))
    def train(
        self,
        key: Key,
        trainable: Trainable,
        optimizer_state: PyTree,
        model_state: PyTree,
        start: Params,
        data: DeviceData,
        segment: Segment,
        rule_state: PyTree = None,
    ) -> tuple[Trainable, PyTree, PyTree, Array]:
        """Make the steps of a segment; also returns the losses by step of the epoch, float32.

        The trainable leaves, the optimiser's and the model's state are donated.
        """
        config, task = self._config, segment.task
        count, class_mask = data.sizes[task], data.class_masks[task]
        # Shuffled anew for every segment: a run that goes on within an epoch needs no saved order.
        order = self.order(key, data, task, segment.epoch)
        steps_per_epoch = -(-count // config.batch_size)
        updates_per_epoch = -(-steps_per_epoch // config.accumulation_steps)

        def step(position: Array, carry: tuple) -> tuple:
            trainable, optimizer_state, model_state, values = carry
            number = segment.epoch * steps_per_epoch + position
            transform = functools.partial(self._transform, purpose_key(key, AUGMENT, task, number))
            batch = self.batches.at(data, order, position, transform)
            update = segment.epoch * updates_per_epoch + position // config.accumulation_steps
            # All batches accumulated into one update share one draw of s, as one large batch would.
            draw = number if self._per_example else update
            model_key = purpose_key(key, MODEL, task, number) if self._is_random else None
            (value, model_state), gradients = jax.value_and_grad(
                self._loss, argnums=1, has_aux=True
            )(
                purpose_key(key, STEP, task, draw),
                trainable,
                start,
                batch,
                class_mask,
                model_state,
                model_key,
            )
            step_optimizer, share = self._accumulated(position, count)
            if config.accumulation_steps > 1:
                gradients = jax.tree.map(lambda g: share * g, gradients)
            # Both are projected: Adam scales entry by entry, which leaves the complement again.
            gradients = hooks.projected(self._hook, rule_state, gradients, segment.projected)
            updates, optimizer_state = step_optimizer.update(gradients, optimizer_state, trainable)
            progress = update / (updates_per_epoch * segment.epochs)
            updates = optimizer.scaled(
                config, updates, self._rate(progress), class_mask, self._classifier
            )
            updates = hooks.projected(self._hook, rule_state, updates, segment.projected)
            trainable = optax.apply_updates(trainable, updates)
            return trainable, optimizer_state, model_state, values.at[position].set(value)

        # A loop with a traced bound makes no step on padding alone, and stops where asked.
        losses_of_steps = jnp.zeros(self._most_steps, jnp.float32)
        carry = (trainable, optimizer_state, model_state, losses_of_steps)
        stop = jnp.minimum(segment.stop, steps_per_epoch)
        return jax.lax.fori_loop(segment.first, stop, step, carry)

    @compiled(donate_argnums=(1, 2))
    def refresh(
        self,
        key: Key,
        trainable: Trainable,
        optimizer_state: PyTree,
        task: Array,
        step: Array,
        rule_state: PyTree,
    ) -> tuple[Trainable, PyTree]:
        """Refresh the trainable leaves by the hook, after a step of the task."""
        return hooks.refreshed(
            self._hook,
            self._accumulated()[0],
            purpose_key(key, REFRESH, task, step),
            trainable,
            optimizer_state,
            rule_state,
        )

    def _accumulated(
        self, position: Array | int = 0, count: Array | int = 1
    ) -> tuple[optax.GradientTransformation, Array | float]:
        return optimizer.accumulated(self._config, self._optimizer, position, count)
