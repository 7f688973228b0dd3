"""The classifiers of a run beside its trained columns: their statistics, and how they are made."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import trees
from pm_jax.classifiers import Linear, Predictor, Statistics, drift
from pm_jax.classifiers.base import Columns
from pm_jax.continual.merging.statistics import StatisticsPass, TaskStatistics, features_of
from pm_jax.continual.placement.compiled import compiled
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.chosen_classifiers import ChosenClassifier
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.purpose_keys import CLASSIFIERS, purpose_key
from pm_jax.models.model import Model
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree, cause

DRIFT_FIGURES = ("drift_explained", "drift_strength", "drift_size")
"""Figures that a drift correction adds to those of its merge."""


class Fitted(NamedTuple):
    """The classifiers of a run after a merge, in the order of the settings.

    Attributes:
        predictors: a `Predictor` each; `None` stands for the model's own columns.
        figures: scalars about each.
    """

    predictors: tuple[Predictor | None, ...]
    figures: tuple[dict[str, Array], ...]


class Classifying:
    """The compiled functions of the classifiers that are made from features.

    Attributes:
        observe: passes over a task, see `StatisticsPass`.
        follows_drift: whether some statistics are moved with the features.

    Raises:
        InvalidInput: the model has no features that classifiers can be made of.
    """

    def __init__(self, config: Config, model: Model, params: Params, state: PyTree, blank: Array):
        self.devices, self._model = devices_of(config), model
        self._chosen = config.chosen_classifiers
        made = [each for each in self._chosen if each.classifier.statistics]
        # Classifiers with the same statistics share one state, if both follow the drift or neither.
        self._kinds = {each.state_name: each for each in made}
        width = _width_of_features(made[0].label, model, params, state, blank)
        num_classes = jax.eval_shape(model.apply, params, state, blank)[0].shape[-1]
        for each in made:
            if each.classifier.needs_columns:
                _check_columns(each.label, _columns_of(params, model.classifier), width)
        self.follows_drift = any(each.moves for each in made)
        statistics = {_statistics_of(each).name: _statistics_of(each) for each in made}
        self.observe = StatisticsPass(config, model, tuple(statistics.values()), num_classes, width)

    @compiled()
    def init(self, key: Key) -> dict[str, PyTree]:
        """Make the statistics of no examples."""
        blank = self.observe.blank(key, False).classes
        return {name: blank[_statistics_of(each).name] for name, each in self._kinds.items()}

    @compiled(donate_argnums=0)
    def joined(
        self, earlier: dict[str, PyTree], task: TaskStatistics
    ) -> tuple[dict[str, PyTree], dict[str, Array]]:
        """Move the statistics of earlier tasks with the features, and add those of a task."""
        return self.devices.by_each(self._joined, earlier, task)

    def _joined(
        self, earlier: dict[str, PyTree], task: TaskStatistics
    ) -> tuple[dict[str, PyTree], dict[str, Array]]:
        figures: dict[str, Array] = {}
        feature_map = None
        if task.drift is not None:
            feature_map, found = drift.fit(task.drift)
            values = (found.explained, found.strength, drift.size(task.drift))
            figures = dict(zip(DRIFT_FIGURES, values, strict=True))

        def of_kind(name: str, each: ChosenClassifier) -> PyTree:
            statistics, state = _statistics_of(each), earlier[name]
            if each.moves:
                assert statistics.moved and feature_map
                state = statistics.moved(state, feature_map)
            return statistics.plus(state, task.classes[statistics.name])

        return {name: of_kind(name, each) for name, each in self._kinds.items()}, figures

    @compiled()
    def fit(self, statistics: dict[str, PyTree], params: Params, key: Key) -> Fitted:
        """Make the classifiers from the statistics and the merged model's columns."""
        columns = _columns_of(params, self._model.classifier)
        return self.devices.by_each(self._fit, statistics, columns, key)

    def _fit(self, statistics: dict[str, PyTree], columns: Columns | None, key: Key) -> Fitted:
        predictors, figures = list[Predictor | None](), list[dict[str, Array]]()
        for place, each in enumerate(self._chosen):
            classifier = each.classifier
            if classifier.statistics is None:
                predictors.append(None)
                figures.append({})
                continue
            state, own = statistics[each.state_name], purpose_key(key, CLASSIFIERS, place)
            given = columns if classifier.needs_columns else None
            predictors.append(classifier.fit(state, given, own))
            figures.append(classifier.figures(state, predictors[-1]))
        return Fitted(tuple(predictors), tuple(figures))


def with_head(model: Model, params: Params, predictor: Linear) -> Params:
    """Return a model whose own classifier is a linear predictor.

    Raises:
        InvalidInput: its classifier has no kernel or no bias of that shape.
    """
    paths = [f"{model.classifier}/{leaf}" for leaf in ("kernel", "bias")]
    leaves = trees.leaves_by_path(params)
    for path, value in zip(paths, predictor, strict=True):
        if path not in leaves or leaves[path].shape != value.shape:
            raise InvalidInput(
                f"classifiers: the model has no {path} of shape {value.shape}, which a linear "
                "classifier is written to; predict with trained"
            )
    return trees.replace(params, dict(zip(paths, predictor, strict=True)))


def _statistics_of(each: ChosenClassifier) -> Statistics:
    assert each.classifier.statistics
    return each.classifier.statistics


def _width_of_features(
    label: str, model: Model, params: Params, state: PyTree, blank: Array
) -> int:
    """Return the number D of a model's features; raises `InvalidInput` where they are no [N, D]."""
    try:
        found = jax.eval_shape(functools.partial(features_of, model), params, blank, state)
    except Exception as error:  # Someone else's code may raise anything.
        raise InvalidInput(
            f"classifiers={label}: the model's features, which are the inputs of its classifier, "
            f"cannot be computed ({cause(error)}); use trained"
        ) from error
    if len(found.shape) != 2 or not jnp.issubdtype(found.dtype, jnp.floating):
        raise InvalidInput(
            f"classifiers={label}: the model's features are {found.dtype} {list(found.shape)}; "
            "floating-point [N, D] is needed, the inputs of its classifier; use trained"
        )
    return found.shape[1]


def _columns_of(params: Params, classifier: str) -> Columns | None:
    """Return kernel and bias of a model's classifier; `None` where it is no plain dense layer."""
    leaves = trees.leaves_by_path(params)
    kernel, bias = (leaves.get(f"{classifier}/{leaf}") for leaf in ("kernel", "bias"))
    return None if kernel is None or bias is None else (kernel, bias)


def _check_columns(label: str, columns: Columns | None, width: int) -> None:
    if columns is None or columns[0].shape != (width, *columns[1].shape):
        raise InvalidInput(
            f"classifiers={label}: starts from the kernel [{width}, classes] and the bias of the "
            "model's classifier, which has no such leaves; leave it out"
        )
