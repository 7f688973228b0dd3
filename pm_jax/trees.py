"""Pytrees of parameters: paths, selection, inner products and interpolation.

Arithmetic is in float32 (float64 where the leaves are float64), leaf by leaf: no leaf is
reshaped or joined with another, so sharded leaves stay sharded.

A model may have leaves that are not floating point: steps, PRNG keys, ids, flags, text. There is no
arithmetic for them: a displacement has `None` in their places, and a function whose result is a
model passes on the leaves of the model that it says.
"""

import difflib
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.types import Array, InvalidInput, Key, Params, PyTree


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


def is_floating(leaf: Any) -> bool:
    """True for real floating-point numbers of any precision, which are what merges.

    Example:
        >>> is_floating(jnp.ones(2, jnp.bfloat16)), is_floating(0.5)
        (True, True)
        >>> is_floating(jnp.arange(2)), is_floating(jax.random.key(0)), is_floating("gelu")
        (False, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else _is_type_of(jnp.floating, dtype)


@functools.lru_cache(maxsize=256)
def _is_type_of(numbers: Any, dtype: Any) -> bool:
    """True for a type of such numbers; remembered, as checks of models ask it for every leaf."""
    try:
        return bool(jnp.issubdtype(dtype, numbers))
    except TypeError:  # another library's type
        return False


def floating(tree: PyTree) -> PyTree:
    """The tree with `None` in place of every leaf that is not floating point.

    `None` is a node without leaves: `jax.tree.map` passes over it, and boxes around a leaf stay.

    Raises:
        InvalidInput: a leaf is complex.

    Example:
        >>> floating({"w": 0.5, "step": 7})
        {'step': None, 'w': 0.5}
    """
    leaves, structure = jax.tree.flatten(tree)
    if any(map(_is_complex, leaves)):
        path, leaf = next(item for item in leaves_by_path(tree).items() if _is_complex(item[1]))
        # Signs, magnitudes and squares of entries, which rules and curvatures are made of, would
        # each need a meaning of its own.
        raise InvalidInput(
            f"{path or 'leaf'}={described(leaf)}: complex leaves do not merge; hold the real and "
            "the imaginary part as two leaves"
        )
    return jax.tree.unflatten(structure, [x if is_floating(x) else None for x in leaves])


def with_floating(tree: PyTree, floating_tree: PyTree) -> PyTree:
    """The tree with its floating-point leaves replaced, and all other leaves as they are.

    Args:
        tree: pytree with leaves of any type.
        floating_tree: of the structure of `floating(tree)`.

    Raises:
        InvalidInput: the structures differ.

    Example:
        >>> with_floating({"w": 0.5, "step": 7}, {"w": 0.25, "step": None})
        {'step': 7, 'w': 0.25}
    """
    leaves, structure = jax.tree.flatten(tree)
    kept = floating(tree)
    if not same_structure(kept, floating_tree):
        check_alike(floating_tree, kept, ("floating_tree", "tree"))
    new = iter(jax.tree.leaves(floating_tree))
    return jax.tree.unflatten(structure, [next(new) if is_floating(x) else x for x in leaves])


def _is_complex(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, complex) if dtype is None else _is_type_of(jnp.complexfloating, dtype)


def described(value: Any) -> str:
    """An array's type and shape, "float32[2, 3]", or the name of another value's type.

    Example:
        >>> described(jnp.ones((2, 3))), described({"w": 0.5}), described(None)
        ('float32[2, 3]', 'dict', 'None')
    """
    if value is None:
        return "None"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not jax.tree_util.all_leaves([value]) or not isinstance(shape, tuple) or dtype is None:
        return type(value).__name__
    return f"{dtype}{list(shape)}"


def check_alike(left: PyTree, right: PyTree, names: tuple[str, str]) -> None:
    """Check that two trees have the same structure, and floating-point leaves of the same shapes.

    Leaves that are not floating point may differ in type and shape, and `None` may stand for them.

    Args:
        left: pytree of arrays.
        right: the pytree that it is compared with.
        names: what a message calls the two.

    Raises:
        InvalidInput: they differ; the message names the first place where they do.

    Example:
        >>> check_alike({"w": jnp.ones(3), "step": 1}, {"w": jnp.ones(3), "step": None}, ("a", "b"))
        >>> check_alike({"w": jnp.ones(3)}, {"w": jnp.ones(2)}, ("trained", "previous"))
        Traceback (most recent call last):
        pm_jax.types.InvalidInput: trained=float32[3] at w: previous is float32[2] there; ...
    """
    # This quick look at both trees is enough for most that are alike.
    if same_structure(left, right):
        if all(map(_leaves_alike, jax.tree.leaves(left), jax.tree.leaves(right))):
            return
    if difference := first_difference(left, right, _leaves_alike):
        raise InvalidInput(
            f"{difference.written(*names)}; give trees of one structure and the same shapes"
        )


def _leaves_alike(left: Any, right: Any) -> bool:
    kinds = is_floating(left), is_floating(right)
    return kinds == (False, False) or (all(kinds) and np.shape(left) == np.shape(right))


class Difference(NamedTuple):
    """The first place where two trees differ.

    Attributes:
        path: "a/b/c", empty for the whole tree.
        left: what the left tree is there; `None` where it has nothing of the name.
        right: likewise.
    """

    path: str
    left: str | None
    right: str | None

    def written(self, left: str, right: str) -> str:
        """The beginning of a message about the two trees, by their names."""
        if self.left is None:
            return f"{left}: lacks {self.path}, which {right} has"
        if self.right is None:
            return f"{left}: has {self.path}, which {right} lacks"
        place, there = (f" at {self.path}", " there") if self.path else ("", "")
        if self.left == self.right:
            return f"{left}={self.left}{place}: its metadata are not those of {right}{there}"
        return f"{left}={self.left}{place}: {right} is {self.right}{there}"


def first_difference(
    left: PyTree, right: PyTree, leaves_alike: Callable[[Any, Any], bool], path: tuple = ()
) -> Difference | None:
    """The first place where two trees differ in structure, or in leaves that are not alike.

    Args:
        left: pytree.
        right: pytree.
        leaves_alike: whether two leaves count as the same; `None` is given to it like a leaf.
        path: key path of both in the trees that they are from.
    """
    leaf = [x is None or jax.tree_util.all_leaves([x]) for x in (left, right)]
    if all(leaf) and leaves_alike(left, right):
        return None
    # Two containers of one type: look inside.
    if any(leaf) or type(left) is not type(right):
        return Difference(path_name(path), described(left), described(right))
    ours, theirs = _children(left), _children(right)
    for key in {**ours, **theirs}:
        if key not in ours:
            return Difference(path_name((*path, key)), None, described(theirs[key]))
        if key not in theirs:
            return Difference(path_name((*path, key)), described(ours[key]), None)
        place = (*path, key)
        if difference := first_difference(ours[key], theirs[key], leaves_alike, place):
            return difference
    # With equal children, the nodes themselves differ: in the names of their axes, for example.
    bare = [jax.tree.map(lambda _: None, x) for x in (left, right)]
    if not same_structure(*bare):
        return Difference(path_name(path), described(left), described(right))
    return None


def same_structure(left: PyTree, right: PyTree) -> bool:
    """True for trees of the same containers with leaves in the same places, of whatever type."""
    ours: Any = jax.tree.structure(left)
    return bool(ours == jax.tree.structure(right))


def _children(node: PyTree) -> dict[Any, PyTree]:
    """The children of a container by their keys; `None` is one of them."""
    # Everything but the node itself counts as a leaf, so that one level is flattened.
    pairs = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {path[0]: child for path, child in pairs}


def compute_dtype(*leaves: Array) -> np.dtype:
    """Type in which leaves are computed: float32, or float64 if one of them is float64."""
    # A shape has a type and no value; asarray turns NumPy's float64 into what JAX is set to.
    dtypes = (
        leaf.dtype if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf).dtype
        for leaf in leaves
        if is_floating(leaf)
    )
    # Types below 16 bits have no common type with float32 in JAX; they are computed in it.
    wide = [dtype for dtype in dtypes if dtype.itemsize > 1]
    return np.dtype(jnp.result_type(jnp.float32, *wide))


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros in the shape of a tree, in the type in which its leaves are computed.

    There is `None` in place of leaves that are not floating point.
    """
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, compute_dtype(leaf)), floating(tree))


def inner(left: PyTree, right: PyTree, weight: PyTree | None = None) -> Array:
    """Inner product over all floating-point leaves, `sum_p weight_p left_p right_p`.

    Args:
        left: pytree of arrays.
        right: pytree of the same structure and shapes.
        weight: likewise, or `None` for ones.

    Returns:
        Scalar, float32 (float64 for float64 leaves).

    Raises:
        InvalidInput: structures or shapes differ, or no leaf is floating point.

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

    check_alike(right, left, ("right", "left"))
    factors = [left, right]
    if weight is not None:
        check_alike(weight, left, ("weight", "left"))
        factors = [weight, left, right]
    products = jax.tree.leaves(jax.tree.map(leaf_product, *map(floating, factors)))
    if not products and (leaves := jax.tree.leaves(left)):
        raise InvalidInput(
            f"left={described(leaves[0])}: has no floating-point leaf; convert the numbers"
        )
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
        previous: pytree of arrays, the model at `alpha = 0`.
        new: the model at `alpha = 1`, of the same structure and shapes.
        alpha: scalar; any real number, 0 to 1 for a convex combination.

    Returns:
        The interpolated model, computed in float32 and cast once to the type of the new one's leaf.
        Leaves that are not floating point are the new model's.

    Raises:
        InvalidInput: structures or shapes differ.

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

    check_alike(new, previous, ("new", "previous"))
    return with_floating(new, jax.tree.map(leaf_lerp, floating(previous), floating(new)))


def leaf_keys(key: Key, tree: PyTree) -> PyTree:
    """A tree of PRNG keys, one per leaf, which do not depend on the order or number of leaves.

    Example:
        >>> first = leaf_keys(jax.random.key(0), {"a": 1, "b": 2})
        >>> second = leaf_keys(jax.random.key(0), {"b": 2, "c": 3})
        >>> bool(first["b"] == second["b"])
        True
    """
    # A checksum, because Python's `hash` of a string changes from process to process.
    numbers = [zlib.crc32(path.encode()) for path in leaves_by_path(tree)]
    structure = jax.tree.structure(tree)
    if not numbers:
        return tree
    # All at once: a program with as many foldings as a model has leaves compiles for a minute.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(numbers, np.uint32))
    return jax.tree.unflatten(structure, list(keys))


def gaussian_like(key: Key, tree: PyTree) -> PyTree:
    """Standard normal noise in the shape of a tree, float32 (float64 for float64 leaves).

    There is `None` in place of leaves that are not floating point.
    """
    tree = floating(tree)
    return jax.tree.map(
        lambda k, leaf: jax.random.normal(k, jnp.shape(leaf), compute_dtype(leaf)),
        leaf_keys(key, tree),
        tree,
    )
