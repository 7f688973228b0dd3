"""Flax linen modules in pm_jax: any of them as a `Model`, and batch statistics measured anew."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.curvature import dense_layers
from pm_jax.types import Array, Batch, InvalidInput, Key, Params, PyTree

TRUE_IN_TRAINING = ("train", "training", "is_training")
"""Arguments of `__call__` that are true while a linen module trains."""
FALSE_IN_TRAINING = ("deterministic", "use_running_average")
"""Arguments of `__call__` that are false while a linen module trains."""
STATISTICS = "batch_stats"
"""The collection of the running averages of `nn.BatchNorm`."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinenModel:
    """A linen module as a `pm_jax.models.Model`; made by `model`.

    Attributes:
        module: the module, whose first argument is the inputs.
        classifier: path of the classifier's module.
        flags: value of each argument that tells the module that it trains.
    """

    module: nn.Module
    classifier: str = "head"
    flags: tuple[tuple[str, bool], ...] = ()

    def init(self, key: Key, inputs: Array) -> tuple[Params, PyTree]:
        """Initialise the module; all collections but the parameters are the state."""
        variables = self.module.init(key, inputs, **self._flags(train=False))
        state = {name: x for name, x in variables.items() if name != "params"}
        if state:
            # A collection that another call changes in form, such as sown losses, is an output.
            after = jax.eval_shape(self._train, key, variables["params"], state, inputs)[1]
            state = {name: x for name, x in state.items() if _form(x) == _form(after[name])}
        return variables.get("params", {}), state

    def apply(
        self,
        params: Params,
        state: PyTree,
        inputs: Array,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, PyTree]:
        """Apply the module; while it trains, its state moves."""
        if train:
            return self._train(key, params, state, inputs)
        variables = {"params": params, **(state or {})}
        logits: Any = self.module.apply(variables, inputs, **self._flags(train=False))
        return logits, state

    def features(self, params: Params, state: PyTree, inputs: Array) -> Array:
        """Return the inputs [N, D] of the classifier, which must be a Dense layer."""
        return self.logits_and_features(params, state, inputs)[1]

    def logits_and_features(
        self, params: Params, state: PyTree, inputs: Array
    ) -> tuple[Array, Array]:
        """Return the logits [N, C] and the features of one pass."""
        logits: list[Array] = []

        def run() -> None:
            logits.append(self.apply(params, state, inputs)[0])

        features = dense_layers.inputs_of(run, self.classifier)
        return logits[0], features

    def batch_statistics(self, params: Params, state: PyTree, inputs: Array, key: Key) -> PyTree:
        """Return the state with the statistics of one batch in the place of running averages.

        Raises:
            InvalidInput: the state has running averages of another layer than `nn.BatchNorm`.
        """

        def apply_fn(variables: PyTree, inputs: Array) -> tuple[Array, PyTree]:
            collections = {name: x for name, x in variables.items() if name != "params"}
            return self._train(key, variables["params"], collections, inputs)

        if STATISTICS not in state:
            return state
        measured = _statistics_of_batch(apply_fn, {"params": params, **state}, inputs)
        return {**state, STATISTICS: measured}

    def _train(
        self, key: Key | None, params: Params, state: PyTree, inputs: Array
    ) -> tuple[Array, PyTree]:
        state = state or {}
        # Linen draws from the stream "params" for names of streams that it is not given.
        rngs = None if key is None else {"params": key, "dropout": jax.random.fold_in(key, 1)}
        variables = {"params": params, **state}
        flags = self._flags(train=True)
        if not state:
            outputs: Any = self.module.apply(variables, inputs, rngs=rngs, **flags)
            return outputs, state
        logits, changed = self.module.apply(
            variables, inputs, rngs=rngs, mutable=list(state), **flags
        )
        return logits, {**state, **changed}

    def _flags(self, *, train: bool) -> dict[str, Any]:
        return {name: value == train for name, value in self.flags}

    def _identity(self) -> Any:
        try:
            hash(self.module)
        except TypeError:
            # A field holds an array or another thing without a hash: such a module is only itself.
            return id(self.module), self.classifier, self.flags
        return self.module, self.classifier, self.flags

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinenModel) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def model(
    module: nn.Module, classifier: str = "head", train_argument: str | None = None
) -> LinenModel:
    """Make a `pm_jax.models.Model` of a linen module.

    The parameters are the module's collection `params`. All its other collections, such as
    `batch_stats`, are the model's state, which moves while the model trains. Dropout draws from a
    key that training gives. Equal modules make equal models.

    Args:
        module: a module whose first argument is the inputs [N, ...] and whose result is logits
            [N, C].
        classifier: path of the module of the classifier, "a/b" for one within another.
        train_argument: name of the argument of `__call__` that says whether the module trains;
            `None` to look for `train`, `training`, `is_training`, `deterministic` and
            `use_running_average`. The last two are False in training, any other name is True.

    Raises:
        InvalidInput: no linen module, or one without the argument.

    Example:
        >>> class Network(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train=False):
        ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        ...         return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=not train)(x))
        >>> network = model(Network())
        >>> params, state = network.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> sorted(params), sorted(state)
        (['BatchNorm_0', 'Dense_0', 'head'], ['batch_stats'])
    """
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"module={type(module).__name__}: must be an instance of a linen module")
    names = inspect.signature(type(module).__call__).parameters
    if train_argument is None:
        found = [name for name in (*TRUE_IN_TRAINING, *FALSE_IN_TRAINING) if name in names]
    elif train_argument in names:
        found = [train_argument]
    else:
        raise InvalidInput(
            f"train_argument={train_argument}: {type(module).__name__}.__call__ has no such "
            f"argument; it has {', '.join(names)}"
        )
    flags = tuple((name, name not in FALSE_IN_TRAINING) for name in found)
    return LinenModel(module, classifier.strip("/"), flags)


def recalibrate_batch_statistics(
    apply_fn: Callable[[PyTree, Any], tuple[Any, Mapping[str, PyTree]]],
    variables: Mapping[str, PyTree],
    batches: Iterable[Any],
) -> dict[str, PyTree]:
    """Measure the statistics of batch normalisation anew, as for a model that was merged.

    The running averages of a merged model are those of no model: they were collected while another
    one trained. With B batches of N_b examples, this function replaces them by

        mean = sum_b N_b mean_b / sum_b N_b,    var = sum_b N_b var_b / sum_b N_b

    where mean_b and var_b are what `nn.BatchNorm` computes of batch b while it trains, with all
    layers before it normalised by the same batch. Every example counts the same, whatever the
    module's momentum and the order of the batches. A layer that a pass calls several times gets
    the mean over its calls; one that uses its running averages while it trains keeps them.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> (outputs, changed collections)`, the module in
            training mode with `mutable=["batch_stats"]`.
        variables: the collections `params` (of the merged model), `batch_stats` and others.
        batches: inputs [N, ...], or tuples that begin with them, or `Batch`es, of which examples of
            weight 0 do not count. Batches of the size of training give the statistics of training.

    Returns:
        The variables, with new `batch_stats`.

    Raises:
        InvalidInput: no `batch_stats`, no batches, or statistics of a layer that is no
            `nn.BatchNorm`.

    References:
        Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization
        <https://arxiv.org/abs/1803.05407>`_, 2018, section 3.2

    Example:
        >>> norm = nn.BatchNorm(use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 1)))
        >>> def apply_fn(variables, inputs):
        ...     return norm.apply(variables, inputs, mutable=["batch_stats"])
        >>> batches = [jnp.asarray([[1.0], [3.0]]), jnp.asarray([[5.0]])]
        >>> new = recalibrate_batch_statistics(apply_fn, variables, batches)
        >>> round(float(new["batch_stats"]["mean"][0]), 5)
        3.0
    """
    if STATISTICS not in variables:
        raise InvalidInput(
            f"variables: have no collection {STATISTICS!r}; they have {', '.join(variables)}"
        )
    mean, examples = variables[STATISTICS], 0
    for batch in batches:
        inputs = _inputs_of(batch)
        count = len(jax.tree.leaves(inputs)[0])
        examples += count
        mean = _moved_mean(apply_fn, dict(variables), mean, inputs, count / examples)
    if not examples:
        raise InvalidInput("batches: there are none; a generator can be gone through only once")
    return {**variables, STATISTICS: mean}


@functools.partial(jax.jit, static_argnums=0)
def _moved_mean(
    apply_fn: Callable[..., Any], variables: PyTree, mean: PyTree, inputs: Any, share: Array
) -> PyTree:
    """Move the mean over earlier examples towards a batch whose share of all examples is given."""
    return running_mean(mean, _statistics_of_batch(apply_fn, variables, inputs), share)


def running_mean(mean: PyTree, value: PyTree, share: Array | float) -> PyTree:
    """Move a mean towards a newer value by its share of the weight; whole numbers stay."""

    def moved(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return old
        # A `where`, so that the first value replaces whatever was there, NaN included.
        return jnp.where(jnp.asarray(share) >= 1, new, old + (new - old) * share).astype(old.dtype)

    return jax.tree.map(moved, mean, value)


def _statistics_of_batch(
    apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Any
) -> PyTree:
    """Return `batch_stats` in which each batch norm has the statistics of this batch alone."""
    seen: set[tuple[str, ...]] = set()
    # Values that an earlier call of the same layer left, with the number of its calls. They are
    # told by identity: `nn.scan` traces a layer several times that it calls once.
    left: list[tuple[Array, int]] = []

    def interceptor(next_fn, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
            return next_fn(*args, **kwargs)
        names = ("mean", "var")
        before: dict[str, Any] = {name: module.get_variable(STATISTICS, name) for name in names}
        zeros = {name: jnp.zeros_like(value) for name, value in before.items()}
        for name, zero in zeros.items():
            module.put_variable(STATISTICS, name, zero)
        with _without_unbound_axis(module):
            output = next_fn(*args, **kwargs)
        seen.add(module.path)
        earlier = next((calls for value, calls in left if value is before["mean"]), 0)
        for name, zero in zeros.items():
            value: Any = module.get_variable(STATISTICS, name)
            if value is zero:
                # The layer uses its running averages, and has not moved them.
                module.put_variable(STATISTICS, name, before[name])
                continue
            # From zero, a step of the running average is (1 - momentum) times the batch's own.
            value = value / (1 - module.momentum)
            mean = value if not earlier else before[name] + (value - before[name]) / (earlier + 1)
            module.put_variable(STATISTICS, name, mean)
            left.append((mean, earlier + 1))
        return output

    with nn.intercept_methods(interceptor):
        _, changed = apply_fn(variables, inputs)
    result = changed[STATISTICS]
    for path in trees.leaves_by_path(result):
        if tuple(path.split("/")[:-1]) not in seen:
            raise InvalidInput(
                f"{STATISTICS}={path}: belongs to no nn.BatchNorm that the model calls, so it "
                "cannot be measured anew; interpolate it, or keep the trained model's"
            )
    return result


@contextlib.contextmanager
def _without_unbound_axis(module: nn.BatchNorm) -> Iterator[None]:
    """Let a layer average over its batch alone where its `axis_name` is not bound.

    The axis is that of the parallel training (`jax.pmap`), which a single call is not part of.
    """
    axis = module.axis_name
    try:
        if axis is not None:
            jax.lax.axis_index(axis)
    except NameError:
        # A module does not allow to set its fields, and a clone has variables of its own.
        object.__setattr__(module, "axis_name", None)
    try:
        yield
    finally:
        object.__setattr__(module, "axis_name", axis)


def _inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch, without examples of weight 0."""
    if not isinstance(batch, tuple):
        return batch
    if isinstance(batch, Batch) and batch.weights is not None:
        counts = np.asarray(batch.weights) > 0
        return jax.tree.map(lambda leaf: leaf[counts], batch.inputs)
    return batch[0]


def _form(tree: PyTree) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
