"""Columns made from the names of the classes, by a text tower that shares the features' space."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from pm_jax.classifiers import checks
from pm_jax.classifiers.base import Classifier, Columns, Linear
from pm_jax.types import Array, InvalidInput, Key


def zero_shot() -> Classifier:
    """Predict with columns that were made from the names of the classes, and that nothing trains.

    The columns are those of the model, see `text_columns`. A run makes them before its first task
    and keeps them as they are, so that training moves the features towards them.

    Returns:
        A `Classifier` without statistics whose predictor is `Linear`.

    References:
        Radford et al., `Learning Transferable Visual Models From Natural Language Supervision
        <https://arxiv.org/abs/2103.00020>`_, ICML 2021

    Example:
        >>> columns = jnp.asarray([[1.0, 2.0]]), jnp.zeros(2)
        >>> zero_shot().fit(None, columns, None)(jnp.ones((1, 1))).tolist()
        [[1.0, 2.0]]
    """
    return Classifier("zero_shot", None, _fit, True, True)


def _fit(state: Any, columns: Columns | None, key: Key | None = None) -> Linear:
    del state, key
    return Linear(*checks.columns_of(columns, "zero_shot"))


def text_columns(
    embed: Callable[[list[str]], Array],
    names: Sequence[str],
    templates: Sequence[str],
    scale: float = 1.0,
) -> Columns:
    """Make the columns of classes from phrases about them.

        kernel_c = scale m_c / |m_c|,    m_c = sum_k e_kc / |e_kc|,    bias_c = 0

    where e_kc is the vector of the k-th template with the class's name in the place of `{}`.
    Underscores in names are read as spaces.

    Args:
        embed: the function from N phrases to their vectors [N, D].
        names: of the classes, C of them.
        templates: phrases with one `{}` each.
        scale: of the logits; CLIP's is 100.

    Returns:
        Kernel float32 [D, C] and bias float32 [C].

    Raises:
        InvalidInput: no names or no templates, or vectors of another shape.

    References:
        Radford et al., `Learning Transferable Visual Models From Natural Language Supervision
        <https://arxiv.org/abs/2103.00020>`_, ICML 2021, section 3.1.4

    Example:
        >>> def embed(phrases):
        ...     return jnp.asarray([[3.0 * ("cat" in x), 4.0 * ("sea lion" in x)] for x in phrases])
        >>> kernel, bias = text_columns(embed, ["cat", "sea_lion"], ["a {}", "my {}"], 10.0)
        >>> kernel.tolist()
        [[10.0, 0.0], [0.0, 10.0]]
    """
    if not names or not templates:
        raise InvalidInput(
            f"names={list(names)}, templates={list(templates)}: needs one or more of each"
        )
    phrases = phrases_of(names, templates)
    vectors = jnp.asarray(embed(phrases)).astype(jnp.float32)
    if vectors.ndim != 2 or len(vectors) != len(phrases):
        raise InvalidInput(
            f"embed: gives {vectors.shape} for {len(phrases)} phrases; must give [N, D]"
        )
    vectors = _unit(vectors).reshape(len(names), len(templates), -1)
    kernel = scale * _unit(vectors.mean(axis=1)).T
    return kernel, jnp.zeros(len(names))


def phrases_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """List the phrases of the first class, of the second, and so on."""
    # Not `str.format`, for which other braces would mean something.
    return [
        template.replace("{}", name.replace("_", " ")) for name in names for template in templates
    ]


def _unit(vectors: Array) -> Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
