"""A model of the user's own, looked at once before any work starts."""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pm_jax import lora, trees
from pm_jax.curvature import dense_layers, input_moments
from pm_jax.curvature.kernel_inputs import kernel_inputs
from pm_jax.curvature.taps import tapped
from pm_jax.integrations.linen import LinenModel
from pm_jax.models.model import Model, classifier_pattern
from pm_jax.types import Array, Batch, InvalidInput, Key, Params, PyTree, cause


class Traits(NamedTuple):
    """The properties of a model that decide how it is trained.

    Attributes:
        has_state: whether anything moves beside the parameters.
        is_random: whether it draws random numbers while it trains.
        folds: whether adapters are folded into its kernels at every step, because its layers take
            none on their activations.
    """

    has_state: bool = False
    is_random: bool = False
    folds: bool = False


def name_of(model: Model, setting: str = "") -> str:
    """Name a model in messages: by the setting that it was made by, or by its class."""
    if ":" in setting:
        return setting
    return type(model.module if isinstance(model, LinenModel) else model).__name__


def checked(
    model: Model,
    name: str,
    init: Callable[[Key], tuple[Params, PyTree]],
    blank: Array,
    num_classes: int,
) -> Traits:
    """Look at a model's shapes, and see that it can be trained, evaluated and merged.

    Messages call it by `name`; `blank` is one blank example.

    Raises:
        InvalidInput: it cannot; the message says why.
    """
    key, inputs = jax.random.key(0), jnp.broadcast_to(blank, (2, *blank.shape[1:]))
    seen = f"inputs of {inputs.dtype} [N, {', '.join(map(str, inputs.shape[1:]))}]"

    def shapes(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            pair = jax.eval_shape(function, *arguments)
        except InvalidInput:
            raise
        except Exception as error:  # A model may fail in any way.
            raise InvalidInput(f"model={name}: cannot be {what} {seen} ({cause(error)})") from error
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidInput(
                f"model={name}: gave no pair when {what} {seen}; init returns (params, state) and "
                "apply (logits, state)"
            )
        return pair

    params, state = shapes("initialised for", init, key)
    _check_classifier(model, name, params, num_classes)
    logits, _ = shapes("evaluated on", model.apply, params, state, inputs)
    _check_logits(name, logits, num_classes)
    train = functools.partial(model.apply, train=True)

    def apply(key: Key, params: Params, state: PyTree) -> tuple[Array, PyTree]:
        return train(params, state, inputs, key=key)

    logits, after = shapes("trained on", apply, key, params, state)
    _check_logits(name, logits, num_classes)
    before, now = (
        {path: (x.shape, x.dtype) for path, x in trees.leaves_by_path(tree).items()}
        for tree in (state, after)
    )
    if before != now:
        path = next(path for path in {**before, **now} if before.get(path) != now.get(path))
        raise InvalidInput(
            f"model={name}: its state changes its form while it trains: {path} is "
            f"{before.get(path, 'absent')} before a step and {now.get(path, 'absent')} after it"
        )
    return Traits(bool(jax.tree.leaves(state)), _reads_key(apply, key, params, state))


def check_measurable(model: Model, name: str, params: Params, state: PyTree, blank: Array) -> None:
    """Check that the running averages of a model, given in shapes, can be measured anew.

    Raises:
        InvalidInput: they cannot; the message names the setting that asks for it.
    """
    key, inputs = jax.random.key(0), jnp.broadcast_to(blank, (2, *blank.shape[1:]))
    moving = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not moving:
        return
    measure = getattr(model, "batch_statistics", None)
    if measure is None:
        raise InvalidInput(
            f"model_state=measured: model={name} has state and no function batch_statistics; use "
            "merged or trained"
        )
    try:
        jax.eval_shape(measure, params, state, inputs, key)
    except Exception as error:  # A model may fail in any way.
        raise InvalidInput(
            f"model_state=measured: model={name} cannot be measured ({cause(error)}); use merged "
            "or trained"
        ) from error


def check_linen(model: Model, name: str, setting: str, instead: str) -> None:
    """Check that the inputs of a model's dense layers can be read, as a setting asks for.

    Raises:
        InvalidInput: the model is no linen module, which alone tells of the calls of its layers.
    """
    if not isinstance(model, LinenModel):
        raise InvalidInput(
            f"{setting}: reads the inputs of linen Dense layers, and model={name} is no linen "
            f"module; use a linen model or {instead}"
        )


def check_inputs_of_layers(
    model: Model, name: str, rule: str, leaves: Params, adapted: Collection[str], blank: Array
) -> None:
    """Check that a rule can read the inputs of all dense layers whose kernels merge.

    `leaves` are those that merge, or their shapes; `adapted` are paths of the kernels that have
    adapters; `blank` is one blank example.

    Raises:
        InvalidInput: it cannot; the message names a kernel.
    """
    check_linen(model, name, f"rule={rule}", "another rule")
    reads = f"rule={rule}: reads the inputs of linen Dense layers"
    kernels = dense_layers.kernel_paths(leaves)
    if others := sorted(set(adapted) - set(kernels)):
        raise InvalidInput(
            f"{reads}, and {others[0]}, which has an adapter, is no kernel of one; choose others "
            "by lora_pattern, or another rule"
        )
    if not kernels:
        raise InvalidInput(f"{reads}, and model={name} merges no kernel of one; use another rule")
    params, state = jax.eval_shape(model.init, jax.random.key(0), blank)

    def can_read(*paths: str) -> bool:
        def trial(params: Params, state: PyTree) -> Any:
            return dense_layers.input_moments(
                lambda: model.apply(params, state, blank), paths, jnp.ones(len(blank))
            )

        try:
            constants = jax.make_jaxpr(trial)(params, state).consts
        except Exception:  # JAX has several errors for values that leave the loop they belong to.
            return False
        # It takes values that leave a checkpoint for constants, and complains only when they run.
        return not any(isinstance(value, jax.core.Tracer) for value in constants)

    if not can_read(*kernels):
        path = next((path for path in kernels if not can_read(path)), kernels[0])
        raise InvalidInput(
            f"{reads}, and {path} of model={name} is not the kernel of one that is called in the "
            "open, outside nn.scan, nn.remat and nn.jit; use another rule"
        )


def check_input_moments(
    model: Model,
    name: str,
    setting: str,
    leaves: Params,
    adapted: Collection[str],
    blank: Array | None,
) -> None:
    """Check that the inputs of the dense kernels that merge can be measured.

    Arguments are as for `check_inputs_of_layers`; `setting` is the one that asks for them. Without
    an example the model is one of this package, which needs no trial.

    Raises:
        InvalidInput: they cannot; the message names a kernel.
    """
    reads = f"{setting}: reads the inputs of dense kernels"
    try:
        kernels = input_moments.kernel_axes(leaves)
    except InvalidInput:
        raise InvalidInput(
            f"{reads}, and model={name} merges none; use another rule or curvature"
        ) from None
    if others := sorted(set(adapted) - set(kernels)):
        raise InvalidInput(
            f"{reads}, and {others[0]} of shape {leaves[others[0]].shape}, which has an adapter, "
            "does not tell its inputs from its outputs; choose others by lora_pattern, or another "
            "rule or curvature"
        )
    if blank is None:
        return
    params, state = jax.eval_shape(model.init, jax.random.key(0), blank)

    def trial(params: Params, state: PyTree) -> Any:
        return kernel_inputs(
            lambda some, inputs: model.apply(trees.replace(params, some), state, inputs)[0],
            trees.select(params, tuple(kernels)),
            blank,
            kernels,
        )

    try:
        jax.eval_shape(trial, params, state)
    except InvalidInput as error:
        raise InvalidInput(
            f"{setting}: model={name} cannot be measured ({error}); use another rule or curvature"
        ) from None


def check_values(model: str, params: Params, state: PyTree) -> None:
    """Check that the numbers which a model starts from are finite.

    Raises:
        InvalidInput: one is not; the message names its leaf.
    """
    for kind, tree in (("parameter", params), ("state", state)):
        for path, leaf in trees.leaves_by_path(tree).items():
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
                raise InvalidInput(
                    f"model={model}: its {kind} {path} is not finite before training; see to its "
                    "initialisation"
                )


def _check_classifier(model: Model, name: str, params: Params, num_classes: int) -> None:
    """Check that the leaves of the classifier are there, their last axis being the classes."""
    try:
        paths = trees.match_paths(params, classifier_pattern(model))
    except ValueError:
        # One line for all of a module's leaves.
        modules = dict.fromkeys(p.rpartition("/")[0] for p in trees.leaves_by_path(params))
        raise InvalidInput(
            f"model={name}: has no parameters under its classifier's path {model.classifier!r}; "
            f"name that module so, or wrap the model with classifier= one of {', '.join(modules)}"
        ) from None
    for path, leaf in trees.select(params, paths).items():
        if leaf.shape[-1:] != (num_classes,):
            raise InvalidInput(
                f"model={name}: its classifier's {path} has the shape {leaf.shape}; the last axis "
                f"must be the {num_classes} classes of the data"
            )


def _check_logits(name: str, logits: Any, num_classes: int) -> None:
    shape = getattr(logits, "shape", None)
    if shape != (2, num_classes):
        raise InvalidInput(
            f"model={name}: gives {type(logits).__name__ if shape is None else shape} for 2 "
            f"examples; logits [2, {num_classes}] are needed, one for each class of the data"
        )


def _reads_key(apply: Callable[..., Any], key: Key, *arguments: Any) -> bool:
    """Tell whether a function uses its first argument."""
    traced = jax.make_jaxpr(apply)(key, *arguments).jaxpr
    first = traced.invars[0]
    return any(variable is first for equation in traced.eqns for variable in equation.invars)


def axes_from(model: Model, blank: Array) -> dict[str, Any]:
    """Return the arguments of `lora.adapted_axes` by which a module says how it uses kernels."""
    module = getattr(model, "module", None)
    if not isinstance(model, LinenModel):
        # An nnx module says it by itself; a few functions say nothing.
        return {} if module is None else {"module": module}
    inputs: list[Any] = [blank]
    flags = dict(model.flags)
    for name in list(inspect.signature(type(model.module).__call__).parameters)[2:]:
        if name not in flags:
            break
        inputs.append(not flags[name])
    return {"module": module, "inputs": tuple(inputs)}


def takes_branches(
    model: Model, params: Params, state: PyTree, blank: Array, adapters: lora.Adapters
) -> bool:
    """Tell whether adapters can act on the activations of a model, which is cheaper than folding.

    All arguments but the model may be shapes.
    """
    if not isinstance(model, LinenModel):
        return False

    def trial(params: Params, state: PyTree, adapters: lora.Adapters) -> Array:
        with lora.branch(adapters):
            return model.apply(params, state, blank)[0]

    try:
        jax.eval_shape(trial, params, state, adapters)
    except InvalidInput:
        return False
    return True


def layers_by_example(model: LinenModel, blank: Array) -> tuple[str, ...]:
    """Return the names of the dense layers whose squared gradients come from inputs and outputs.

    The model calls each exactly once, in the open (not inside `nn.scan` or `nn.remat`), on inputs
    whose first axis is the examples.
    """
    inputs = jnp.broadcast_to(blank, (3, *blank.shape[1:]))
    params, state = jax.eval_shape(model.init, jax.random.key(0), inputs)
    kernels = set(dense_layers.kernel_paths(params))
    calls: dict[str, list[bool]] = {}

    def note(call: dense_layers.LayerCall) -> None:
        by_example = call.inputs.shape[0] == call.output.shape[0] == len(inputs)
        calls.setdefault(call.name, []).append(by_example and call.kernel in kernels)

    with dense_layers.visiting(note):
        jax.eval_shape(model.apply, params, state, inputs)
    names = tuple(name for name, fits in calls.items() if fits == [True])
    if _can_tap(model, params, state, inputs, names):
        return names
    return tuple(name for name in names if _can_tap(model, params, state, inputs, (name,)))


def _can_tap(
    model: LinenModel, params: Params, state: PyTree, inputs: Array, layers: tuple[str, ...]
) -> bool:
    """Tell whether the outputs of layers can be differentiated by, as a trial shows."""
    batch = Batch(inputs, jnp.zeros(len(inputs), jnp.int32))

    def trial(params: Params, state: PyTree) -> Any:
        taps = tapped(
            lambda params, batch: model.apply(params, state, batch.inputs)[0], params, batch, layers
        )
        return taps.pull_back(jnp.ones_like(taps.outputs))

    try:
        jax.eval_shape(trial, params, state)
    except Exception:
        # JAX has several errors for values that leave the loop or the checkpoint they belong to.
        return False
    return True
