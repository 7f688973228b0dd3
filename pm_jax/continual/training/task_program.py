"""Training of one task: an optimiser step, and an epoch of them in one compiled loop."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pm_jax import lora, losses, perturbation, task_vectors, trees
from pm_jax.continual.placement.devices import Devices, devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training import hooks, optimizer
from pm_jax.continual.training.image_transforms import training_transform
from pm_jax.continual.training.partition import Partition, Trainable, fresh_trainable
from pm_jax.continual.training.purpose_keys import ADAPTERS, AUGMENT, SHUFFLE, STEP, purpose_key
from pm_jax.data.stream import TaskIndices, TaskStream
from pm_jax.rules import TrainingHook
from pm_jax.types import Array, Batch, Key, Params, PyTree


class Window(NamedTuple):
    """The inputs of a stretch of a pass over examples, in the order of the pass.

    Attributes:
        values: uint8 [S, B, ...], of S steps.
        first: place of the first of them in the pass, int32 scalar.
    """

    values: Array
    first: Array


class DeviceData(NamedTuple):
    """A stream on the device.

    Attributes:
        inputs: uint8 images or int32 token ids [N, ...], by rows on the devices, or what is there
            of them.
        labels: int32 [N].
        positions: int32 [T, M], examples of each task.
        sizes: int32 [T], how many entries of each row are examples.
        class_masks: bool [T, C].
    """

    inputs: Array | Window | None
    labels: Array
    positions: Array
    sizes: Array
    class_masks: Array

    @classmethod
    def of(cls, devices: Devices, stream: TaskStream, split: TaskIndices) -> "DeviceData":
        """Put a stream and one of its splits on the devices."""
        rest = devices.place((stream.labels, split.positions, split.sizes, stream.class_masks))
        return cls(devices.place_rows(stream.inputs), *rest)

    def take(self, devices: Devices, rows: Array, places: Array) -> Array:
        """Inputs of the examples in some rows, which are one step's places of a pass."""
        if isinstance(self.inputs, Window):
            values, first = self.inputs
            if devices.count == 1:  # taken as resident ones are, for the same last bit
                return values.reshape(-1, *values.shape[2:])[places - first]
            return values[(places[0] - first) // places.shape[0]]
        assert self.inputs is not None
        return devices.rows(self.inputs, rows)


class Segment(NamedTuple):
    """A piece of an epoch of a task; int32 scalars, so that every piece runs the same program.

    Attributes:
        task: counted from 0.
        epoch: counted from 0.
        first: first step within the epoch.
        stop: one past the last step; no more steps are made than the task has batches.
        epochs: of the task in all, for the schedule.
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
        """A segment from Python ints."""
        values = (task, epoch, first, stop, epochs, projected)
        return cls(*(jnp.asarray(value, jnp.int32) for value in values))


class TaskProgram(NamedTuple):
    """Compiled functions that train one task.

    Attributes:
        begin: `begin(key, start, task) -> (trainable, optimizer_state)`.
        train: `train(key, trainable, optimizer_state, start, data, segment) -> (trainable,
            optimizer_state, losses)`, losses float32 [steps of the largest task]. The first two are
            donated. With a rule's hook, both functions take the rule's state last.
        order: `order(key, data, task, epoch) -> rows`, int32, the examples of an epoch in order.
        refresh: `refresh(key, trainable, optimizer_state, task, step, rule_state) -> (trainable,
            optimizer_state)`, the hook's, after so many steps of the task; the two are donated.
    """

    begin: Callable[..., tuple[Trainable, PyTree]]
    train: Callable[..., tuple[Trainable, PyTree, Array]]
    order: Callable[..., Array]
    refresh: Callable[..., tuple[Trainable, PyTree]]


def normalized(inputs: Array) -> Array:
    """Examples as the models read them: images from 0..255 to -1..1, token ids as they are.

    Args:
        inputs: uint8 images or int32 token ids [N, ...].

    Returns:
        float32 images or int32 token ids [N, ...].

    Example:
        >>> import jax.numpy as jnp
        >>> normalized(jnp.asarray([0, 255], jnp.uint8)).tolist()
        [-1.0, 1.0]
    """
    if inputs.dtype != jnp.uint8:
        return inputs
    return inputs.astype(jnp.float32) / 127.5 - 1.0


def logits_of(
    model: nn.Module,
    params: Params,
    inputs: Array,
    class_mask: Array,
    temperature: float = 1.0,
) -> Array:
    """Masked logits of a model on examples as they are stored, as the loss sees them.

    Args:
        model: linen module.
        params: its parameters.
        inputs: uint8 images or int32 token ids [N, ...].
        class_mask: bool [C].
        temperature: that the logits are divided by.

    Returns:
        float32 [N, C].

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.zeros(2)}
        >>> logits_of(nn.Dense(2), params, jnp.asarray([[255]], jnp.uint8), jnp.ones(2)).tolist()
        [[1.0, 1.0]]
    """
    logits = jnp.asarray(model.apply({"params": params}, normalized(inputs)))
    return losses.mask_logits(logits.astype(jnp.float32) / temperature, class_mask)


def training_loss(
    model: nn.Module,
    law: perturbation.Perturbation,
    trainable: Trainable,
    start: Params,
    batch: Batch,
    class_mask: Array,
    key: Key,
    *,
    per_example: bool = False,
    temperature: float = 1.0,
) -> Array:
    """The loss of one step of Perturb-and-Merge: at a random point along the task vector.

    Args:
        model: linen module.
        law: of the perturbation (static).
        trainable: what is differentiated.
        start: the model that the task started from, `theta_hat_{t-1}`.
        batch: N examples.
        class_mask: bool [C], classes that take part.
        key: PRNG key of the draw.
        per_example: one draw per example; adapters only.
        temperature: that the logits are divided by.

    Returns:
        float32 scalar.

    References:
        Perturb-and-Merge, `arXiv 2505.22389 <https://arxiv.org/abs/2505.22389>`_, section 3.2

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.zeros(2)}
        >>> flat = trees.leaves_by_path(params)
        >>> batch = Batch(jnp.zeros((1, 1), jnp.uint8), jnp.zeros(1, int))
        >>> round(float(training_loss(nn.Dense(2), perturbation.symmetric(),
        ...     Trainable({}, flat, {}), params, batch, jnp.ones(2), jax.random.key(0))), 4)
        0.6931
    """
    step_key, direction_key = jax.random.split(key)
    total = jnp.zeros((), jnp.float32)
    for step, weight in law.draws(step_key, batch.labels.shape if per_example else ()):
        leaves, scale = _displaced(law, direction_key, step, trainable, start)
        params = trees.replace(start, {**leaves, **trainable.head})
        with lora.branch(trainable.adapters, scale):
            logits = logits_of(model, params, batch.inputs, class_mask, temperature)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        weights = losses.weights_of(batch)
        total += weight * jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1.0)
    return total


def _displaced(
    law: perturbation.Perturbation, key: Key, step: Array, trainable: Trainable, start: Params
) -> tuple[dict[str, Array], Array | float]:
    """Leaves to replace and scale of the adapter branches, for one draw."""
    if law == perturbation.none():
        return trainable.direct, 1.0
    base = trees.select(start, tuple(trainable.direct))
    if not law.gaussian:
        # With adapters, theta + s Delta scales their branch by 1 + s: one factor only.
        return perturbation.displace(key, law, step, trainable.direct, base), 1.0 + step
    delta = task_vectors.difference(trainable.direct, base)
    length = trees.safe_sqrt(trees.inner(delta, delta) + lora.squared_norm(trainable.adapters))
    leaves = {**trees.select(start, tuple(trainable.adapters)), **trainable.direct}
    noise = perturbation.noise_of_norm(key, leaves, step * length)
    return task_vectors.apply(leaves, noise), 1.0


def task_program(
    config: Config,
    model: nn.Module,
    partition: Partition,
    largest_task: int,
    hook: TrainingHook | None = None,
) -> TaskProgram:
    """Compile-once functions that train tasks of up to a number of examples.

    Args:
        config: settings.
        model: linen module.
        partition: which of its parameters train.
        largest_task: M, examples of the largest task.
        hook: of the merge rule.

    Returns:
        A `TaskProgram`.

    Example:
        >>> task_program(Config(), Config().network(10), Partition((), (), ()), 64).train
        <PjitFunction of <function task_program.<locals>.train at ...>>
    """
    law, devices = config.perturbation_law, devices_of(config)
    transform = training_transform(config)
    transformation, rate = optimizer.transformation(config), optimizer.schedule(config)
    batch_size = config.batch_size
    steps = -(-largest_task // batch_size)
    # Without adapters, as in the first task from scratch, examples share all that is perturbed.
    per_example = config.perturb_per == "example" and bool(partition.adapted)

    @devices.jit
    def begin(
        key: Key, start: Params, task: Array, rule_state: PyTree = None
    ) -> tuple[Trainable, PyTree]:
        adapter_key = purpose_key(key, ADAPTERS, task)
        trainable = fresh_trainable(adapter_key, partition, start, config.lora_rank)
        trainable = hooks.at_onset(hook, rule_state, trainable)
        # Copies: the next call donates them, and `start` must survive.
        trainable = jax.tree.map(jnp.copy, trainable)
        return trainable, optimizer.accumulated(config, transformation)[0].init(trainable)

    def batches_of(key: Key, data: DeviceData, task: Array, epoch: Array) -> Array:
        shuffle_key = purpose_key(key, SHUFFLE, task, epoch)
        return _epoch_batches(shuffle_key, data, task, steps, batch_size)

    @jax.jit
    def order(key: Key, data: DeviceData, task: Array, epoch: Array) -> Array:
        return batches_of(key, data, task, epoch).ravel()

    def train(key, trainable, optimizer_state, start, data, segment, rule_state=None):
        task, count = segment.task, data.sizes[segment.task]
        batches = batches_of(key, data, task, segment.epoch)
        steps_per_epoch = -(-count // batch_size)
        updates_per_epoch = -(-steps_per_epoch // config.accumulation_steps)
        class_mask = data.class_masks[task]

        def step(position, carry):
            trainable, optimizer_state, values = carry
            rows = batches[position]
            places = position * batch_size + jnp.arange(batch_size)
            weights = places < count
            number = segment.epoch * steps_per_epoch + position
            image_key = purpose_key(key, AUGMENT, task, number)
            inputs = transform(image_key, data.take(devices, rows, places))
            batch = Batch(inputs, data.labels[rows], weights.astype(jnp.float32))
            batch = devices.spread(batch)
            update = segment.epoch * updates_per_epoch + position // config.accumulation_steps
            # What a batch shares, so do the batches of an update.
            draw = number if per_example else update
            value, gradients = jax.value_and_grad(
                lambda t: training_loss(
                    model,
                    law,
                    t,
                    start,
                    batch,
                    class_mask,
                    purpose_key(key, STEP, task, draw),
                    per_example=per_example,
                    temperature=config.temperature,
                )
            )(trainable)
            progress = update / (updates_per_epoch * segment.epochs)
            step_optimizer, share = optimizer.accumulated(config, transformation, position, count)
            if config.accumulation_steps > 1:
                gradients = jax.tree.map(lambda g: share * g, gradients)
            gradients = hooks.projected(hook, rule_state, gradients, segment.projected)
            updates, optimizer_state = step_optimizer.update(gradients, optimizer_state, trainable)
            updates = optimizer.scaled(config, updates, rate(progress), class_mask)
            updates = hooks.projected(hook, rule_state, updates, segment.projected)
            trainable = optax.apply_updates(trainable, updates)
            return trainable, optimizer_state, values.at[position].set(value)

        # A loop with a traced bound makes no step on padding alone, and stops where asked.
        carry = (trainable, optimizer_state, jnp.zeros(steps, jnp.float32))
        stop = jnp.minimum(segment.stop, steps_per_epoch)
        return jax.lax.fori_loop(segment.first, stop, step, carry)

    refresh = hooks.refresh_fn(hook, optimizer.accumulated(config, transformation)[0], devices)
    return TaskProgram(begin, devices.jit(train, donate_argnums=(1, 2)), order, refresh)


def _epoch_batches(key: Key, data: DeviceData, task: Array, steps: int, batch_size: int) -> Array:
    """Positions of the task's examples in random order, then padding, [steps, batch_size]."""
    row = data.positions[task]
    draws = jax.random.uniform(key, row.shape)
    first = jnp.argsort(jnp.where(jnp.arange(row.shape[0]) < data.sizes[task], draws, 2.0))
    padding = (0, steps * batch_size - row.shape[0])
    return jnp.pad(row[first], padding).reshape(steps, batch_size)


def segments(
    first_step: int,
    total_steps: int,
    steps_per_epoch: int,
    every: int,
    further: Collection[int] = (),
) -> list[tuple[int, int, int]]:
    """Pieces (epoch, first, stop) that lead through a task, cut at epochs and at checkpoints.

    Args:
        first_step: where to begin, in steps of the task.
        total_steps: steps of the task in all.
        steps_per_epoch: of the task.
        every: steps between checkpoints; 0 for none within the task.
        further: steps of the task to cut at as well.

    Returns:
        Pieces of one epoch or less, in order.

    Example:
        >>> segments(0, 6, 3, 2)
        [(0, 0, 2), (0, 2, 3), (1, 0, 1), (1, 1, 3)]
    """
    cuts = {*range(0, total_steps + 1, steps_per_epoch), *further}
    if every:
        cuts |= set(range(0, total_steps + 1, every))
    bounds = [first_step, *sorted(cut for cut in cuts if cut > first_step)]
    return [
        (low // steps_per_epoch, low % steps_per_epoch, low % steps_per_epoch + high - low)
        for low, high in zip(bounds[:-1], bounds[1:], strict=True)
    ]
