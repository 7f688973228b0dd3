"""Classifiers made from features: one file per method, all of the form of `Classifier`."""

from pm_jax.classifiers import drift
from pm_jax.classifiers.aligned import aligned
from pm_jax.classifiers.base import Classifier, FeatureMap, Linear, Predictor, Statistics
from pm_jax.classifiers.class_statistics import CLASS_STATISTICS, ClassStatistics
from pm_jax.classifiers.discriminant import discriminant
from pm_jax.classifiers.nearest_mean import nearest_mean
from pm_jax.classifiers.registry import REGISTRY, make
from pm_jax.classifiers.ridge import ridge
from pm_jax.classifiers.trained import trained
from pm_jax.classifiers.zero_shot import text_columns, zero_shot

__all__ = [
    "CLASS_STATISTICS",
    "REGISTRY",
    "ClassStatistics",
    "Classifier",
    "FeatureMap",
    "Linear",
    "Predictor",
    "Statistics",
    "aligned",
    "discriminant",
    "drift",
    "make",
    "nearest_mean",
    "ridge",
    "text_columns",
    "trained",
    "zero_shot",
]
