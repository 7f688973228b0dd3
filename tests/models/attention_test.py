"""Attention in its implementations, padded tokens, and what the backward pass keeps."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from pm_jax import curvature, lora, models, trees
from pm_jax.curvature.input_moments import input_moment
from pm_jax.curvature.kronecker import fisher_kronecker
from pm_jax.curvature.measures import measure_all
from pm_jax.models import attention, vit
from pm_jax.types import InvalidInput

IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
LABELS = jnp.asarray([0, 2, 1])
KERNELS = ("blocks_0/attn/key/kernel", "blocks_1/mlp/fc2/kernel")


def model(**options):
    """Images of 4 patches, so 5 tokens."""
    return models.VisionTransformer(
        3, patch_size=4, width=16, depth=2, num_heads=2, **{"attention": "auto", **options}
    )


@functools.cache
def random_params():
    params = jax.jit(model().init)(jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


def close(got, wanted, tolerance=1e-5):
    """Agree leaf by leaf, relative to the largest entry; gradients of key biases are 0."""
    for (path, x), y in zip(
        trees.leaves_by_path(got).items(), jax.tree.leaves(wanted), strict=True
    ):
        gap, size = (float(jnp.max(jnp.abs(z.astype(jnp.float32)))) for z in (x - y, y))
        assert gap <= tolerance * max(size, 1e-2), path


REAL = {
    "all": None,
    "lengths": jnp.asarray([4, 7], jnp.int32),
    "mask": jnp.asarray([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]], bool),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("other", ["xla", "cudnn"])
def test_implementations_agree_in_values_and_gradients(other, real, dtype, tolerance):
    try:
        attention.chosen(other, dtype, 8)
    except InvalidInput as error:
        pytest.skip(str(error))
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weights = (jax.random.normal(k, (2, 7, 3, 8), dtype) for k in keys)

    @functools.partial(jax.jit, static_argnums=0)
    def results(name, *inputs):
        def loss(*inputs):
            mixed = attention.attend(*inputs, REAL[real], name)
            return jnp.sum((mixed * weights).astype(jnp.float32)), mixed

        (_, mixed), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
        return mixed, gradients

    assert results("own", query, key, value)[0].dtype == dtype
    close(results(other, query, key, value), results("own", query, key, value), tolerance)


def test_attention_of_two_tokens_by_hand():
    query, key = jnp.zeros((1, 2, 1, 4)), jnp.ones((1, 2, 1, 4))
    key = key.at[0, 1].set(2.0)
    value = jnp.asarray([1.0, 3.0]).reshape(1, 2, 1, 1)
    # A query of zeros attends to both alike; one of ones has the logits 4 / 2 and 8 / 2.
    got = attention.attend(query.at[0, 1].set(1.0), key, value)[0, :, 0, 0]
    np.testing.assert_allclose(got, [2.0, 1.0 + 2.0 / (1.0 + np.exp(-2.0))], rtol=1e-6)


@pytest.mark.parametrize(
    ("backend", "has_cudnn", "dtype", "head_size", "wanted"),
    [
        ("cpu", False, jnp.bfloat16, 64, "own"),
        ("tpu", False, jnp.bfloat16, 64, "xla"),
        ("gpu", False, jnp.bfloat16, 64, "xla"),
        ("gpu", True, jnp.bfloat16, 64, "cudnn"),
        ("gpu", True, jnp.float32, 64, "xla"),
        ("gpu", True, None, 64, "xla"),
        ("gpu", True, jnp.float16, 12, "xla"),
    ],
)
def test_the_platform_chooses_the_implementation(
    backend, has_cudnn, dtype, head_size, wanted, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention, "_has_cudnn", lambda: has_cudnn)
    assert attention.chosen("auto", dtype, head_size) == wanted
    assert attention.chosen("own", dtype, head_size) == "own"


def test_an_implementation_that_cannot_run_is_refused(monkeypatch):
    with pytest.raises(InvalidInput, match=r"^attention=fast: must be one of auto, own, xla, cud"):
        attention.chosen("fast", jnp.float32, 8)
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    with pytest.raises(InvalidInput, match=r"^attention=cudnn: computes in bfloat16 or float16,"):
        model(attention="cudnn").init(jax.random.key(0), IMAGES)
    with pytest.raises(InvalidInput, match=r"^attention=cudnn: needs heads .* these have 12; own"):
        attention.chosen("cudnn", jnp.bfloat16, 12)


@functools.cache
def gradients(**options):
    """Logits, and gradients of a loss by all parameters and by adapters."""
    network, params = model(**options), random_params()
    adapters = lora.init(jax.random.key(2), params, r".*/attn/(key|value)/kernel", 2)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)

    def loss(params, adapters):
        with lora.branch(adapters):
            logits = network.apply({"params": params}, IMAGES)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), LABELS]), logits

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, adapters)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"pad_tokens": 8},
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        pytest.param({"attention": "xla", "pad_tokens": 3}, marks=pytest.mark.slow),
    ],
)
def test_padding_and_other_options_change_no_logit_and_no_gradient(options):
    close(gradients(**options), gradients())


def measured(measure_of, network, **options):
    """A quadratic of some kernels on the images."""

    def logits_fn(some, images):
        return network.apply({"params": trees.replace(random_params(), some)}, images)

    measure, leaves = measure_of(logits_fn, **options), trees.select(random_params(), KERNELS)
    return jax.jit(lambda x: measure_all(measure, x, (IMAGES, LABELS)).quadratic)(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"pad_tokens": 8}, {"remat": True}])
def test_padding_and_other_options_change_no_fisher(options):
    layers = [path.removesuffix("/kernel") for path in KERNELS]
    fisher = functools.partial(measured, curvature.fisher_exact, dense_layers=layers)
    close(fisher(model(**options)), fisher(model()))


@pytest.mark.slow
@pytest.mark.parametrize("measure_of", [fisher_kronecker, input_moment])
def test_a_measure_that_counts_rows_refuses_padding_and_is_the_same_on_the_plain_model(measure_of):
    padded = model(pad_tokens=8, remat=True)
    with pytest.raises(InvalidInput, match="^kernels=.*: of a model that pads its tokens,"):
        measured(measure_of, padded, kernels=KERNELS)
    plain = measured(measure_of, attention.plain(padded), kernels=KERNELS)
    close(plain, measured(measure_of, model(), kernels=KERNELS))


def test_a_model_that_is_plain_here_stays_the_same_object():
    for network in (model(), model(attention="xla"), models.TextEncoder(2, attention="auto")):
        assert attention.plain(network) is network


def counted(program):
    """Names of the primitives in a program and those within it, with the shapes of operands."""
    found = collections.Counter()
    for equation in program.eqns:
        found[
            equation.primitive.name, equation.invars[0].aval.shape if equation.invars else ()
        ] += 1
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    found += counted(inner)
    return found


def step_of(network):
    """Gradient of a loss in adapters, of parameters and images."""
    params = jax.eval_shape(network.init, jax.random.key(0), IMAGES)["params"]
    pattern = r".*/attn/(key|value)/kernel"
    make = functools.partial(lora.init, pattern=pattern, rank=2)
    adapters = jax.eval_shape(make, jax.random.key(0), params)

    def loss(adapters, params, images):
        with lora.branch(adapters):
            logits = network.apply({"params": params}, images)
        return jnp.mean(jax.nn.logsumexp(logits, -1))

    return jax.value_and_grad(loss), (adapters, params, IMAGES)


def products(depth, **options):
    """Number of matrix products in the program of a training step, and its text."""
    network = model(**options).clone(depth=depth)
    step, arguments = step_of(network)
    text = jax.jit(step).lower(*arguments).as_text()
    return len(re.findall(r"stablehlo\.dot_general", text)), text


def test_matrix_products_of_a_training_step_are_counted():
    """A block has 12 products forward: query, key, value, 2 A, 2 B, 2 of attention, proj, fc1, fc2.

    It has 18 backward: gradients by the inputs of the 10 layers, 4 for the 2 products of attention,
    and those of 2 A and 2 B themselves.
    """
    (two, text), (three, _) = products(2), products(3)
    assert three - two == 12 + 18
    # The first block's inputs have no gradient, nor has its query, which saves 6; patches and head
    # have one product each, and the gradient of the head's inputs is another.
    assert two == 2 * (12 + 18) - 6 + 3
    assert "stablehlo.convolution" not in text


@pytest.fixture
def cudnn(monkeypatch):
    """A machine that seems to have cuDNN, whose kernels can be traced and not be lowered."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)


def test_cudnn_gets_padded_tokens_once_and_nothing_is_transposed(cudnn):
    network = model(dtype=jnp.dtype(jnp.bfloat16))
    step, arguments = step_of(network)
    found = counted(jax.make_jaxpr(step)(*arguments).jaxpr)
    calls = {name: count for (name, _), count in found.items() if "dot_product_attention" in name}
    assert sum(count for name, count in calls.items() if "fwd" in name) == 2
    assert sum(count for name, count in calls.items() if "bwd" in name) == 2
    # Query, key and value have the axes [N, T, heads, H].
    assert [shape for name, shape in found if name == "transpose" and len(shape) == 4] == []
    # The tokens of the embedding are padded to 8, and the gradient of the class token that is read.
    pads = {shape: count for (name, shape), count in found.items() if name == "pad"}
    assert pads == {(3, 5, 16): 1, (3, 1, 16): 1}
    plain = attention.plain(network)
    assert (plain.attention, plain.pad_tokens) == ("xla", 1)


def test_the_fisher_of_dense_kernels_takes_cudnn_with_padded_tokens(cudnn):
    network = model(dtype=jnp.dtype(jnp.bfloat16))
    params = jax.eval_shape(network.init, jax.random.key(0), IMAGES)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    layers = [path.removesuffix("/kernel") for path in KERNELS]

    def logits_fn(some, images):
        logits = network.apply({"params": trees.replace(params, some)}, images)
        return logits.astype(jnp.float32)

    measure = curvature.fisher_exact(logits_fn, dense_layers=layers)
    update = functools.partial(measure_all, measure)
    program = jax.make_jaxpr(update)(trees.select(params, KERNELS), (IMAGES, LABELS))
    names = [name for name, _ in counted(program.jaxpr)]
    assert any("attention_bwd" in name for name in names)


@pytest.mark.parametrize("tokens", [6, 7])
def test_cudnn_gets_an_even_number_of_tokens_with_any_mask(cudnn, tokens):
    x = jnp.ones((2, tokens, 3, 8), jnp.bfloat16)
    for real in (None, jnp.asarray([4, 5], jnp.int32), jnp.ones((2, tokens), bool)):
        attend = functools.partial(attention.attend, real=real, implementation="cudnn")
        program = jax.make_jaxpr(attend)(x, x, x)
        assert program.out_avals[0].shape == x.shape
        shapes = {s for (name, s) in counted(program.jaxpr) if "attention_fwd" in name}
        assert shapes == {(2, tokens + tokens % 2, 3, 8)}


@pytest.mark.parametrize("implementation", ["own", "cudnn"])
def test_a_block_in_bfloat16_keeps_no_float32_of_activations(implementation, capsys, cudnn):
    block = vit.Block(2, 64, 1e-6, jnp.dtype(jnp.bfloat16), implementation)
    x = jnp.ones((2, 4, 16), jnp.bfloat16)
    params = jax.eval_shape(vit.Block(2, 64, 1e-6).init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    print_saved_residuals(lambda x: block.apply(params, x).astype(jnp.float32).sum(), x)
    kept = re.findall(r"^(\w+)\[([\d,]*)\]", capsys.readouterr().out, re.MULTILINE)
    assert ("bf16", "2,4,64") in kept  # the inputs of GELU
    # The softmax of attention, here of 64 numbers, stays float32.
    wide = [shape.split(",") for name, shape in kept if name == "f32" and shape]
    assert max(np.prod([int(n) for n in shape]) for shape in wide) < x.size
