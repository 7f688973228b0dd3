"""The compiled functions of a run, made once per configuration and shape of stream."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pm_jax import rules, task_vectors, trees
from pm_jax.continual.merging import evaluation, statistics
from pm_jax.continual.merging.evidence import evidence_fn
from pm_jax.continual.merging.objective import objective_fn
from pm_jax.continual.placement import feed
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training import task_program
from pm_jax.continual.training.image_transforms import check_images, evaluation_transform
from pm_jax.continual.training.partition import Partition, partition, trained_params
from pm_jax.continual.training.purpose_keys import INITIALIZE, purpose_key
from pm_jax.continual.training.snapshots import Snapshots
from pm_jax.continual.training.task_program import TaskProgram
from pm_jax.curvature import dense_layers
from pm_jax.discriminant import ClassStatistics
from pm_jax.rules import MergeInfo, TrainingHook, gradient_projection
from pm_jax.rules.objectives import Objective
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree
from pm_jax.weights import pretrained


class Programs(NamedTuple):
    """The compiled functions of a run, shared by seeds whose shapes agree.

    Attributes:
        init: `init(key) -> params`.
        first: trains the first task of a run from scratch (all parameters).
        later: trains the other tasks; the same object as `first` without adapters.
        merging: paths of the leaves that merge.
        adapted: those of them that have adapters, from the second task on at the latest.
        measure: see `evidence_fn`.
        between: `between(previous, trained, alpha) -> params`, a point of the merge segment.
        in_plane: `in_plane(previous, trained, across, coordinates) -> params`, a point of the plane
            through the model before along the task vector and the leaves `across`.
        merge: `merge(rule_state, previous, trained, evidence) -> (rule_state, leaves, info)`, from
            full parameter trees to the merged leaves.
        trained: `trained(start, trainable) -> params`.
        scores: see `evaluation.scores_fn`.
        mean_loss: see `evaluation.mean_loss_fn`.
        objective: see `task_objective.objective_fn`.
        gradient_norm: `gradient_norm(objective, params)`, `Objective.gradient_norm` at full
            parameters.
        snapshots: see `snapshots.Snapshots`.
        add_statistics: see `statistics.statistics_fn`.
        absorb: `absorb(rule_state, merged, objective, evidence) -> rule_state` at full parameters,
            for rules that absorb.
    """

    init: Callable[[Key], Params]
    first: TaskProgram
    later: TaskProgram
    merging: tuple[str, ...]
    adapted: tuple[str, ...]
    measure: Callable[..., Any]
    between: Callable[..., Params]
    in_plane: Callable[..., Params]
    merge: Callable[..., tuple[PyTree, Params, MergeInfo]]
    trained: Callable[..., Params]
    scores: Callable[..., evaluation.Scores]
    mean_loss: Callable[..., Array]
    objective: Callable[..., Objective]
    gradient_norm: Callable[[Objective, Params], Array]
    snapshots: Snapshots
    add_statistics: Callable[..., ClassStatistics]
    absorb: Callable[..., PyTree]


def partitions(config: Config, params: Params) -> tuple[Partition, Partition]:
    """What trains in the first task, and in the others.

    Args:
        config: settings.
        params: of the model, arrays or shapes.

    Returns:
        Two `Partition`s; they differ for adapters from scratch, where the first task trains all.

    Raises:
        InvalidInput: the adapter's pattern or rank does not fit the model.

    Example:
        >>> params = {"fc": {"kernel": jnp.ones((4, 4))}, "head": {"bias": jnp.ones(2)}}
        >>> config = Config(adapter="lora", lora_pattern="fc/.*", lora_rank=2)
        >>> [p.adapted for p in partitions(config, params)]
        [(), ('fc/kernel',)]
    """
    by_class = config.scenario == "class_incremental"
    everything = partition(params, class_incremental=by_class)
    if config.adapter == "full":
        return everything, everything
    try:
        adapted = partition(
            params,
            class_incremental=by_class,
            lora_pattern=config.kernel_pattern,
            rank=config.lora_rank,
        )
    except ValueError as error:
        raise InvalidInput(f"lora_{error}") from None
    return (everything if config.from_scratch else adapted), adapted


def parameter_shapes(config: Config, num_classes: int, input_shape: tuple[int, ...]) -> Params:
    """Shapes of the model's parameters, without making them.

    Args:
        config: settings.
        num_classes: C.
        input_shape: of one example.

    Returns:
        Pytree of `jax.ShapeDtypeStruct`.

    Raises:
        InvalidInput: the patch size does not divide the image, or the pre-trained weights do not
            fit.

    Example:
        >>> parameter_shapes(Config(hidden_sizes=(5,)), 10, (8, 8, 1))["head"]["kernel"].shape
        (5, 10)
    """
    shapes = jax.eval_shape(_init_fn(config, num_classes, input_shape), jax.random.key(0))
    starting_params(config, shapes)
    return shapes


def starting_params(config: Config, params: Params) -> Params:
    """The model before the first task: as initialised, or with pre-trained weights.

    Args:
        config: settings.
        params: freshly initialised, or their shapes to check that the weights fit.

    Returns:
        `theta_0`; the classifier is always the fresh one.

    Raises:
        InvalidInput: the weights cannot be read or do not fit the model.

    Example:
        >>> starting_params(Config(), {"w": 1.0})
        {'w': 1.0}
    """
    if config.from_scratch:
        return params
    tensors = pretrained.read_tensors(config.pretrained)
    try:
        return pretrained.load_params(tensors, params)
    except InvalidInput as error:
        what = str(error).partition(": ")[2]
        raise InvalidInput(f"pretrained={config.pretrained}: {what}") from None


def _init_fn(config: Config, num_classes: int, input_shape: tuple[int, ...]):
    check_images(config, input_shape)
    model, blank = config.network(num_classes), _blank(config, input_shape)
    sides = (config.image_size,) * 2 if config.image_size else input_shape[:2]
    if (patch := getattr(model, "patch_size", 1)) and any(side % patch for side in sides):
        raise InvalidInput(
            f"image_size={config.image_size}: patch_size={patch} must divide the image of "
            f"{sides[0]} x {sides[1]} pixels"
        )

    def init(key: Key) -> Params:
        return model.init(purpose_key(key, INITIALIZE), blank)["params"]

    return init


def _blank(config: Config, input_shape: tuple[int, ...]) -> Array:
    """One example as the model reads it."""
    dtype = jnp.int32 if config.reads_text else jnp.uint8
    return task_program.normalized(jnp.zeros((1, *input_shape), dtype))


class SharedPrograms(NamedTuple):
    """Those of `Programs` that know of the merge rule its hook only, and what the others need."""

    model: nn.Module
    partition: Partition
    init: Callable[[Key], Params]
    first: TaskProgram
    later: TaskProgram
    trained: Callable[..., Params]
    scores: Callable[..., evaluation.Scores]
    mean_loss: Callable[..., Array]


@functools.lru_cache(maxsize=8)
def shared_programs(
    config: Config,
    num_classes: int,
    input_shape: tuple[int, ...],
    largest_task: int,
    hook: TrainingHook | None,
) -> SharedPrograms:
    """The compiled functions that runs have in common if only what merging depends on differs."""
    model = config.network(num_classes)
    init = _init_fn(config, num_classes, input_shape)
    first, later = partitions(config, jax.eval_shape(init, jax.random.key(0)))
    devices = devices_of(config)
    program = task_program.task_program(config, model, later, largest_task, hook)
    seen_as: dict[str, Any] = {
        "temperature": config.temperature,
        "transform": evaluation_transform(config),
        "devices": devices,
    }
    return SharedPrograms(
        model=model,
        partition=later,
        init=devices.jit(init),
        first=program
        if first == later
        else task_program.task_program(config, model, first, largest_task, hook),
        later=program,
        trained=devices.jit(trained_params),
        scores=evaluation.scores_fn(model, **seen_as),
        mean_loss=evaluation.mean_loss_fn(model, **seen_as),
    )


def _check_dense(shared: SharedPrograms, once: tuple[str, ...]) -> None:
    """Raise `InvalidInput` where a kernel that merges cannot have Kronecker factors."""
    shapes = trees.select(jax.eval_shape(shared.init, jax.random.key(0)), shared.partition.merging)
    for path in dense_layers.kernel_paths(shapes):
        if dense_layers.layer_of(path) not in once:
            raise InvalidInput(
                f"curvature=kronecker: {path} is not the kernel of a dense layer that is called "
                "once; use fisher_exact, or lora_pattern to choose other kernels"
            )


@functools.lru_cache(maxsize=8)
def programs(
    config: Config,
    num_classes: int,
    input_shape: tuple[int, ...],
    largest_task: int,
    task_classes: int | None = None,
) -> Programs:
    """The compiled functions of a configuration on a stream of some shape.

    Args:
        config: settings.
        num_classes: C.
        input_shape: of one example.
        largest_task: training examples of the largest task.
        task_classes: classes of the task that has most; `None` for all.

    Returns:
        `Programs`; the same ones for the same arguments.

    Raises:
        InvalidInput: settings that do not fit the model.

    Example:
        >>> programs(Config(), 10, (8, 8, 1), 100).merging[:2]
        ('hidden_0/bias', 'hidden_0/kernel')
    """
    rule, devices = config.merge_rule, devices_of(config)
    shape = (num_classes, input_shape, largest_task)
    shared = shared_programs(config.without_merging(), *shape, rule.hook)
    model, later = shared.model, shared.partition
    once = dense_layers.layers_called_once(model, _blank(config, input_shape))
    if config.kept_curvature == "kronecker":
        _check_dense(shared, once)

    @rules.jit_merge
    def merge(rule_state, previous, trained, evidence):
        leaves, rule_state, info = rule.update(
            rule_state,
            previous=trees.select(previous, later.merging),
            trained=trees.select(trained, later.merging),
            evidence=evidence,
        )
        return devices.keep((rule_state, leaves, info))

    @devices.jit
    def between(previous, trained, alpha):
        ends = trees.select(previous, later.merging), trees.select(trained, later.merging)
        return trees.replace(trained, trees.lerp(*ends, alpha))

    @devices.jit
    def in_plane(previous, trained, across, coordinates):
        start = trees.select(previous, later.merging)
        along = task_vectors.difference(trees.select(trained, later.merging), start)
        step = task_vectors.combine([along, across], list(coordinates))
        return trees.replace(trained, task_vectors.apply(start, step))

    @functools.partial(devices.jit, donate_argnums=0)
    def absorb(rule_state, merged, objective, evidence):
        assert rule.absorb
        leaves = trees.select(merged, later.merging)
        kernels = dense_layers.kernel_paths(leaves)
        moments = gradient_projection.input_moments(objective, leaves, kernels)
        return rule.absorb(rule_state, evidence._replace(input_moments=moments))

    return Programs(
        init=shared.init,
        first=shared.first,
        later=shared.later,
        merging=later.merging,
        adapted=later.adapted,
        measure=evidence_fn(config, model, rule, later.merging, once, task_classes),
        between=between,
        in_plane=in_plane,
        merge=merge,
        trained=shared.trained,
        scores=shared.scores,
        mean_loss=shared.mean_loss,
        objective=objective_fn(config, model, later.merging),
        gradient_norm=jax.jit(
            lambda objective, params: objective.gradient_norm(trees.select(params, later.merging))
        ),
        snapshots=Snapshots(rule.snapshots, later.merging, feed.resident_bytes(config), devices),
        add_statistics=statistics.statistics_fn(config, model),
        absorb=absorb,
    )
