"""Task streams, and the data sets that they are made of."""

from pm_jax.data.digits import load_digits, rotated
from pm_jax.data.sources import load, load_domains
from pm_jax.data.stream import (
    LabelledArrays,
    TaskIndices,
    TaskStream,
    class_incremental,
    domain_incremental,
)

__all__ = [
    "LabelledArrays",
    "TaskIndices",
    "TaskStream",
    "class_incremental",
    "domain_incremental",
    "load",
    "load_digits",
    "load_domains",
    "rotated",
]
