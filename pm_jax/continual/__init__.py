"""The experiment: configuration, jitted training, the task loop, checkpoints and results."""

from pm_jax.continual.learner import Learner
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.training.divergence import TrainingDiverged

__all__ = ["Config", "Learner", "RunOptions", "TrainingDiverged"]
