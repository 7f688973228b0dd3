"""The model before the first task: its parameters, and which of them train."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from pm_jax import files, models, trees
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training import own_model
from pm_jax.continual.training.image_transforms import check_images
from pm_jax.continual.training.logits import normalized
from pm_jax.continual.training.partition import Partition, partition
from pm_jax.continual.training.purpose_keys import INITIALIZE, purpose_key
from pm_jax.integrations.linen import LinenModel
from pm_jax.integrations.wrap import as_model
from pm_jax.models import attention
from pm_jax.models.model import Model, classifier_pattern
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree
from pm_jax.weights import clip, pretrained
from pm_jax.weights.model_config import check_config, remark_on_pixels
from pm_jax.weights.peft_folder import PeftFolder
from pm_jax.weights.peft_start import with_adapter


def partitions(
    config: Config, params: Params, model: Model | None = None, blank: Array | None = None
) -> tuple[Partition, Partition]:
    """Sort the parameters, or their shapes, for the first task and for the later tasks.

    Without a model they are those of the configuration's own. With a blank example, a model of the
    user's own tells how its kernels are used.

    Raises:
        InvalidInput: the adapter's pattern or rank does not fit the model.
    """
    options: dict[str, Any] = {
        "class_incremental": config.scenario == "class_incremental",
        "head_pattern": classifier_pattern(model) if model else "head/.*",
        "frozen_head": config.has_text_columns,
    }
    everything = partition(params, **options)
    if config.adapter == "full":
        return everything, everything
    pattern = kernel_pattern(config, params, model)
    try:
        adapted = partition(
            params,
            lora_pattern=pattern,
            rank=config.lora_rank,
            **options,
            **(own_model.axes_from(model, blank) if model and blank is not None else {}),
        )
    except ValueError as error:
        raise InvalidInput(f"lora_{error}") from None
    # From scratch there is nothing to adapt yet: the first task trains all parameters.
    return (everything if config.from_scratch else adapted), adapted


def kernel_pattern(config: Config, params: Params, model: Model | None) -> str:
    """Return the pattern of the kernels that get adapters."""
    if config.lora_pattern or model is None or is_built_in(model):
        return config.kernel_pattern
    paths = ", ".join(path for path, x in trees.leaves_by_path(params).items() if len(x.shape) > 1)
    raise InvalidInput(
        "lora_pattern=: must say which kernels of one's own model get adapters, as a regular "
        f"expression over their paths; it has {paths}"
    )


def is_built_in(model: Model) -> TypeGuard[LinenModel]:
    """Tell whether a model is one of `pm_jax.models`."""
    kinds = (models.MLP, models.TextEncoder, models.VisionTransformer, models.ClipImageTower)
    return isinstance(model, LinenModel) and isinstance(model.module, kinds)


def plain(model: Model) -> Model:
    """Return a model of the same numbers for what looks at its layers or differentiates forward."""
    if not is_built_in(model) or isinstance(model.module, models.MLP):
        return model
    return dataclasses.replace(model, module=attention.plain(model.module))


def parameter_shapes(
    config: Config,
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    model: Model | None = None,
    input_dtype: str = "",
) -> Params:
    """Return the shapes of the model's parameters, without making them.

    Raises:
        InvalidInput: the images or the pre-trained weights do not fit the model, or the model is
            none.
    """
    init = init_fn(config, num_classes, input_shape, model=model, input_dtype=input_dtype)
    shapes, _ = jax.eval_shape(init, jax.random.key(0))
    # For its errors: shapes suffice to check whether the weights fit.
    starting_params(config, shapes)
    return shapes


def starting_params(config: Config, params: Params) -> Params:
    """Replace initialised parameters by pre-trained ones, but for the classifier, if asked for.

    Raises:
        InvalidInput: the weights or an adapter cannot be read or do not fit the model.
    """
    if config.from_scratch:
        return params
    tensors = pretrained.read_tensors(config.pretrained)
    if config.model == "clip":
        tensors = clip.parted(config.pretrained, tensors).image
    elif clip.SCALE in tensors:
        raise InvalidInput(f"pretrained={config.pretrained}: is a CLIP model; use model=clip")
    else:
        check_config(config.pretrained, config.network(num_classes=1))
    try:
        params = pretrained.load_params(tensors, params)
    except InvalidInput as error:
        what = str(error).partition(": ")[2]
        raise InvalidInput(f"pretrained={config.pretrained}: {what}") from None
    if adapter := earlier_adapter(config):
        params = with_adapter(params, adapter, pretrained.layout_of(tensors))
    return params


def earlier_adapter(config: Config) -> PeftFolder | None:
    """Open the adapter that a run starts from, if there is one; raises `InvalidInput`."""
    path = config.adapter_from
    return PeftFolder.open("adapter_from", Path(path)) if path else None


def remarks(config: Config) -> list[str]:
    """Say in lines what a run does not use of its weights, and how its pixels differ from theirs.

    Raises:
        InvalidInput: weights that cannot be read, or that no model is for.
    """
    if config.from_scratch:
        return []
    if config.model == "clip":
        # It normalises pixels by itself.
        unused = f"pretrained={config.pretrained}: left out the text tower"
        return [] if config.has_text_columns else [unused]
    names = pretrained.left_out(pretrained.read_tensors(config.pretrained))
    lines = [f"pretrained={config.pretrained}: left out {files.listed(names)}"] if names else []
    if (adapter := earlier_adapter(config)) and adapter.saved:
        lines.append(f"adapter_from={adapter.source}: left out {files.listed([*adapter.saved])}")
    pixels = "" if config.reads_text else remark_on_pixels(config.pretrained)
    return lines + [pixels] * bool(pixels)


def init_fn(
    config: Config,
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    model: Model | None = None,
    input_dtype: str = "",
) -> Callable[[Key], tuple[Params, PyTree]]:
    """Make the function from the run's key to freshly initialised parameters and state.

    Without a model they are those of the configuration's own.

    Raises:
        InvalidInput: settings that do not fit the images.
    """
    blank = blank_example(config, input_shape, input_dtype)
    check_images(config, input_shape, input_dtype)
    model = model or as_model(config.network(num_classes))
    sides = (config.image_size,) * 2 if config.image_size else input_shape[:2]
    module = model.module if isinstance(model, LinenModel) else None
    patched = (models.VisionTransformer, models.ClipImageTower)
    patch = module.patch_size if isinstance(module, patched) else 1
    if any(side % patch for side in sides):
        raise InvalidInput(
            f"image_size={config.image_size}: patch_size={patch} must divide the image of "
            f"{sides[0]} x {sides[1]} pixels"
        )

    def init(key: Key) -> tuple[Params, PyTree]:
        return model.init(purpose_key(key, INITIALIZE), blank)

    return init


def blank_example(config: Config, input_shape: tuple[int, ...], input_dtype: str = "") -> Array:
    """Return one blank example as the model reads it; the type is the configuration's if empty."""
    dtype = input_dtype or ("int32" if config.reads_text else "uint8")
    return normalized(jnp.zeros((1, *input_shape), dtype))
