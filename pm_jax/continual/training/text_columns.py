"""The classifier's columns that CLIP's text tower makes of the names of the classes."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import classifiers, models
from pm_jax.classifiers.zero_shot import phrases_of
from pm_jax.continual.settings.config import Config
from pm_jax.data import clip_tokens, prompts
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, InvalidInput, Params
from pm_jax.weights import clip, pretrained

BATCH_SIZE = 256
"""Phrases at a time."""


def text_columns(config: Config, class_names: Sequence[str] | None) -> dict[str, Array]:
    """Make the leaves of the classifier, by path, for classes with names.

    Raises:
        InvalidInput: as `check_text_columns`; or the weights of the text tower do not fit.
    """
    names, templates = _names_and_templates(config, class_names)
    return _columns(config.pretrained, str(_tokenizer(config)), names, templates)


def check_text_columns(config: Config, class_names: Sequence[str] | None) -> None:
    """Check all that columns are made of but the weights.

    Raises:
        InvalidInput: there are no class names that tell classes apart, a template or the tokenizer
            cannot be read, or a phrase is too long for the tower.
    """
    names, templates = _names_and_templates(config, class_names)
    _ids(config.pretrained, str(_tokenizer(config)), names, templates)


def _names_and_templates(
    config: Config, class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = prompts.check_class_names(config.dataset, class_names)
    return names, prompts.read_templates(config.templates)


def _tokenizer(config: Config) -> Path:
    return Path(config.tokenizer) if config.tokenizer else clip.folder_of(config.pretrained)


def _ids(
    weights: str, tokenizer: str, names: tuple[str, ...], templates: tuple[str, ...]
) -> np.ndarray:
    """Return the token ids [phrases, tokens] of all phrases about all classes."""
    tower, phrases = clip.sizes(weights).text, phrases_of(names, templates)
    ids = clip_tokens.encoder(Path(tokenizer))(phrases)
    if ids.max() >= tower["vocabulary"]:
        raise InvalidInput(
            f"tokenizer={tokenizer}: gives ids up to {ids.max()}, and the model has "
            f"{tower['vocabulary']}; give the tokenizer of the model"
        )
    if ids.shape[1] > tower["positions"]:
        longest = int(np.argmax(np.count_nonzero(ids, axis=1)))
        raise InvalidInput(
            f"templates={templates[longest % len(templates)]}: {phrases[longest]!r} has "
            f"{ids.shape[1]} tokens, and the model takes {tower['positions']}; shorten the "
            "template or the name"
        )
    return ids


# Once for all seeds and rules of a stream.
@functools.lru_cache(maxsize=2)
def _columns(
    weights: str, tokenizer: str, names: tuple[str, ...], templates: tuple[str, ...]
) -> dict[str, Array]:
    ids = _ids(weights, tokenizer, names, templates)
    parts = clip.parted(weights, pretrained.read_tensors(weights))
    tower = models.ClipTextTower(**clip.sizes(weights).text)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), ids[:1])["params"]
    try:
        params = pretrained.load_params(parts.text, shapes)
    except InvalidInput as error:
        what = str(error).partition(": ")[2]
        raise InvalidInput(f"pretrained={weights}: {what}") from None

    @jax.jit
    @in_full_precision
    def vectors(params: Params, ids: Array) -> Any:
        return tower.apply({"params": params}, ids)

    def embed(phrases: list[str]) -> Array:
        batches = -(-len(phrases) // BATCH_SIZE)
        # All batches have one shape; the rows of padding are left out again.
        blank = np.zeros((batches * BATCH_SIZE, ids.shape[1]), np.int32)
        blank[: len(ids)] = ids
        rows = [vectors(params, batch) for batch in np.split(blank, batches)]
        return jnp.concatenate(rows)[: len(phrases)]

    kernel, bias = classifiers.text_columns(embed, names, templates, parts.scale)
    return {"head/kernel": kernel, "head/bias": bias}
