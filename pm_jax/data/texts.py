"""Labelled texts as token ids: a data set of tensorflow-datasets, or a NumPy archive of strings."""

import functools
from pathlib import Path

import numpy as np

from pm_jax.data import prepared, sources
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput

LABELS = ("label", "intent")
"""The class is in the first of these features that a data set has."""
GROUPS = "domain"
"""The feature that groups classes, if a data set has it."""


# Seeds and baselines share one tokenization.
@functools.lru_cache(maxsize=1)
def load(
    dataset: str,
    data_dir: str,
    tokenizer: str,
    max_tokens: int,
    *,
    class_subset: int = 0,
    train_per_class: int = 0,
    test_per_class: int = 0,
) -> LabelledArrays:
    """Load texts into memory, as int32 token ids [N, max_tokens], with labels.

    Raises:
        InvalidInput: data or tokenizer are missing, damaged or of another kind, or there are fewer
            classes than `class_subset`.
    """
    encode = _encoder(tokenizer, max_tokens)
    archive = dataset.endswith(".npz")
    arrays = load_archive(Path(dataset)) if archive else _prepared(dataset, data_dir)
    arrays = sources.keep_classes(arrays, class_subset)
    return sources.keep_first(arrays, train_per_class, test_per_class).with_inputs(encode)


def _encoder(path: str, max_tokens: int):
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
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:
        # The Rust library raises plain exceptions.
        raise InvalidInput(
            f"tokenizer={path}: cannot be read ({error}); give the tokenizer.json of the model"
        ) from error
    tokenizer.enable_truncation(max_tokens)
    # The text encoder masks id 0, which is where the vocabularies of BERT have [PAD].
    padding = tokenizer.token_to_id("[PAD]") or 0
    tokenizer.enable_padding(length=max_tokens, pad_id=padding)

    def encode(texts: np.ndarray) -> np.ndarray:
        encodings = tokenizer.encode_batch(list(texts))
        return np.asarray([encoding.ids for encoding in encodings], np.int32)

    return encode


def load_archive(path: Path) -> LabelledArrays:
    """Load the user's `.npz`: strings [N], labels from 0 on; raises `InvalidInput`."""
    needs = "a text model needs strings [N]"
    return sources.read_archive(path, needs, lambda x: x.dtype.kind == "U" and x.ndim == 1)


def _prepared(name: str, data_dir: str) -> LabelledArrays:
    builder = prepared.find(name, data_dir, ("train", "test"))
    features = builder.info.features
    label = next((feature for feature in LABELS if feature in features), None)
    if "text" not in features or label is None:
        raise InvalidInput(
            f"dataset={name}: has the features {', '.join(features)}; a text model needs text and "
            f"{' or '.join(LABELS)}"
        )
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    groups: dict[int, int] = {}
    fields = [field for field in ("text", label, GROUPS) if field in features]
    for split in ("train", "test"):
        texts, labels = [], []
        for example in prepared.examples(builder, split, fields):
            texts.append(example["text"].decode())
            labels.append(int(example[label]))
            if GROUPS in features:
                # All examples of a class are of one domain: the first one says which.
                groups.setdefault(labels[-1], int(example[GROUPS]))
        parts.append((np.asarray(texts), np.asarray(labels, np.int64)))
    of_class = np.asarray([groups[c] for c in range(len(groups))]) if groups else None
    return LabelledArrays(*parts[0], *parts[1], name=name, class_groups=of_class)
