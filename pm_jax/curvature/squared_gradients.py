"""Squares of per-example gradients, summed over a batch: the work of a diagonal Fisher.

A *pass* is one backward pass of all examples at once: a cotangent for the model's outputs and a
weight per example. The empirical Fisher is one pass; the exact one has a pass per label. Sums are
`sum_passes sum_n weight_n (pulled-back cotangent_n)^2`, by one of three ways that agree:

- `by_vmap`, for any parameters: the gradient of every example is formed.
- `by_program`, for any parameters as well, in one pass: convolutions and matrix products in the
  traced program are found, and the gradients of their kernels follow from the inputs x and the
  gradients g of the outputs.
- `by_layers`, for linen layers that are matrix products (`dense_layers.DENSE`): from the inputs x
  of the layer and the gradients g of its outputs, which one ordinary backward pass gives for the
  whole batch. A layer without token axes needs no per-example gradient at all, since
  `sum_n (x_n g_n^T)^2 = (x^2)^T g^2`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import losses, trees
from pm_jax.curvature import dense_layers
from pm_jax.curvature.linear_uses import Traced
from pm_jax.curvature.taps import tapped
from pm_jax.precision import in_full_precision
from pm_jax.types import Array, Batch, InvalidInput, Key, Params, PyTree


class Passes(NamedTuple):
    """Backward passes to make.

    Attributes:
        cotangents: [P, N, ...], of the model's outputs.
        weights: float32 [P, N].
    """

    cotangents: Array
    weights: Array


OutputsFn = Callable[[Params, Batch], Array]
"""Outputs [N, ...] of a batch of N examples; a row depends on its example only."""

PassesFn = Callable[[Array, Key | None], Passes]
"""The passes for outputs [N, ...], with one key per example or none."""


class SquaredGradients(NamedTuple):
    """Sums of squared gradients over a batch.

    Attributes:
        total: sum over passes and examples, pytree of the parameters' structure.
        along: `sum_p squares_np d_p^2` of every example, [N]; `None` without a direction.
    """

    total: PyTree
    along: Array | None


def label_passes(num_samples: int | None) -> PassesFn:
    """Passes of the exact Fisher for logits [N, C]: one per class, weighted by its probability.

    With `num_samples`, that many labels are drawn with the key of every example instead. Logits
    [N, T, C] of sequences have a pass for each token's every class, or draws of all T labels: the
    tokens' labels are independent given the inputs, so that the squared gradient of their sum is
    the sum of their squared gradients on average.

    Raises:
        ValueError: num_samples below 1; when it is called, no keys to sample with, or sequences
            with too many tokens and classes.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: must be at least 1, or None for all labels")

    def passes(logits: Array, keys: Key | None) -> Passes:
        examples, *tokens, classes = logits.shape
        probabilities = jax.nn.softmax(logits)
        if num_samples is None and tokens:
            return _passes_of_tokens(probabilities)
        if num_samples is None:
            labels = jnp.broadcast_to(jnp.arange(classes)[:, None], (classes, examples))
            weights = probabilities.T
        else:
            if keys is None:
                raise ValueError("key=None: sampled labels need a PRNG key in Measure.init")
            draw = functools.partial(_draw_labels, num_samples)
            # Examples on axis 1, because passes come first in `Passes`.
            labels = jax.vmap(draw, out_axes=1)(keys, logits)
            weights = jnp.full((num_samples, examples), 1 / num_samples)
        # d log p_label / d logits.
        scores = jax.nn.one_hot(labels, classes, dtype=logits.dtype) - probabilities[None]
        return Passes(scores, weights)

    return passes


def _draw_labels(number: int, key: Key, logits: Array) -> Array:
    """Draw labels as `jax.random.categorical` does, int32 [number, ...] for logits [..., C]."""
    count = number * logits.size
    # The first numbers are the same ones however many are drawn. XLA unrolls loops of an odd length
    # for CPUs, and takes a second longer to compile them than those of a multiple of 16.
    noise = jax.random.gumbel(key, (-(-count // 16) * 16,), logits.dtype)[:count]
    return jnp.argmax(noise.reshape(number, *logits.shape) + logits[None], axis=-1)


MOST_TOKEN_PASSES = 512
"""Passes of sequences without samples; their cotangents take as many times the logits' memory."""


def _passes_of_tokens(probabilities: Array) -> Passes:
    """A pass for every class of every token, for probabilities [N, T, C]."""
    examples, tokens, classes = probabilities.shape
    if tokens * classes > MOST_TOKEN_PASSES:
        raise InvalidInput(
            f"num_samples=None: sequences of {tokens} tokens with {classes} classes would take "
            f"{tokens * classes} backward passes each; give num_samples=1 or more"
        )
    # [class, example, token, class]; the labels of one token at a time are scored.
    scores = jnp.eye(classes)[:, None, None, :] - probabilities[None]
    one_token = jnp.eye(tokens)[:, None, None, :, None]
    cotangents = (one_token * scores[None]).astype(probabilities.dtype)
    weights = jnp.transpose(probabilities, (1, 2, 0))
    return Passes(cotangents.reshape(-1, *probabilities.shape), weights.reshape(-1, examples))


@in_full_precision
def by_vmap(
    outputs_fn: OutputsFn,
    passes_fn: PassesFn,
    params: Params,
    batch: Batch,
    keys: Key | None = None,
    direction: PyTree | None = None,
) -> SquaredGradients:
    """Sum squared gradients by forming the gradient of every example, N of them in memory.

    `params` and `direction` are pytrees, `keys` [N]; float32 (float64 for float64 leaves).
    """

    def squares_of(example: Batch, key: Key | None) -> PyTree:
        # The model reads batches: this one has a single example.
        single = jax.tree.map(lambda leaf: leaf[None], example)
        outputs, pull_back = jax.vjp(lambda p: outputs_fn(p, single), params)
        passes = passes_fn(outputs, None if key is None else key[None])

        def add_pass(total, one):
            gradient = pull_back(one.cotangents)[0]
            # Cast before the square: bfloat16 would keep eight bits of it.
            squares = jax.tree.map(lambda g: g.astype(trees.compute_dtype(g)) ** 2, gradient)
            return jax.tree.map(lambda t, s: t + one.weights[0] * s, total, squares), None

        # A scan over the passes, not a vmap: one gradient per example is in memory, not one per
        # example and label.
        return jax.lax.scan(add_pass, trees.zeros_like(params), passes)[0]

    squares = jax.vmap(squares_of, (0, None if keys is None else 0))(batch, keys)
    return _summed(squares, losses.weights_of(batch), direction)


def _summed(squares: PyTree, weights: Array, direction: PyTree | None) -> SquaredGradients:
    """Sums over examples of squared gradients [N, ...]."""
    # Products with vectors, not sums over an axis, and none of it fused into the outer products:
    # XLA's CPU reductions over a leading axis are ten times slower.
    squares = jax.lax.optimization_barrier(squares)
    total = jax.tree.map(
        lambda s: jnp.tensordot(weights.astype(s.dtype), s, 1, precision="highest"), squares
    )
    if direction is None:
        return SquaredGradients(total, None)
    along = jax.tree.map(
        lambda s, d: jnp.tensordot(s, d.astype(s.dtype) ** 2, d.ndim, precision="highest"),
        squares,
        direction,
    )
    return SquaredGradients(total, functools.reduce(jnp.add, jax.tree.leaves(along)))


@in_full_precision
def by_program(
    outputs_fn: OutputsFn,
    passes_fn: PassesFn,
    params: Params,
    batch: Batch,
    keys: Key | None = None,
    direction: PyTree | None = None,
) -> SquaredGradients:
    """Sum squared gradients, those of kernels from the inputs and output gradients of layers.

    Arguments and results are those of `by_vmap`, which it is for a program without such kernels.
    The squared gradient of a kernel that one row is multiplied by is a product of squares, and is
    not formed for the examples.
    """
    traced = Traced.of(outputs_fn, params, jax.tree.map(lambda leaf: leaf[:1], batch))
    uses = dict(traced.uses.values())
    if not uses:
        return by_vmap(outputs_fn, passes_fn, params, batch, keys, direction)
    leaves, structure = jax.tree.flatten(params)
    squares, inputs = jax.vmap(
        functools.partial(_squares_of_example, traced, passes_fn, leaves),
        (0, None if keys is None else 0),
    )(batch, keys)
    directions = None if direction is None else jax.tree.leaves(direction)
    weights = losses.weights_of(batch)
    whole = {number: s for number, s in squares.items() if number not in inputs}
    along: Array | None = None
    total: dict[int, Array] = {}
    if whole:
        d_whole = None if directions is None else {number: directions[number] for number in whole}
        total, along = _summed(whole, weights, d_whole)
    for number, x in inputs.items():
        use, g = uses[number], squares[number]
        matrix = jnp.matmul((weights.astype(x.dtype)[:, None] * x).T, g, precision="highest")
        total[number] = use.from_matrix(matrix)
        if directions is not None:
            d = use.as_matrix(directions[number]).astype(x.dtype)
            value = jnp.sum(jnp.matmul(x, d**2, precision="highest") * g, axis=1)
            along = value if along is None else along + value
    of_leaves = [total[number] for number in range(len(leaves))]
    return SquaredGradients(jax.tree.unflatten(structure, of_leaves), along)


def _squares_of_example(
    traced: Traced, passes_fn: PassesFn, leaves: list[Array], example: Batch, key: Key | None
) -> tuple[dict[int, Array], dict[int, Array]]:
    """Squared gradients of one example by the numbers of the leaves, summed over the passes.

    For a kernel that one row is multiplied by, they are those of the layer's outputs [out], and its
    squared inputs [in] are the second result: the kernel's are their outer product.
    """
    uses = dict(traced.uses.values())
    single = jax.tree.map(lambda leaf: leaf[None], example)

    def run(slots: dict[int, Array], others: dict[int, Array]) -> Any:
        # The kernels are constants here, so no gradients of them are formed.
        return traced.run([others.get(n, x) for n, x in enumerate(leaves)], single, slots)

    slots = {n: jnp.zeros(use.output.shape, use.output.dtype) for n, use in uses.items()}
    others = {number: x for number, x in enumerate(leaves) if number not in uses}
    outputs, pull_back, inputs = jax.vjp(run, slots, others, has_aux=True)
    rows = {number: use.input_rows(inputs[number]) for number, use in uses.items()}

    def squares_of(cotangent: Array) -> dict[int, Array]:
        of_slots, gradients = pull_back(cotangent)
        for number, use in uses.items():
            g = use.gradient_rows(of_slots[number])
            if use.rows > 1:
                g = use.from_matrix(jnp.matmul(rows[number].T, g, precision="highest"))
            gradients = {**gradients, number: g if use.rows > 1 else g[0]}
        return {n: g.astype(trees.compute_dtype(g)) ** 2 for n, g in gradients.items()}

    passes = passes_fn(outputs, None if key is None else key[None])

    def add_pass(total, one):
        squares = squares_of(one.cotangents)
        return jax.tree.map(lambda t, s: t + one.weights[0] * s, total, squares), None

    start = trees.zeros_like(jax.eval_shape(squares_of, passes.cotangents[0]))
    squares, _ = jax.lax.scan(add_pass, start, passes)
    return squares, {number: rows[number][0] ** 2 for number, use in uses.items() if use.rows == 1}


@in_full_precision
def by_layers(
    outputs_fn: OutputsFn,
    passes_fn: PassesFn,
    params: Params,
    batch: Batch,
    keys: Key | None = None,
    direction: PyTree | None = None,
) -> SquaredGradients:
    """Sum squared gradients of linen dense layers, from their inputs and output gradients.

    `params` and `direction` are flat `{path: leaf}` of kernels and biases of `Dense`,
    `DenseGeneral` and `Einsum` layers, `keys` [N]; float32.

    Raises:
        InvalidInput: a path that is no kernel or bias of such a layer that is called exactly once.
    """
    # In order: the order of a set is another one in every process, and so would the program be.
    layers = tuple(dict.fromkeys(map(dense_layers.layer_of, params)))
    taps = tapped(outputs_fn, params, batch, layers)
    weights = losses.weights_of(batch)

    def add_pass(carry, one):
        passed = taps.pull_back(one.cotangents)
        total, along = carry
        for path in params:
            name, _, kind = path.rpartition("/")
            contraction, (inputs, gradients) = taps.contractions[name], passed[name]
            added, values = _dense_squares(
                inputs if kind == "kernel" else None,
                gradients,
                one.weights * weights,
                None if direction is None else contraction.as_matrix(direction[path], kind),
            )
            added = contraction.from_matrix(added, kind, params[path].shape)
            total = {**total, path: total[path] + added}
            # Per example and so without the examples' weights, which the mean over them applies.
            along = along + one.weights * values
        return (total, along), None

    start = (trees.zeros_like(params), jnp.zeros(weights.shape, jnp.float32))
    (total, along), _ = jax.lax.scan(add_pass, start, passes_fn(taps.outputs, keys))
    return SquaredGradients(total, None if direction is None else along)


def _dense_squares(inputs, gradients, weights, direction):
    """Weighted sum of one leaf's squared gradients, and their values along d^2 per example.

    `inputs` [N, tokens, in] for a kernel and `None` for a bias, `gradients` [N, tokens, out]; the
    kernel is a matrix here, and the bias a vector.
    """
    examples = gradients.shape[0]
    g = gradients.astype(jnp.float32)
    # The factors whose product is the squared gradient of an example n, by their axes.
    if inputs is None:
        axes, squares = "no", [jnp.sum(g, axis=1) ** 2]
    elif g.shape[1] > 1:
        # The square of a sum over tokens t is no product of squares: gradients are formed. Factors
        # in bfloat16 stay, as their products are exact in float32 and fast on accelerators.
        x, g = (v if v.dtype.itemsize < 4 else v.astype(jnp.float32) for v in (inputs, gradients))
        of_example = jnp.einsum(
            "nti,nto->nio", x, g, precision="highest", preferred_element_type=jnp.float32
        )
        axes, squares = "nio", [of_example**2]
    else:
        x = inputs.astype(jnp.float32).reshape(examples, -1)
        axes, squares = "ni,no", [x**2, g[:, 0] ** 2]
    leaf = "o" if inputs is None else "io"
    total = jnp.einsum(f"n,{axes}->{leaf}", weights, *squares, precision="highest")
    if direction is None:
        return total, 0.0
    return total, jnp.einsum(f"{axes},{leaf}->n", *squares, direction**2, precision="highest")
