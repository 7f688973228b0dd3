"""The experiment: configuration, jitted training, the task loop, checkpoints and results."""

from pm_jax.continual.config import Config
from pm_jax.continual.divergence import TrainingDiverged
from pm_jax.continual.learner import Learner

__all__ = ["Config", "Learner", "TrainingDiverged"]
