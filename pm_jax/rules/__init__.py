"""Merge rules: one file per method, all with the signature of `MergeRule`."""

from collections.abc import Callable

from pm_jax.rules.averaging import averaging
from pm_jax.rules.base import Evidence, MergeInfo, MergeRule
from pm_jax.rules.perturb_and_merge import perturb_and_merge
from pm_jax.rules.sequential import sequential
from pm_jax.rules.trm import trm

REGISTRY: dict[str, Callable[..., MergeRule]] = {
    "perturb_and_merge": perturb_and_merge,
    "sequential": sequential,
    "averaging": averaging,
    "trm": trm,
}
"""Every rule by name: what `--rule` accepts and what the contract tests run over."""

__all__ = [
    "REGISTRY",
    "Evidence",
    "MergeInfo",
    "MergeRule",
    "averaging",
    "perturb_and_merge",
    "sequential",
    "trm",
]
