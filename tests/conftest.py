import gc
import importlib.metadata
import os
import pathlib
import tempfile

import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the suite's time is compilation, much of it of the same programs in other processes.
    _cache = tempfile.TemporaryDirectory(prefix="compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Less of it than a user's run has; JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests that as well.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # the last to know this flag
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Of the tests' own products too: on GPUs for their accuracy, and everywhere because JAX compiles
# twice what is called under two precisions.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax  # noqa: E402  reads the environment

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_num_cpu_devices", 8)

MAPPINGS = 30_000
"""Linux gives a process 65,530 mappings of memory by default, and a compiled program takes several:
a worker that kept the programs of a thousand tests would crash while it compiles the next one."""


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
