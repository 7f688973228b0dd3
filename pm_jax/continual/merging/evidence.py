"""What a finished task offers to the merge rule: its curvature at the trained model."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax import curvature, losses, task_vectors, trees
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.placement.feed import Pass
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.purpose_keys import CURVATURE, MERGE, purpose_key
from pm_jax.continual.training.task_program import DeviceData, logits_of
from pm_jax.curvature import kronecker, low_rank
from pm_jax.curvature.dense_layers import kernel_paths
from pm_jax.curvature.measures import Measure, Measurement, in_groups
from pm_jax.rules import Evidence, MergeRule
from pm_jax.types import Array, Batch, Key, LogitsFn, Params

FEWEST_EXAMPLES = 32
"""To know a standard error from."""


def evidence_fn(
    config: Config,
    model: nn.Module,
    rule: MergeRule,
    merging: tuple[str, ...],
    dense_layers: tuple[str, ...] = (),
    task_classes: int | None = None,
) -> Callable[..., Evidence]:
    """How the evidence that a rule needs is measured, in the coordinates that merge.

    Curvature is that of the mean loss over the task's own classes, without perturbation, on the
    task's training examples (or `config.curvature_examples` of them), at the trained model.

    Args:
        config: settings.
        model: linen module.
        rule: says what it needs; nothing else is computed.
        merging: paths of the leaves that merge.
        dense_layers: those of the model, for speed (see `dense_layers.layers_called_once`).
        task_classes: most classes that a task has, for speed: sums over all labels are over so
            many; `None` for all classes of the stream.

    Returns:
        A pass `measure(key, trained, previous, data, task) -> Evidence`: full parameter trees, the
        stream, and the task's number as an int32 scalar.

    Example:
        >>> from pm_jax import rules
        >>> measure = evidence_fn(Config(), nn.Dense(2), rules.averaging(), ())
        >>> measure(None, {}, {}, None, 0).quadratic is None
        True
    """

    def merge_key(key: Key, task: Array) -> Key | None:
        return purpose_key(key, MERGE, task) if "key" in rule.needs else None

    if not rule.needs & {"quadratic", "curvature_error"}:
        return lambda key, trained, previous, data, task: Evidence(key=merge_key(key, task))
    transform, devices = evaluation_transform(config), devices_of(config)

    def chunk_of(key: Key, trained: Params, previous: Params, data: DeviceData, task: Array) -> int:
        del key, previous, task
        leaves = trees.select(trained, merging)
        chunk = curvature.chunk_for_memory(leaves, _memory_bytes(config)) * devices.count
        # Each group of the examples is measured by itself.
        step = devices.count * max(1, rule.example_groups)
        return -(-min(chunk, data.positions.shape[1]) // step) * step

    def estimators(
        trained: Params, data: DeviceData, task: Array, chunk: int
    ) -> tuple[Measure, ...]:
        def logits_fn(leaves: Params, inputs: Array) -> Array:
            params = trees.replace(trained, leaves)
            return logits_of(model, params, inputs, data.class_masks[task], config.temperature)

        def own_logits_fn(leaves: Params, inputs: Array) -> Array:
            return _of_classes(logits_fn(leaves, inputs), data.class_masks[task], task_classes)

        leaves = trees.select(trained, merging)
        # Drawn labels are the same ones whatever the classes of other tasks.
        each_label_fn = logits_fn if config.curvature_samples else own_logits_fn
        found = _measures(config, logits_fn, each_label_fn, leaves, chunk, dense_layers)
        if rule.example_groups:
            found = tuple(in_groups(measure, rule.example_groups) for measure in found)
        return found

    def begin(key: Key, trained: Params, previous: Params, data: DeviceData, task: Array):
        chunk = chunk_of(key, trained, previous, data, task)
        key = purpose_key(key, CURVATURE, task)
        leaves = trees.select(trained, merging)
        delta = task_vectors.difference(leaves, trees.select(previous, merging))
        order, count = _examples(config, key, data, task)
        measures = estimators(trained, data, task, chunk)
        states = tuple(measure.init(leaves, delta, key) for measure in measures)
        return (states, count), order, -(-count // chunk)

    def step(number, carry, order, *arguments):
        (states, count), chunk = carry, chunk_of(*arguments)
        _, trained, _, data, task = arguments
        places = number * chunk + jnp.arange(chunk)
        rows = order[jnp.minimum(places, order.shape[0] - 1)]
        weights = (places < count).astype(jnp.float32)
        inputs = transform(data.take(devices, rows, places))
        batch = devices.spread(Batch(inputs, data.labels[rows], weights))
        measures = estimators(trained, data, task, chunk)

        def update(states):
            pairs = zip(measures, states, strict=True)
            return tuple(measure.update(state, batch) for measure, state in pairs)

        if not config.curvature_error:
            return update(states), count
        known = _known_enough(config, measures[-1].finalize(states[-1]))
        return jax.lax.cond(known, lambda x: x, update, states), count

    def finish(carry, *arguments) -> Evidence:
        key, trained, _, data, task = arguments
        measures = estimators(trained, data, task, chunk_of(*arguments))
        pairs = zip(measures, carry[0], strict=True)
        found = [measure.finalize(state) for measure, state in pairs]
        stored, known = found[0], found[-1]
        left_out = stored.left_out
        if left_out and known.left_out:
            left_out = left_out._replace(along=known.left_out.along)
        return Evidence(
            stored.quadratic,
            known.standard_error,
            merge_key(key, task),
            curvature_along=known.along if known is not stored else None,
            left_out=left_out,
        )

    return Pass(begin=begin, step=step, finish=finish, batch_size=chunk_of, devices=devices)


def _of_classes(logits: Array, mask: Array, most: int | None) -> Array:
    """The columns of some classes, and masked ones up to the most that a task has."""
    if most in (None, mask.shape[0]):
        return logits
    (own,) = jnp.nonzero(mask, size=most, fill_value=mask.shape[0])
    return jnp.take(logits, own, axis=1, fill_value=losses.MASKED_LOGIT)


def _measures(
    config: Config,
    logits_fn: LogitsFn,
    each_label_fn: LogitsFn,
    leaves: Params,
    chunk: int,
    dense_layers: tuple[str, ...],
) -> tuple[Measure, ...]:
    """What the settings name: the curvature that is stored, and the exact one along Delta.

    `each_label_fn` are the logits for kinds that make a pass for each label.
    """
    options: dict[str, Any] = {"chunk_size": chunk, "dense_layers": dense_layers}
    samples = config.curvature_samples or None
    match config.kept_curvature:
        case "identity":
            stored = curvature.identity()
        case "fisher_empirical":
            stored = curvature.fisher_empirical(losses.cross_entropy(logits_fn), **options)
        case "kronecker":
            kernels = kernel_paths(leaves)
            stored = kronecker.fisher_kronecker(
                each_label_fn, kernels, num_samples=samples, **options
            )
        case "low_rank":
            stored = low_rank.gauss_newton_low_rank(logits_fn, rank=config.curvature_rank)
        case _:  # For a softmax, fisher_exact is the diagonal of the Gauss-Newton matrix.
            stored = curvature.fisher_exact(each_label_fn, num_samples=samples, **options)
    if config.curvature == "exact_current":
        return stored, curvature.gauss_newton(logits_fn)
    return (stored,)


def _examples(config: Config, key: Key, data: DeviceData, task: Array) -> tuple[Array, Array]:
    """Positions of the examples to measure on, and how many of them count."""
    row, count = data.positions[task], data.sizes[task]
    if not (config.curvature_examples or config.curvature_error):
        return row, count
    draws = jax.random.uniform(key, row.shape)
    order = jnp.argsort(jnp.where(jnp.arange(row.shape[0]) < count, draws, 2.0))
    return row[order], jnp.minimum(count, config.curvature_examples or count)


def _known_enough(config: Config, found: Measurement) -> Array:
    """Whether the curvature along Delta is known to the error that is asked for."""
    precise = found.standard_error <= config.curvature_error * found.along
    # Few examples do not know their own spread; without a displacement there is no value.
    return precise & (found.along > 0) & (found.examples >= FEWEST_EXAMPLES)


def _memory_bytes(config: Config) -> float:
    """The bound of the flag; by default what fits a CPU's cache or is small on an accelerator."""
    default = 8 if jax.default_backend() == "cpu" else 2048
    return 1e6 * (config.curvature_memory_mb or default)
