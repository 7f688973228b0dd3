"""CLIP's tokenizer, from a tokenizer.json or from the two files that it can be made of."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pm_jax import files
from pm_jax.types import InvalidInput, cause

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_FILE, VOCABULARY_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""The words of CLIP's tokenizer: an English ending, letters, a digit, or other signs."""


def encoder(place: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Make the function from N texts to their token ids, int32 [N, T], with 0 behind the ends.

    Args:
        place: a tokenizer.json, a vocab.json with merges.txt beside it, or a folder of either.

    Raises:
        InvalidInput: there is no such file, or it cannot be read; and, when the function is called,
            the tokenizer is not CLIP's, whose end of a text has the highest id.
    """
    tokenizer = _read(place)
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=0)

    def encode(texts: Sequence[str]) -> np.ndarray:
        encodings = tokenizer.encode_batch(list(texts))
        ids = np.asarray([encoding.ids for encoding in encodings], np.int32)
        end = tokenizer.token_to_id(END)
        if end is None or not np.all((ids.max(axis=1) == end) & ((ids == end).sum(axis=1) == 1)):
            raise InvalidInput(
                f"tokenizer={place}: does not end a text by {END} as the highest of its ids, as "
                "CLIP's does; give the tokenizer of the CLIP model"
            )
        return ids

    return encode


def _read(place: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InvalidInput(
            "tokenizer: the package tokenizers is not installed; pip install 'pm_jax[text]'"
        ) from None
    path = place
    if place.is_dir():
        names = (TOKENIZER_FILE, VOCABULARY_FILE)
        path = next((place / name for name in names if (place / name).is_file()), place)
    if not path.is_file():
        raise InvalidInput(
            f"tokenizer={place}: is neither {TOKENIZER_FILE} nor {VOCABULARY_FILE} with "
            f"{MERGES_FILE}, nor a folder of them; give those of the CLIP model"
        )
    try:
        if path.name == VOCABULARY_FILE:
            return _of_vocabulary(path)
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The Rust library raises plain exceptions.
        raise InvalidInput(
            f"tokenizer={path}: cannot be read ({cause(error)}); get it anew"
        ) from error


def _of_vocabulary(path: Path) -> Any:
    """Make the tokenizer of a vocabulary [{token: id}] and the pairs that are joined, in order."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = files.read_json(path, {START: int, END: int})
    lines = path.with_name(MERGES_FILE).read_text(encoding="utf-8").splitlines()
    # The first line names the version.
    pairs: Any = [tuple(line.split()) for line in lines if line and line[:8] != "#version"]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, vocabulary[token]) for token in (START, END)],
    )
    return tokenizer
