"""Curvature: what a finished task leaves behind, and how it is measured."""

from pm_jax.curvature.diagonal import (
    chunk_for_memory,
    fisher_empirical,
    fisher_exact,
    gauss_newton,
    hessian,
    identity,
)
from pm_jax.curvature.kronecker import KroneckerQuadratic, fisher_kronecker
from pm_jax.curvature.low_rank import LowRankQuadratic, gauss_newton_low_rank
from pm_jax.curvature.measures import Measure, Measurement, measure_all
from pm_jax.curvature.quadratics import (
    DiagonalQuadratic,
    ExactQuadratic,
    Quadratic,
    SumQuadratic,
)

__all__ = [
    "DiagonalQuadratic",
    "ExactQuadratic",
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
    "measure_all",
]
