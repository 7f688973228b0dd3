"""Labelled images by name: digits, a NumPy archive, or data sets of tensorflow-datasets."""

import functools
from pathlib import Path

import numpy as np

from pm_jax.data import stored_images
from pm_jax.data.digits import load_digits
from pm_jax.data.stream import LabelledArrays, first_of_each_class
from pm_jax.data.tfds_images import DOMAINS, load_images
from pm_jax.types import InvalidInput, cause

ARCHIVE_FIELDS = ("x_train", "y_train", "x_test", "y_test")


# Seeds and baselines share one decoding.
@functools.lru_cache(maxsize=1)
def load(
    dataset: str,
    data_dir: str = "",
    *,
    train_per_class: int = 0,
    test_per_class: int = 0,
    stored_size: int = 0,
    cache_dir: str = "",
    rgb: bool = False,
) -> LabelledArrays:
    """Load a data set, uint8 images [N, H, W, channels] with labels, into memory.

    Raises:
        InvalidInput: the data set is unknown, not prepared or damaged, or has several sizes.
    """
    if dataset == "digits" or dataset.endswith(".npz"):
        arrays = load_digits() if dataset == "digits" else load_archive(Path(dataset))
        arrays = keep_first(arrays, train_per_class, test_per_class)
    else:
        domains = load_images(
            [f"{dataset}/{domain}" for domain in DOMAINS.get(dataset, ())] or [dataset],
            data_dir,
            train_per_class=train_per_class,
            test_per_class=test_per_class,
            stored_size=stored_size,
            cache_dir=cache_dir,
        )
        arrays = domains[0] if len(domains) == 1 else _pooled(domains, dataset)
    return _as_rgb(arrays) if rgb else arrays


@functools.lru_cache(maxsize=1)
def load_domains(
    dataset: str,
    num_domains: int,
    data_dir: str = "",
    *,
    train_per_class: int = 0,
    test_per_class: int = 0,
    stored_size: int = 0,
    cache_dir: str = "",
    rgb: bool = False,
) -> tuple[LabelledArrays, ...]:
    """Load the first `num_domains` domains of "domainnet": the same classes, different images.

    Raises:
        InvalidInput: there are fewer domains, or as `load`.
    """
    known = DOMAINS[dataset]
    if not 1 <= num_domains <= len(known):
        raise InvalidInput(
            f"num_tasks={num_domains}: {dataset} has {len(known)} domains; "
            f"choose 1..{len(known)} tasks"
        )
    domains = load_images(
        [f"{dataset}/{domain}" for domain in known[:num_domains]],
        data_dir,
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        stored_size=stored_size,
        cache_dir=cache_dir,
    )
    return tuple(_as_rgb(domain) if rgb else domain for domain in domains)


def keep_first(arrays: LabelledArrays, train_per_class: int, test_per_class: int) -> LabelledArrays:
    """Keep the first examples of each class, in the data's order; 0 keeps all."""
    train = first_of_each_class(arrays.train_labels, train_per_class)
    test = first_of_each_class(arrays.test_labels, test_per_class)
    return arrays._replace(
        train_inputs=arrays.train_inputs[train],
        train_labels=arrays.train_labels[train],
        test_inputs=arrays.test_inputs[test],
        test_labels=arrays.test_labels[test],
    )


def _pooled(domains: list[LabelledArrays], name: str) -> LabelledArrays:
    parts = zip(*(domain[:4] for domain in domains), strict=True)
    x_train, y_train, x_test, y_test = (np.concatenate(part) for part in parts)
    return LabelledArrays(x_train, y_train, x_test, y_test, name)


def _as_rgb(arrays: LabelledArrays) -> LabelledArrays:
    return arrays._replace(
        train_inputs=stored_images.as_rgb(arrays.train_inputs, arrays.name),
        test_inputs=stored_images.as_rgb(arrays.test_inputs, arrays.name),
    )


def load_archive(path: Path) -> LabelledArrays:
    """Load the user's `.npz`: uint8 images [N, H, W] or [N, H, W, channels], labels from 0 on.

    Raises:
        InvalidInput: the file is missing or damaged, or a field is missing or has another form.
    """
    fields = read_archive(path)
    for part in ("train", "test"):
        images, labels = fields[f"x_{part}"], fields[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
            raise InvalidInput(
                f"dataset={path}: x_{part} is {images.dtype} {images.shape}; it must be uint8 "
                "[N, H, W] or [N, H, W, channels], none of them 0"
            )
        check_labels(path, part, labels, len(images))
        if images.ndim == 3:
            fields[f"x_{part}"] = images[..., None]
    if fields["x_train"].shape[1:] != fields["x_test"].shape[1:]:
        raise InvalidInput(f"dataset={path}: x_train and x_test have images of different shapes")
    x_train, y_train, x_test, y_test = (fields[name] for name in ARCHIVE_FIELDS)
    return LabelledArrays(x_train, y_train, x_test, y_test, path.stem)


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """Read `ARCHIVE_FIELDS` of an `.npz`, whatever they contain; raises `InvalidInput`."""
    if not path.is_file():
        raise InvalidInput(f"dataset={path}: there is no such file")
    try:
        # Opened here, because NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in ARCHIVE_FIELDS if name in archive}
    except Exception as error:  # zip and NumPy raise many types for damaged files.
        raise InvalidInput(
            f"dataset={path}: cannot be read ({cause(error)}); write it anew with numpy.savez, "
            "without objects"
        ) from error
    if missing := [name for name in ARCHIVE_FIELDS if name not in fields]:
        raise InvalidInput(
            f"dataset={path}: lacks {', '.join(missing)}; write all of {', '.join(ARCHIVE_FIELDS)}"
        )
    return fields


def check_labels(path: Path, part: str, labels: np.ndarray, examples: int) -> None:
    """Check that an archive's labels are whole numbers from 0 on; raises `InvalidInput`."""
    if labels.shape != (examples,) or labels.dtype.kind not in "iu" or min(labels, default=0) < 0:
        raise InvalidInput(
            f"dataset={path}: y_{part} is {labels.dtype} {labels.shape}; it must hold a whole "
            f"number from 0 on for each of {examples} examples"
        )
