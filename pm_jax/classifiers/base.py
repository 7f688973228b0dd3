"""The grammar of classifiers that are made from features, in the manner of merge rules.

A factory takes the hyper-parameters and returns a `Classifier`. What it needs to know of the
examples are its statistics, which add up over batches and tasks and have one size for ever:

    classifier = pm_jax.classifiers.discriminant()
    state = classifier.statistics.init(num_classes, width, key)
    state = classifier.statistics.observe(state, features, labels, weights)     # for every batch
    predictor = classifier.fit(state, columns, key)                             # after a task
    logits = predictor(features)

Classifiers whose statistics have the same name read the same state, which is kept once for all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from pm_jax.losses import MASKED_LOGIT
from pm_jax.types import Array, Key

Columns = tuple[Array, Array]
"""Kernel [D, C] and bias [C] of the classifier's layer as training has left it."""


class Predictor(Protocol):
    """Computes logits float32 [N, C] of features [N, D]; a pytree of arrays.

    Classes without examples have the logit -1e30, but for columns that are as training left them.
    """

    def __call__(self, features: Array, /) -> Array:
        """Logits [N, C]."""
        ...


class Linear(NamedTuple):
    """A `Predictor` that is linear in the features, `features @ kernel + bias`.

    Attributes:
        kernel: float32 [D, C].
        bias: float32 [C].

    Example:
        >>> Linear(jnp.asarray([[1.0, 2.0]]), jnp.asarray([0.0, 1.0]))(jnp.asarray([[3.0]]))
        Array([[3., 7.]], dtype=float32)
    """

    kernel: Array
    bias: Array

    @classmethod
    def of_seen(cls, kernel: Array, bias: Array, seen: Array) -> "Linear":
        """A predictor with the logit -1e30 for the classes that are not seen (bool [C])."""
        return cls(jnp.where(seen[None], kernel, 0.0), jnp.where(seen, bias, MASKED_LOGIT))

    def __call__(self, features: Array, /) -> Array:
        """Logits [N, C]."""
        return product(features.astype(jnp.float32), self.kernel) + self.bias[None]


class FeatureMap(NamedTuple):
    """An affine map of features, `x -> (x - before) @ matrix + after`.

    Attributes:
        before: float32 [D].
        matrix: float32 [D, D].
        after: float32 [D].

    Example:
        >>> shift = FeatureMap(jnp.zeros(2), jnp.eye(2), jnp.asarray([1.0, 0.0]))
        >>> shift(jnp.asarray([[5.0, 5.0]])).tolist()
        [[6.0, 5.0]]
    """

    before: Array
    matrix: Array
    after: Array

    @classmethod
    def identity(cls, width: int) -> "FeatureMap":
        """The map that changes nothing, to the bit."""
        return cls(jnp.zeros(width), jnp.eye(width), jnp.zeros(width))

    def __call__(self, features: Array, /) -> Array:
        """Mapped features [N, D]."""
        centred = features.astype(jnp.float32) - self.before[None]
        return product(centred, self.matrix) + self.after[None]


class InitFn(Protocol):
    """Makes the statistics of no examples."""

    def __call__(self, num_classes: int, width: int, key: Key, /) -> Any:
        """Return a pytree of arrays.

        Args:
            num_classes: C, of all tasks together.
            width: D, of the features.
            key: for what is drawn; all states that are to add up need the same one.
        """


class ObserveFn(Protocol):
    """Adds the examples of a batch to the statistics."""

    def __call__(self, state: Any, features: Array, labels: Array, weights: Array, /) -> Any:
        """Return the next state, whose shapes and dtypes are those of the last one.

        Args:
            state: the statistics so far.
            features: [N, D], of any floating-point dtype.
            labels: integers [N].
            weights: [N]; 0 marks padding.

        Raises:
            InvalidInput: shapes do not fit; where the values are known (outside of jit), features
                that are not finite or labels out of range.
        """


class Statistics(NamedTuple):
    """All that is kept of the features of the classes seen: pure functions of a state.

    Attributes:
        name: classifiers whose statistics have the same name share one state.
        init: `init(num_classes, width, key) -> state`.
        observe: `observe(state, features, labels, weights) -> state`.
        plus: `plus(state, other) -> state`, the statistics of both sets of examples, of which
            those of `other` are the newer.
        moved: `moved(state, feature_map) -> state`, the statistics of the mapped features; `None`
            where they cannot be had.
    """

    name: str
    init: InitFn
    observe: ObserveFn
    plus: Callable[[Any, Any], Any]
    moved: Callable[[Any, FeatureMap], Any] | None = None


class FitFn(Protocol):
    """Makes a predictor."""

    def __call__(self, state: Any, columns: Columns | None, key: Key | None, /) -> Predictor:
        """Return the predictor of all classes.

        Args:
            state: of the classifier's statistics; `None` where it has none.
            columns: what training has left; `None` for classifiers that do not read it.
            key: for what is drawn; `None` for classifiers that draw nothing.
        """


def no_figures(state: Any, predictor: Any) -> dict[str, Array]:
    """No figures."""
    del state, predictor
    return {}


def no_remarks(figures: dict[str, Any]) -> tuple[str, ...]:
    """No remarks."""
    del figures
    return ()


class Classifier(NamedTuple):
    """A classifier over all classes seen.

    Attributes:
        name: as in the registry.
        statistics: all that it reads of the examples; `None` for trained columns.
        fit: `fit(state, columns, key) -> Predictor`.
        linear: whether the predictor is a `Linear`, which can take the place of a model's head.
        needs_columns: whether `fit` reads the trained columns.
        figures: `figures(state, predictor) -> {name: scalar}`, what is to be said about a fit.
        remarks: `remarks(figures) -> sentences` about a fit that may not be what was meant, outside
            of jit.
    """

    name: str
    statistics: Statistics | None
    fit: FitFn
    linear: bool
    needs_columns: bool
    figures: Callable[[Any, Any], dict[str, Array]] = no_figures
    remarks: Callable[[dict[str, Any]], tuple[str, ...]] = no_remarks


def product(left: Array, right: Array) -> Array:
    """Matrix product in full float32, also where the platform would round the factors."""
    return jnp.matmul(left, right, precision="highest")
