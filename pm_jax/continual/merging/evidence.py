"""Evidence of a finished task for the merge rule: its curvature at the trained model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import curvature, losses, task_vectors, trees
from pm_jax.continual.placement.data import DeviceData, Order
from pm_jax.continual.placement.data_pass import DataPass
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import evaluation_transform
from pm_jax.continual.training.logits import logits_of
from pm_jax.continual.training.purpose_keys import CURVATURE, purpose_key
from pm_jax.curvature import input_moments, kronecker, low_rank
from pm_jax.curvature.dense_layers import kernel_paths, layer_of
from pm_jax.curvature.measures import Measure, Measurement, MeasureState, in_groups
from pm_jax.rules import Evidence, MergeRule
from pm_jax.types import Array, Batch, Key, LogitsFn, Params, PyTree

FEWEST_EXAMPLES = 32
"""A standard error of fewer examples is not believed."""
FORWARD_CHUNK = 64
"""Examples of a device whose inputs of all layers are in memory at a time."""


class Given(NamedTuple):
    """The arguments of a measurement, beside the data.

    Attributes:
        trained: full parameter tree.
        previous: model that the task started from.
        task: int32 scalar.
        model_state: the trained model's state, at which it is evaluated.
    """

    key: Key
    trained: Params
    previous: Params
    task: Array
    model_state: PyTree = None


class EvidencePass(DataPass):
    """Measures what a rule needs: `evidence(data, key, trained, previous, task)`.

    Curvature is that of the mean loss over the task's own classes, without perturbation, on the
    task's training examples (or `config.curvature_examples` of them), at the trained model and in
    the coordinates that merge.

    Args:
        leaves: leaves that merge, `{path: array or shape}`.
        dense_layers: paths of Dense layers that the model calls once, whose Fisher is faster.
        task_classes: most classes that a task has, over which labels are summed; `None` for all.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        rule: MergeRule,
        leaves: Params,
        largest_task: int,
        dense_layers: tuple[str, ...] = (),
        task_classes: int | None = None,
    ):
        devices = devices_of(config)
        layers = set(map(layer_of, leaves))
        self._dense_layers = tuple(layer for layer in dense_layers if layer in layers)
        by_layers = layers <= set(dense_layers)
        chunk = _examples_at_once(config, leaves, by_layers, devices.count) * devices.count
        if config.kept_curvature == "input_moment" and config.curvature != "exact_current":
            chunk = FORWARD_CHUNK * devices.count  # no gradient of an example is formed
        # Each group of examples is measured by itself, and each device has as many of a group.
        step = devices.count * max(1, rule.needs.example_groups)
        chunk = -(-min(chunk, largest_task) // step) * step
        super().__init__(devices, chunk, evaluation_transform(config))
        self._config, self._model, self._groups = config, model, rule.needs.example_groups
        self._merging = tuple(leaves)
        self._task_classes = task_classes

    def begin(self, data: DeviceData, given: Given) -> tuple[tuple[MeasureState, ...], Order]:
        """Begin with blank measures, and the examples to measure on."""
        key, trained, previous, task, _ = given
        key = purpose_key(key, CURVATURE, task)
        leaves = trees.select(trained, self._merging)
        delta = task_vectors.difference(leaves, trees.select(previous, self._merging))
        measures = self._measures(data, given)
        states = tuple(measure.init(leaves, delta, key) for measure in measures)
        return states, self._order(data, key, task)

    def update(
        self, states: tuple[MeasureState, ...], batch: Batch, data: DeviceData, given: Given
    ) -> tuple[MeasureState, ...]:
        """Measure a batch, unless the curvature along the task vector is precise already."""
        measures = self._measures(data, given)

        def measured(states: tuple[MeasureState, ...]) -> tuple[MeasureState, ...]:
            pairs = zip(measures, states, strict=True)
            return tuple(measure.update(state, batch) for measure, state in pairs)

        if not self._config.curvature_error:
            return measured(states)
        precise = self._is_precise(measures[-1].finalize(states[-1]))
        return jax.lax.cond(precise, lambda same: same, measured, states)

    def finish(self, states: tuple[MeasureState, ...], data: DeviceData, given: Given) -> Evidence:
        """Return the stored quadratic, and the exact curvature where it was measured too."""
        measures = self._measures(data, given)
        pairs = zip(measures, states, strict=True)
        results = [measure.finalize(state) for measure, state in pairs]
        stored, along = results[0], results[-1]
        left_out = stored.left_out
        if left_out and along.left_out:
            left_out = left_out._replace(along=along.left_out.along)
        return Evidence(
            stored.quadratic,
            along.standard_error,
            curvature_along=along.along if along is not stored else None,
            left_out=left_out,
        )

    def _measures(self, data: DeviceData, given: Given) -> tuple[Measure, ...]:
        """Make the measures of the stored curvature and, if asked for, of the exact one."""
        mask, config, trained = data.class_masks[given.task], self._config, given.trained

        def logits_fn(leaves: Params, inputs: Array) -> Array:
            params = trees.replace(trained, leaves)
            return logits_of(
                self._model, params, inputs, mask, config.temperature, given.model_state
            )

        def task_logits_fn(leaves: Params, inputs: Array) -> Array:
            return _select_columns(logits_fn(leaves, inputs), mask, self._task_classes)

        # Sample labels over all columns, so that the draws do not depend on how classes are split
        # into tasks. Without samples, a backward pass is made for each of the task's labels only.
        label_logits_fn = logits_fn if config.curvature_samples else task_logits_fn
        leaves = trees.select(trained, self._merging)
        measures = [self._stored_measure(logits_fn, label_logits_fn, leaves)]
        if config.curvature == "exact_current":
            measures.append(curvature.gauss_newton(logits_fn))
        if self._groups:
            measures = [in_groups(measure, self._groups) for measure in measures]
        return tuple(measures)

    def _stored_measure(
        self, logits_fn: LogitsFn, label_logits_fn: LogitsFn, leaves: Params
    ) -> Measure:
        """Make the measure that the settings name; passes per label use `label_logits_fn`."""
        config, samples = self._config, self._config.curvature_samples or None
        options: Any = {"chunk_size": self.batches.size, "dense_layers": self._dense_layers}
        match config.kept_curvature:
            case "identity":
                return curvature.identity()
            case "fisher_empirical":
                return curvature.fisher_empirical(losses.cross_entropy(logits_fn), **options)
            case "kronecker":
                kernels = kernel_paths(leaves)
                return kronecker.fisher_kronecker(
                    label_logits_fn, kernels, num_samples=samples, **options
                )
            case "low_rank":
                return low_rank.gauss_newton_low_rank(logits_fn, rank=config.curvature_rank)
            case "input_moment":
                return input_moments.input_moment(logits_fn, chunk_size=self.batches.size)
        # For a softmax, the exact Fisher is the diagonal of the Gauss-Newton matrix.
        return curvature.fisher_exact(label_logits_fn, num_samples=samples, **options)

    def _order(self, data: DeviceData, key: Key, task: Array) -> Order:
        """Return the order of the task's examples, shuffled where not all may be measured."""
        config = self._config
        if not (config.curvature_examples or config.curvature_error):
            return data.order(task)
        order = data.shuffled(key, task)
        wanted = config.curvature_examples or order.length
        return Order.of(order.rows, jnp.minimum(order.length, wanted))

    def _is_precise(self, measurement: Measurement) -> Array:
        """Tell whether the curvature along Delta has the relative error that is asked for."""
        error = self._config.curvature_error * measurement.along
        # A few examples may agree by chance; without a displacement the curvature along it is 0.
        enough = measurement.examples >= FEWEST_EXAMPLES
        return (measurement.standard_error <= error) & (measurement.along > 0) & enough


def _select_columns(logits: Array, mask: Array, most: int | None) -> Array:
    """Select the columns of some classes, padded with masked ones up to the most of a task."""
    if most in (None, mask.shape[0]):
        return logits
    # Tasks differ in their number of classes; the shape must not.
    (columns,) = jnp.nonzero(mask, size=most, fill_value=mask.shape[0])
    return jnp.take(logits, columns, axis=1, fill_value=losses.MASKED_LOGIT)


def _examples_at_once(config: Config, leaves: Params, by_layers: bool, devices: int) -> int:
    """Return the number of examples that a device measures at a time."""
    memory = _memory_bytes(config)
    examples = curvature.chunk_for_memory(leaves, memory)
    if not by_layers or jax.default_backend() == "cpu":
        return examples
    # Gradients of examples are formed for one leaf after another, and accelerators are slow on few
    # examples; there is room for a training step's activations.
    of_leaf = min(curvature.chunk_for_memory(leaf, memory) for leaf in leaves.values())
    return max(examples, min(of_leaf, config.batch_size // devices))


def _memory_bytes(config: Config) -> float:
    """Return the bound on a chunk's temporaries, from the setting or by the backend."""
    # 8 MB fit a CPU's cache; 2 GB are little on an accelerator.
    default = 8 if jax.default_backend() == "cpu" else 2048
    return 1e6 * (config.curvature_memory_mb or default)
