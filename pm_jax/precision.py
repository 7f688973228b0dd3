"""Full float32 in matrix products, also where the platform would round their factors."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let every matrix product and convolution of a function keep all bits of its factors.

    NVIDIA GPUs otherwise round float32 factors to TF32 (errors of about 3e-4), and TPUs to
    bfloat16. This holds for everything that the function traces, a user's model and its derivatives
    too, except for products that name a precision of their own. Products of bfloat16 factors stay
    what they are.

    Args:
        function: a function of arrays, of any shapes and dtypes.

    Returns:
        The same function in full precision.

    Example:
        >>> import jax.numpy as jnp
        >>> exact = in_full_precision(lambda x, y: x @ y)
        >>> "HIGHEST" in str(jax.make_jaxpr(exact)(jnp.eye(2), jnp.eye(2)))
        True
    """

    @functools.wraps(function)
    def exact(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return exact
