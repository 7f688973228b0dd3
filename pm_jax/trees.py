"""Pytrees of parameters: paths, selection, inner products and interpolation.

Arithmetic is in float32 (float64 where the leaves are float64), leaf by leaf: no leaf is
reshaped or joined with another, so sharded leaves stay sharded.
"""

import difflib
import re
import zlib
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.types import Array, Key, Params, PyTree


def path_name(path: tuple) -> str:
    """Name of a leaf, "a/b/c", from its `jax.tree_util` key path.

    Example:
        >>> (path, _), = jax.tree_util.tree_leaves_with_path({"layer": {"kernel": 1.0}})
        >>> path_name(path)
        'layer/kernel'
    """
    # `flax.nnx` variables add the attribute `value`, which is no part of a leaf's name.
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> dict[str, Array]:
    """All leaves of a tree in a flat dict `{"a/b/c": leaf}`, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def match_paths(tree: PyTree, pattern: str) -> tuple[str, ...]:
    """Paths of the leaves whose whole "a/b/c" matches a regular expression, in the tree's order.

    Raises:
        ValueError: no regular expression, or no match; the message then lists the nearest paths.

    Example:
        >>> match_paths({"key": {"kernel": 0, "bias": 0}, "mlp": {"kernel": 0}}, ".*/kernel")
        ('key/kernel', 'mlp/kernel')
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: not a regular expression ({error})") from None
    paths = list(leaves_by_path(tree))
    matched = tuple(path for path in paths if compiled.fullmatch(path))
    if not matched:
        # Paths that contain a match come from a pattern that forgot the rest of the path.
        containing = [path for path in paths if compiled.search(path)]
        near = containing[:3] or difflib.get_close_matches(pattern, paths, 3, 0.0) or paths[:3]
        raise ValueError(
            f"pattern={pattern!r}: must match the whole path of a leaf and matches none; "
            f"the nearest are {', '.join(near)}"
        )
    return matched


def select(tree: PyTree, paths: tuple[str, ...] | str) -> dict[str, Array]:
    """Some leaves of a tree as `{path: leaf}`, by their paths or by a pattern of `match_paths`.

    Raises:
        ValueError: a path that does not exist, or a pattern that matches nothing.

    Example:
        >>> select({"a": {"b": 1, "c": 2}}, ".*/c")
        {'a/c': 2}
    """
    if isinstance(paths, str):
        paths = match_paths(tree, paths)
    leaves = leaves_by_path(tree)
    if missing := [path for path in paths if path not in leaves]:
        raise ValueError(f"paths={missing}: not in the tree, which has {', '.join(leaves)}")
    return {path: leaves[path] for path in paths}


def replace(tree: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """The tree with the leaves of `{path: new leaf}` replaced: the way back from `select`.

    Raises:
        ValueError: a path that the tree does not have.

    Example:
        >>> replace({"a": {"b": 1, "c": 2}}, {"a/c": 5})
        {'a': {'b': 1, 'c': 5}}
    """
    # Raises for a path that the tree does not have, which the map below would pass over.
    select(tree, tuple(leaves))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(path_name(path), leaf), tree
    )


def compute_dtype(*leaves: Array) -> np.dtype:
    """Type in which leaves are computed: float32, or float64 if one of them is float64."""
    # A shape has a type and no value; asarray turns NumPy's float64 into what JAX is set to.
    dtypes = (
        leaf.dtype if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf).dtype
        for leaf in leaves
    )
    return np.dtype(jnp.result_type(jnp.float32, *dtypes))


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros in the shape of a tree, in the type in which its leaves are computed."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, compute_dtype(leaf)), tree)


def inner(left: PyTree, right: PyTree, weight: PyTree | None = None) -> Array:
    """Inner product over all leaves, `sum_p weight_p left_p right_p`.

    Args:
        left: pytree of arrays.
        right: pytree of the same structure and shapes.
        weight: likewise, or `None` for ones.

    Returns:
        Scalar, float32 (float64 for float64 leaves).

    Raises:
        ValueError: the structures differ.

    Example:
        >>> float(inner({"a": jnp.arange(3.0)}, {"a": jnp.ones(3)}))
        3.0
    """

    def leaf_product(*factors):
        dtype = compute_dtype(*factors)
        # Cast before the product: bfloat16 would round every term of the sum.
        product = jnp.asarray(factors[0], dtype)
        for factor in factors[1:]:
            product = product * jnp.asarray(factor, dtype)
        return jnp.sum(product)

    factors = (left, right) if weight is None else (weight, left, right)
    products = jax.tree.leaves(jax.tree.map(leaf_product, *factors))
    return sum(products, start=jnp.zeros((), compute_dtype(*products)))


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, scalar, with gradient 0 (not NaN) at the origin."""
    return safe_sqrt(inner(tree, tree))


def safe_sqrt(value: Array) -> Array:
    """Square root of a non-negative scalar, with gradient 0 (not infinity) at 0.

    Example:
        >>> float(jax.grad(safe_sqrt)(0.0))
        0.0
    """
    positive = value > 0
    # Two `where`: the gradient of the branch that is not chosen is 0 times infinity without one.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, value, 1.0)), 0.0)


def lerp(previous: Params, new: Params, alpha: Array | float) -> Params:
    """Interpolation that is exact at both ends and for equal models.

    `where(alpha < 1/2, previous + alpha d, new - (1 - alpha) d)` with `d = new - previous`:
    the two usual forms each miss one of these identities in floating point.

    Args:
        previous: pytree of floating-point arrays, the model at `alpha = 0`.
        new: the model at `alpha = 1`, of the same structure and shapes.
        alpha: scalar; any real number, 0 to 1 for a convex combination.

    Returns:
        The interpolated model, computed in float32 and cast once to the leaf's own type.

    Raises:
        AssertionError: structures or shapes differ.

    Example:
        >>> lerp(jnp.asarray([0.0, 1.0]), jnp.asarray([4.0, 1.0]), 0.25).tolist()
        [1.0, 1.0]
    """

    def leaf_lerp(low, high):
        dtype = compute_dtype(low, high)
        start, end, a = (jnp.asarray(x, dtype) for x in (low, high, alpha))
        step = end - start
        mixed = jnp.where(a < 0.5, start + a * step, end - (1 - a) * step)
        return mixed.astype(jnp.asarray(high).dtype)

    chex.assert_trees_all_equal_shapes(previous, new)
    return jax.tree.map(leaf_lerp, previous, new)


def leaf_keys(key: Key, tree: PyTree) -> PyTree:
    """A tree of PRNG keys, one per leaf, which do not depend on the order or number of leaves.

    Example:
        >>> first = leaf_keys(jax.random.key(0), {"a": 1, "b": 2})
        >>> second = leaf_keys(jax.random.key(0), {"b": 2, "c": 3})
        >>> bool(first["b"] == second["b"])
        True
    """
    # A checksum, because Python's `hash` of a string changes from process to process.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), tree
    )


def gaussian_like(key: Key, tree: PyTree) -> PyTree:
    """Standard normal noise in the shape of a tree, float32 (float64 for float64 leaves)."""
    return jax.tree.map(
        lambda k, leaf: jax.random.normal(k, jnp.shape(leaf), compute_dtype(leaf)),
        leaf_keys(key, tree),
        tree,
    )
