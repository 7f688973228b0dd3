"""The few functions that training, measuring and merging ask of a model.

Everything in `pm_jax.continual` sees a model through the Protocol `Model`. A linen module becomes
one by `pm_jax.integrations.linen.model`, an nnx module by `pm_jax.integrations.nnx_model.model`;
the models of this package are linen modules and take the same way.

A `Model` may have more methods, which callers look for by name:

    features(params, state, inputs) -> [N, D]
        the inputs of the classifier, for `--classifiers=discriminant` and its like;
    logits_and_features(params, state, inputs) -> ([N, C], [N, D])
        both in one pass, which saves the other where several classifiers are evaluated;
    batch_statistics(params, state, inputs, key) -> state
        the state in which running averages are those of this one batch, for
        `--model_state=measured`.

Programs are compiled once for each model and remembered by it, so a `Model` is hashable: two equal
models share their programs, and two different ones never do.
"""

import re
from collections.abc import Hashable
from typing import Protocol

from pm_jax.types import Array, Key, Params, PyTree


class Model(Hashable, Protocol):
    """A classifier as a few pure functions."""

    @property
    def classifier(self) -> str:
        """Path of the module whose leaves are the classifier, such as "head".

        The last axis of each of its leaves is the classes.
        """

    def init(self, key: Key, inputs: Array, /) -> tuple[Params, PyTree]:
        """Make the model's parameters and its state.

        Args:
            key: PRNG key.
            inputs: some inputs [N, ...], of which only shape and type matter.

        Returns:
            The parameters, a pytree of arrays that train and merge; and the state, a pytree of
            everything else that the model reads, such as batch statistics. A model without state
            has an empty one, `{}`.
        """

    def apply(
        self,
        params: Params,
        state: PyTree,
        inputs: Array,
        /,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, PyTree]:
        """Compute logits [N, C], and the state afterwards.

        Args:
            params: parameters, of the structure that `init` makes.
            state: state, likewise.
            inputs: [N, ...]; images of type uint8 come scaled to -1..1, other types as they are.
            key: PRNG key of this call, for dropout; given while training only.
            train: whether the model trains. Without it each row of the logits depends on its own
                input only, nothing is random, and the state that is returned is not used.
        """


def classifier_pattern(model: Model) -> str:
    """Return the regular expression that matches the paths of a model's classifier."""
    return f"{re.escape(model.classifier)}/.*" if model.classifier else ".*"
