"""Flax nnx modules as a `pm_jax.models.Model`, for `Learner` and the binaries."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from pm_jax.integrations.linen import FALSE_IN_TRAINING, TRUE_IN_TRAINING
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree


@dataclasses.dataclass(frozen=True)
class NNXModel:
    """An nnx module as a `pm_jax.models.Model`; made by `model`.

    Parameters and state are nested dictionaries with names for keys, whatever containers the module
    has. Streams of random numbers are no part of the state: every call seeds them from its key.

    Attributes:
        make: from `nnx.Rngs` to the module.
        classifier: path of the classifier's module.
        given: the module itself, where there is one already.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    classifier: str = "head"
    given: nnx.Module | None = None

    def init(self, key: Key, inputs: Array) -> tuple[Params, PyTree]:
        """Make the module anew, or take the parameters of the one that was given."""
        del inputs
        module = self.make(nnx.Rngs(key)) if self.given is None else self.given
        _, params, _, rest = _parted(module)
        return _named(params), _named(rest)

    def apply(
        self,
        params: Params,
        state: PyTree,
        inputs: Array,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, PyTree]:
        """Apply the module in the mode of training or of evaluation."""
        module = self._module(params, state, key, train)
        logits = module(inputs, **self._flags(module, train))
        return logits, self._state_of(module)

    def features(self, params: Params, state: PyTree, inputs: Array) -> Array:
        """Return the inputs [N, D] of the classifier's module."""
        return self.logits_and_features(params, state, inputs)[1]

    def logits_and_features(
        self, params: Params, state: PyTree, inputs: Array
    ) -> tuple[Array, Array]:
        """Return the logits [N, C] and the features of one pass."""
        seen: list[Array] = []
        module = self._module(params, state, None, False)
        *parents, name = self.classifier.split("/")
        owner: Any = module
        for parent in parents:
            owner = owner[int(parent)] if parent.isdecimal() else getattr(owner, parent)
        setattr(owner, name, _Tap(getattr(owner, name), seen.append))
        logits = module(inputs, **self._flags(module, False))
        return logits, seen[0].astype(jnp.float32)

    def batch_statistics(self, params: Params, state: PyTree, inputs: Array, key: Key) -> PyTree:
        """Return the state in which running averages are the statistics of one batch."""
        module = self._module(params, state, key, True)
        # Without momentum, a running average is what the last batch has.
        module.set_attributes(nnx.BatchNorm, momentum=0.0, raise_if_not_found=False)
        module(inputs, **self._flags(module, True))
        return self._state_of(module)

    @property
    def module(self) -> nnx.Module:
        """A module of this form."""
        return self.make(nnx.Rngs(0)) if self.given is None else self.given

    @functools.cached_property
    def _template(self) -> tuple[Any, ...]:
        """The module's form, and the shapes of its parameters, streams and other state."""
        module = (
            nnx.eval_shape(lambda: self.make(nnx.Rngs(0))) if self.given is None else self.given
        )
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    def _module(self, params: Params, state: PyTree, key: Key | None, train: bool) -> Any:
        graphdef, *shapes = self._template
        parts = [
            _filled(shapes[0], params),
            _seeded(shapes[1], jax.random.key(0) if key is None else key),
            _filled(shapes[2], state),
        ]
        # A module of its own for every call: nothing moves in one that was given.
        module: Any = nnx.merge(graphdef, *parts)
        module.train() if train else module.eval()
        return module

    def _state_of(self, module: nnx.Module) -> PyTree:
        """Return the state of a module, without what a call has sown."""
        rest = _parted(module)[3]
        values = _flat(rest)
        names = {_as_names(path): values[path] for path in _flat(self._template[3])}
        return traverse_util.unflatten_dict(names)

    @staticmethod
    def _flags(module: Any, train: bool) -> dict[str, bool]:
        names = inspect.signature(type(module).__call__).parameters
        flags = {name: train for name in TRUE_IN_TRAINING if name in names}
        return flags | {name: not train for name in FALSE_IN_TRAINING if name in names}


class _Tap(nnx.Module):
    """Calls a layer, and tells what it was called with."""

    def __init__(self, layer: Callable[..., Any], tell: Callable[[Any], None]):
        self.layer, self.tell = layer, tell

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        self.tell(inputs)
        return self.layer(inputs, *args, **kwargs)


def model(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module], classifier: str = "head"
) -> NNXModel:
    """Make a `pm_jax.models.Model` of an nnx module.

    The parameters are the module's `nnx.Param`s; all other variables but random streams are the
    model's state. `train()` and `eval()` set the mode, and an argument `train`, `training`,
    `is_training`, `deterministic` or `use_running_average` of `__call__` is given too.

    Args:
        module: a function from `nnx.Rngs` to a module, which is initialised anew for every seed; or
            a module, whose present parameters every run starts from. Its first argument is the
            inputs [N, ...] and its result logits [N, C].
        classifier: path of the module of the classifier, "a/b" for one within another.

    Raises:
        InvalidInput: neither of both.

    Example:
        >>> class Network(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.norm = nnx.BatchNorm(2, rngs=rngs)
        ...         self.head = nnx.Linear(2, 3, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.head(self.norm(x))
        >>> network = model(Network)
        >>> params, state = network.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> sorted(params), sorted(state["norm"])
        (['head', 'norm'], ['mean', 'var'])
    """
    classifier = classifier.strip("/")
    if isinstance(module, nnx.Module):
        return NNXModel(lambda rngs: module, classifier, module)
    if not callable(module):
        raise InvalidInput(
            f"module={type(module).__name__}: must be an nnx module or a function of nnx.Rngs"
        )
    return NNXModel(module, classifier)


def _parted(module: Any) -> tuple[Any, ...]:
    """Split a module into its form, its parameters, its random streams and everything else."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _flat(state: Any) -> dict[tuple[Any, ...], Any]:
    return traverse_util.flatten_dict(nnx.to_pure_dict(state))


def _as_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    # Layers in lists have numbers for keys, which checkpoints would not give back as numbers.
    return tuple(map(str, path))


def _named(state: Any) -> dict[str, Any]:
    return traverse_util.unflatten_dict({_as_names(p): x for p, x in _flat(state).items()})


def _filled(shapes: Any, named: dict[str, Any]) -> Any:
    """Return a state of given form with the values of named ones."""
    values = traverse_util.flatten_dict(named)
    state = jax.tree.map(lambda leaf: leaf, shapes)
    nnx.replace_by_pure_dict(
        state, traverse_util.unflatten_dict({p: values[_as_names(p)] for p in _flat(shapes)})
    )
    return state


def _seeded(shapes: Any, key: Key) -> Any:
    """Return streams of random numbers with keys of their own and counts of 0."""

    def seeded(number: int, leaf: Any) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(key, number)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [seeded(n, leaf) for n, leaf in enumerate(leaves)])
