"""Merge rules: one file per method, all with the signature of `MergeRule`."""

from pm_jax.rules.averaging import averaging
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule, TrainingHook
from pm_jax.rules.became import became
from pm_jax.rules.pam import pam
from pm_jax.rules.perturb_and_merge import perturb_and_merge
from pm_jax.rules.registry import REGISTRY, make
from pm_jax.rules.sequential import sequential
from pm_jax.rules.trm import trm

__all__ = [
    "REGISTRY",
    "Evidence",
    "MergeInfo",
    "MergeRule",
    "TrainingHook",
    "averaging",
    "became",
    "make",
    "pam",
    "perturb_and_merge",
    "sequential",
    "trm",
]
