"""Labelled texts as token ids: of tensorflow-datasets, tables, or a NumPy archive of strings."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pm_jax.data import archives, prepared, several, sources, tables
from pm_jax.data import splits as split_names
from pm_jax.data.assembling import Split, assembled, of_array, without_domains
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput

LABELS = ("label", "intent")
"""The class is in the first of these features that a data set has."""
GROUPS = "domain"
"""The feature that groups classes, if a data set has it."""


# Seeds and baselines share one tokenization.
@functools.lru_cache(maxsize=1)
def load(
    dataset: str, data_dir: str, tokenizer: str, max_tokens: int, **options: Any
) -> LabelledArrays:
    """Load texts into memory, as int32 token ids [N, max_tokens], with labels.

    Options are those of `sources.ReadOptions` that are not for images only.

    Raises:
        InvalidInput: data or tokenizer are missing, damaged or of another kind, or there are fewer
            classes than `class_subset`.
    """
    encoder = _Encoder.of(tokenizer, max_tokens)
    return encoder.applied(several.pooled(_read(dataset, data_dir, False, options), dataset))


@functools.lru_cache(maxsize=1)
def load_domains(
    dataset: str, num_domains: int, data_dir: str, tokenizer: str, max_tokens: int, **options: Any
) -> tuple[LabelledArrays, ...]:
    """Load texts likewise, a data set for each domain.

    Raises:
        InvalidInput: there are not so many domains, or as `load`.
    """
    encoder = _Encoder.of(tokenizer, max_tokens)
    loaded = _read(dataset, data_dir, True, options)
    several.check_domains(loaded, num_domains, dataset)
    return tuple(encoder.applied(arrays) for arrays in loaded)


class _Encoder(NamedTuple):
    """A tokenizer: `cut` pads and cuts to `max_tokens`, `whole` does neither."""

    cut: Any
    whole: Any
    max_tokens: int

    @classmethod
    def of(cls, path: str, max_tokens: int) -> "_Encoder":
        """Read a tokenizer; raises `InvalidInput`."""
        if not Path(path).is_file():
            raise InvalidInput(
                f"tokenizer={path}: there is no such file; give the tokenizer.json of the model"
            )
        try:
            import tokenizers
        except ImportError:
            raise InvalidInput(
                "tokenizer: the package tokenizers is not installed; pip install 'pm_jax[text]'"
            ) from None
        try:
            cut, whole = (tokenizers.Tokenizer.from_file(path) for _ in range(2))
        except Exception as error:
            # The Rust library raises plain exceptions.
            raise InvalidInput(
                f"tokenizer={path}: cannot be read ({error}); give the tokenizer.json of the model"
            ) from error
        cut.enable_truncation(max_tokens)
        # The text encoder masks id 0, which is where the vocabularies of BERT have [PAD].
        cut.enable_padding(length=max_tokens, pad_id=cut.token_to_id("[PAD]") or 0)
        whole.no_truncation()
        whole.no_padding()
        return cls(cut, whole, max_tokens)

    def applied(self, arrays: LabelledArrays) -> LabelledArrays:
        """Make token ids of a data set's texts, and note how many were cut."""
        long: list[str] = []

        def encode(texts: np.ndarray) -> np.ndarray:
            encodings = self.cut.encode_batch(texts.tolist())
            overflowing = (bool(encoding.overflowing) for encoding in encodings)
            long.extend(x for x, over in zip(texts.tolist(), overflowing, strict=True) if over)
            return np.asarray([encoding.ids for encoding in encodings], np.int32)

        encoded = arrays.with_inputs(encode)
        if not long:
            return encoded
        most = max(len(encoding.ids) for encoding in self.whole.encode_batch(long))
        count = sum(len(labels) for _, labels in arrays.parts())
        note = (
            f"{arrays.name}: {len(long)} of {count} texts ({100 * len(long) / count:.1f} %) are "
            f"longer than max_tokens={self.max_tokens} and were cut; the longest has {most} tokens"
        )
        return encoded._replace(notes=(*arrays.notes, note))


def _read(
    dataset: str, data_dir: str, by_domain: bool, options: dict[str, Any]
) -> list[LabelledArrays]:
    if len(several.names_in(dataset)) == 1:
        return _reader(dataset, data_dir)(by_domain=by_domain, **options)
    each = {**options, "class_subset": 0}

    def read(name: str) -> list[LabelledArrays]:
        return _reader(name, data_dir)(by_domain=False, **each)

    return several.read_each(dataset, read, options.get("class_subset", 0))


def _reader(dataset: str, data_dir: str) -> Callable[..., list[LabelledArrays]]:
    """Return the function that reads one data set."""
    kind, path = sources.kind_of(dataset), Path(dataset).expanduser()
    if kind == "archive":
        return functools.partial(archives.load_texts, path)
    if kind in ("table", "folder"):
        return functools.partial(tables.load, path)
    return functools.partial(_prepared, dataset, data_dir)


def _prepared(
    name: str,
    data_dir: str,
    *,
    by_domain: bool,
    test_split: str = "",
    validation_split: str = "",
    domain_field: str = "",
    **keeping: Any,
) -> list[LabelledArrays]:
    """Read a data set of tensorflow-datasets."""
    builder = prepared.find(name, data_dir)
    features = builder.info.features
    label = next((feature for feature in LABELS if feature in features), None)
    if "text" not in features or label is None:
        raise InvalidInput(
            f"dataset={name}: has the features {', '.join(features)}; a text model needs text and "
            f"{' or '.join(LABELS)}"
        )
    if by_domain and not domain_field:
        raise InvalidInput(without_domains(name))
    field = domain_field or (GROUPS if GROUPS in features else None)
    of_domain = prepared.field_of(builder, field, name) if field else None
    roles = split_names.roles(name, [*builder.info.splits], test_split, validation_split)
    splits = {}
    for role, split in roles.named().items():
        texts, labels, domains = [], [], []
        for example in prepared.examples(builder, split, ["text", label, *filter(None, [field])]):
            texts.append(example["text"].decode())
            labels.append(int(example[label]))
            if field:
                domains.append(prepared.domain_of(of_domain, example[field]))
        values = np.asarray(domains) if field else None
        splits[role] = Split(
            np.asarray(labels, np.int64), of_array(np.asarray(texts, object)), values
        )
    names = getattr(features[label], "names", None)
    return assembled(
        name,
        splits,
        by_domain=by_domain,
        class_names=names,
        notes=roles.notes_about(name),
        **keeping,
    )
