"""Curvature: the quadratic that a finished task leaves behind, and how it is measured."""

from pm_jax.curvature.diagonal import (
    DiagonalQuadratic,
    chunk_for_memory,
    fisher_empirical,
    fisher_exact,
    identity,
)
from pm_jax.curvature.exact import ExactQuadratic, gauss_newton, hessian
from pm_jax.curvature.input_moments import InputMomentQuadratic, input_moment
from pm_jax.curvature.kronecker import KroneckerQuadratic, fisher_kronecker
from pm_jax.curvature.low_rank import LowRankQuadratic, gauss_newton_low_rank
from pm_jax.curvature.measures import Measure, Measurement, measure_all
from pm_jax.curvature.quadratics import Curvature, Quadratic, SumQuadratic

__all__ = [
    "Curvature",
    "DiagonalQuadratic",
    "ExactQuadratic",
    "InputMomentQuadratic",
    "KroneckerQuadratic",
    "LowRankQuadratic",
    "Measure",
    "Measurement",
    "Quadratic",
    "SumQuadratic",
    "chunk_for_memory",
    "fisher_empirical",
    "fisher_exact",
    "fisher_kronecker",
    "gauss_newton",
    "gauss_newton_low_rank",
    "hessian",
    "identity",
    "input_moment",
    "measure_all",
]
