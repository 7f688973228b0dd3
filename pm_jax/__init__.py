"""Continual learning by model merging in JAX: Perturb-and-Merge and its neighbours.

A training loop of one's own takes three things from here:

    loss = pm_jax.perturbed(loss_fn, pm_jax.perturbation.symmetric())      # to train with
    merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(logits_fn))
    params, state, info = merger.finish_task(state, trained, batches, key)  # after each task

`import pm_jax` loads the method and nothing heavier. These are imported by name:

- `pm_jax.integrations.linen`, `pm_jax.integrations.nnx`, `pm_jax.integrations.nnx_adapters` and
  `pm_jax.integrations.qwix`: modules of other people, with batch statistics and adapters
- `pm_jax.models` and `pm_jax.data`: vision and text transformers, streams of tasks
- `pm_jax.weights.pretrained` and `pm_jax.weights.peft_adapter`: public weights in and out
- `pm_jax.offline.merging` and `pm_jax.offline.requests`: models merged as files
- `pm_jax.continual`: a whole experiment, as the programs in experiments/ run it
- `pm_jax.rules.base`, `pm_jax.rules.building`, `pm_jax.classifiers.base` and `pm_jax.types`: what
  a rule or a classifier of one's own is made of
"""

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

__version__ = "0.1.0"

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
