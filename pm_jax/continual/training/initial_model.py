"""The model before the first task: its parameters, and which of them train."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.image_transforms import check_images
from pm_jax.continual.training.logits import normalized
from pm_jax.continual.training.partition import Partition, partition
from pm_jax.continual.training.purpose_keys import INITIALIZE, purpose_key
from pm_jax.types import Array, InvalidInput, Key, Params
from pm_jax.weights import pretrained


def partitions(config: Config, params: Params) -> tuple[Partition, Partition]:
    """Sort the parameters, or their shapes, for the first task and for the later tasks.

    Raises:
        InvalidInput: the adapter's pattern or rank does not fit the model.
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
    # From scratch there is nothing to adapt yet: the first task trains all parameters.
    return (everything if config.from_scratch else adapted), adapted


def parameter_shapes(config: Config, num_classes: int, input_shape: tuple[int, ...]) -> Params:
    """Return the shapes of the model's parameters, without making them.

    Raises:
        InvalidInput: the images or the pre-trained weights do not fit the model.
    """
    shapes = jax.eval_shape(init_fn(config, num_classes, input_shape), jax.random.key(0))
    # For its errors: shapes suffice to check whether the weights fit.
    starting_params(config, shapes)
    return shapes


def starting_params(config: Config, params: Params) -> Params:
    """Replace initialised parameters by pre-trained ones, but for the classifier, if asked for.

    Raises:
        InvalidInput: the weights cannot be read or do not fit the model.
    """
    if config.from_scratch:
        return params
    tensors = pretrained.read_tensors(config.pretrained)
    try:
        return pretrained.load_params(tensors, params)
    except InvalidInput as error:
        what = str(error).partition(": ")[2]
        raise InvalidInput(f"pretrained={config.pretrained}: {what}") from None


def init_fn(
    config: Config, num_classes: int, input_shape: tuple[int, ...]
) -> Callable[[Key], Params]:
    """Make the function from the run's key to freshly initialised parameters.

    Raises:
        InvalidInput: settings that do not fit the images.
    """
    check_images(config, input_shape)
    model, blank = config.network(num_classes), blank_example(config, input_shape)
    sides = (config.image_size,) * 2 if config.image_size else input_shape[:2]
    if (patch := getattr(model, "patch_size", 1)) and any(side % patch for side in sides):
        raise InvalidInput(
            f"image_size={config.image_size}: patch_size={patch} must divide the image of "
            f"{sides[0]} x {sides[1]} pixels"
        )

    def init(key: Key) -> Params:
        return model.init(purpose_key(key, INITIALIZE), blank)["params"]

    return init


def blank_example(config: Config, input_shape: tuple[int, ...]) -> Array:
    """Return one blank example as the model reads it."""
    dtype = jnp.int32 if config.reads_text else jnp.uint8
    return normalized(jnp.zeros((1, *input_shape), dtype))
