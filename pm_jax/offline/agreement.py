"""The tensors of several models that merge: what is left out, what is tied, what must agree."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from pm_jax import files, trees
from pm_jax.offline.tensor_files import FLOATS, WHOLE_NUMBERS, Entry, TensorFile
from pm_jax.types import InvalidInput, cause

_FIRST_LOOK = 1 << 12
"""Bytes by which most tensors are told apart."""
_ABOUT_FILES = (
    *(
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "architectures",
    ),
    *("id2label", "label2id", "problem_type", "finetuning_task"),
)
"""Keys of a config that do not change what a model computes before its classifier."""


class Agreement(NamedTuple):
    """The tensors of a merge, by what is done with them.

    Attributes:
        files: base, models and Fisher files, whose entries have the base's names.
        merging: names of the tensors that merge: floating-point numbers, and not empty.
        left: names of the base's tensors that stay as they are, as the user says.
        ignored: names of tensors of the models that the base does not have, as the user says.
        copies: `{name: another tensor's}` of second names of tied tensors, merged once.
        dropped: second names that the base does not have.
    """

    files: tuple[TensorFile, ...]
    merging: tuple[str, ...]
    left: tuple[str, ...]
    ignored: tuple[str, ...]
    copies: dict[str, str]
    dropped: tuple[str, ...]

    def lines(self) -> list[str]:
        """Say what does not merge."""
        base = self.files[0].entries
        kinds = {
            "not floating-point, left as the base's": [
                n for n in base if base[n].dtype not in FLOATS and n not in self.left
            ],
            "left as the base's, as leave says": self.left,
            "left out, as the base has none and leave says so": self.ignored,
            "tied, so merged once": [f"{n} with {other}" for n, other in self.copies.items()],
            "second names of tied tensors, which the base does not have": self.dropped,
        }
        return [f"{what}: {files.listed([*names])}" for what, names in kinds.items() if names]


def agreement(
    base: TensorFile,
    models: Sequence[TensorFile],
    fishers: Sequence[TensorFile],
    leave: Sequence[str],
    changed: frozenset[str] | None = None,
) -> Agreement:
    """Sort the tensors of opened files, and check that those that merge agree.

    Where adapters alone merge into a base, only the tensors that they have changed merge.

    Raises:
        InvalidInput: a model has other tensors than the base, a pattern of `leave` matches none, or
            nothing is left to merge.
    """
    opened = (base, *models, *fishers)
    named = matching(leave, [name for file in opened for name in file.entries])
    for file in opened:
        for name, entry in file.entries.items():
            known = entry.dtype in FLOATS or entry.dtype in WHOLE_NUMBERS
            if not known and name not in named:
                raise InvalidInput(
                    f"{file.argument}={file.source}: {name} is of type {entry.dtype}; convert "
                    f"it to one of {', '.join(FLOATS)}, or leave it as the base's by leave"
                )
    renamed = [_with_names_of(base, file, named) for file in (*models, *fishers)]
    opened = (base, *(file for file, _ in renamed))
    models, fishers = opened[1 : len(models) + 1], opened[len(models) + 1 :]
    floating = (n for n in _floating(base) if changed is None or n in changed)
    merging = tuple(n for n in floating if n not in named)
    if not merging:
        what = f"leave={','.join(leave)}: leaves" if leave else f"base={base.source}: has"
        raise InvalidInput(f"{what} no floating-point tensor; nothing to merge")
    for file in models:
        _check_same(base, file, tuple(n for n in base.entries if n not in named), named)
    for file in fishers:
        _check_same(base, file, merging, named)
    copies = dict(_tied((base, *models), merging))
    return Agreement(
        opened,
        tuple(name for name in merging if name not in copies),
        tuple(name for name in base.entries if name in named),
        tuple(name for name in named if name not in base.entries),
        copies,
        tuple(dict.fromkeys(name for _, names in renamed for name in names)),
    )


def _floating(file: TensorFile) -> Iterator[str]:
    return (n for n, entry in file.entries.items() if entry.dtype in FLOATS and entry.size)


def matching(leave: Sequence[str], names: Sequence[str]) -> dict[str, None]:
    """Find the names that patterns match; raises `InvalidInput` for a pattern that matches none."""
    matched: dict[str, None] = {}
    for pattern in leave:
        try:
            matched |= dict.fromkeys(trees.match_paths(dict.fromkeys(names, 0), pattern))
        except ValueError as error:
            raise InvalidInput(f"leave={error}") from None
    return matched


def _with_names_of(
    base: TensorFile, file: TensorFile, left: dict[str, None]
) -> tuple[TensorFile, list[str]]:
    """Give a file the base's names of tied tensors, which one writer stores twice, another once.

    Returns the file, and the names that were taken away.
    """
    entries, places, dropped = dict(file.entries), dict(file.places), []
    for name in base.entries:
        if name not in entries and name not in left:
            twins = (n for n in base.entries if n in file.entries and _equal(base, name, n))
            if twin := next(twins, None):
                entries[name], places[name] = entries[twin], places[twin]
    for name in file.entries:
        if name not in base.entries and name not in left:
            if any(n in file.entries and _equal(file, name, n) for n in base.entries):
                del entries[name], places[name]
                dropped.append(name)
    return dataclasses.replace(file, entries=entries, places=places), dropped


def _tied(opened: Sequence[TensorFile], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Find the tensors that equal an earlier one in every model."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        entry = opened[0].entries[name]
        # Only matrices are tied; vectors of ones or zeros are equal by chance.
        if len(entry.shape) > 1:
            groups.setdefault((entry.dtype, entry.shape), []).append(name)
    found = set()
    for group in groups.values():
        for first, second in combinations(group, 2):
            if second in found or first in found:
                continue
            if all(_equal(file, first, second) for file in opened):
                found.add(second)
                yield second, first


def _equal(file: TensorFile, first: str, second: str) -> bool:
    """Tell whether two matrices of a file are the same, bit for bit."""
    one, other = file.entries[first], file.entries[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape) or len(one.shape) < 2 or not one.size:
        return False
    starts = (next(file.pieces(name, _FIRST_LOOK)) for name in (first, second))
    if len({start.tobytes() for start in starts}) > 1:
        return False
    pairs = zip(file.pieces(first), file.pieces(second), strict=True)
    return all((left == right).all() for left, right in pairs)


def _check_same(
    base: TensorFile, other: TensorFile, names: tuple[str, ...], left: dict[str, None]
) -> None:
    differences = [f"lacks {name}" for name in names if name not in other.entries]
    differences += [
        f"also has {n}" for n in other.entries if n not in base.entries and n not in left
    ]
    for name in names:
        # A missing tensor is in the list already.
        if theirs := other.entries.get(name):
            differences += _differences(name, base.entries[name], theirs)
    if differences:
        raise InvalidInput(
            f"{other.argument}={other.source}: does not hold the tensors of the base: "
            f"{files.listed(differences)}; give files of one architecture, or leave tensors as "
            "the base's by leave"
        )


def _differences(name: str, ours: Entry, theirs: Entry) -> list[str]:
    if theirs.shape != ours.shape:
        return [f"{name} is {list(theirs.shape)}, not {list(ours.shape)}"]
    if (theirs.dtype in FLOATS) != (ours.dtype in FLOATS):
        return [f"{name} is {theirs.dtype}, not {ours.dtype}"]
    return []


def differing_configs(base: TensorFile, models: Sequence[TensorFile]) -> list[str]:
    """Say in lines where the config of a model differs from the base's, which the output gets.

    Raises:
        InvalidInput: a config cannot be read.
    """
    ours = _config(base)
    lines = []
    for file in models:
        theirs = _config(file)
        if ours is None or theirs is None:
            continue
        differing = [
            f"{key}={theirs.get(key)}, not {ours.get(key)}"
            for key in dict.fromkeys([*ours, *theirs])
            if key not in _ABOUT_FILES and ours.get(key) != theirs.get(key)
        ]
        if differing:
            lines.append(
                f"{file.source}: its config has {files.listed(differing)}; the output has the "
                "base's"
            )
    return lines


def _config(file: TensorFile) -> dict[str, Any] | None:
    path: Path | None = file.form.config
    try:
        return files.read_json(path, dict) if path else None
    except (ValueError, OSError) as error:
        raise InvalidInput(
            f"{file.argument}={file.source}: config.json cannot be read ({cause(error)})"
        ) from error
