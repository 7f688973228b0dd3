"""A run that takes the trained models of another run's first tasks, and goes on by itself."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pm_jax import files, trees
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import MERGING
from pm_jax.continual.storage import logs, task_models
from pm_jax.continual.storage.workdir import CONFIG_FILE
from pm_jax.types import InvalidInput, Params

FREE = (*MERGING, "perturbation", "epsilon", "probabilities", "perturb_per")
"""Settings in which a branch may differ from the run that it comes from."""


def check(config: Config, seeds: Sequence[int]) -> None:
    """Check that a run can branch off from where it is to.

    Args:
        config: settings of the branch; nothing is checked for a run that is none.
        seeds: of the branch.

    Raises:
        InvalidInput: there is no such run, it has other settings than a branch may have, lacks
            models of a task, or the rule takes part in training.

    Example:
        >>> check(Config(), [0])
    """
    if not config.branch_from:
        return
    rule = config.merge_rule
    if rule.takes_part_in_training:
        raise InvalidInput(
            f"branch_from={config.branch_from}: rule={config.rule} has to be there in training; "
            "use another rule, or train from the beginning"
        )
    try:
        saved = files.read_json(Path(config.branch_from) / CONFIG_FILE)
        saved = Config(**{name: _frozen(value) for name, value in saved.items()})
    except (OSError, ValueError, TypeError):
        raise InvalidInput(
            f"branch_from={config.branch_from}: {CONFIG_FILE} cannot be read; give the work "
            "directory of a run of experiments.train"
        ) from None
    fixed = [field.name for field in dataclasses.fields(Config)
             if field.metadata["identity"] and field.name not in FREE]  # fmt: skip
    differing = [
        f"{name}={getattr(saved, name)}, not {getattr(config, name)}"
        for name in fixed
        if getattr(saved, name) != getattr(config, name)
    ]
    if differing:
        raise InvalidInput(
            f"branch_from={config.branch_from}: is a run with {'; '.join(differing)}; a branch may "
            "have another rule, curvature or perturbation only"
        )
    for seed in seeds:
        folder = Path(config.branch_from) / f"seed_{seed}" / task_models.FOLDER
        for task in range(1, config.from_task + 1):
            if not (folder / task_models.rest_name(task)).exists():
                raise InvalidInput(
                    f"from_task={config.from_task}: seed_{seed} in {config.branch_from} has no "
                    f"model of task {task}; take a run that was trained with keep_task_models, and "
                    "an earlier task"
                )


def trained(
    config: Config, seed: int, task: int, start: Params
) -> tuple[Params, list[dict[str, Any]]]:
    """The model that a task's training ended with in the run that a branch comes from.

    Args:
        config: settings of the branch.
        seed: of the run.
        task: counted from 0, one of the first `config.from_task`.
        start: a model of the same structure.

    Returns:
        The model, full tree, and what its training wrote to the log.

    Raises:
        InvalidInput: a file that is damaged.
    """
    run = Path(config.branch_from) / f"seed_{seed}"
    leaves = {path: jnp.asarray(leaf) for path, leaf in task_models.whole(run, task + 1).items()}
    return trees.replace(start, leaves), logs.lines_about(run / logs.JSONL_FILE, "epoch", task + 1)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
