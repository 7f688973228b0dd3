import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pm_jax
from pm_jax import models
from pm_jax.integrations import linen, nnx_model
from pm_jax.integrations.wrap import as_model
from pm_jax.types import InvalidInput
from tests import own_models

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4))


class Normed(nn.Module):
    """Batch norm twice, the second on what the first one gives."""

    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="first")(x)
        x = nn.relu(nn.Dense(3, name="dense")(x))
        return nn.BatchNorm(use_running_average=not train, momentum=0.5, name="second")(x)


def training(module):
    return lambda variables, x: module.apply(variables, x, True, mutable=["batch_stats"])


def moments(x):
    x = np.asarray(x, np.float64)
    return x.mean(axis=0), x.var(axis=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_batch_statistics_are_the_means_over_examples_by_hand(momentum):
    module = Normed(momentum)
    variables = module.init(KEY, X, False)
    batches = [X[:4], X[4:5], X[5:]]
    found = linen.recalibrate_batch_statistics(training(module), variables, batches)
    firsts, seconds = [], []
    for batch in batches:
        mean, var = moments(batch)
        firsts.append((mean, var))
        # By hand: the layer before is normalised by the same batch.
        x = (np.asarray(batch) - mean) / np.sqrt(var + 1e-5)
        x = np.maximum(x @ variables["params"]["dense"]["kernel"], 0)
        seconds.append(moments(x))
    for name, parts in (("first", firsts), ("second", seconds)):
        for field, values in zip(("mean", "var"), zip(*parts, strict=True), strict=True):
            wanted = np.average(values, axis=0, weights=[4, 1, 1])
            got = found["batch_stats"][name][field]
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert found["params"] is variables["params"]
    order = linen.recalibrate_batch_statistics(training(module), variables, batches[::-1])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(order), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_axis_of_parallel_training_counts_where_it_is_bound_and_only_there():
    module = nn.BatchNorm(use_running_average=False, axis_name="devices")
    plain = nn.BatchNorm(use_running_average=False)
    variables = plain.init(KEY, X)
    wanted = linen.recalibrate_batch_statistics(collected(plain), variables, [X])
    alone = linen.recalibrate_batch_statistics(collected(module), variables, [X])
    on_shards = jax.vmap(collected(module), (None, 0), (0, None), axis_name="devices")
    sharded = linen.recalibrate_batch_statistics(
        lambda variables, x: on_shards(variables, x.reshape(2, 3, 4)), variables, [X]
    )
    for found in (alone, sharded):
        for name in ("mean", "var"):
            got, right = (tree["batch_stats"][name] for tree in (found, wanted))
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    assert module.axis_name == "devices"


def collected(module):
    return lambda variables, x: module.apply(variables, x, mutable=["batch_stats"])


def test_batches_come_as_inputs_as_tuples_and_with_padding():
    module = Normed()
    variables = module.init(KEY, X, False)
    labels = jnp.zeros(4, int)
    padded = pm_jax.Batch(
        jnp.concatenate([X[4:], 100 * X[:2]]), labels, jnp.asarray([1.0, 1.0, 0.0, 0.0])
    )
    wanted = linen.recalibrate_batch_statistics(training(module), variables, [X[:4], X[4:]])
    found = linen.recalibrate_batch_statistics(
        training(module), variables, iter([(X[:4], labels), padded])
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))


class Shared(nn.Module):
    """One batch norm that is called twice, and one that never moves."""

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        frozen = nn.BatchNorm(use_running_average=True, name="frozen")
        return frozen(norm(x)) + norm(3 * x + 1)


def test_a_layer_called_twice_has_the_mean_of_its_calls_and_a_frozen_one_stays():
    variables = Shared().init(KEY, X, False)
    frozen = jax.tree.map(lambda x: x + 0.25, variables["batch_stats"]["frozen"])
    variables["batch_stats"]["frozen"] = frozen
    found = linen.recalibrate_batch_statistics(training(Shared()), variables, [X])["batch_stats"]
    (mean, var), (of_second, var_of_second) = moments(X), moments(3 * X + 1)
    np.testing.assert_allclose(found["norm"]["mean"], (mean + of_second) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["norm"]["var"], (var + var_of_second) / 2, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, found["frozen"], frozen))


class NormedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=False)(2 * x + 1), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        scan = nn.scan(
            nn.remat(NormedLayer), variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True}, length=2,
        )  # fmt: skip
        return scan(name="layers")(x, None)[0]


def test_statistics_of_stacked_layers():
    variables = Stack().init(KEY, X, False)
    found = linen.recalibrate_batch_statistics(training(Stack()), variables, [X])["batch_stats"]
    mean, _ = moments(2 * X + 1)
    # The second layer gets outputs of variance 1 and mean 0, twice as large and moved by 1.
    got = found["layers"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(got, [mean, np.ones(4)], rtol=1e-5, atol=1e-6)


class Counting(nn.Module):
    """Running statistics that are no batch norm's."""

    @nn.compact
    def __call__(self, x, train):
        total = self.variable("batch_stats", "total", jnp.zeros, ())
        if train:
            total.value += 1.0
        return x


@pytest.mark.parametrize(
    "module,batches,message",
    [
        (nn.Dense(1), [X], "variables: have no collection 'batch_stats'; they have params"),
        (Normed(), [], "batches: there are none; a generator can be gone through only once"),
        (Counting(), [X], "batch_stats=total: belongs to no nn.BatchNorm that the model calls"),
    ],
)
def test_what_cannot_be_measured_anew(module, batches, message):
    arguments = (X,) if isinstance(module, nn.Dense) else (X, False)
    variables = module.init(KEY, *arguments)
    with pytest.raises(InvalidInput, match=message):
        linen.recalibrate_batch_statistics(training(module), variables, batches)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        self.sow("intermediates", "seen", x)
        self.sow("losses", "size", x.sum())
        return nn.Dense(3, name="head")(nn.Dropout(0.5)(x, deterministic=deterministic))


class Named(nn.Module):
    """A name for the flag that nobody can guess."""

    @nn.compact
    def __call__(self, x, learning):
        return nn.Dense(3, name="top")(nn.Dropout(0.5, deterministic=not learning)(x))


@pytest.mark.parametrize(
    "model,shape",
    [
        (linen.model(Deterministic()), (4,)),
        (linen.model(Named(), "top", "learning"), (4,)),
        (linen.model(own_models.ResNet(3, (4,), dropout=0.5)), (4, 4, 1)),
        (nnx_model.model(lambda rngs: own_models.Network(3, rngs, size=16)), (4, 4)),
    ],
    ids=["deterministic", "named", "train", "nnx"],
)
def test_a_model_trains_with_dropout_and_state_and_evaluates_without(model, shape):
    x = jax.random.normal(KEY, (5, *shape))
    params, state = model.init(KEY, x)
    plain, same = jax.jit(lambda x: model.apply(params, state, x))(x)
    assert plain.shape == (len(x), 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, state))
    one, other = (
        model.apply(params, state, x, key=jax.random.key(seed), train=True) for seed in (1, 2)
    )
    assert not np.allclose(one[0], other[0]) and not np.allclose(one[0], plain)
    again = model.apply(params, state, x, key=jax.random.key(1), train=True)
    assert np.array_equal(again[0], one[0])
    assert jax.tree.structure(one[1]) == jax.tree.structure(state)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), one[1], state)
    assert all(jax.tree.leaves(moved))
    features = model.features(params, state, x)
    leaves = pm_jax.trees.leaves_by_path(params)
    kernel, bias = (leaves[f"{model.classifier}/{name}"] for name in ("kernel", "bias"))
    np.testing.assert_allclose(features @ kernel + bias[None], plain, rtol=1e-5, atol=1e-6)


def test_sown_values_are_no_state():
    assert linen.model(Deterministic()).init(KEY, X)[1] == {}


def test_nnx_gives_the_logits_and_the_statistics_of_the_module():
    module = own_models.Network(3, nnx.Rngs(0), size=4)
    model = nnx_model.model(module)
    params, state = model.init(KEY, X)
    assert sorted(params) == ["head", "layers", "norm"] and list(params["layers"]) == ["0"]
    before = jax.tree.map(np.array, nnx.state(module, nnx.Not(nnx.RngKey)))
    measured = model.batch_statistics(params, state, X, KEY)
    layer = params["layers"]["0"]
    hidden = X @ layer["kernel"] + layer["bias"][None]
    for name, value in zip(("mean", "var"), moments(hidden), strict=True):
        np.testing.assert_allclose(measured["norm"][name], value, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, nnx.state(module, nnx.Not(nnx.RngKey)), before)
    )
    logits = model.apply(params, state, X)[0]
    module.eval()
    np.testing.assert_allclose(logits, module(X), rtol=1e-5)


def test_equal_modules_are_equal_models_and_others_are_not():
    a, b = (linen.model(own_models.Plain(3, 4)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a is not b
    assert a != linen.model(own_models.Plain(3, 5)) and a != linen.model(nn.Dense(3))
    assert a != linen.model(own_models.Plain(3, 4), "hidden_0")

    class WithArray(nn.Module):
        table: jax.Array

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(x + self.table)

    first, second = (linen.model(WithArray(jnp.ones(4))) for _ in range(2))
    assert first == first and first != second and isinstance(hash(first), int)


def test_whatever_describes_a_model_is_taken():
    own = own_models.Functions(3)
    assert as_model(own) is own
    assert as_model(own_models.Plain(3)) == linen.model(own_models.Plain(3))
    assert isinstance(as_model(own_models.Network(3, nnx.Rngs(0))), nnx_model.NNXModel)
    assert isinstance(as_model(own_models.network(3)), nnx_model.NNXModel)
    assert as_model(models.MLP(3)).classifier == "head"
    for wrong in ({"params": 1}, None, "resnet", own_models.Functions, own_models.ResNet):
        with pytest.raises(InvalidInput, match="^model=.*: must be a linen module, an nnx module"):
            as_model(wrong)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: linen.model(own_models.Plain), "module=.*: must be an instance of a linen"),
        (lambda: linen.model(own_models.Plain(3), "head", "train"), "train_argument=train: Plain"),
        (lambda: nnx_model.model(3), "module=int: must be an nnx module or a function of nnx.Rngs"),
    ],
)
def test_what_is_no_module_is_refused(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()
