"""Mistakes with modules of nnx, and the one line that answers each."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pm_jax import perturbation
from pm_jax.integrations import nnx as pm_nnx
from pm_jax.types import InvalidInput
from tests.integrations.nnx_test import LAWS, aux_loss_fn, loss_fn, problem


def mistakes():
    model, base, batch = problem("convolutional")
    other = problem("dense")[0]
    key, law = jax.random.key(0), LAWS["symmetric"]
    loss = pm_nnx.perturbed(loss_fn, law)
    pure = pm_nnx.logits_fn(model)
    state = nnx.state(model, nnx.Param)
    return {
        "law not called": (
            lambda: pm_nnx.perturbed(loss_fn, perturbation.symmetric),
            r"^perturbation=symmetric: is a function that makes a law; call it",
        ),
        "no function": (
            lambda: pm_nnx.perturbed(0.5, law),
            r"^loss_fn=0.5: must be a function",
        ),
        "key and module swapped": (
            lambda: loss(model, key, base, batch),
            r"^module: is a .*; the order is \(key, module, base, ...\)",
        ),
        "state for the module": (
            lambda: loss(key, state, base, batch),
            r"^module: is a State; the order is",
        ),
        "module for the base": (
            lambda: loss(key, model, model, batch),
            r"^base: is the module Convolutional; pass snapshot\(module\)",
        ),
        "view for the base": (
            lambda: loss(key, model, nnx.state(model, nnx.Param), batch),
            r"^base: has the module's own variables, .* snapshot\(module\)",
        ),
        "base of another module": (
            lambda: loss(key, model, pm_nnx.snapshot(other), batch),
            r"^base: has 'first/bias', which the module lacks; pass snapshot",
        ),
        "base of fewer variables": (
            lambda: loss(key, model, {"token": jnp.ones(4)}, batch),
            r"^base: lacks 'again/bias' of the module; pass snapshot",
        ),
        "another shape of the base": (
            lambda: pm_nnx.perturbed(loss_fn, law, wrt=nnx.PathContains("token"))(
                key, model, {"token": jnp.ones(5)}, batch
            ),
            r"^base=float32\[5\] at token: params is float32\[4\] there",
        ),
        "no layer to fold": (
            lambda: pm_nnx.fold_lora(model),
            r"^module: the Convolutional has no nnx.LoRA layer",
        ),
        "no kernel to fold into": (
            lambda: pm_nnx.fold_lora(nnx.LoRA(2, 1, 3, rngs=nnx.Rngs(0))),
            r"^module: the nnx.LoRA at the top has no kernel \[2, 3\]",
        ),
        "no base": (lambda: loss(key, model), r"^base: is missing"),
        "base forgotten": (
            lambda: loss(key, model, batch),
            r"^base: has '0', which the module lacks",
        ),
        "no key": (lambda: loss(0, model, base, batch), r"^key=0: is no PRNG key"),
        "aux without has_aux": (
            lambda: pm_nnx.perturbed(aux_loss_fn, law)(key, model, base, batch),
            r"^has_aux=False: loss_fn returned a tuple of 2",
        ),
        "losses of examples": (
            lambda: pm_nnx.perturbed(lambda m, b: m(b[0])[:, 0], law)(key, model, base, batch),
            r"^loss_fn: returned a loss of shape \(4,\)",
        ),
        "snapshot of a state": (
            lambda: pm_nnx.snapshot(state),
            r"^module: is a State; pass the nnx.Module",
        ),
        "filter without variables": (
            lambda: pm_nnx.snapshot(model, nnx.LoRAParam),
            r"^wrt=.*LoRAParam.*: chooses no variable of the Convolutional",
        ),
        "module written back": (
            lambda: pm_nnx.write_back(model, model),
            r"^params: is the module Convolutional; pass snapshot",
        ),
        "another module's parameters written back": (
            lambda: pm_nnx.write_back(model, pm_nnx.snapshot(other)),
            r"^params: 'first/bias' is no variable of the Convolutional",
        ),
        "another shape written back": (
            lambda: pm_nnx.write_back(model, {"token": jnp.ones(5)}),
            r"^params: 'token' is float32\[5\] and in the Convolutional float32\[4\]",
        ),
        "logits of a module": (
            lambda: pure(model, batch[0]),
            r"^params: is the module Convolutional; pass snapshot",
        ),
        "logits of another module": (
            lambda: pure(pm_nnx.snapshot(other), batch[0]),
            r"^params: lacks 'again/bias', unlike the Convolutional that logits_fn was made for",
        ),
        "state forgotten": (
            lambda: pm_nnx.logits_fn(other)(pm_nnx.snapshot(other), batch[0]),
            r"^model_state: lacks 'drop/rngs/count', unlike the Dense",
        ),
        "statistics of nothing": (
            lambda: pm_nnx.recalibrate_batch_statistics(model, [batch]),
            r"^module: the Convolutional has no nnx.BatchNorm layer",
        ),
        "a generator where two passes are made": (
            lambda: pm_nnx.finish_task(None, None, other, iter([batch])),
            r"^batches=list_iterator: the batch statistics of the Dense are measured",
        ),
        "logits_fn of parameters": (
            lambda: pm_nnx.logits_fn(state),
            r"^module: is a State; pass the nnx.Module",
        ),
    }


@pytest.mark.parametrize("name", list(mistakes()))
def test_mistakes_are_one_line_that_names_the_argument(name):
    call, message = mistakes()[name]
    with pytest.raises(InvalidInput, match=message) as error:
        call()
    assert "\n" not in str(error.value)
