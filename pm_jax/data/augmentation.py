"""Random crops and flips of uint8 images on the device, and the views that evaluation takes.

Everything is a pure function of fixed shapes that runs inside a jitted step.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pm_jax.data import augmentation_policies
from pm_jax.types import Array, Key

AUGMENTATIONS = ("none", "flip", "crop_flip", "randaugment", "autoaugment")
CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)


def random_flip(key: Key, images: Array) -> Array:
    """Each image as it is or mirrored from left to right, with equal probability.

    Args:
        key: PRNG key.
        images: [N, H, W, channels].

    Returns:
        Images of the same shape and type.

    Example:
        >>> images = jnp.arange(8).reshape(4, 1, 2, 1)
        >>> random_flip(jax.random.key(0), images)[:, 0, :, 0].sum(axis=1).tolist()
        [1, 5, 9, 13]
    """
    flipped = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_resized_crop(
    key: Key,
    images: Array,
    shape: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
) -> Array:
    """A random box of each image, resized bicubically with antialiasing.

    Args:
        key: PRNG key.
        images: uint8 [N, H, W, channels].
        shape: height and width of the results.
        scale: least and greatest area of a box over that of the image.

    Returns:
        uint8 [N, *shape, channels].

    References:
        Szegedy et al., `Going Deeper with Convolutions <https://arxiv.org/abs/1409.4842>`_, 2015

    Example:
        >>> images = jnp.full((2, 8, 8, 3), 7, jnp.uint8)
        >>> crops = random_resized_crop(jax.random.key(0), images, (4, 4))
        >>> crops.shape, bool((crops == 7).all())
        ((2, 4, 4, 3), True)
    """
    count, height, width, channels = images.shape
    draws = jax.random.uniform(key, (count, CROP_ATTEMPTS, 4))

    def crop(image: Array, box: Array) -> Array:
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
    """Boxes by torchvision's law: uniform area, log-uniform aspect ratio, uniform place.

    The first attempt that fits the image is taken; if none does, the largest central box whose
    aspect ratio is allowed.

    Args:
        draws: uniform in [0, 1), float32 [N, attempts, 4]: for area, aspect ratio, top and left.
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: least and greatest area over that of the image.
        ratio: least and greatest width over height.

    Returns:
        Top, left, height and width in whole pixels, float32 [N, 4].

    References:
        `torchvision.transforms.RandomResizedCrop
        <https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.RandomResizedCrop.html>`_

    Example:
        >>> crop_boxes(jnp.full((1, 1, 4), 0.5), 8, 8, (0.25, 0.25)).tolist()
        [[2.0, 2.0, 4.0, 4.0]]
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(low + (high - low) * draws[..., 1])
    sides = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1)))
    room = jnp.asarray([[[height, width]]], jnp.float32) - sides
    corners = jnp.floor(draws[..., 2:] * (room + 1))
    fits = ((sides > 0) & (room >= 0)).all(axis=-1)
    boxes = jnp.concatenate([corners, sides], axis=-1)
    first = jnp.argmax(fits, axis=1)[:, None, None]
    chosen = jnp.take_along_axis(boxes, first, axis=1)[:, 0]
    central = (min(height, round(width / ratio[0])), min(width, round(height * ratio[1])))
    corner = ((height - central[0]) // 2, (width - central[1]) // 2)
    fallback = jnp.asarray([[*corner, *central]], jnp.float32)
    return jnp.where(fits.any(axis=1)[:, None], chosen, fallback)


def central_view(images: Array, shape: tuple[int, int], resize: float) -> Array:
    """Images resized to cover `resize` times a shape, then its middle, as backbones evaluate.

    Args:
        images: uint8 [N, H, W, channels].
        shape: height and width of the results.
        resize: at least 1; 256 / 224 is the common choice.

    Returns:
        uint8 [N, *shape, channels].

    Example:
        >>> images = jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1)
        >>> central_view(images, (2, 2), 2.0)[0, :, :, 0].tolist()
        [[5, 6], [9, 10]]
    """
    count, height, width, channels = images.shape
    zoom = resize * max(shape[0] / height, shape[1] / width)
    translation = [
        (out - zoom * side) / 2 for out, side in zip(shape, (height, width), strict=True)
    ]
    view = jax.image.scale_and_translate(
        images.astype(jnp.float32),
        (count, *shape, channels),
        (1, 2),
        jnp.asarray([zoom, zoom]),
        jnp.asarray(translation),
        "bicubic",
    )
    return as_pixels(view)


def as_pixels(values: Array) -> Array:
    """The nearest uint8.

    Args:
        values: float array.

    Returns:
        uint8 array of the same shape.

    Example:
        >>> as_pixels(jnp.asarray([-3.0, 1.6, 300.0])).tolist()
        [0, 2, 255]
    """
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)


def augmentation(
    name: str,
    shape: tuple[int, int],
    *,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    layers: int = 2,
    magnitude: float = 9.0,
) -> Callable[[Key, Array], Array]:
    """A named augmentation of a batch, each image on its own.

    A policy acts on the images as they are stored, before crop and flip: the smaller side of the
    work where images are enlarged.

    Args:
        name: one of `AUGMENTATIONS`; "none" and "flip" do not resize.
        shape: height and width of what crops are resized to.
        crop_scale: see `random_resized_crop`.
        layers: of RandAugment.
        magnitude: of RandAugment.

    Returns:
        `augment(key, images) -> images`, uint8 [N, H, W, channels] both.

    Example:
        >>> augment = augmentation("crop_flip", (4, 4))
        >>> augment(jax.random.key(0), jnp.zeros((2, 8, 8, 3), jnp.uint8)).shape
        (2, 4, 4, 3)
    """

    def augment(key: Key, images: Array) -> Array:
        if name == "none":
            return images
        policy_key, crop_key, flip_key = jax.random.split(key, 3)
        if name == "randaugment":
            images = augmentation_policies.rand_augment(policy_key, images, layers, magnitude)
        if name == "autoaugment":
            images = augmentation_policies.auto_augment(policy_key, images)
        if name != "flip":
            images = random_resized_crop(crop_key, images, shape, crop_scale)
        return random_flip(flip_key, images)

    return augment
