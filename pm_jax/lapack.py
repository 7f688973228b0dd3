"""LAPACK on one thread: more cost more than they bring for matrices of the size of a model's."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let LAPACK compute on one thread within a block, in which its work must also end.

    JAX decomposes matrices on a CPU by SciPy's OpenBLAS, whose threads wait for one another by
    spinning. With other jobs on two cores, the singular values of a 768 x 768 matrix took 0.3 s on
    one thread and 5 to 9 s on two. On one thread the numbers do not depend on the number of cores
    either. Matrix products, which are XLA's own, keep their threads.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> with one_thread():
        ...     values = jax.block_until_ready(jnp.linalg.svd(jnp.eye(2))[1])
        >>> values.tolist()
        [1.0, 1.0]
    """
    # Loads the library, which cannot be limited before.
    import scipy.linalg  # noqa: F401
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
