"""The models that a run merged, kept as files for another rule to merge or to go on from."""

from pathlib import Path

import numpy as np

from pm_jax import trees
from pm_jax.continual.storage import manifest
from pm_jax.continual.training.partition import HEAD_PATTERN
from pm_jax.types import InvalidInput, Params
from pm_jax.weights.pretrained import read_tensors, write_tensors

FOLDER = "task_models"


def keep(
    run: Path,
    task: int,
    merging: tuple[str, ...],
    trained: Params,
    pretrained: Params | None = None,
) -> None:
    """Write what a task trained: what merges, and in a file beside it what does not.

    Args:
        run: directory of one seed.
        task: counted from 0; before the first, theta_0 is written too.
        merging: paths of the leaves that merge.
        trained: theta_{task+1}*, full parameter tree.
        pretrained: theta_0; `None` where the first task is the pre-training.

    Example:
        >>> import tempfile
        >>> run, model = Path(tempfile.mkdtemp()), {"fc": np.ones(2), "head": {"bias": np.zeros(2)}}
        >>> keep(run, 0, ("fc",), model)
        >>> base, models = files(run)
        >>> base.name, [model.name for model in models], sorted(whole(run, 1))
        ('theta_0.safetensors', ['task_1.safetensors'], ['fc', 'head/bias'])
    """
    theta_0 = trained if pretrained is None else pretrained
    if task == 0:
        _write(run, "theta_0.safetensors", trees.select(theta_0, merging))
    _write(run, f"task_{task + 1}.safetensors", trees.select(trained, merging))
    # From scratch the first task trains all; else all that does not merge is the classifier.
    all_train = task == 0 and pretrained is None
    others = trees.match_paths(trained, ".*" if all_train else HEAD_PATTERN)
    rest = tuple(path for path in others if path not in merging)
    _write(run, rest_name(task + 1), trees.select(trained, rest))


def rest_name(task: int) -> str:
    """Of the file with what a task, counted from 1, trained and did not merge."""
    return f"rest_{task}.safetensors"


def whole(run: Path, task: int) -> dict[str, np.ndarray]:
    """All that a task trained.

    Args:
        run: directory of one seed.
        task: t for theta_t*.

    Returns:
        `{path: leaf}`.

    Raises:
        InvalidInput: a file is missing or damaged.
    """
    folder = run / FOLDER
    names = (f"task_{task}.safetensors", rest_name(task))
    return {key: leaf for name in names for key, leaf in _leaves(folder / name).items()}


def _write(run: Path, name: str, leaves: Params) -> None:
    path = run / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    tensors = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    with manifest.covering(run, path.relative_to(run).as_posix()):
        write_tensors(tensors, path, overwrite=True)  # a resumed run writes the same


def _leaves(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_tensors(path)
    except InvalidInput as error:
        raise InvalidInput(f"branch_from={path}: {str(error).partition(': ')[2]}") from None


def files(run: Path) -> tuple[Path, tuple[Path, ...]]:
    """The files that a run kept.

    Args:
        run: directory of one seed.

    Returns:
        That of theta_0, and those of theta_1*, theta_2*, ...

    Raises:
        InvalidInput: there are none.

    Example:
        >>> files(Path("/nonexistent"))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: run=/nonexistent: holds no task models; ...
    """
    folder = run / FOLDER
    count = len(list(folder.glob("task_*.safetensors")))
    if not count:
        raise InvalidInput(
            f"run={run}: holds no task models; give the seed_<n> of a run that was trained with "
            "keep_task_models"
        )
    models = (folder / f"task_{task}.safetensors" for task in range(1, count + 1))
    return folder / "theta_0.safetensors", tuple(models)
