"""Trained models that are used again, instead of training the same once more.

A run with `keep_task_models` leaves them in `seed_<n>/task_models`, for a branch of the run and for
`experiments.merge`. A comparison of rules leaves them in `shared_training`, for its other rules.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pm_jax import files, trees
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.settings import STAGES, as_now, names_of
from pm_jax.continual.storage import logs, manifest
from pm_jax.continual.storage.provenance import configuration_hash
from pm_jax.continual.storage.workdir import CONFIG_FILE
from pm_jax.types import Array, InvalidInput, Params, PyTree, cause
from pm_jax.weights.pretrained import read_tensors, write_tensors

TASK_MODELS = "task_models"
FIXED_IN_BRANCHES = names_of(*({*STAGES} - {"perturbation", "merging"}), identity=True)
"""Settings that a branch has in common with the run that it comes from."""

Lines = list[dict[str, Any]]
"""The lines that the training of a task wrote to the log."""
OF_STATE = "state of the model: "
"""Begins the names of tensors that are no parameters; no path of a parameter begins so."""
LINES = [{"seconds": (int, float), "step": int, "event": str}]
"""The form of `Lines` in a file."""


def keep_task_model(
    run: Path,
    task: int,
    merging: tuple[str, ...],
    head_pattern: str,
    trained: Params,
    pretrained: Params | None,
    model_state: PyTree,
) -> None:
    """Write the merging leaves that a task, from 0, trained, and in a second file its other leaves.

    Those are the classifier's, which a pattern matches, and the state of the model.

    The first task writes theta_0 too, which from scratch, without `pretrained`, is its own model.
    """
    from_scratch = task == 0 and pretrained is None
    # The first task of a run from scratch trains everything; any other only the classifier besides.
    others = trees.match_paths(trained, ".*" if from_scratch else head_pattern)
    parts = {
        f"task_{task + 1}": trees.select(trained, merging),
        f"rest_{task + 1}": {
            **trees.select(trained, tuple(p for p in others if p not in merging)),
            **joined({}, model_state),
        },
    }
    if task == 0:
        theta_0 = trained if pretrained is None else pretrained
        # theta_0 comes before the task's files, whose last one says that all are there.
        parts = {"theta_0": trees.select(theta_0, merging), **parts}
    for name, leaves in parts.items():
        _write(run, f"{TASK_MODELS}/{name}.safetensors", leaves)


def read_task_model(run: Path, task: int) -> dict[str, np.ndarray]:
    """Read all leaves that a task, counted from 1, trained in a run, as `{path: leaf}`.

    Raises:
        InvalidInput: a file is missing or damaged.
    """
    leaves: dict[str, np.ndarray] = {}
    for part in ("task", "rest"):
        path = run / TASK_MODELS / f"{part}_{task}.safetensors"
        try:
            leaves |= read_tensors(path)
        except InvalidInput as error:
            raise InvalidInput(f"branch_from={path}: {str(error).partition(': ')[2]}") from None
    return leaves


def task_model_files(run: Path) -> tuple[Path, tuple[Path, ...]]:
    """Find the files of theta_0 and of theta_1*, theta_2*, ... in a run.

    Raises:
        InvalidInput: there are none.
    """
    folder = run / TASK_MODELS
    count = len(list(folder.glob("task_*.safetensors")))
    if not count:
        raise InvalidInput(
            f"run={run}: holds no task models; give the seed_<n> of a run that was trained with "
            "keep_task_models"
        )
    models = (folder / f"task_{task}.safetensors" for task in range(1, count + 1))
    return folder / "theta_0.safetensors", tuple(models)


def check_branch(config: Config, seeds: Sequence[int]) -> None:
    """Check that a run can branch off where its settings say, if they do.

    Raises:
        InvalidInput: `branch_from` is no run, does not fit or lacks models, or the rule does not.
    """
    source = config.branch_from
    if not source:
        return
    if config.merge_rule.needs.takes_part_in_training:
        raise InvalidInput(
            f"branch_from={source}: rule={config.rule} has to be there in training; use another "
            "rule, or train from the beginning"
        )
    try:
        values: dict[str, Any] = as_now(files.read_json(Path(source) / CONFIG_FILE, {}))
        # JSON has lists for tuples.
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        saved = Config(**(values | lists))
    except (OSError, ValueError, TypeError):
        raise InvalidInput(
            f"branch_from={source}: {CONFIG_FILE} cannot be read; give the work directory of a run "
            "of experiments.train"
        ) from None
    differing = [
        f"{name}={getattr(saved, name)}, not {getattr(config, name)}"
        for name in FIXED_IN_BRANCHES
        if getattr(saved, name) != getattr(config, name)
    ]
    if saved.has_text_columns != config.has_text_columns:
        names = (",".join(each.classifiers) for each in (saved, config))
        differing.append(f"classifiers={', not '.join(names)}")
    if differing:
        raise InvalidInput(
            f"branch_from={source}: is a run with {'; '.join(differing)}; a branch may have "
            "another rule, curvature or perturbation only"
        )
    for seed in seeds:
        for task in range(1, config.from_task + 1):
            # This file is the last that `keep_task_model` writes.
            path = Path(source) / f"seed_{seed}" / TASK_MODELS / f"rest_{task}.safetensors"
            if not path.exists():
                raise InvalidInput(
                    f"from_task={config.from_task}: seed_{seed} in {source} has no model of task "
                    f"{task}; take a run that was trained with keep_task_models, and an earlier "
                    "task"
                )


def joined(params: Params, model_state: PyTree) -> dict[str, Array]:
    """Put the leaves of parameters and of a model's state into one `{path: leaf}`."""
    state = trees.leaves_by_path(model_state)
    return {**trees.leaves_by_path(params), **{f"{OF_STATE}{p}": x for p, x in state.items()}}


def parted(
    leaves: Mapping[str, Array], params: Params, model_state: PyTree
) -> tuple[Params, PyTree]:
    """Return parameters and state with the leaves that were `joined`."""
    paths = trees.leaves_by_path(model_state)
    state = {path: leaves[f"{OF_STATE}{path}"] for path in paths}
    of_params = {path: leaf for path, leaf in leaves.items() if not path.startswith(OF_STATE)}
    return trees.replace(params, of_params), trees.replace(model_state, state)


def branch_model(
    config: Config, seed: int, task: int, start: Mapping[str, Array]
) -> tuple[dict[str, Array], Lines]:
    """Read the model, and the log, of a task, from 0, in the run that a branch comes from.

    Raises:
        InvalidInput: a file is damaged.
    """
    run = Path(config.branch_from) / f"seed_{seed}"
    leaves = read_task_model(run, task + 1)
    return _replaced(start, leaves), logs.lines_about(run / logs.JSONL_FILE, "epoch", task + 1)


class SharedTraining:
    """The models of a training in which each task goes on from the model trained before it.

    How a task is trained depends on the model it starts from, the settings of training, the seed
    and the task's number, and not on the merge rule. Rules that merge for inference only follow
    this one trajectory to its end, the others as far as their merges leave the model as it was
    trained. Whether a task lies on it is decided by the model that it starts from, bit for bit.
    """

    def __init__(self, directory: Path):
        self._directory = directory

    def find(self, task: int, start: Mapping[str, Array]) -> tuple[dict[str, Array], Lines] | None:
        """Return the model that a task, counted from 0, trained, and its log, if it was kept.

        `start` is the model that the task starts from, `joined`, as the result is.

        Raises:
            InvalidInput: a file is damaged.
        """
        if not self._path(task).exists() or not self._on_trajectory(task, start):
            return None
        leaves, lines = self._read(task, start)
        return _replaced(start, leaves), lines

    def keep(
        self, task: int, start: Params, trained: Params, lines: Sequence[dict[str, Any]]
    ) -> None:
        """Keep the model that a task trained, and its log, if it lies on the trajectory.

        Raises:
            InvalidInput: the file cannot be written.
        """
        path = self._path(task)
        if not path.exists() and self._on_trajectory(task, start):
            leaves = trees.leaves_by_path(trained)
            _write(self._directory, path.name, leaves, log=json.dumps(list(lines)))

    def _path(self, task: int) -> Path:
        return self._directory / f"task_{task + 1}.safetensors"

    def _on_trajectory(self, task: int, start: Params) -> bool:
        if task == 0:
            return True
        if not self._path(task - 1).exists():
            return False
        before, _ = self._read(task - 1, start)
        # Bytes are compared: zeros of either sign are equal and may still lead apart.
        return all(
            np.asarray(leaf).tobytes() == before[path].tobytes()
            for path, leaf in trees.leaves_by_path(start).items()
        )

    def _read(self, task: int, like: Params) -> tuple[dict[str, np.ndarray], Lines]:
        """Read a trained model, which must have the shapes of another, and the lines of its log."""
        from safetensors import safe_open

        path = self._path(task)
        try:
            saved = manifest.read_or_empty(self._directory, path.name).files
            if manifest.damage(self._directory, saved):
                raise OSError("it is not as it was saved")
            with safe_open(path, "np") as file:
                lines = files.parse_json(file.metadata()["log"], LINES)
                leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _form(leaves) != _form(trees.leaves_by_path(like)):
                raise ValueError("it holds another model")
        except Exception as error:  # Rust, JSON and a log of another form raise many types.
            raise InvalidInput(
                f"workdir={path}: cannot be read ({cause(error)}); move it away to have its task "
                "trained again"
            ) from None
        return leaves, lines


def training_name(config: Config) -> str:
    """Name the settings that training depends on by ten digits, the same for every merge rule."""
    return configuration_hash(config.without_merging())[:10]


def _form(leaves: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()}


def _replaced(start: Mapping[str, Array], leaves: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {**start, **{path: jnp.asarray(leaf) for path, leaf in leaves.items()}}


def _write(directory: Path, name: str, leaves: Mapping[str, Array], **metadata: str) -> None:
    """Write leaves to a file that the directory's manifest covers; a resumed run writes again."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.asarray(leaf) for key, leaf in leaves.items()}
    with manifest.covering(directory, name):
        write_tensors(tensors, path, metadata=metadata, overwrite=True)
