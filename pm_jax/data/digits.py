"""Handwritten digits from scikit-learn: 1,797 real 8x8 images that need no download."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from pm_jax.data.packages import needed_for
from pm_jax.data.stream import LabelledArrays

ORDER = Path(__file__).with_name("digits_order.npy")
"""Rows of scikit-learn's file, those for training before those for testing."""
TEST_EXAMPLES = 450
"""A quarter of every class, as scikit-learn's `train_test_split` draws it with random_state=0."""


def load_digits() -> LabelledArrays:
    """Load the UCI digits, uint8 [N, 8, 8, 1], a fixed quarter of every class for testing."""
    table = _table()[np.load(ORDER)]
    # scikit-learn's grey levels reach from 0 to 16.
    images = np.round(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels, stop = table[:, -1].astype(int), -TEST_EXAMPLES
    return LabelledArrays(images[:stop], labels[:stop], images[stop:], labels[stop:], "digits")


def _table() -> np.ndarray:
    """Read the digits in scikit-learn's order, [N, 65]: 64 grey levels and the class."""
    with needed_for("dataset=digits"):
        package = importlib.util.find_spec("sklearn")
        if not package or not package.origin:
            raise ModuleNotFoundError(name="scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        # Importing scikit-learn would take longer than all else before the first step.
        with gzip.open(file) as text:
            return np.loadtxt(text, delimiter=",")
    from sklearn import datasets

    bunch = datasets.load_digits()
    return np.column_stack([bunch.data, bunch.target])


def rotated(arrays: LabelledArrays, degrees: float) -> LabelledArrays:
    """Make a domain: turn every image counter-clockwise about its middle, bilinearly."""
    from scipy import ndimage

    def turn(images: np.ndarray) -> np.ndarray:
        values = images.astype(np.float32)
        # Order 1 is bilinear; corners that come from outside an image are black.
        turned = ndimage.rotate(values, degrees, axes=(2, 1), reshape=False, order=1)
        return np.clip(np.round(turned), 0, 255).astype(np.uint8)

    return arrays.with_inputs(turn)._replace(name=f"{arrays.name}_rotated_{degrees:g}")
