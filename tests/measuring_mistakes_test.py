"""Mistakes in measuring, one line each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import pm_jax
from pm_jax import Batch, losses
from pm_jax.curvature import kronecker
from pm_jax.types import InvalidInput


def linear(params, inputs):
    return inputs @ params


W, X, Y = np.ones((4, 3), np.float32), np.ones((6, 4), np.float32), np.arange(6) % 3
FISHER = pm_jax.fisher_empirical(losses.cross_entropy(linear))
EXACT = pm_jax.fisher_exact(linear)


def wrong(examples=(X, Y), measure=FISHER, params=W, **given):
    return lambda: pm_jax.measure_all(measure, params, examples, **given)


def late(*batches):
    """A generator whose last batch is the wrong one."""
    return wrong((batch for batch in ((X, Y), (X, Y), *batches)))


def used_up():
    batches = iter([(X, Y)])
    pm_jax.measure_all(FISHER, W, batches)
    pm_jax.measure_all(FISHER, W, batches)


NAN = np.where(np.eye(6, 4, dtype=bool), np.nan, X)
MISTAKES = {
    "examples: the iterable has no batches; a generator is used up after one pass": used_up,
    "examples: the iterable has no batches": wrong([]),
    "examples: all batches are empty": wrong([(X[:0], Y[:0])]),
    "examples: has no examples": wrong((X[:0], Y[:0])),
    r"examples: batch 2: has inputs of shape \[N, 5\] float32, and batch 0 has \[N, 4\] float32": (
        late((np.ones((6, 5), np.float32), Y))
    ),
    r"examples: batch 2: has inputs of shape \[N, 4\] int64, and batch 0 has \[N, 4\] float32": (
        late((X.astype(int), Y))
    ),
    "examples: batch 2: has the leaves inputs/x, labels, weights, and batch 0 has inputs, labels": (
        late(({"x": X}, Y))
    ),
    r"examples: batch 0: is a dict with 'image', 'label'; .*\(batch\['image'\], batch\['label'\]\)":
        wrong([{"image": X, "label": Y}]),
    "examples: is a dict with 'x', 'y'": wrong({"x": X, "y": Y}),
    "examples: batch 0: is a ndarray; it must be a Batch or a tuple": wrong([X, Y]),
    r"examples: is one array of shape \(6, 4\); give a tuple": wrong(X),
    "examples: is a int; it must be": wrong(3),
    "examples: is a NoneType; it must be": wrong(None),
    "examples: batch 0: is a tuple of 1: ndarray": wrong([(X,)]),
    "examples: batch 0: is a tuple of 4": wrong([(X, Y, Y, Y)]),
    r"examples: has inputs of shape \(6, 4\) and labels of shape \(5,\)": wrong((X, Y[:5])),
    r"examples: batch 0: has inputs/a of shape \(5, 4\) and labels": wrong([({"a": X[:5]}, Y)]),
    r"examples: has weights of shape \(2,\) and labels of shape \(6,\)": wrong((X, Y, np.ones(2))),
    "examples: has a weight that is negative or NaN": wrong((X, Y, np.arange(6) - 1.0)),
    "examples: has labels of type float32 and shape .6, 3.;.*give np.argmax": wrong(
        (X, np.eye(3, dtype=np.float32)[Y])
    ),
    "examples: has labels of type float64 and shape .6,.;.*labels.astype": wrong((X, Y * 1.0)),
    "examples: has labels of type bool.*labels.astype": wrong((X, Y > 1)),
    r"examples: has labels of shape \[N, 3\] where the logits are \[N, 3\]; give np.argmax": wrong(
        (X, np.eye(3, dtype=int)[Y])
    ),
    r"examples: has labels of shape \[N, 7\] where the logits are \[N, 3\]; give labels \[N\]":
        wrong((X, np.ones((6, 7), int))),
    "examples: has a label 3; labels must be from 0 to 2": wrong((X, Y + 1)),
    "examples: has a label 1099511627776; labels must be": wrong((X, Y + 2**40)),
    "examples: has a label -1; labels must be from 0 to 2": wrong((X, Y - 1), measure=EXACT),
    "examples: batch 2: has a label 3; labels must be": late((X, Y + 3)),
    "examples: batch 0: has a label without an axis": wrong([(X[0], Y[0]), (X[1], Y[1])]),
    "examples: batch 0: has inputs of ndarray and type <U1, which are no numbers": wrong(
        [(np.asarray(["a"] * 6), Y)]
    ),
    "examples: batch 0: has inputs of type Strange, which NumPy cannot read": wrong(
        [(type("Strange", (), {"__array__": lambda self: 1 / 0})(), Y)]
    ),
    "examples: all weights are 0": wrong((X, Y, np.zeros(6))),
    "examples: has NaN among its inputs": wrong((NAN, Y)),
    "examples: batch 2: has NaN among its inputs": wrong(
        ((x, Y) for x in (X, X, NAN)), batch_size=6
    ),
    "batch_size=0: must be a whole number, at least 1": wrong(batch_size=0),
    "batch_size=2.5: must be a whole number": wrong(batch_size=2.5),
    "params: has numbers that are not finite": wrong(params=W * np.nan),
    "params/b: has numbers that are not finite": wrong(
        params={"a": W, "b": W * np.nan}, measure=pm_jax.fisher_exact(lambda p, x: x @ p["a"])
    ),
    "model_state/mean: has numbers that are not finite": wrong(
        measure=pm_jax.fisher_exact(lambda p, x, s: x @ p + s["mean"][None]),
        model_state={"mean": np.full(3, np.nan)},
    ),
    "params: has no floating-point leaf": wrong(params={}),
    "params=Linear: is a module.*snapshot": wrong(params=nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
    "params=TrainState: has the optimiser's moments.*state.params": wrong(
        params=train_state.TrainState.create(apply_fn=linear, params=W, tx=optax.adam(0.1))
    ),
    r"direction=float32\[3\]: params is float32\[4, 3\]": wrong(direction=np.ones(3, np.float32)),
    "direction=dict: params is": wrong(direction={"w": W}),
    "direction: has numbers that are not finite": wrong(direction=W * np.nan),
    "measure=fisher_exact: must be a Measure; call its factory": wrong(measure=pm_jax.fisher_exact),
    "measure=str: must be a Measure": wrong(measure="fisher_exact"),
    r"logits_fn=<lambda>: is called with \(params, inputs\) and does not": wrong(
        measure=pm_jax.fisher_exact(lambda w: w)
    ),
    r"logits_fn=<lambda>: is called with \(params, inputs\).*give measure_all a model_state": wrong(
        measure=pm_jax.fisher_exact(lambda w, x, state: x @ w)
    ),
    r"logits_fn=linear: is called with \(params, inputs, model_state\).*lambda params, inputs, st":
        wrong(model_state={"mean": W}),
    "losses_fn=<lambda>: is called with .params, batch, model_state.": wrong(
        measure=pm_jax.fisher_empirical(lambda w, batch: batch.inputs @ w), model_state=W
    ),
    r"logits_fn: returns shape \(6,\) for 6 examples; it must return logits \[N, C\]": wrong(
        measure=pm_jax.fisher_exact(lambda w, x: (x @ w)[:, 0])
    ),
    r"logits_fn: returns shape \(3,\) for 6 examples": wrong(
        measure=pm_jax.gauss_newton(lambda w, x: (x @ w).mean(axis=0)), direction=W
    ),
    r"logits_fn: returns a tuple; it must return one array, the logits \[N, C\] .without": wrong(
        measure=pm_jax.fisher_exact(lambda w, x: (x @ w, {}))
    ),
    "logits_fn: returns int32; it must return floating point": wrong(
        measure=pm_jax.fisher_exact(lambda w, x: jnp.argmax(x @ w, -1, keepdims=True))
    ),
    r"losses_fn: returns shape \(\) for 6 examples; it must return losses \[N\]": wrong(
        measure=pm_jax.fisher_empirical(lambda w, batch: (batch.inputs @ w).mean())
    ),
    "key=None: sampled labels need a PRNG key": wrong(
        measure=pm_jax.fisher_exact(linear, num_samples=1)
    ),
    "direction=None: this measure needs": wrong(measure=pm_jax.gauss_newton(linear)),
    "kernels=.*hiden.*not in the tree, which has hidden/kernel": wrong(
        params={"hidden": {"kernel": W}},
        measure=kronecker.fisher_kronecker(
            lambda params, x: x @ params["hidden"]["kernel"], ("hiden/kernel",)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    with pytest.raises(ValueError, match=f"^({message})") as error:
        MISTAKES[message]()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert isinstance(error.value, InvalidInput) or "=" in message


def assert_close(left, right):
    np.testing.assert_allclose(left, right, rtol=1e-5)


def test_checks_are_no_part_of_a_program_that_a_caller_compiles():
    """Inside jit there are no values to look at, and nothing is added to the computation."""

    def measure(params, examples):
        return pm_jax.measure_all(EXACT, params, examples, 6).quadratic.diagonal

    found = jax.jit(measure)(jnp.asarray(W), Batch(jnp.asarray(X), jnp.asarray(Y)))
    assert_close(found, measure(W, (X, Y)))
    text = jax.jit(measure).lower(W, Batch(X, Y)).as_text()
    assert "is_finite" not in text and "callback" not in text
