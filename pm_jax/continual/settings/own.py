"""The model and the tasks of a run: those that its settings name, or the caller's own."""

import functools
from collections.abc import Sequence
from typing import Any

from pm_jax.continual.settings import conditions
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.factories import is_reference
from pm_jax.data import own
from pm_jax.data.stream import TaskStream
from pm_jax.integrations.wrap import as_model
from pm_jax.models.model import Model
from pm_jax.types import InvalidInput


def model_of(config: Config, num_classes: int, given: Any = None) -> Model:
    """Return the model of a run: the one given, or the one that the settings name.

    Raises:
        InvalidInput: it is no model, or settings that it does not go with.
    """
    if given is not None:
        model = as_model(given)
        conditions.check_own_model(config, type(given).__name__)
    elif is_reference(config.model):
        model = _made_once(config.model, config.model_settings, num_classes)
    else:
        # Not kept: a subclass of Config may make a network by other means than its settings.
        model = as_model(config.network(num_classes))
    for each in config.chosen_classifiers:
        if each.classifier.statistics and not hasattr(model, "features"):
            raise InvalidInput(
                f"classifiers={each.label}: the model has no function features; use trained"
            )
    return model


@functools.lru_cache(maxsize=8)
def _made_once(reference: str, settings: str, num_classes: int) -> Model:
    """Make a model by its factory; seeds get the same object, and so the same programs."""
    made = Config(model=reference, model_settings=settings).network(num_classes)
    try:
        return as_model(made)
    except InvalidInput as error:
        what = str(error).partition("=")[2]
        raise InvalidInput(f"model={reference}: returned {what}") from None


def stream_of(
    config: Config, seed: int, given: TaskStream | Sequence[Any] | None = None
) -> TaskStream:
    """Return the tasks of a run: those given, or those that the settings name.

    Raises:
        InvalidInput: they cannot be formed, or do not agree with the settings.
    """
    if given is None:
        return config.task_stream(seed)
    if config.class_subset:
        raise InvalidInput(
            f"class_subset={config.class_subset}: has no effect on a stream that is given; leave "
            "the classes out of it, and use 0"
        )
    if isinstance(given, TaskStream):
        own.check_agrees(given, config.scenario, config.num_tasks)
        return config.with_class_names(given)
    return config.stream_of_data(given, seed, "stream")
