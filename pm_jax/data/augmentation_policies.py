"""RandAugment and AutoAugment of uint8 images, with operations drawn for each image.

An operation is one of three kinds: a table from old to new grey level, a blend with another image,
or a bilinear warp. Each image goes through one of each kind, of which all but the chosen one are
the identity. A switch under vmap would compute every operation for every image instead.

References:
    Cubuk et al., `RandAugment <https://arxiv.org/abs/1909.13719>`_, 2020
    Cubuk et al., `AutoAugment <https://arxiv.org/abs/1805.09501>`_, 2019, appendix
"""

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.types import Array, Key

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness"),
    *("color", "contrast", "sharpness", "posterize", "solarize", "auto_contrast", "equalize"),
    "invert",
)
"""Operations, which are numbered by their place here. RandAugment draws all but the last."""

SHEAR, TRANSLATE, DEGREES, BLEND, BITS = 0.3, 150 / 331, 30.0, 0.9, 4.0
"""Full strength of shears, translations (share of the side), rotations, blends, posterize."""

FILL = 128.0
"""Grey level outside the image."""

IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
"""AutoAugment's sub-policies for ImageNet: two operations, each with a probability and a level."""


def rand_augment(key: Key, images: Array, layers: int = 2, magnitude: float = 9.0) -> Array:
    """Apply `layers` operations drawn uniformly, all of one magnitude in [0, 10]."""
    count = images.shape[0]
    for layer in range(layers):
        operation_key, sign_key = jax.random.split(jax.random.fold_in(key, layer))
        operation = jax.random.randint(operation_key, (count,), 0, len(OPERATIONS) - 1)
        strength = jax.random.rademacher(sign_key, (count,)) * (magnitude / 10)
        images = operate(images, operation, strength)
    return images


def auto_augment(key: Key, images: Array) -> Array:
    """Apply a sub-policy of `IMAGENET_POLICY` drawn for each image, with random signs."""
    count = images.shape[0]
    policy_key, apply_key, sign_key = jax.random.split(key, 3)
    chosen = jax.random.randint(policy_key, (count,), 0, len(IMAGENET_POLICY))
    applied = jax.random.uniform(apply_key, (2, count))
    signs = jax.random.rademacher(sign_key, (2, count))
    for place in range(2):
        steps = [policy[place] for policy in IMAGENET_POLICY]
        operations = np.asarray([OPERATIONS.index(name) for name, _, _ in steps])
        probabilities = np.asarray([probability for _, probability, _ in steps], np.float32)
        # Levels reach from 0 to 9, the greatest one that the policy has.
        levels = np.asarray([level for _, _, level in steps], np.float32)
        takes_place = applied[place] < jnp.asarray(probabilities)[chosen]
        operation = jnp.where(takes_place, jnp.asarray(operations)[chosen], 0)
        images = operate(images, operation, signs[place] * jnp.asarray(levels)[chosen] / 9)
    return images


def operate(images: Array, operation: Array, strength: Array) -> Array:
    """Apply to each image the operation of its number in `OPERATIONS`, its strength in [-1, 1]."""

    # The strength where an operation was drawn, else 0, at which all but auto_contrast, equalize
    # and invert are the identity. Its sign is the direction of warps and blends.
    def amount(name: str) -> Array:
        return jnp.where(operation == OPERATIONS.index(name), strength, 0.0)[:, None, None]

    pixels = _by_table(images, _tables(images, operation, amount)).astype(jnp.float32)
    pixels = _blended(pixels, operation, amount)
    return _warped(pixels, amount).astype(jnp.uint8)


def _rounded(values: Array) -> Array:
    return jnp.clip(jnp.round(values), 0.0, 255.0)


def _grey(pixels: Array) -> Array:
    """Compute the luminance, float32 [N, H, W, 1]; images that are not RGB stay as they are."""
    if pixels.shape[-1] != 3:
        return pixels.astype(jnp.float32)
    # Pillow's weights in whole numbers, of 65536 in all.
    weights = jnp.asarray([19595, 38470, 7471])
    return ((pixels.astype(jnp.int32) @ weights + 32768) >> 16)[..., None].astype(jnp.float32)


def _tables(images: Array, operation: Array, amount) -> Array:
    """Make tables with the new grey level of every old one, uint8 [N, 256, channels]."""
    level = jnp.arange(256.0)[None, :, None]
    # Posterizing drops the lowest bits: grey levels become multiples of a power of two.
    unit = jnp.exp2(jnp.round(BITS * jnp.abs(amount("posterize"))))
    posterized = jnp.floor(level / unit) * unit
    threshold = 256 * (1 - jnp.abs(amount("solarize")))
    mean = jnp.round(jnp.mean(_grey(images), axis=(1, 2)))[:, None, :]
    contrast = mean + (1 + BLEND * amount("contrast")) * (level - mean)
    low, high = (
        bound(images, axis=(1, 2)).astype(jnp.float32)[:, None, :] for bound in (jnp.min, jnp.max)
    )
    stretched = (level - low) * (255 / jnp.maximum(high - low, 1))
    tables = {
        "brightness": level * (1 + BLEND * amount("brightness")),
        "contrast": contrast,
        "posterize": posterized,
        "solarize": jnp.where(level >= threshold, 255 - level, level),
        "auto_contrast": jnp.where(high > low, stretched, level),
        "equalize": _equalizing(images),
        "invert": 255 - level,
    }
    shape = (images.shape[0], 256, images.shape[-1])
    table = jnp.broadcast_to(level, shape)
    for name, values in tables.items():
        chosen = (operation == OPERATIONS.index(name))[:, None, None]
        table = jnp.where(chosen, jnp.broadcast_to(values, shape), table)
    return _rounded(table).astype(jnp.uint8)


def _equalizing(images: Array) -> Array:
    """Make tables that flatten each channel's histogram as Pillow does, float32 [N, 256, C]."""

    def one(values: Array) -> Array:
        counts = jnp.bincount(values, length=256)
        last = jnp.max(values)
        # Pillow leaves out the last occupied level when it divides the pixels among 255 steps.
        step = (values.size - counts[last]) // 255
        below = jnp.cumsum(counts) - counts
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table, jnp.arange(256)).astype(jnp.float32)

    count, channels = images.shape[0], images.shape[-1]
    flat = images.reshape(count, -1, channels).astype(jnp.int32)
    return jax.vmap(jax.vmap(one, in_axes=-1, out_axes=-1))(flat)


def _by_table(images: Array, tables: Array) -> Array:
    flat = images.reshape(images.shape[0], -1, images.shape[-1]).astype(jnp.int32)
    return jnp.take_along_axis(tables, flat, axis=1).reshape(images.shape)


def _blended(pixels: Array, operation: Array, amount) -> Array:
    """Blend with grey (color) or smoothed images (sharpness), towards or away from them."""
    height, width = pixels.shape[1:3]
    total = sum(
        pixels[:, y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)
    )
    # Pillow's SMOOTH kernel: 5 in the middle, 1 around it; the border stays as it is.
    inner = pixels[:, 1:-1, 1:-1]
    smooth = pixels.at[:, 1:-1, 1:-1].set(jnp.round((total + 4 * inner) / 13))
    sharpen = (operation == OPERATIONS.index("sharpness"))[:, None, None, None]
    other = jnp.where(sharpen, smooth, jnp.broadcast_to(_grey(pixels), pixels.shape))
    factor = 1 + BLEND * (amount("color") + amount("sharpness"))[..., None]
    return _rounded(other + factor * (pixels - other))


def _warped(pixels: Array, amount) -> Array:
    """Shear, shift or turn about the middle, bilinearly."""
    height, width = pixels.shape[1:3]
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.arange(height)[None, :, None] - middle_y, jnp.arange(width)[None, None, :] - middle_x
    angle = jnp.deg2rad(DEGREES) * amount("rotate")
    # For each new pixel, the place in the old image that it comes from.
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    from_y = cosine * y + (sine + SHEAR * amount("shear_y")) * x
    from_x = cosine * x + (SHEAR * amount("shear_x") - sine) * y
    from_y += middle_y + TRANSLATE * height * amount("translate_y")
    from_x += middle_x + TRANSLATE * width * amount("translate_x")

    def channel(values: Array, from_y: Array, from_x: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(values, [from_y, from_x], 1, "constant", FILL)

    channels = jax.vmap(channel, in_axes=(-1, None, None), out_axes=-1)
    return _rounded(jax.vmap(channels)(pixels, from_y, from_x))
