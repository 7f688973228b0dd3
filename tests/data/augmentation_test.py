import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from pm_jax.continual import Config, Learner
from pm_jax.continual.training import task_program
from pm_jax.continual.training.image_transforms import evaluation_transform, training_transform
from pm_jax.continual.training.initial_model import parameter_shapes
from pm_jax.continual.training.logits import logits_of
from pm_jax.continual.training.purpose_keys import AUGMENT, SHUFFLE, purpose_key
from pm_jax.data import augmentation, augmentation_policies
from pm_jax.data.augmentation_policies import OPERATIONS
from pm_jax.types import InvalidInput
from tests.small_runs import BY_CLASS, QUIET

WITHOUT_STRENGTH = ("auto_contrast", "equalize", "invert")


def random_images(count, height, width, channels=3, seed=0):
    """Smooth but for the clipping, so that Pillow's fixed-point weights round alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-60, 316, (count, 5, 5, channels))
    zoom = (1, height / 5, width / 5, 1)
    return np.clip(ndimage.zoom(coarse, zoom, order=1), 0, 255).astype(np.uint8)


def assert_within_a_grey_level(found, wanted):
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(wanted).astype(int))
    assert difference.max() <= 1, difference.max()


def pillows_box(image, shape, box):
    """Bicubic, in floats: on uint8 Pillow rounds between its two passes."""
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize(
            shape[::-1], Image.Resampling.BICUBIC, box=box
        )
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.round(np.stack(channels, axis=-1)), 0, 255)


# Crops and flips.


def test_a_flip_is_the_image_or_its_mirror():
    images = random_images(64, 4, 6)
    found = np.asarray(augmentation.random_flip(jax.random.key(0), images))
    same = (found == images).all(axis=(1, 2, 3))
    mirrored = (found == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all() and same.any() and mirrored.any()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(24, 24), (7, 9)], ids=["enlarged", "reduced"])
def test_crops_are_pillows_resized_boxes(shape):
    images, key = random_images(40, 17, 23), jax.random.key(1)
    crops = jax.jit(augmentation.random_resized_crop, static_argnums=2)
    found = crops(key, jnp.asarray(images), shape)
    assert found.dtype == jnp.uint8
    draws = jax.random.uniform(key, (40, augmentation.CROP_ATTEMPTS, 4))
    boxes = np.asarray(augmentation.crop_boxes(draws, 17, 23, (0.08, 1.0)))
    assert len({tuple(box) for box in boxes}) > 20
    for image, (top, left, height, width), crop in zip(images, boxes, found, strict=True):
        box = (left, top, left + width, top + height)
        assert_within_a_grey_level(crop, pillows_box(image, shape, box))


@pytest.mark.slow
def test_a_crop_of_the_whole_image_is_the_resized_image():
    images = jnp.asarray(random_images(3, 8, 8, 1))
    found = augmentation.random_resized_crop(jax.random.key(0), images, (12, 12), (1.0, 1.0))
    whole = jnp.zeros((3, 1, 4))  # aspect ratio 3/4 does not fit
    assert augmentation.crop_boxes(whole, 8, 8, (1.0, 1.0)).tolist() == [[0, 0, 8, 8]] * 3
    square = np.asarray(
        [box[2:] == [8, 8] for box in augmentation.crop_boxes(
            jax.random.uniform(jax.random.key(0), (3, 10, 4)), 8, 8, (1.0, 1.0)).tolist()]
    )  # fmt: skip
    assert square.all()
    wanted = jax.image.resize(images.astype(jnp.float32), (3, 12, 12, 1), "bicubic")
    assert np.array_equal(found, augmentation.as_pixels(wanted))
    assert np.array_equal(found, augmentation.central_view(images, (12, 12), 1.0))


@pytest.mark.slow
def test_boxes_follow_the_law_over_a_grid_of_draws():
    grid = (np.arange(16) + 0.5) / 16
    draws = np.stack(np.meshgrid(grid, grid, [0.5], [0.5], indexing="ij"), axis=-1)
    draws = draws.reshape(-1, 1, 4).astype(np.float32)
    top, left, height, width = np.asarray(augmentation.crop_boxes(draws, 100, 100, (0.1, 0.5))).T
    area = 1e4 * (0.1 + 0.4 * draws[:, 0, 0])
    aspect = 0.75 * (16 / 9) ** draws[:, 0, 1]  # log-uniform from 3/4 to 4/3
    np.testing.assert_allclose(width, np.sqrt(area * aspect), atol=0.501)
    np.testing.assert_allclose(height, np.sqrt(area / aspect), atol=0.501)
    assert np.array_equal(top, np.floor((100 - height + 1) / 2))
    # A box of 4 x 4 in an image of 6 x 8 has 3 x 5 places, equally likely.
    places = np.stack(np.meshgrid((np.arange(30) + 0.5) / 30, (np.arange(30) + 0.5) / 30), axis=-1)
    draws = np.concatenate([np.full((900, 2), 0.5), places.reshape(-1, 2)], axis=1)[:, None]
    boxes = np.asarray(augmentation.crop_boxes(draws.astype(np.float32), 6, 8, (1 / 3, 1 / 3)))
    corners, counts = np.unique(boxes[:, :2], axis=0, return_counts=True)
    assert corners.tolist() == [[y, x] for y in range(3) for x in range(5)]
    assert set(counts) == {60} and (boxes[:, 2:] == 4).all()


@pytest.mark.slow
def test_the_first_attempt_that_fits_is_taken_and_else_the_largest_allowed_box():
    whole, half = [0.99, 0.0, 0.0, 0.0], [0.2, 0.5, 0.5, 0.0]
    draws = jnp.asarray([[whole, half, [0.1, 0.5, 0.0, 0.0]], [whole] * 3])
    # sqrt(.2 * 100 * 100) = 45; in a square the whole image is the fallback.
    assert augmentation.crop_boxes(draws, 100, 100, (0.0, 1.0)).tolist() == [
        [28.0, 0.0, 45.0, 45.0],
        [0.0, 0.0, 100.0, 100.0],
    ]
    full = jnp.full((1, 2, 4), 0.5)
    assert augmentation.crop_boxes(full, 10, 100, (1.0, 1.0)).tolist() == [[0, 43, 10, 13]]
    assert augmentation.crop_boxes(full, 100, 10, (1.0, 1.0)).tolist() == [[43, 0, 13, 10]]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(20, 20), (20, 31), (90, 60)])
def test_the_central_view_is_pillows_resize_and_central_crop(size):
    images = random_images(3, *size)
    found = augmentation.central_view(jnp.asarray(images), (28, 28), 32 / 28)
    assert found.dtype == jnp.uint8
    zoom = 32 / min(size)
    # Pillow resizes to whole pixels: the box of a side that is none is given instead.
    for image, view in zip(images, found, strict=True):
        half = 14 / zoom
        y, x = size[0] / 2, size[1] / 2
        box = (x - half, y - half, x + half, y + half)
        assert_within_a_grey_level(view, pillows_box(image, (28, 28), box))
    if size == (20, 20):
        resized = pillows_box(images[0], (32, 32), None)
        assert_within_a_grey_level(found[0], resized[2:30, 2:30])


# Operations.


operate = jax.jit(augmentation_policies.operate)


def one(name, images, strength=0.0):
    operation = jnp.full(len(images), OPERATIONS.index(name))
    return np.asarray(operate(jnp.asarray(images), operation, jnp.full(len(images), strength)))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_operation_of_no_strength_is_the_identity(channels):
    images = np.random.default_rng(0).integers(256, size=(4, 20, 30, channels)).astype(np.uint8)
    for name in OPERATIONS:
        found = one(name, images)
        assert found.dtype == np.uint8
        assert np.array_equal(found, images) == (name not in WITHOUT_STRENGTH)


PILLOW = {
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "invert": lambda image, s: ImageOps.invert(image),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 * (1 - abs(s))),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
}


@pytest.mark.parametrize("name", PILLOW)
def test_tables_and_blends_are_pillows(name):
    images = np.concatenate([random_images(3, 20, 30), 50 + random_images(1, 20, 30) // 4])
    changed = False
    for strength in (0.5, -0.7, 1.0):
        found = one(name, images, strength)
        for image, result in zip(images, found, strict=True):
            wanted = PILLOW[name](Image.fromarray(image), strength)
            assert_within_a_grey_level(result, wanted)
            changed |= not np.array_equal(result, image)
    assert changed


def test_equalize_and_auto_contrast_leave_an_even_image():
    images = np.full((2, 6, 6, 3), 77, np.uint8)
    for name in ("equalize", "auto_contrast"):
        assert np.array_equal(one(name, images), images)


@pytest.mark.parametrize("strength", [0.6, -1.0])
def test_warps_are_scipys(strength):
    images = random_images(2, 21, 30)
    turn = np.deg2rad(30 * strength)
    middle = np.asarray([10.0, 14.5])
    matrices = {
        "rotate": [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]],
        "shear_x": [[1, 0], [0.3 * strength, 1]],
        "shear_y": [[1, 0.3 * strength], [0, 1]],
        "translate_x": np.eye(2),
        "translate_y": np.eye(2),
    }
    shifts = {"translate_x": (0, 30), "translate_y": (21, 0)}
    for name, matrix in matrices.items():
        found = one(name, images, strength)
        shift = 150 / 331 * strength * np.asarray(shifts.get(name, (0, 0)))
        offset = middle - np.asarray(matrix) @ middle + shift
        for image, channel in itertools.product(range(2), range(3)):
            wanted = ndimage.affine_transform(
                images[image, :, :, channel].astype(np.float64), np.asarray(matrix), offset,
                order=1, mode="grid-constant", cval=128,
            )  # fmt: skip
            assert_within_a_grey_level(found[image, :, :, channel], np.round(wanted))


IMAGE = random_images(1, 8, 8)


def results_of(images):
    return {np.asarray(image).tobytes() for image in images}


def arguments_for(choices):
    """Arguments of `operate` for pairs of name and strength."""
    operation = jnp.asarray([OPERATIONS.index(name) for name, _ in choices])
    strength = jnp.asarray([strength for _, strength in choices], jnp.float32)
    return operation, strength


@pytest.mark.slow
def test_rand_augment_is_one_of_its_operations_for_each_image():
    found = jax.jit(augmentation_policies.rand_augment, static_argnums=2)(
        jax.random.key(0), jnp.asarray(np.repeat(IMAGE, 400, axis=0)), 1, 5.0
    )
    operation, strength = arguments_for(
        [(name, sign * 0.5) for name in OPERATIONS[:-1] for sign in (1, -1)]
    )
    candidates = operate(jnp.asarray(np.repeat(IMAGE, len(strength), axis=0)), operation, strength)
    assert results_of(found) == results_of(candidates) and len(results_of(found)) > 20


@pytest.mark.slow
def test_auto_augment_is_one_of_its_sub_policies_for_each_image(monkeypatch):
    """Nothing but what the policy's probabilities allow comes out, over all signs."""
    policies = augmentation_policies.IMAGENET_POLICY
    assert len(policies) == 25
    # By the one compiled program for all operations, as another one is rounded apart.
    monkeypatch.setattr(augmentation_policies, "operate", operate)
    images = jnp.asarray(np.repeat(IMAGE, 500, axis=0))
    found = augmentation_policies.auto_augment(jax.random.key(0), images)

    def outcomes(name, probability, level):
        done = [(name, sign * level / 9) for sign in (1, -1)]
        return (done if probability > 0 else []) + ([("identity", 0.0)] if probability < 1 else [])

    paths = [path for policy in policies for path in itertools.product(
        *(outcomes(*step) for step in policy))]  # fmt: skip
    paths += [paths[0]] * (len(images) - len(paths))
    for place in range(2):
        images = operate(images, *arguments_for([path[place] for path in paths]))
    assert results_of(found) <= results_of(images) and len(results_of(found)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", augmentation.AUGMENTATIONS)
def test_an_augmentation_is_a_function_of_the_key(name):
    images = jnp.asarray(random_images(6, 12, 10))
    augment = jax.jit(augmentation.augmentation(name, (8, 8)))
    first, again, other = (augment(jax.random.key(seed), images) for seed in (0, 0, 1))
    assert first.dtype == jnp.uint8
    assert first.shape[1:3] == ((12, 10) if name in ("none", "flip") else (8, 8))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name == "none")


# In a run.


def test_without_transforms_the_program_is_as_it_was():
    images = object()
    assert evaluation_transform(Config())(images) is images
    arrays = jnp.zeros((1, 8, 8, 1), jnp.uint8)
    assert training_transform(Config(image_size=16, model="vit"))(None, arrays) is arrays


@pytest.mark.slow
def test_training_sees_augmented_and_evaluation_central_images():
    config = dataclasses.replace(
        BY_CLASS, augmentation="crop_flip", evaluation_resize=1.25, perturbation="none",
        batch_size=1000, optimizer="sgd",
    )  # fmt: skip
    learner = Learner(config, seed=0, options=QUIET)
    run, stream, model = learner.programs, learner.stream, config.network(10)
    rows = stream.train.rows()[1]
    mask = jnp.asarray(stream.class_masks[1])

    def loss(images, labels):
        logits = logits_of(model, learner.params, images, mask)
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    labels = jnp.asarray(stream.labels[rows])
    view = augmentation.central_view(jnp.asarray(stream.inputs[rows]), (8, 8), 1.25)
    task = np.asarray(1, np.int32)
    np.testing.assert_allclose(
        run.training.mean_loss(learner.training_data, learner.params, task),
        loss(view, labels),
        rtol=1e-5,
    )
    held_out = stream.test.rows()[1]
    test_view = augmentation.central_view(jnp.asarray(stream.inputs[held_out]), (8, 8), 1.25)
    guess = logits_of(model, learner.params, test_view, mask).argmax(axis=1)
    right = np.mean(np.asarray(guess) == stream.labels[held_out])
    seen = np.ones(10, bool)
    found = run.training.scores(learner.splits["test"], learner.params, seen, stream.num_tasks)
    np.testing.assert_allclose(found.task_aware[1], right, rtol=1e-6)
    # One step on the whole task: its loss is that of the images augmented with the step's key.
    state = run.training.first.begin(learner.key, learner.params, task)
    *_, values = run.training.first.train(
        learner.key,
        *state,
        learner.params,
        learner.training_data,
        task_program.Segment.of(1, 0, 0, 9, 1),
    )
    order = learner.training_data.shuffled(purpose_key(learner.key, SHUFFLE, 1, 0), task).rows
    order = jnp.pad(order, (0, 1000 - len(order)))
    augment = augmentation.augmentation("crop_flip", (8, 8))
    crops = augment(
        purpose_key(learner.key, AUGMENT, 1, 0),
        learner.training_data.inputs[order],
    )[: len(rows)]
    wanted = loss(crops, learner.training_data.labels[order][: len(rows)])
    np.testing.assert_allclose(values[0], wanted, rtol=1e-5)
    assert abs(values[0] - loss(view, labels)) > 1e-4


@pytest.mark.parametrize("name", ["augmentation", "evaluation_resize"])
def test_inputs_that_are_no_images_have_no_transforms(name):
    settings = {"augmentation": "flip"} if name == "augmentation" else {"evaluation_resize": 1.5}
    config = dataclasses.replace(BY_CLASS, **settings)
    with pytest.raises(InvalidInput, match=f"^{name}=.*is for images.*use {name}="):
        parameter_shapes(config, 10, (21,))
