"""What happens to images between the device's memory and the model, by the settings of a run."""

from collections.abc import Callable

from pm_jax.continual.settings.config import Config
from pm_jax.data import augmentation
from pm_jax.types import Array, InvalidInput, Key


def evaluation_transform(config: Config) -> Callable[[Array], Array]:
    """Images as accuracy, losses at the merge and curvature see them.

    Args:
        config: settings.

    Returns:
        A function of uint8 images [N, H, W, channels]; the identity without `evaluation_resize`,
        where a model resizes by itself.
    """
    if config.evaluation_resize == 1.0:
        return lambda images: images
    return lambda images: augmentation.central_view(
        images, _shape(config, images), config.evaluation_resize
    )


def training_transform(config: Config) -> Callable[[Key, Array], Array]:
    """Images as training sees them; without crops, a flip or nothing after `evaluation_transform`.

    Args:
        config: settings.

    Returns:
        A function of a key and uint8 images [N, H, W, channels].
    """
    prepare = evaluation_transform(config)
    if config.augmentation == "none":
        return lambda key, images: prepare(images)

    def transform(key: Key, images: Array) -> Array:
        shape = _shape(config, images)
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


def check_images(config: Config, input_shape: tuple[int, ...]) -> None:
    """Raise where transforms are asked for that the inputs, not being images, cannot have.

    Args:
        config: settings.
        input_shape: of one example.

    Raises:
        InvalidInput: of the setting.

    Example:
        >>> check_images(Config(augmentation="flip"), (8, 8, 1))
    """
    for name, without in (("augmentation", "none"), ("evaluation_resize", 1.0)):
        if getattr(config, name) != without and len(input_shape) != 3:
            raise InvalidInput(
                f"{name}={getattr(config, name)}: is for images, and dataset={config.dataset} has "
                f"none; use {name}={without}"
            )


def _shape(config: Config, images: Array) -> tuple[int, int]:
    """What the model reads: its own size, or that of the images."""
    if config.image_size and config.model != "mlp":
        return config.image_size, config.image_size
    return images.shape[1], images.shape[2]
