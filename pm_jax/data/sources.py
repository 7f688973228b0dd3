"""Labelled images by name: digits, archives, folders, or data sets of tensorflow-datasets."""

import functools
import re
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pm_jax.data import archives, image_folders, prepared, several, stored_images, tables
from pm_jax.data.assembling import without_domains
from pm_jax.data.digits import load_digits, rotated
from pm_jax.data.stream import LabelledArrays
from pm_jax.data.tfds_images import DOMAINS, load_images
from pm_jax.types import InvalidInput

BARE_NAME = re.compile(r"[A-Za-z_]\w*")
ONLY_OF_IMAGES = ("stored_size", "cache_dir", "skip_unreadable")


class ReadOptions(TypedDict, total=False):
    """The options of reading, which are settings of a run."""

    class_subset: int
    train_per_class: int
    test_per_class: int
    stored_size: int
    cache_dir: str
    test_split: str
    validation_split: str
    domain_field: str
    skip_unreadable: bool


def kind_of(dataset: str) -> str:
    """Tell what a setting names: "digits", "archive", "table", "folder" or "prepared".

    A name without slashes that is also a folder may still be a data set that is prepared.

    Example:
        >>> kind_of("mine.npz"), kind_of("./photos"), kind_of("cmaterdb/bangla:1.0.0")
        ('archive', 'folder', 'prepared')
    """
    if dataset == "digits":
        return "digits"
    if dataset.endswith(".npz"):
        return "archive"
    if dataset.endswith(tables.ENDINGS):
        return "table"
    if dataset.startswith(("/", "./", "../", "~")) or dataset in (".", ".."):
        return "folder"
    return "folder" if dataset not in DOMAINS and Path(dataset).is_dir() else "prepared"


# Seeds and baselines share one decoding.
@functools.lru_cache(maxsize=1)
def load(
    dataset: str, data_dir: str = "", *, rgb: bool = False, **options: Unpack[ReadOptions]
) -> LabelledArrays:
    """Load a data set, uint8 images [N, H, W, channels] with labels, into memory.

    Where tasks bring new classes, domains and several data sets are pooled.

    Raises:
        InvalidInput: the data set is unknown, not prepared or damaged, or has several sizes.
    """
    return _as_rgb(several.pooled(_read(dataset, data_dir, False, options), dataset), rgb)


@functools.lru_cache(maxsize=1)
def load_domains(
    dataset: str,
    num_domains: int,
    data_dir: str = "",
    *,
    rgb: bool = False,
    **options: Unpack[ReadOptions],
) -> tuple[LabelledArrays, ...]:
    """Load data sets with the same classes and different images: the domains of a stream.

    They are several data sets, or those of one: of "domainnet" the first `num_domains`.

    Raises:
        InvalidInput: there are not so many domains, or as `load`.
    """
    if dataset in DOMAINS:
        domains = DOMAINS[dataset]
        if not 1 <= num_domains <= (count := len(domains)):
            raise InvalidInput(
                f"num_tasks={num_domains}: {dataset} has {count} domains; choose 1..{count} tasks"
            )
        names = [f"{dataset}/{domain}" for domain in domains[:num_domains]]
        loaded = load_images(names, data_dir, **_of_prepared(options))
    else:
        loaded = _read(dataset, data_dir, True, options)
        several.check_domains(loaded, num_domains, dataset)
    return tuple(_as_rgb(arrays, rgb) for arrays in loaded)


@functools.lru_cache(maxsize=1)
def load_rotated(
    dataset: str, angles: tuple[float, ...], data_dir: str = "", **options: Any
) -> tuple[LabelledArrays, ...]:
    """Load a data set once for each angle, and turn it by that.

    Raises:
        InvalidInput: as `load`.
    """
    arrays = load(dataset, data_dir, **options)
    return tuple(rotated(arrays, angle) for angle in angles)


def _read(
    dataset: str, data_dir: str, by_domain: bool, options: ReadOptions
) -> list[LabelledArrays]:
    if len(several.names_in(dataset)) == 1:
        return _read_one(dataset, data_dir, by_domain, options)
    # The first classes are those of all data sets together.
    each: ReadOptions = {**options, "class_subset": 0}

    def read(name: str) -> list[LabelledArrays]:
        return [several.pooled(_read_one(name, data_dir, False, each), name)]

    return several.read_each(dataset, read, options.get("class_subset", 0))


def _read_one(
    dataset: str, data_dir: str, by_domain: bool, options: ReadOptions
) -> list[LabelledArrays]:
    """Read one data set: as one, or as one for each of its domains."""
    kind, path = kind_of(dataset), Path(dataset).expanduser()
    rest: Any = dict(options)
    if kind == "folder" and BARE_NAME.fullmatch(dataset) and prepared.is_known(dataset, data_dir):
        kind = "prepared"
    if kind == "table":
        raise InvalidInput(
            f"dataset={dataset}: holds texts; a text model reads them: model=text_encoder, "
            "minilm_l6 or bert_base"
        )
    if kind == "digits":
        arrays = several.keep_classes(load_digits(), rest.pop("class_subset", 0))
        counts = (rest.get("train_per_class", 0), rest.get("test_per_class", 0))
        return [several.keep_first(arrays, *counts)]
    if kind == "archive":
        for name in ONLY_OF_IMAGES:
            rest.pop(name, None)
        return archives.load_images(path, by_domain=by_domain, **rest)
    if kind == "folder":
        rest.pop("domain_field", None)
        return image_folders.load(path, by_domain=by_domain, **rest)
    names = [f"{dataset}/{domain}" for domain in DOMAINS.get(dataset, ())] or [dataset]
    if by_domain and not rest.get("domain_field"):
        raise InvalidInput(without_domains(dataset))
    return load_images(names, data_dir, **_of_prepared(options))


def _of_prepared(options: ReadOptions) -> Any:
    return {name: value for name, value in options.items() if name != "skip_unreadable"}


def _as_rgb(arrays: LabelledArrays, rgb: bool) -> LabelledArrays:
    if not rgb:
        return arrays
    return arrays.with_inputs(lambda images: stored_images.as_rgb(images, arrays.name))
