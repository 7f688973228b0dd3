"""nnx modules in training, measuring and merging, against the same steps on their pure state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pm_jax
from pm_jax import perturbation
from pm_jax.integrations import nnx as pm_nnx
from pm_jax.types import InvalidInput


class Dense(nnx.Module):
    """Linear layers with dropout and batch statistics."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


class Convolutional(nnx.Module):
    """Convolutions, a list of blocks, tied weights and a parameter that is no layer's."""

    def __init__(self, rngs):
        self.blocks = nnx.List(
            [nnx.Conv(1, 4, (2, 2), rngs=rngs), nnx.Conv(4, 4, (2, 2), rngs=rngs)]
        )
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.token = nnx.Param(jax.random.normal(rngs.params(), (4,)))
        self.last = nnx.Linear(4, 3, rngs=rngs)
        self.again = self.last

    def __call__(self, x):
        x = x.reshape(-1, 2, 3, 1)
        for block in self.blocks:
            x = nnx.relu(block(x))
        x = self.norm(x).mean((1, 2)) + self.token[None]
        return self.last(x) + 0.5 * self.again(x)


class Attention(nnx.Module):
    """Attention with its own dropout, and an embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 8, decode=False, dropout_rate=0.2, deterministic=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed((jnp.abs(x) * 10).astype(int) % 5)
        return self.last(self.norm(x + self.attention(x)).mean(1))


MODELS = {"dense": Dense, "convolutional": Convolutional, "attention": Attention}
FAST = {("dense", "symmetric"), ("dense", "antithetic"), ("convolutional", "certain")}
LAWS = {
    "symmetric": perturbation.symmetric(0.5),
    "certain": perturbation.Perturbation((0.5,), (1.0,)),
    "antithetic": perturbation.antithetic(0.4),
    "one_sided": perturbation.one_sided(0.7, 0.5),
    "gaussian": perturbation.gaussian(0.5, 1.0),
    "none": perturbation.none(),
}


EVALUATED = {"deterministic": True, "use_running_average": True}


def problem(name="dense"):
    """A model, a model that its task started from, and a batch."""
    model = MODELS[name](nnx.Rngs(0))
    params = pm_nnx.snapshot(model)
    noise = pm_jax.trees.gaussian_like(jax.random.key(9), params)
    base = jax.tree.map(lambda leaf, step: leaf + 0.1 * step, params, noise)
    x = jax.random.normal(jax.random.key(1), (4, 6))
    return model, base, (x, jnp.arange(4) % 3)


def loss_fn(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def aux_loss_fn(model, batch):
    logits = model(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), logits


def pure_loss(model):
    """The loss of the module's state: `(params, rest, batch) -> (loss, (logits, rest))`."""
    graph = nnx.graphdef(model)

    def loss(params, rest, batch):
        # Variables of its own: those of `rest` are outside of the gradient's trace.
        merged = nnx.merge(graph, params, rest, copy=True)
        value, logits = aux_loss_fn(merged, batch)
        return value, (logits, nnx.state(merged, nnx.Not(nnx.Param)))

    return loss


def assert_close(got, wanted, rtol=1e-5, atol=1e-7):
    got, wanted = (pm_jax.trees.leaves_by_path(tree) for tree in (got, wanted))
    assert got.keys() == wanted.keys()
    for path in got:
        if jnp.issubdtype(got[path].dtype, jax.dtypes.prng_key):
            assert bool(got[path] == wanted[path])
        else:
            np.testing.assert_allclose(got[path], wanted[path], rtol, atol, err_msg=path)


def assert_equal(got, wanted):
    assert_close(got, wanted, 0, 0)


def every_model_and_law():
    """All pairs; those that compile longest and differ least from others are slow."""
    for name in MODELS:
        for law in LAWS:
            fast = (name, law) in FAST
            yield pytest.param(name, law, marks=[] if fast else pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("name,law", list(every_model_and_law()))
def test_loss_gradient_and_state_equal_those_of_the_pure_state(name, law):
    law = LAWS[law]
    model, base, batch = problem(name)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = (jax.tree.map(jnp.copy, tree) for tree in (params, rest))
    pure = pm_jax.perturbed(pure_loss(model), law, has_aux=True)
    key = jax.random.key(3)
    (value, (logits, moved)), gradient = jax.value_and_grad(pure, argnums=1, has_aux=True)(
        key, params, base, rest, batch
    )
    loss = pm_nnx.perturbed(aux_loss_fn, law, has_aux=True)
    (got, aux), gradients = nnx.value_and_grad(loss, argnums=1, has_aux=True)(
        key, model, base, batch
    )
    np.testing.assert_array_equal(got, value)
    np.testing.assert_array_equal(aux, logits)
    assert_equal(gradients, gradient)
    assert_equal(nnx.state(model, nnx.Param), params)
    assert_equal(nnx.state(model, nnx.Not(nnx.Param)), moved)


def in_graph_mode(loss):
    """Value and gradient as nnx users write them: the module goes in and changes in place."""

    @nnx.jit
    def step(key, model, base, batch):
        return nnx.value_and_grad(loss, argnums=1)(key, model, base, batch)

    return step


def in_tree_mode(loss):
    """The style of nnx without shared references: only the parameters are differentiated."""

    @partial(nnx.jit, graph=False)
    def step(key, model, base, batch):
        graph, params, rest = nnx.split(model, nnx.Param, ..., graph=False)

        def state_loss(params, rest):
            merged = nnx.merge(graph, params, rest, copy=True)
            value = loss(key, merged, base, batch)
            return value, nnx.state(merged, nnx.Not(nnx.Param), graph=False)

        (value, rest), gradient = jax.value_and_grad(state_loss, has_aux=True)(params, rest)
        nnx.update(model, rest)
        return value, gradient

    return step


@pytest.mark.slow
@pytest.mark.parametrize("style", [in_graph_mode, in_tree_mode])
@pytest.mark.parametrize("law", ["symmetric", pytest.param("antithetic", marks=pytest.mark.slow)])
def test_under_jit_keys_and_statistics_move_and_parameters_stay(style, law):
    model, base, batch = problem()
    before = pm_nnx.snapshot(model)
    eager, _, _ = problem()
    loss = pm_nnx.perturbed(loss_fn, LAWS[law])
    step = style(loss)
    for number in (1, 2):
        key = jax.random.key(0)
        value, gradient = step(key, model, base, batch)
        wanted, wanted_gradient = nnx.value_and_grad(loss, argnums=1)(key, eager, base, batch)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert_close(gradient, wanted_gradient, 1e-4, 1e-6)
        assert int(model.drop.rngs.count[...]) == number
        assert_close(nnx.state(model, nnx.BatchStat), nnx.state(eager, nnx.BatchStat))
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0
    assert_equal(nnx.state(model, nnx.Param), before)


@pytest.mark.slow
def test_all_modes_of_nnx_give_the_same_step():
    class Normed(nnx.Module):
        """Without random numbers, which the gradient of a whole module in tree mode refuses."""

        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))))

    batch, results = problem()[2], []
    loss = pm_nnx.perturbed(loss_fn, LAWS["symmetric"])
    for mode in ({}, {"graph": False}, {"graph": True, "graph_updates": False}):
        model = Normed(nnx.Rngs(0))
        before = pm_nnx.snapshot(model)
        base = jax.tree.map(lambda leaf: 0.5 * leaf, before)
        step = nnx.jit(nnx.value_and_grad(loss, argnums=1, **mode), **mode)
        value, gradient = step(jax.random.key(3), model, base, batch)
        assert_equal(nnx.state(model, nnx.Param), before)
        gradient = nnx.state(gradient) if isinstance(gradient, nnx.Module) else gradient
        statistics = nnx.state(model, nnx.BatchStat)
        results.append((value, nnx.filter_state(gradient, nnx.Param), statistics))
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert_close(got, wanted, 1e-5, 1e-6)


def test_an_ordinary_training_loop_with_donation_keeps_its_base():
    model, base, batch = problem()
    pm_nnx.write_back(model, base)
    base = pm_nnx.snapshot(model)
    kept = jax.tree.map(np.asarray, base)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    loss = pm_nnx.perturbed(aux_loss_fn, perturbation.symmetric(), has_aux=True)
    metrics = nnx.metrics.Average("loss")

    @partial(nnx.jit, donate_argnames=("model", "optimizer"))
    def train_step(model, optimizer, metrics, key, base, batch):
        (value, _), gradients = nnx.value_and_grad(loss, argnums=1, has_aux=True)(
            key, model, base, batch
        )
        metrics.update(loss=value)
        optimizer.update(model, gradients)
        return value

    old = model.first.kernel.get_raw_value()
    untrained = float(loss_fn(nnx.view(model, **EVALUATED), batch))
    values = [
        float(train_step(model, optimizer, metrics, jax.random.key(n), base, batch))
        for n in range(30)
    ]
    # The first array was given away to the step; the snapshot is its own.
    assert old.is_deleted()
    assert_equal(base, kept)
    assert float(loss_fn(nnx.view(model, **EVALUATED), batch)) < 0.5 * untrained
    assert float(metrics.compute()) == pytest.approx(np.mean(values), rel=1e-5)


def test_the_mean_over_the_law_is_the_loss_plus_lam_times_the_finite_difference():
    model, base, batch = problem("convolutional")
    epsilon = 0.5
    law = perturbation.symmetric(epsilon)

    def at(step):
        certain = perturbation.Perturbation((step,), (1.0,))
        return pm_nnx.perturbed(loss_fn, certain)(jax.random.key(0), model, base, batch)

    mean = sum(p * at(s) for s, p in zip(law.steps, law.probabilities, strict=True))
    plain = loss_fn(model, batch)
    difference = (at(epsilon) + at(-epsilon) - 2 * plain) / epsilon**2
    np.testing.assert_allclose(
        mean, plain + perturbation.curvature_weight(law) * difference, rtol=1e-6
    )


def test_two_passes_see_the_same_keys_and_only_the_last_changes_anything():
    model, base, batch = problem()
    rngs, metrics = nnx.Rngs(5), nnx.metrics.Average("loss")
    seen = []

    def recorded_loss(model, batch, *, rngs, metrics):
        seen.append((model.norm.mean[...], rngs.params()))
        value = loss_fn(model, batch)
        metrics.update(loss=value)
        return value

    loss = pm_nnx.perturbed(recorded_loss, perturbation.antithetic())
    loss(jax.random.key(0), model, base, batch, rngs=rngs, metrics=metrics)
    (mean, key), (other_mean, other_key) = seen
    np.testing.assert_array_equal(mean, other_mean)
    assert bool(key == other_key)
    assert (int(model.drop.rngs.count[...]), int(rngs.params.count[...])) == (1, 1)
    assert int(metrics.count[...]) == 1


def test_with_key_and_base_bound_it_takes_the_place_of_the_loss():
    model, base, batch = problem()
    twin, _, _ = problem()
    loss = pm_nnx.perturbed(aux_loss_fn, LAWS["symmetric"], has_aux=True)
    bound = partial(loss, jax.random.key(4), base=base)
    got = nnx.value_and_grad(bound, has_aux=True)(model, batch)
    wanted = nnx.value_and_grad(loss, argnums=1, has_aux=True)(jax.random.key(4), twin, base, batch)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(g, w)
    assert_equal(nnx.state(model), nnx.state(twin))


def test_parameters_come_back_when_the_loss_fails():
    model, base, batch = problem()
    before = pm_nnx.snapshot(model)

    def failing(model, batch):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        pm_nnx.perturbed(failing, LAWS["certain"])(jax.random.key(0), model, base, batch)
    assert_equal(nnx.state(model, nnx.Param), before)


def test_only_the_variables_of_the_filter_move():
    model, _, batch = problem("convolutional")
    blocks = nnx.PathContains("blocks")
    base = jax.tree.map(jnp.zeros_like, pm_nnx.snapshot(model, blocks))
    loss = pm_nnx.perturbed(loss_fn, LAWS["certain"], wrt=blocks)
    gradient = nnx.grad(loss, argnums=nnx.DiffState(1, blocks))(
        jax.random.key(0), model, base, batch
    )
    paths = set(pm_jax.trees.leaves_by_path(gradient))
    assert paths == {f"blocks/{n}/{name}" for n in (0, 1) for name in ("kernel", "bias")}
    moved = nnx.clone(model)
    for block in moved.blocks:
        block.kernel[...] = 1.5 * block.kernel[...]
        block.bias[...] = 1.5 * block.bias[...]
    np.testing.assert_allclose(
        loss(jax.random.key(0), model, base, batch), loss_fn(moved, batch), rtol=1e-6
    )


def test_low_rank_layers_move_along_the_task_vector_of_their_product():
    model, _, batch = problem("convolutional")
    plain = nnx.clone(model)
    model.last = nnx.LoRA(4, 2, 3, base_module=model.last, rngs=nnx.Rngs(2))
    model.again = nnx.LoRA(4, 2, 3, base_module=model.last.base_module, rngs=nnx.Rngs(3))
    base = pm_nnx.snapshot(model, nnx.LoRAParam)
    # As after some training: both factors moved.
    trained = jax.tree.map(lambda leaf: leaf + 0.3, base)
    pm_nnx.write_back(model, trained)
    loss = pm_nnx.perturbed(loss_fn, LAWS["certain"], wrt=nnx.LoRAParam)
    got = loss(jax.random.key(0), model, base, batch)

    def dense_loss(step):
        folded = nnx.clone(plain)
        kernel = plain.last.kernel[...]
        products = [layer.lora_a[...] @ layer.lora_b[...] for layer in (model.last, model.again)]
        folded.last = nnx.clone(plain.last)
        folded.again = nnx.clone(plain.last)
        folded.last.kernel[...] = kernel + (1 + step) * products[0]
        folded.again.kernel[...] = kernel + (1 + step) * products[1]
        return loss_fn(folded, batch)

    np.testing.assert_allclose(got, dense_loss(0.5), rtol=1e-5)
    # A base of all parameters serves as well.
    everything = pm_nnx.snapshot(model)
    for layer in (everything["last"], everything["again"]):
        layer["lora_b"][...] = jnp.zeros((2, 3))
    np.testing.assert_array_equal(loss(jax.random.key(0), model, everything, batch), got)
    with pytest.raises(InvalidInput, match="Gaussian law moves kernels"):
        pm_nnx.perturbed(loss_fn, LAWS["gaussian"], wrt=nnx.LoRAParam)(
            jax.random.key(0), model, base, batch
        )


def test_a_base_may_be_a_dict_of_arrays():
    model, base, batch = problem("convolutional")
    loss = pm_nnx.perturbed(loss_fn, LAWS["certain"])
    key = jax.random.key(0)
    plain = nnx.to_pure_dict(base)
    np.testing.assert_array_equal(loss(key, model, base, batch), loss(key, model, plain, batch))


def test_low_rank_layers_fold_into_their_kernels():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
            inner = nnx.Linear(8, 3, rngs=rngs)
            self.last = nnx.LoRA(8, 2, 3, base_module=inner, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    model, x = Net(nnx.Rngs(0)), jnp.ones((2, 6))
    trained = jax.tree.map(lambda leaf: leaf + 0.2, pm_nnx.snapshot(model, nnx.LoRAParam))
    pm_nnx.write_back(model, trained)
    before, kernel = model(x), model.last.base_module.kernel[...]
    product = model.last.lora_a[...] @ model.last.lora_b[...]
    nnx.jit(pm_nnx.fold_lora)(model)
    np.testing.assert_allclose(model(x), before, rtol=1e-5)
    np.testing.assert_allclose(model.last.base_module.kernel[...], kernel + product, rtol=1e-6)
    assert not model.first.lora.lora_b[...].any() and not model.last.lora_b[...].any()


# Snapshots and the way back.


def test_a_snapshot_does_not_follow_the_module_and_goes_back_into_it():
    model, _, _ = problem("attention")
    taken, shared = pm_nnx.snapshot(model), pm_nnx.snapshot(model, copy=False)
    kernel = model.last.kernel.get_raw_value()
    assert shared["last"]["kernel"].get_raw_value() is kernel
    assert taken["last"]["kernel"].get_raw_value() is not kernel
    before = jax.tree.map(np.asarray, taken)
    model.last.kernel[...] += 1.0
    assert_equal(taken, before)
    assert_equal(shared, before)
    pm_nnx.write_back(model, taken)
    assert_equal(nnx.state(model, nnx.Param), before)
    assert model.last.kernel.get_raw_value() is not taken["last"]["kernel"].get_raw_value()
    model.last.kernel[...] += 1.0
    assert_equal(taken, before)


# Measuring.


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["dense", pytest.param("attention", marks=pytest.mark.slow)])
def test_logits_are_those_of_evaluation_whatever_the_mode(name, mode):
    model, _, (x, _) = problem(name)
    model.train()
    model(x)
    statistics = pm_nnx.model_state(model)
    evaluated = nnx.clone(model)
    evaluated.eval()
    getattr(model, mode)()
    pure = pm_nnx.logits_fn(model)
    before = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    got = jax.jit(pure)(pm_nnx.snapshot(model), x, statistics)
    np.testing.assert_allclose(got, evaluated(x), rtol=1e-5)
    np.testing.assert_allclose(pure(pm_nnx.snapshot(model), x[:1], statistics), got[:1], rtol=1e-5)
    assert_equal(nnx.state(model), before)
    flags = [m.deterministic for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)]
    assert all(flag == (mode == "eval") for flag in flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "attention"])
def test_a_module_is_measured_with_its_statistics_as_its_pure_function_would_be(name):
    model, base, (x, y) = problem(name)
    model.train()
    model(x)
    params, state = pm_nnx.snapshot(model), pm_nnx.model_state(model)
    delta = pm_jax.task_vectors.difference(params, base)
    before = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    pure = pm_nnx.logits_fn(model)
    found = [
        pm_jax.measure_all(make(pure), params, (x, y), 3, delta, model_state=state)
        for make in (pm_jax.fisher_exact, pm_jax.gauss_newton)
    ]
    assert_equal(nnx.state(model), before)

    # Dense: J^T (diag p - p p^T) J along delta, and its diagonal, of the evaluated module.
    evaluated = nnx.clone(model)
    evaluated.eval()
    graph = nnx.graphdef(evaluated)

    def logits(params):
        return nnx.merge(graph, params, state, copy=True)(x)

    jacobian = jax.tree.leaves(jax.jacrev(logits)(params))
    flat = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in jacobian], -1)
    p = jax.nn.softmax(logits(params))
    hessian = p[:, :, None] * jnp.eye(3)[None] - p[:, :, None] * p[:, None, :]
    direction = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(delta)])
    fisher = jnp.einsum("nci,ncd,ndj->ij", flat, hessian, flat) / len(x)
    leaves = jax.tree.leaves(found[0].quadratic.diagonal)
    diagonal = jnp.concatenate([leaf.ravel() for leaf in leaves])
    # Sums over examples and classes in another order.
    np.testing.assert_allclose(diagonal, jnp.diag(fisher), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found[0].along, direction**2 @ jnp.diag(fisher), rtol=1e-4)
    np.testing.assert_allclose(found[1].along, direction @ fisher @ direction, rtol=1e-4)


def test_a_call_may_have_its_own_arguments():
    class Flagged(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.drop = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5)

        def __call__(self, x, *, rngs):
            return {"logits": self.drop(self.layer(x), rngs=rngs)}

    model, x = Flagged(nnx.Rngs(0)), jnp.ones((2, 6))
    pure = pm_nnx.logits_fn(model, lambda model, x: model(x, rngs=None)["logits"])
    np.testing.assert_array_equal(pure(pm_nnx.snapshot(model), x), model.layer(x))


# Merging.


@pytest.mark.parametrize("name", ["dense", pytest.param("attention", marks=pytest.mark.slow)])
def test_a_task_finishes_on_a_module_as_on_its_pure_state(name):
    model, base, (x, y) = problem(name)
    pure = pm_nnx.logits_fn(model)
    merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(pure))
    state = pure_state = merger.init(base)
    for task in (1, 2):
        pm_nnx.write_back(model, jax.tree.map(lambda leaf, n=task: leaf + 0.1 * n, state.start))
        model.train()
        model(x + task)
        trained, rest = pm_nnx.snapshot(model), pm_nnx.model_state(model)
        params, pure_state, pure_info = merger.finish_task(
            pure_state, trained, [(x, y)], model_state=rest
        )
        state, info = pm_nnx.finish_task(merger, state, model, [(x, y)])
        assert_equal(nnx.state(model, nnx.Param), params)
        statistics = nnx.filter_state(rest, nnx.BatchStat)
        if jax.tree.leaves(statistics):
            # They have become those of the merged model on these examples.
            value = model.first(x)
            np.testing.assert_allclose(model.norm.mean[...], value.mean(0), 1e-5, 1e-6)
            np.testing.assert_allclose(model.norm.var[...], value.var(0), 1e-5, 1e-6)
        assert_equal(nnx.state(model, nnx.RngState), nnx.filter_state(rest, nnx.RngState))
        assert_equal(state.start, pure_state.start)
        assert float(info.alpha) == float(pure_info.alpha)
    assert 0 < float(info.alpha) < 1


@pytest.mark.slow
def test_a_whole_stream_with_donation_trains_measures_and_merges_a_module():
    model, _, (x, y) = problem()
    loss = pm_nnx.perturbed(aux_loss_fn, perturbation.symmetric(), has_aux=True)

    @partial(nnx.jit, donate_argnames=("model", "optimizer"))
    def train_step(model, optimizer, key, base, batch):
        value, gradients = nnx.value_and_grad(loss, argnums=1, has_aux=True)(
            key, model, base, batch
        )
        optimizer.update(model, gradients)

    measure = pm_jax.fisher_exact(pm_nnx.logits_fn(model))
    merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), measure)
    state = merger.init(pm_nnx.snapshot(model))
    alphas = []
    for labels in (y, (y + 1) % 3):
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        model.train()
        for number in range(5):
            train_step(model, optimizer, jax.random.key(number), state.start, (x, labels))
        trained = pm_nnx.snapshot(model)
        before = state.start
        state, info = pm_nnx.finish_task(merger, state, model, (x, labels))
        merged = pm_jax.trees.lerp(before, trained, info.alpha)
        assert_close(nnx.state(model, nnx.Param), merged, 1e-5, 1e-6)
        assert_equal(nnx.state(model, nnx.Param), state.start)
        alphas.append(float(info.alpha))
    assert alphas[0] == 1 and 0 < alphas[1] < 1


@pytest.mark.slow
def test_statistics_are_measured_by_the_call_that_logits_are_made_of():
    class Flagged(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.norm = nnx.Linear(6, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x, *, flag):
            return {"logits": self.norm(self.layer(x))} if flag else None

    model, (x, y) = Flagged(nnx.Rngs(0)), problem()[2]
    pure = pm_nnx.logits_fn(model, lambda model, x: model(x, flag=True)["logits"])
    merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(pure))
    state = merger.init(pm_nnx.snapshot(model))
    model.layer.kernel[...] += 0.5
    pm_nnx.finish_task(merger, state, model, (x, y))
    np.testing.assert_allclose(model.norm.mean[...], model.layer(x).mean(0), 1e-5, 1e-6)


def test_batch_statistics_are_means_over_batches_of_any_number():
    model, _, (x, y) = problem()
    shifted = jnp.concatenate([x, x + 1.0, 3.0 * x])
    labels = jnp.tile(y, 3)
    before = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    # Batches of 4, 4 and 4, then of 8 and 4.
    for size in (4, 8):
        pm_nnx.recalibrate_batch_statistics(model, [(shifted, labels)], batch_size=size)
        parts = [model.first(shifted[start : start + size]) for start in range(0, 12, size)]
        for name in ("mean", "var"):
            wanted = sum(len(part) * getattr(part, name)(0) for part in parts) / 12
            got = getattr(model.norm, name)[...]
            np.testing.assert_allclose(got, wanted, 1e-5, 1e-6, err_msg=name)
    # Parameters, keys, momentum and the mode stay.
    assert_equal(
        nnx.state(model, nnx.Not(nnx.BatchStat)), nnx.filter_state(before, nnx.Not(nnx.BatchStat))
    )
    assert (model.norm.momentum, model.norm.use_running_average) == (0.5, False)


# Mistakes.
