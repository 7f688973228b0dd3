"""Merge rules: one file per method, all with the signature of `MergeRule`."""

from pm_jax.rules import preferences
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, Requirements, TrainingHook
from pm_jax.rules.became import became
from pm_jax.rules.building import jit_merge
from pm_jax.rules.checked import merge_rule
from pm_jax.rules.cofima import cofima
from pm_jax.rules.dare import dare
from pm_jax.rules.exact_curvature import exact_curvature
from pm_jax.rules.fisher_averaging import fisher_averaging
from pm_jax.rules.jackknife import jackknifed
from pm_jax.rules.magmax import magmax
from pm_jax.rules.null_space import null_space
from pm_jax.rules.opcm import opcm
from pm_jax.rules.oracle import oracle
from pm_jax.rules.pam import pam
from pm_jax.rules.perturb_and_merge import perturb_and_merge
from pm_jax.rules.random_mix import random_mix
from pm_jax.rules.registry import REGISTRY, make, takes_weights, with_own_names
from pm_jax.rules.regmean import regmean
from pm_jax.rules.simple import (
    averaging,
    coma,
    first_session,
    frozen,
    joint,
    sequential,
    slao,
)
from pm_jax.rules.task_arithmetic import task_arithmetic
from pm_jax.rules.ties import ties
from pm_jax.rules.trm import trm
from pm_jax.rules.tunable_magmax import tunable_magmax

__all__ = [
    "REGISTRY",
    "Evidence",
    "MergeInfo",
    "MergeRule",
    "Requirements",
    "TrainingHook",
    "averaging",
    "became",
    "cofima",
    "coma",
    "dare",
    "exact_curvature",
    "first_session",
    "fisher_averaging",
    "frozen",
    "jackknifed",
    "jit_merge",
    "joint",
    "magmax",
    "make",
    "merge_rule",
    "null_space",
    "opcm",
    "oracle",
    "pam",
    "perturb_and_merge",
    "preferences",
    "random_mix",
    "regmean",
    "sequential",
    "slao",
    "takes_weights",
    "task_arithmetic",
    "ties",
    "trm",
    "tunable_magmax",
    "with_own_names",
]
