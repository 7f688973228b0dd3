"""Continual learning by model merging in JAX: Perturb-and-Merge and its neighbours."""

from pm_jax import (
    classifiers,
    coefficients,
    curvature,
    lora,
    losses,
    metrics,
    perturbation,
    rules,
    task_vectors,
    trees,
)
from pm_jax.coefficients import MergeCoefficient, merge_coefficient, predicted_loss_change
from pm_jax.curvature import kronecker, low_rank, measures, quadratics, squared_gradients
from pm_jax.curvature import products as matrix_products
from pm_jax.curvature.diagonal import DiagonalQuadratic, fisher_empirical, fisher_exact
from pm_jax.curvature.exact import ExactQuadratic, gauss_newton, hessian
from pm_jax.curvature.input_moments import InputMomentQuadratic, input_moment
from pm_jax.curvature.measures import Measure, Measurement, measure_all
from pm_jax.curvature.quadratics import Quadratic, SumQuadratic
from pm_jax.merger import Merger, MergerState, merger
from pm_jax.perturbation import Perturbation, curvature_weight, perturbed
from pm_jax.rules import Evidence, MergeInfo, MergeRule
from pm_jax.types import Batch, InvalidInput

__all__ = [
    "Batch",
    "DiagonalQuadratic",
    "Evidence",
    "ExactQuadratic",
    "InputMomentQuadratic",
    "InvalidInput",
    "Measure",
    "Measurement",
    "MergeCoefficient",
    "MergeInfo",
    "MergeRule",
    "Merger",
    "MergerState",
    "Perturbation",
    "Quadratic",
    "SumQuadratic",
    "classifiers",
    "coefficients",
    "curvature",
    "curvature_weight",
    "fisher_empirical",
    "fisher_exact",
    "gauss_newton",
    "hessian",
    "input_moment",
    "kronecker",
    "lora",
    "losses",
    "low_rank",
    "matrix_products",
    "measure_all",
    "measures",
    "merge_coefficient",
    "merger",
    "metrics",
    "perturbation",
    "perturbed",
    "predicted_loss_change",
    "quadratics",
    "rules",
    "squared_gradients",
    "task_vectors",
    "trees",
]
