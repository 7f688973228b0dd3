"""The models that a run merged, kept as files for another rule to merge or to go on from."""

from pathlib import Path

import numpy as np

from pm_jax.continual import manifest
from pm_jax.models import pretrained
from pm_jax.types import InvalidInput, Params

FOLDER = "task_models"


def keep(run: Path, task: int, leaves: Params) -> None:
    """Write the merging leaves of one model.

    Args:
        run: directory of one seed.
        task: 0 for theta_0, t for theta_t*.
        leaves: `{path: leaf}`.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> keep(run, 0, {"fc/kernel": np.zeros(2)})
        >>> keep(run, 1, {"fc/kernel": np.ones(2)})
        >>> base, models = files(run)
        >>> base.name, [model.name for model in models]
        ('theta_0.safetensors', ['task_1.safetensors'])
    """
    _write(run, f"{f'task_{task}' if task else 'theta_0'}.safetensors", leaves)


def rest_name(task: int) -> str:
    """Of the file with what a task trained and did not merge, counted from 1."""
    return f"rest_{task}.safetensors"


def keep_rest(run: Path, task: int, leaves: Params) -> None:
    """Write what a task trained and did not merge, such as its columns of the classifier.

    Args:
        run: directory of one seed.
        task: t for theta_t*.
        leaves: `{path: leaf}`.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> keep(run, 1, {"fc/kernel": np.ones(2)})
        >>> keep_rest(run, 1, {"head/bias": np.zeros(2)})
        >>> sorted(whole(run, 1))
        ['fc/kernel', 'head/bias']
    """
    _write(run, rest_name(task), leaves)


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
        pretrained.write_tensors(tensors, path, overwrite=True)  # a resumed run writes the same


def _leaves(path: Path) -> dict[str, np.ndarray]:
    try:
        return pretrained.read_tensors(path)
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
