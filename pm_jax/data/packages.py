"""Packages that only some data sets need; `pip install 'pm_jax[data]'` brings them."""

import contextlib
from collections.abc import Iterator

from pm_jax.types import InvalidInput


@contextlib.contextmanager
def needed_for(argument: str) -> Iterator[None]:
    """Say which argument needs the package whose import fails within a block.

    Raises:
        InvalidInput: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"{argument}: needs {error.name}, which is not installed; pip install 'pm_jax[data]'"
        ) from None
