"""Images on their way from the device's memory to the model, by the settings of a run."""

from collections.abc import Callable

from pm_jax.continual.settings.config import Config
from pm_jax.data import augmentation
from pm_jax.types import Array, InvalidInput, Key


def evaluation_transform(config: Config) -> Callable[[Array], Array]:
    """Make the function of uint8 images [N, H, W, channels] that every pass but training uses."""
    # Without `evaluation_resize`, the model resizes by itself.
    if config.evaluation_resize == 1.0:
        return lambda images: images
    return lambda images: augmentation.central_view(
        images, _model_size(config, images), config.evaluation_resize
    )


def training_transform(config: Config) -> Callable[[Key, Array], Array]:
    """Make the function of a key and uint8 images [N, H, W, channels] that training uses."""
    prepare = evaluation_transform(config)
    if config.augmentation == "none":
        return lambda key, images: prepare(images)

    def transform(key: Key, images: Array) -> Array:
        shape = _model_size(config, images)
        # Every other augmentation crops to the model's size by itself.
        if config.augmentation == "flip":
            images = prepare(images)
        augment = augmentation.augmentation(
            config.augmentation,
            shape,
            crop_scale=(config.crop_scale[0], config.crop_scale[1]),
            layers=config.randaugment_layers,
            magnitude=config.randaugment_magnitude,
        )
        return augment(key, images)

    return transform


def check_images(config: Config, input_shape: tuple[int, ...], input_dtype: str = "") -> None:
    """Check that examples of a shape are uint8 images, where the settings transform them.

    Raises:
        InvalidInput: they are not; the message names the setting.
    """
    for name, without in (("augmentation", "none"), ("evaluation_resize", 1.0)):
        if getattr(config, name) != without and len(input_shape) != 3:
            raise InvalidInput(
                f"{name}={getattr(config, name)}: is for images, and dataset={config.dataset} has "
                f"none; use {name}={without}"
            )
        if getattr(config, name) != without and input_dtype not in ("", "uint8"):
            raise InvalidInput(
                f"{name}={getattr(config, name)}: is for uint8 images, and dataset="
                f"{config.dataset} has {input_dtype}; use {name}={without}"
            )


def _model_size(config: Config, images: Array) -> tuple[int, int]:
    """Return the height and width that the model reads: its own, or those of the images."""
    # An MLP has no size of its own and reads every pixel.
    if config.image_size and config.model != "mlp":
        return config.image_size, config.image_size
    return images.shape[1], images.shape[2]
