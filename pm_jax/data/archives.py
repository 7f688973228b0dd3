"""The user's `.npz`: inputs, labels and, if there are any, domains of each split."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.data import labels as labelling
from pm_jax.data import splits as split_names
from pm_jax.data.assembling import Split, assembled, of_array
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput, cause

CLASS_NAMES = "class_names"
"""The key of the names of labels 0, 1, ..., strings [C]."""


def load_images(path: Path, **options: Any) -> list[LabelledArrays]:
    """Load uint8 images [N, H, W] or [N, H, W, channels]; options as `read` has them.

    Raises:
        InvalidInput: the file is missing or damaged, or a field is missing or has another form.
    """

    def with_channels(images: np.ndarray) -> np.ndarray:
        return images if images.ndim == 4 else images[..., None]

    return [
        arrays.with_inputs(with_channels) for arrays in read(path, problem_of_images, **options)
    ]


def load_texts(path: Path, **options: Any) -> list[LabelledArrays]:
    """Load strings [N]; options and errors as `load_images` has them."""
    return read(path, _problem_of_texts, **options)


def problem_of_images(images: np.ndarray) -> str | None:
    """Say what is wrong with images, and how to convert them; `None` for nothing."""
    needs = "it must be uint8 [N, H, W] or [N, H, W, channels], none of them 0"
    if images.dtype == np.uint8 and images.ndim in (3, 4) and images.size:
        if images.ndim == 4 and images.shape[3] > 4 and images.shape[1] in (1, 3, 4):
            return "channels come last; save x.transpose(0, 2, 3, 1)"
        return None
    return f"{needs}{_conversion(images)}"


def _conversion(images: np.ndarray) -> str:
    """Say how an array would become images, as the end of a sentence."""
    if images.dtype.kind in "US":
        return "; a text model reads strings: model=text_encoder, minilm_l6 or bert_base"
    if not images.size or images.dtype.kind not in "biuf":
        return ""
    side = round(images.shape[-1] ** 0.5)
    if images.ndim == 2 and side * side == images.shape[1]:
        return f"; save x.reshape(-1, {side}, {side})"
    low, high = images.min(), images.max()
    if images.ndim not in (3, 4) or not np.isfinite([low, high]).all():
        return ""
    if images.dtype.kind in "bf" and low >= 0 and high <= 1:
        return "; its values lie from 0 to 1: save np.round(255 * x).astype(np.uint8)"
    if low >= -1 and high <= 1:
        return "; its values lie from -1 to 1: save np.round(127.5 * (x + 1)).astype(np.uint8)"
    if low >= 0 and high <= 255:
        return "; save np.round(x).astype(np.uint8)"
    return f"; its values lie from {low:g} to {high:g}, and grey levels from 0 to 255"


def _problem_of_texts(texts: np.ndarray) -> str | None:
    if texts.dtype.kind == "U" and texts.ndim == 1:
        return None
    needs = "a text model needs strings [N]"
    if texts.dtype.kind == "S":
        return f"{needs}; save x.astype(str)"
    return needs + ("; an image model reads images: model=mlp or vit" if texts.ndim > 2 else "")


def read(
    path: Path,
    problem_of: Callable[[np.ndarray], str | None],
    *,
    test_split: str = "",
    validation_split: str = "",
    domain_field: str = "",
    **keeping: Any,
) -> list[LabelledArrays]:
    """Read an archive.

    Args:
        path: of the file, which has x_NAME, y_NAME and perhaps domain_NAME of each split NAME, and
            perhaps class_names.
        problem_of: says what is wrong with inputs, after their type and shape.
        test_split: name of the split for testing, if it is not "test".
        validation_split: name of the split for validation.
        domain_field: what the fields of domains are called, if it is not "domain".
        **keeping: as `assembled` takes them.

    Raises:
        InvalidInput: the file is missing or damaged, or a field is missing or has another form.
    """
    field = domain_field or "domain"
    names, fields = _opened(path, field, test_split, validation_split)
    roles = split_names.roles(str(path), names, test_split, validation_split)
    splits = {}
    for role, split in roles.named().items():
        inputs = fields[f"x_{split}"]
        if problem := problem_of(inputs):
            raise InvalidInput(
                f"dataset={path}: x_{split} is {inputs.dtype} {inputs.shape}; {problem}"
            )
        labels, domains = (
            labelling.checked(fields[name], len(inputs), f"dataset={path}: {name}")
            if (name := f"{part}_{split}") in fields
            else None
            for part in ("y", field)
        )
        assert labels is not None
        splits[role] = Split(labels, of_array(inputs), domains)
    if len({split.labels.dtype.kind for split in splits.values()}) > 1:
        raise InvalidInput(
            f"dataset={path}: has numbers for labels in one split and strings in another; use one "
            "of them"
        )
    used = [*roles.named().values()]
    shapes = {fields[f"x_{split}"].shape[1:] for split in used}
    if len(shapes) > 1:
        raise InvalidInput(f"dataset={path}: x_train and x_test have images of different shapes")
    read_keys = [f"{part}_{split}" for split in used for part in ("x", "y", field)]
    unread = sorted({*fields} - {*read_keys, CLASS_NAMES})
    notes = [f"{path.stem}: keys that are not read: {files.listed(unread)}"] if unread else []
    # Splits that are not read are among the keys that are not.
    notes += [note for note in roles.notes_about(path.stem) if ": not read: " not in note]
    class_names = [str(name) for name in fields.get(CLASS_NAMES, ())] or None
    return assembled(path.stem, splits, class_names=class_names, notes=notes, **keeping)


def _opened(
    path: Path, field: str, test_split: str, validation_split: str
) -> tuple[list[str], Mapping[str, Any]]:
    """Read the arrays of an archive, those of splits that have no role without their values."""
    if not path.is_file():
        raise InvalidInput(f"dataset={path}: there is no such file")
    wanted = ["train", test_split or "test", *filter(None, [validation_split])]
    # A data set with a validation split alone is tested on that, as any other.
    wanted += [] if test_split else ["validation"]
    try:
        # Opened here, because NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            read = {f"{part}_{split}" for split in wanted for part in ("x", "y", field)}
            fields = {
                name: archive[name] if name in read or name == CLASS_NAMES else None
                for name in archive.files
            }
    except Exception as error:  # zip and NumPy raise many types for damaged files.
        strings = "; strings with x.astype(str)" if "Object arrays" in str(error) else ""
        raise InvalidInput(
            f"dataset={path}: cannot be read ({cause(error)}); write it anew with numpy.savez, "
            f"without objects{strings}"
        ) from error
    names = [name[2:] for name in fields if name.startswith("x_")]
    needed = ["train"]
    if test_split != "train" and not (test_split == "" and "validation" in names):
        needed.append(test_split or "test")
    if validation_split:
        needed.append(validation_split)
    parts = [f"{part}_{split}" for split in needed for part in ("x", "y")]
    parts += [f"y_{name}" for name in names if name in wanted and f"y_{name}" not in parts]
    if missing := [name for name in parts if name not in fields]:
        whole = ", ".join(dict.fromkeys(parts))
        raise InvalidInput(f"dataset={path}: lacks {', '.join(missing)}; write all of {whole}")
    return names, fields
