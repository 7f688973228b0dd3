"""Handwritten digits from scikit-learn: 1,797 real 8x8 images that need no download."""

import numpy as np

from pm_jax.data.stream import LabelledArrays

TEST_FRACTION = 0.25


def load_digits() -> LabelledArrays:
    """Load the UCI digits, uint8 [N, 8, 8, 1], a fixed quarter of every class for testing."""
    from sklearn import datasets, model_selection

    bunch = datasets.load_digits()
    # scikit-learn's grey levels reach from 0 to 16.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = model_selection.train_test_split(
        np.arange(len(images)), test_size=TEST_FRACTION, random_state=0, stratify=bunch.target
    )
    labels = bunch.target
    return LabelledArrays(images[train], labels[train], images[test], labels[test], "digits")


def rotated(arrays: LabelledArrays, degrees: float) -> LabelledArrays:
    """Make a domain: turn every image counter-clockwise about its middle, bilinearly."""
    from scipy import ndimage

    def turn(images: np.ndarray) -> np.ndarray:
        values = images.astype(np.float32)
        # Order 1 is bilinear; corners that come from outside an image are black.
        turned = ndimage.rotate(values, degrees, axes=(2, 1), reshape=False, order=1)
        return np.clip(np.round(turned), 0, 255).astype(np.uint8)

    return arrays.with_inputs(turn)._replace(name=f"{arrays.name}_rotated_{degrees:g}")
