"""Random crops and flips of uint8 images on the device, and the views that evaluation takes.

Images are uint8 [N, H, W, channels]. Every function is pure, has fixed shapes, and runs inside a
jitted step.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax.data import augmentation_policies
from pm_jax.types import Array, Key

AUGMENTATIONS = ("none", "flip", "crop", "crop_flip", "randaugment", "autoaugment")
CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)
"""Attempts to fit a box, and bounds on its width over height, both torchvision's."""


def random_flip(key: Key, images: Array) -> Array:
    """Mirror each image from left to right with probability one half."""
    flipped = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_resized_crop(
    key: Key, images: Array, shape: tuple[int, int], scale: tuple[float, float] = (0.08, 1.0)
) -> Array:
    """Cut a random box out of each image and resize it, bicubically with antialiasing."""
    count, height, width, channels = images.shape
    draws = jax.random.uniform(key, (count, CROP_ATTEMPTS, 4))

    def crop(image: Array, box: Array) -> Array:
        # A translation is in pixels of the output, hence the box's corner times the zoom.
        zoom = jnp.asarray(shape) / box[2:]
        return jax.image.scale_and_translate(
            image, (*shape, channels), (0, 1), zoom, -box[:2] * zoom, "bicubic"
        )

    boxes = crop_boxes(draws, height, width, scale)
    return as_pixels(jax.vmap(crop)(images.astype(jnp.float32), boxes))


def crop_boxes(
    draws: Array,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = CROP_RATIO,
) -> Array:
    """Turn uniform draws [N, attempts, 4] into boxes [N, 4] by torchvision's law."""
    # The area is uniform between the bounds in `scale`, which are shares of the image.
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # Log-uniform, so that a wide box is as likely as a high one.
    aspect = jnp.exp(low + (high - low) * draws[..., 1])
    # Height and width of the box from its area and its width over height.
    sides = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1)))
    room = jnp.asarray([[[height, width]]], jnp.float32) - sides
    corners = jnp.floor(draws[..., 2:] * (room + 1))
    fits = ((sides > 0) & (room >= 0)).all(axis=-1)
    boxes = jnp.concatenate([corners, sides], axis=-1)
    # argmax finds the first attempt that fits, and 0 where none does.
    first = jnp.argmax(fits, axis=1)[:, None, None]
    chosen = jnp.take_along_axis(boxes, first, axis=1)[:, 0]
    # Where no attempt fits: the largest central box of an allowed aspect ratio.
    central = (min(height, round(width / ratio[0])), min(width, round(height * ratio[1])))
    corner = ((height - central[0]) // 2, (width - central[1]) // 2)
    fallback = jnp.asarray([[*corner, *central]], jnp.float32)
    return jnp.where(fits.any(axis=1)[:, None], chosen, fallback)


def central_view(images: Array, shape: tuple[int, int], resize: float) -> Array:
    """Resize images to cover `resize` times a shape and cut out the middle, to evaluate them."""
    count, height, width, channels = images.shape
    # The larger of the two factors: the view must cover the shape on both sides.
    zoom = resize * max(shape[0] / height, shape[1] / width)
    scale = jnp.asarray([zoom, zoom])
    corner = jnp.asarray([(shape[0] - zoom * height) / 2, (shape[1] - zoom * width) / 2])
    pixels, size = images.astype(jnp.float32), (count, *shape, channels)
    view = jax.image.scale_and_translate(pixels, size, (1, 2), scale, corner, "bicubic")
    return as_pixels(view)


def as_pixels(values: Array) -> Array:
    """Round floating-point values to the nearest uint8."""
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)


def augmentation(
    name: str,
    shape: tuple[int, int],
    *,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    layers: int = 2,
    magnitude: float = 9.0,
) -> Callable[[Key, Array], Array]:
    """Make a function `augment(key, images)` from one of the names in `AUGMENTATIONS`."""

    def augment(key: Key, images: Array) -> Array:
        if name == "none":
            return images
        policy_key, crop_key, flip_key = jax.random.split(key, 3)
        # A policy comes before the crop: stored images are the smaller ones where crops enlarge.
        if name == "randaugment":
            images = augmentation_policies.rand_augment(policy_key, images, layers, magnitude)
        if name == "autoaugment":
            images = augmentation_policies.auto_augment(policy_key, images)
        if name != "flip":
            images = random_resized_crop(crop_key, images, shape, crop_scale)
        return images if name == "crop" else random_flip(flip_key, images)

    return augment
