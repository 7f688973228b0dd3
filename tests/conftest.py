import gc
import sys
import warnings

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def failed_restores():
    """For tests in which Orbax fails to restore: it drops coroutines that it never awaited."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        gc.collect()
        sys.unraisablehook = hook


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
