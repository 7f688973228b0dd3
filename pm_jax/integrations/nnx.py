"""Perturb-and-Merge for Flax nnx: modules are trained, measured and merged where they are.

    loss = pm_nnx.perturbed(loss_fn, pm_jax.perturbation.symmetric())
    measure = pm_jax.fisher_exact(pm_nnx.logits_fn(model))
    merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), measure)
    state = merger.init(pm_nnx.snapshot(model))

    @nnx.jit
    def train_step(model, optimizer, key, base, batch):
        value, gradients = nnx.value_and_grad(loss, argnums=1)(key, model, base, batch)
        optimizer.update(model, gradients)

    for task in tasks:
        ...  # train_step(model, optimizer, key, state.start, batch)
        state, info = pm_nnx.finish_task(merger, state, model, task)

Parameters travel as `nnx.State`, which every function of pm_jax takes as a pytree.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pm_jax import perturbation as laws
from pm_jax import trees
from pm_jax.integrations.nnx_layers import check_module as _check_module
from pm_jax.integrations.nnx_layers import fold_lora as fold_lora
from pm_jax.integrations.nnx_layers import has_batch_statistics
from pm_jax.integrations.nnx_layers import (
    recalibrate_batch_statistics as recalibrate_batch_statistics,
)
from pm_jax.perturbation_checks import base_and_rest, check_key, leaves, loss_and_aux
from pm_jax.types import Array, InvalidInput, Key, Params, PyTree

Filter = Any
"""A choice of variables, as nnx takes it: a type such as `nnx.Param`, a path, a predicate."""


def snapshot(module: nnx.Module, wrt: Filter = nnx.Param, *, copy: bool = True) -> nnx.State:
    """The parameters of a module as they are now; no later training changes them.

    Args:
        module: the nnx module.
        wrt: which variables, as for `nnx.Optimizer`.
        copy: whether arrays are copied, which a training step needs that donates the module
            (`nnx.jit(..., donate_argnames="model")`). Without it only the variables are new, and
            arrays are shared until the module is updated.

    Returns:
        `nnx.State` with the module's paths, a pytree.

    Raises:
        InvalidInput: no module, or no variable that `wrt` chooses.

    Example:
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> base = snapshot(model)
        >>> model.bias[...] += 1.0
        >>> base["bias"][...].tolist()
        [0.0, 0.0, 0.0]
    """
    _check_module("module", module)
    # A state of nnx shares its variables with the module; `map` makes new ones.
    state = jax.tree.map(jnp.copy if copy else lambda leaf: leaf, nnx.state(module, wrt))
    if not jax.tree.leaves(state):
        raise InvalidInput(f"wrt={wrt}: chooses no variable of the {type(module).__name__}")
    return state


def write_back(module: nnx.Module, params: Params, *, copy: bool = True) -> None:
    """Set the parameters of a module, in place.

    Args:
        module: the nnx module; variables that `params` lacks stay as they are.
        params: `nnx.State`, or nested dicts of arrays with the module's paths.
        copy: whether arrays are copied, so that a step that donates the module does not delete
            those of `params`.

    Raises:
        InvalidInput: no module, a path that it does not have, or another shape or type.

    Example:
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> write_back(model, {"bias": jnp.ones(1)})
        >>> model.bias[...].tolist()
        [1.0]
    """
    _check_module("module", module)
    _check_no_module("params", params)
    own, given = leaves(nnx.state(module)), leaves(params)
    for path, leaf in given.items():
        if path not in own:
            raise InvalidInput(f"params: {path!r} is no variable of the {type(module).__name__}")
        if _form(leaf) != _form(own[path]):
            raise InvalidInput(
                f"params: {path!r} is {_form(leaf)} and in the {type(module).__name__} "
                f"{_form(own[path])}; pass parameters of this module"
            )
    nnx.update(module, jax.tree.map(jnp.copy if copy else lambda leaf: leaf, _pure(params)))


def perturbed(
    loss_fn: Callable[..., Any],
    perturbation: laws.Perturbation,
    *,
    has_aux: bool = False,
    wrt: Filter = nnx.Param,
) -> Callable[..., Any]:
    """The loss of a module at a random point along its task vector.

    While `loss_fn` runs the module has the displaced parameters; afterwards it has its own again.
    All else that the loss changes (dropout keys, batch statistics, metrics) stays changed. Losses
    and gradients equal those of `pm_jax.perturbed` on the module's state.

    Args:
        loss_fn: `loss_fn(module, *args, **kwargs) -> scalar`, or `(scalar, aux)`.
        perturbation: the law, made by a factory such as `perturbation.symmetric()`.
        has_aux: whether `loss_fn` returns auxiliary outputs too, as for `nnx.value_and_grad`.
        wrt: which variables move, as for `nnx.Optimizer`. Of `nnx.LoRA` only `lora_b` moves: this
            scales the product, whose task vector it is if `lora_b` started from 0.

    Returns:
        `perturbed_loss(key, module, base, *args, **kwargs)`, to be differentiated by
        `nnx.value_and_grad(perturbed_loss, argnums=1)`, or `argnums=nnx.DiffState(1, wrt)`;
        `functools.partial(perturbed_loss, key, base=base)` has the arguments of `loss_fn`. `base`
        is a `snapshot` of the module, which must outlive the task. `antithetic` has two passes with
        the same dropout masks and statistics; only the last one changes the module.

    Raises:
        InvalidInput: as `pm_jax.perturbed`; arguments out of order; a base that is a module, or
            whose variables are the module's own; a Gaussian law with `nnx.LoRA`.

    Example:
        >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> base = jax.tree.map(lambda leaf: 0.0 * leaf, snapshot(model))
        >>> loss = perturbed(lambda model, x: model(x).sum(), laws.antithetic(0.5))
        >>> value, gradients = nnx.value_and_grad(loss, argnums=1)(
        ...     jax.random.key(0), model, base, jnp.ones((1, 1))
        ... )
        >>> gradients["bias"][...].tolist()
        [1.0]
    """
    laws.check_law(perturbation)
    laws.check_loss_fn(loss_fn)

    def perturbed_loss(key: Key, module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        base, args = base_and_rest(args, kwargs)
        _check_order(key, module, base)
        if perturbation == laws.none():
            loss, aux = loss_and_aux(loss_fn(module, *args, **kwargs), has_aux)
            return (loss, aux) if has_aux else loss
        state = nnx.state(module, wrt)
        fixed = _input_factors(state)
        if fixed and perturbation.gaussian:
            raise InvalidInput(
                "perturbation: a Gaussian law moves kernels, not the factors of nnx.LoRA; "
                "pass symmetric() or antithetic()"
            )
        params = _pure(state)
        check_key(key, params)
        start = _start(module, state, base)
        step_key, direction_key = jax.random.split(key)
        total, aux = jnp.zeros(()), None
        draws = perturbation.draws(step_key)
        for number, (step, weight) in enumerate(draws):
            point = laws.displace(direction_key, perturbation, step, params, start)
            point = trees.replace(point, {path: leaves(params)[path] for path in fixed})
            # All passes see the same keys and statistics; those before the last change a copy.
            last = number == len(draws) - 1
            seen = (module, args, kwargs) if last else _copied((module, args, kwargs))
            output = _with_parameters(loss_fn, point, params, *seen)
            loss, aux = loss_and_aux(output, has_aux)
            total = total + weight * loss
        return (total, aux) if has_aux else total

    return perturbed_loss


def logits_fn(
    module: nnx.Module,
    call: Callable[[nnx.Module, PyTree], Array] | None = None,
    *,
    wrt: Filter = nnx.Param,
) -> Callable[..., Array]:
    """Logits of a module as a pure function, to measure with.

    The function sees the module in evaluation mode (no dropout, running statistics), whatever its
    mode, and changes nothing. It is made once; later parameters and statistics are arguments.

    Args:
        module: the nnx module.
        call: `call(module, inputs) -> [N, C]` where `module(inputs)` does not give the logits.
        wrt: which variables are parameters.

    Returns:
        `logits_fn(params, inputs, model_state)` with `params = snapshot(module, wrt)` and
        `model_state = model_state(module, wrt)`.

    Raises:
        InvalidInput: no module; when called, parameters or state of another structure.

    Example:
        >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        >>> pure = logits_fn(model)
        >>> pure(snapshot(model), jnp.full((2, 3), 5.0), model_state(model))[0].round(3).tolist()
        [5.0, 5.0, 5.0]
    """
    _check_module("module", module)
    # Evaluation mode is a static attribute: it is set on a copy, which shares the arrays.
    model = nnx.clone(module)
    nnx.pop(model, nnx.Intermediate)
    model.eval()
    graph, *states = nnx.split(model, wrt, ...)
    # Paths only: the function must not keep the arrays of the module alive.
    params, state = (frozenset(_paths(state)) for state in states)
    return _Logits(type(module).__name__, graph, params, state, call)


@dataclasses.dataclass(frozen=True, eq=False)
class _Logits:
    """The function that `logits_fn` makes; it compares by identity, as functions do."""

    name: str
    graph: Any
    params: frozenset[str]
    state: frozenset[str]
    call: Callable[[nnx.Module, PyTree], Array] | None

    def __call__(self, params: Params, inputs: PyTree, model_state: PyTree = None) -> Array:
        """Logits of the module in evaluation mode."""
        model_state = nnx.State({}) if model_state is None else model_state
        self._check("params", params, self.params)
        self._check("model_state", model_state, self.state)
        merged = nnx.merge(self.graph, _pure(params), _pure(model_state))
        return merged(inputs) if self.call is None else self.call(merged, inputs)

    def _check(self, argument: str, tree: PyTree, known: frozenset[str]) -> None:
        _check_no_module(argument, tree)
        if difference := sorted(_paths(tree) ^ known):
            verb = "lacks" if difference[0] in known else "has"
            raise InvalidInput(
                f"{argument}: {verb} {difference[0]!r}, unlike the {self.name} that logits_fn was "
                "made for; pass snapshot(module) and model_state(module)"
            )


def model_state(module: nnx.Module, wrt: Filter = nnx.Param) -> nnx.State:
    """Everything of a module beside its parameters: statistics, keys, caches, counters.

    Example:
        >>> list(model_state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))
        ['mean', 'var']
    """
    _check_module("module", module)
    _, _, rest = nnx.state(module, wrt, nnx.Intermediate, ...)
    return jax.tree.map(lambda leaf: leaf, rest)


def finish_task(
    merger: Any,
    state: Any,
    module: nnx.Module,
    batches: Any = None,
    key: Key | None = None,
    *,
    wrt: Filter = nnx.Param,
    call: Callable[[nnx.Module, PyTree], Any] | None = None,
    recalibrate: bool = True,
    batch_size: int = 256,
    progress: bool = False,
) -> tuple[Any, Any]:
    """Merge a module that has finished a task, and leave the merged model in it.

    The running averages of `nnx.BatchNorm` belong to the trained model, and a merged one is often
    useless with them, so they are measured anew by `recalibrate_batch_statistics`.

    Args:
        merger: made by `pm_jax.merger`, where it measures with a measure of `logits_fn(module)`.
        state: its state; `merger.init(snapshot(module))` before the first task.
        module: the trained module.
        batches: the task's examples, in any form that `measure_all` takes.
        key: PRNG key, for rules and measures that draw random numbers.
        wrt: which variables merge, those that `merger.init` was given.
        call: `call(module, inputs)` for the statistics, where `module(inputs)` is not right; that
            of `logits_fn` if the merger measures with one.
        recalibrate: measure batch statistics anew, where the module has any.
        batch_size: examples per update of the measure.
        progress: show a progress bar of the measure.

    Returns:
        The next state and the figures of the merge, as `Merger.finish_task`. The module has the
        merged model, in arrays of its own. A rule whose next task starts from another model needs
        `write_back(module, state.start)` before it.

    Raises:
        InvalidInput: no module; batch statistics to measure and no batches, or batches that can be
            read once only; or as `Merger.finish_task`.

    Example:
        >>> import pm_jax
        >>> model = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
        >>> measure = pm_jax.fisher_exact(logits_fn(model))
        >>> merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), measure)
        >>> state = merger.init(snapshot(model))
        >>> for task in range(2):
        ...     model.bias[...] += jnp.asarray([2.0, 0.0])  # the training
        ...     batches = [(jnp.ones((2, 1)), jnp.asarray([0, 1]))]
        ...     state, info = finish_task(merger, state, model, batches)
        >>> int(state.tasks), bool(2 < model.bias[0] < 4)
        (2, True)
    """
    _check_module("module", module)
    recalibrate = recalibrate and has_batch_statistics(module)
    if recalibrate and (batches is None or isinstance(batches, Iterator)):
        given = "None" if batches is None else type(batches).__name__
        raise InvalidInput(
            f"batches={given}: the batch statistics of the {type(module).__name__} are measured of "
            "the merged model as well; give a list or a loader, or recalibrate=False"
        )
    # Nothing is copied: the merger keeps no array that it is given, and its results are new.
    trained = snapshot(module, wrt, copy=False)
    params, state, info = merger.finish_task(
        state,
        trained,
        batches,
        key,
        model_state=model_state(module, wrt),
        batch_size=batch_size,
        progress=progress,
    )
    write_back(module, params, copy=False)
    if recalibrate:
        logits = getattr(getattr(merger, "measure", None), "logits_fn", None)
        call = call or getattr(logits, "call", None)
        recalibrate_batch_statistics(module, batches, call, batch_size=batch_size)
    return state, info


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _pure(tree: PyTree) -> PyTree:
    """The tree with arrays in the place of variables."""
    return jax.tree.map(
        lambda leaf: leaf.get_raw_value() if _is_variable(leaf) else leaf,
        tree,
        is_leaf=_is_variable,
    )


def _paths(tree: PyTree) -> set[str]:
    return set(leaves(tree))


def _form(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _start(module: nnx.Module, state: nnx.State, base: Params) -> nnx.State:
    """The arrays of `base` in the structure of the parameters, after checks."""
    remedy = "pass snapshot(module), taken before the task"
    own = {id(leaf) for leaf in jax.tree.leaves(state, is_leaf=_is_variable) if _is_variable(leaf)}
    if any(id(leaf) in own for leaf in jax.tree.leaves(base, is_leaf=_is_variable)):
        raise InvalidInput(
            f"base: has the module's own variables, which change as it trains; {remedy}"
        )
    params, start = _pure(state), leaves(_pure(base))
    if unknown := sorted(set(start) - _paths(nnx.state(module))):
        raise InvalidInput(f"base: has {unknown[0]!r}, which the module lacks; {remedy}")
    if missing := sorted(_paths(params) - set(start)):
        raise InvalidInput(f"base: lacks {missing[0]!r} of the module; {remedy} and the same wrt")
    return jax.tree_util.tree_map_with_path(lambda path, _: start[trees.path_name(path)], params)


def _input_factors(state: nnx.State) -> tuple[str, ...]:
    """Paths of the input factors of `nnx.LoRA` layers, which a perturbation leaves in place."""
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_variable)
    return tuple(
        trees.path_name(path)
        for path, leaf in flat
        if isinstance(leaf, nnx.LoRAParam) and trees.path_name(path).endswith("lora_a")
    )


def _copied(arguments: tuple) -> tuple:
    """Arguments of a call whose modules, keys and metrics are copies, shared as before."""
    flat, structure = jax.tree.flatten(arguments, is_leaf=_is_node)
    nodes = {number: leaf for number, leaf in enumerate(flat) if _is_node(leaf)}
    # One clone of all, because a variable may be part of several of them.
    copies = nnx.clone(nodes)
    return jax.tree.unflatten(structure, [copies.get(n, leaf) for n, leaf in enumerate(flat)])


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, (nnx.Pytree, nnx.Variable))


def _with_parameters(
    loss_fn: Callable[..., Any],
    point: nnx.State,
    params: nnx.State,
    module: nnx.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Call a loss while the module has the parameters `point`; then it has `params` again."""
    nnx.update(module, point)
    try:
        return loss_fn(module, *args, **kwargs)
    finally:
        nnx.update(module, params)


def _check_no_module(name: str, params: Any) -> None:
    if isinstance(params, nnx.Module):
        raise InvalidInput(
            f"{name}: is the module {type(params).__name__}; pass snapshot(module), its parameters"
        )


def _check_order(key: Any, module: Any, base: Any) -> None:
    """Raise unless a module is in the place of the module, and in no other."""
    if isinstance(key, nnx.Module) or not isinstance(module, nnx.Module):
        raise InvalidInput(
            f"module: is a {type(module).__name__}; the order is (key, module, base, ...), and "
            "nnx.value_and_grad needs argnums=1"
        )
    _check_no_module("base", base)
