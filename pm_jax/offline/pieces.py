"""The tensors of a merge, piece by piece: blocks of elements, single tensors, or all at once.

A rule's `needs` say how much of a model it must see. One whose elements meet in nothing but sums is
merged in blocks: each sum is added up over all blocks first (see `pm_jax.block_sums`).
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import block_sums
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.offline.displacements import Displacement, as_displacements
from pm_jax.offline.matrices import StoredMatrix
from pm_jax.offline.requests import Inputs
from pm_jax.offline.tensor_files import Entry, TensorFile, writing
from pm_jax.rules import Evidence, MergeRule, jit_merge
from pm_jax.types import InvalidInput, Params, PyTree

BLOCK = 1 << 16
"""Elements merged at a time where a rule allows for it."""

Load = Callable[[TensorFile], Params]
"""Function that loads, from a file, the part that is merged at once."""

Totals = list[tuple[PyTree, ...]]
"""For each model, sums over all elements, in the order in which its merge asks for them."""


class Pieces:
    """Merger of tensors piece by piece, in the order of the elements of each tensor.

    Attributes:
        inputs: the files.
        coefficients: for tensors that have one by curvature, `[T, 2]`: of each model, and whether
            1/t took its place.
    """

    def __init__(
        self,
        inputs: Inputs,
        by_settings: list[tuple[MergeRule, tuple[str, ...]]],
        stored: dict[str, StoredMatrix],
        seed: int,
    ):
        self.inputs, self._by_settings, self._stored = inputs, by_settings, stored
        # For each tensor, all that a rule of scope "model" takes for a model.
        self._together = {name: names for _, names in by_settings for name in names}
        self._merged: dict[str, np.ndarray] = {}
        self._totals: dict[tuple[str, ...], Totals] = {}
        self.coefficients: dict[tuple[str, ...], np.ndarray] = {}
        self._seed, self._mergers = seed, dict[int, _Merger]()

    def on(self, inputs: Inputs) -> "Pieces":
        """Return the same merger of other files with the same tensors."""
        return Pieces(inputs, self._by_settings, self._stored, self._seed)

    def of(self, name: str, rule: MergeRule) -> Iterator[np.ndarray]:
        """Yield the merged pieces of a tensor."""
        parts, is_matrix = rule.needs.parts, name in self._stored
        of_tensor = rule if parts is None else parts.matrix if is_matrix else parts.other
        merger = self._merger(of_tensor)
        if is_matrix:
            matrices = merger.whole(
                lambda file: self._stored[name].separate(self._tensor(file, name)), (_place(name),)
            )
            yield self._stored[name].joined(matrices, self.inputs.base.entries[name].shape)
        elif of_tensor.needs.scope == "element":
            for load, place, length in self._blocks(name):
                yield merger.whole(load, place)[:length]
        elif of_tensor.needs.meets_in_sums:
            whole = self._together[name] if of_tensor.needs.scope == "model" else (name,)
            totals = self._sums(whole, of_tensor)
            for load, place, length in self._blocks(name):
                yield merger.block(load, place, totals)[:length]
            if merger.has_coefficients:
                self.coefficients[whole] = np.stack(merger.coefficients)
        elif of_tensor.needs.scope == "tensor":
            yield merger.whole(lambda file: self._tensor(file, name), (_place(name),))
        else:
            if name not in self._merged:
                names = self._together[name]
                self._merged |= merger.whole(lambda file: {n: self._tensor(file, n) for n in names})
            # A tied tensor is asked for once more, under its second name.
            tied = name in self.inputs.agreement.copies.values()
            yield self._merged[name] if tied else self._merged.pop(name)

    def dtype(self, name: str) -> np.dtype:
        """Return the type in which a tensor is merged."""
        double = any(file.entries[name].dtype == "F64" for file in self.inputs.files)
        return np.dtype(np.float64 if double else np.float32)

    def _sums(self, names: tuple[str, ...], rule: MergeRule) -> Totals:
        """Add up, over all elements of some tensors, the sums in which a rule's elements meet.

        Raises:
            InvalidInput: the rule asks for none.
        """
        if names in self._totals:
            return self._totals[names]
        totals: Totals = []
        for _ in self.inputs.models:
            totals.append(())
            while (total := self._next_sum(names, rule, totals)) is not None:
                totals[-1] = (*totals[-1], total)
        if not any(totals) and self._size(names):
            raise InvalidInput(
                "rule=: says meets_in_sums, and its update takes no sum by block_sums.over_all; "
                "take all of them so, or leave meets_in_sums out"
            )
        if rule.needs.scope == "model":
            self._totals[names] = totals
        return totals

    def _next_sum(self, names: tuple[str, ...], rule: MergeRule, totals: Totals) -> PyTree | None:
        """Add up the first sum that the last model with totals lacks, or return None.

        The models before are merged anew for it, as files of their states would be larger than the
        models.
        """
        merger, sums = self._merger(rule), _Sums()
        # All blocks ask for the same sums, so the first one tells whether any is missing.
        for name in names:
            for load, place, _ in self._blocks(name):
                try:
                    merger.block(load, place, totals)
                except block_sums.Missing as missing:
                    if missing.of_size:
                        return np.uint32(missing.of_size(self._size(names)))
                    sums.add(missing.part)
                else:
                    return None
        return sums.total()

    def _merger(self, rule: MergeRule) -> "_Merger":
        if id(rule) not in self._mergers:
            self._mergers[id(rule)] = _Merger(rule, self.inputs, self._seed)
        return self._mergers[id(rule)]

    def _size(self, names: tuple[str, ...]) -> int:
        return sum(self.inputs.base.entries[name].size for name in names)

    def _blocks(self, name: str) -> Iterator[tuple[Load, tuple[int, int], int]]:
        """Yield the loader of each block of a tensor, the numbers of its draws, and its length."""
        size = self._size((name,))
        for block, first in enumerate(range(0, size, BLOCK)):
            stop = min(first + BLOCK, size)
            yield self._block(name, first, stop), (_place(name), block), stop - first

    def _block(self, name: str, first: int, stop: int) -> Load:
        def load(file: TensorFile) -> np.ndarray:
            # Padded to one shape, so that one compilation serves all blocks.
            values: np.ndarray = np.zeros(BLOCK, self.dtype(name))
            values[: stop - first] = _values(file, name, first, stop)
            return values

        return load

    def _tensor(self, file: TensorFile, name: str) -> np.ndarray:
        entry = file.entries[name]
        values = _values(file, name, 0, entry.size).astype(self.dtype(name), copy=False)
        return values.reshape(entry.shape)


class Rescaled(Pieces):
    """Merger of a rule that multiplies the whole displacement by a number that all of it gives.

    The displacements are merged into a file in a folder first, and from there into the output.
    """

    def __init__(
        self, inputs: Inputs, pieces: Pieces, of_tensor: dict[str, MergeRule], folder: Path
    ):
        self.inputs, self.coefficients = inputs, {}
        displaced = as_displacements(inputs)
        pieces, entries, begin = pieces.on(displaced), dict[str, Entry](), 0
        for name in of_tensor:
            dtype, size = pieces.dtype(name), inputs.base.entries[name].size
            kind = "F64" if dtype == np.float64 else "F32"
            entries[name] = Entry(kind, (size,), begin, begin + size * dtype.itemsize)
            begin = entries[name].end
        path, squares = folder / "displacement.safetensors", []
        with writing(path, entries, {}) as file:
            for name, rule in of_tensor.items():
                for values in pieces.of(name, rule):
                    squares.append(float(np.sum(values.astype(np.float64) ** 2)))
                    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._displacement = TensorFile.open("models", path)
        lengths = jnp.asarray(
            [file.length for file in displaced.models if isinstance(file, Displacement)]
        )
        parts = next(rule.needs.parts for rule in of_tensor.values())
        assert parts and parts.factor
        self._factor = float(parts.factor(lengths, jnp.asarray(math.sqrt(math.fsum(squares)))))

    def of(self, name: str, rule: MergeRule) -> Iterator[np.ndarray]:
        """Yield the merged pieces of a tensor."""
        del rule
        dtype = self.dtype(name)
        for start, step in zip(
            stored_blocks(self.inputs.base, name),
            stored_blocks(self._displacement, name),
            strict=True,
        ):
            yield start.astype(dtype) + dtype.type(self._factor) * step.astype(dtype)


class _Merger:
    """Compiled merge of one part of all models.

    Attributes:
        has_coefficients: whether a model has one coefficient, which curvature gives.
        coefficients: as `Pieces` has them, of the last part that was merged.
    """

    def __init__(self, rule: MergeRule, inputs: Inputs, seed: int):
        self._inputs, self._starts_at = inputs, rule.needs.next_task_from
        self.has_coefficients = rule.needs.meets_in_sums and "quadratic" in rule.needs.evidence
        self.coefficients: list[np.ndarray] = []
        # By the number of totals that are known before.
        self._of_size: dict[int, Callable[[int], int]] = {}

        @jax.jit
        def init(base):
            # A copy, because `update` donates the state, which may be the base itself.
            return rule.init(jax.tree.map(jnp.copy, base))

        def update(state, previous, trained, fisher, place):
            evidence = Evidence()
            if "quadratic" in rule.needs.evidence:
                evidence = evidence._replace(quadratic=DiagonalQuadratic.at(trained, fisher))
            if "key" in rule.needs.evidence:
                key = functools.reduce(jax.random.fold_in, place, jax.random.key(seed))
                evidence = evidence._replace(key=key)
            merged, state, info = rule.update(
                state, previous=previous, trained=trained, evidence=evidence
            )
            # Other figures are not asked for, so that they are not computed.
            found = jnp.stack([info.alpha, info.degenerate]) if self.has_coefficients else None
            return state, merged, found

        @jax.jit
        def update_block(totals, *arguments):
            """Update, or return the block's part of the first sum that is not in the totals."""
            try:
                with block_sums.in_blocks(totals):
                    return *update(*arguments), None
            except block_sums.Missing as missing:
                if missing.of_size:
                    # Kept, because a compiled program returns no function.
                    self._of_size[len(totals)] = missing.of_size
                return None, None, None, missing.part

        self._init, self._update, self._update_block = init, jit_merge(update), update_block

    def whole(self, load: Load, place: tuple[int, ...] = ()) -> Params:
        """Merge, over all models, a part that is all the rule must see."""
        return self._merged(load, place, [self._update] * len(self._inputs.models))

    def block(self, load: Load, place: tuple[int, ...], totals: Totals) -> Params:
        """Merge a block of elements over the first models, which have totals.

        Raises:
            Missing: the last of these models needs one more sum; it has the block's part of that.
        """

        def update(known, *arguments):
            *results, missing = self._update_block(known, *arguments)
            if len(known) in self._of_size:
                raise block_sums.Missing(None, self._of_size[len(known)])
            if missing is not None:
                raise block_sums.Missing(jax.tree.map(np.asarray, missing))
            return results

        return self._merged(load, place, [functools.partial(update, known) for known in totals])

    def _merged(
        self, load: Load, place: tuple[int, ...], updates: list[Callable[..., tuple]]
    ) -> Params:
        previous = load(self._inputs.base)
        state, self.coefficients = self._init(previous), []
        for task, update in enumerate(updates):
            trained = load(self._inputs.models[task])
            fisher = load(self._inputs.fishers[task]) if self._inputs.fishers else None
            # The part and the task number the draws, so that no two parts draw alike.
            numbers = np.asarray([*place, task], np.uint32)
            state, merged, found = update(state, previous, trained, fisher, numbers)
            # Otherwise the next model is loaded while this one is still in memory.
            jax.block_until_ready(merged)
            previous = merged if self._starts_at == "merged" else trained
            if found is not None:
                self.coefficients.append(np.asarray(found))
        return jax.tree.map(_with_lost_bits, merged, trained)


class _Sums:
    """Sums of arrays over blocks, in float64 and int64; only the total is rounded to their type."""

    def __init__(self) -> None:
        self._total: PyTree = None
        self._dtypes: PyTree = None

    def add(self, part: PyTree) -> None:
        """Add a block's arrays."""
        wide = jax.tree.map(
            lambda x: x.astype(np.float64 if x.dtype.kind == "f" else np.int64), part
        )
        dtypes = jax.tree.map(lambda x: x.dtype, part)
        if self._total is not None:
            wide = jax.tree.map(np.add, self._total, wide)
            dtypes = jax.tree.map(np.promote_types, self._dtypes, dtypes)
        self._total, self._dtypes = wide, dtypes

    def total(self) -> PyTree | None:
        """Return the sums in the type of the arrays, or None where there were none."""
        if self._total is None:
            return None
        return jax.tree.map(_narrowed, self._total, self._dtypes)


def stored_blocks(file: TensorFile, name: str) -> Iterator[np.ndarray]:
    """Read a tensor of floating-point numbers block by block."""
    size = file.entries[name].size
    for first in range(0, size, BLOCK):
        yield file.read(name, first, min(first + BLOCK, size))


def _place(name: str) -> int:
    """Number a tensor for its draws by its name, as its place among the others may change."""
    return zlib.crc32(name.encode())


def _values(file: TensorFile, name: str, first: int, stop: int) -> np.ndarray:
    values = file.read(name, first, stop)
    if file.argument == "fishers" and values.size and values.min() < 0:
        raise InvalidInput(
            f"fishers={file.source}: {name} holds {values.min()}; must not be negative"
        )
    return values


def _narrowed(total: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A total in a type; a whole number that does not fit becomes the nearest that does."""
    if dtype.kind != "f":
        total = np.clip(total, np.iinfo(dtype).min, np.iinfo(dtype).max)
    return np.asarray(total, dtype)


def _with_lost_bits(merged: jax.Array, trained: np.ndarray) -> np.ndarray:
    """Restore signed zeros and subnormal numbers, which compiled arithmetic turns into zero."""
    values = np.asarray(merged)
    lost = np.abs(values - trained) < np.finfo(values.dtype).tiny
    return np.where(lost, trained, values)
