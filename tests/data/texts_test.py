import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import models
from pm_jax.continual import Config
from pm_jax.continual.learner import Learner
from pm_jax.data import class_incremental, texts
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from tests.small_runs import QUIET

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text")
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tfds"
Y_TEST = np.asarray([0, 1] * 4)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "please", "turn", "it"]


@pytest.fixture
def tokenizer(tmp_path):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return str(path)


def colours(path, **changes):
    names = ["red", "green", "blue", "please"]
    y = np.arange(32) % 4
    x = np.asarray([f"turn it {names[label]}" for label in y])
    fields = {"x_train": x, "y_train": y, "x_test": x[:8], "y_test": y[:8], **changes}
    np.savez(path, **fields)
    return str(path)


def test_texts_become_the_tokenizers_ids_cut_and_padded(tmp_path, tokenizer):
    x = np.asarray(["red", "turn it green now", "blue"])
    path = colours(tmp_path / "t.npz", x_train=x, y_train=np.asarray([0, 1, 0]), y_test=Y_TEST)
    found = texts.load(path, "", tokenizer, 5)
    assert found.train_inputs.dtype == np.int32
    assert found.notes == (
        "t: 1 of 11 texts (9.1 %) are longer than max_tokens=5 and were cut; the longest has 6 "
        "tokens",
    )
    # [CLS] red [SEP]; "now" is unknown and cut away, the closing [SEP] is kept.
    assert found.train_inputs.tolist() == [[2, 4, 3, 0, 0], [2, 8, 9, 5, 3], [2, 6, 3, 0, 0]]
    kept = texts.load(path, "", tokenizer, 5, train_per_class=1)
    assert kept.train_labels.tolist() == [0, 1]
    colours(tmp_path / "t.npz")
    two = texts.load(path, "", tokenizer, 4, class_subset=2, train_per_class=3)
    assert two.train_labels.tolist() == [0, 1] * 3 and two.left_out_classes == 2
    assert two.train_inputs[0].tolist() == [2, 8, 9, 3]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the prepared CLINC150")
def test_clinc150_by_domains(tokenizer):
    arrays = texts.load("clinc_oos", str(SHARED), tokenizer, 8)
    assert arrays.train_inputs.shape == (15000, 8) and len(arrays.test_labels) == 4500
    stream = class_incremental(arrays, 10, seed=0, class_order="groups")
    assert stream.class_masks.sum(axis=1).tolist() == [15] * 10
    for mask in stream.class_masks:
        assert len(set(arrays.class_groups[mask])) == 1
    other = class_incremental(arrays, 10, seed=1, class_order="groups")
    assert other.class_order != stream.class_order
    mixed = class_incremental(arrays, 10, seed=0)
    assert any(len(set(arrays.class_groups[mask])) > 1 for mask in mixed.class_masks)
    with pytest.raises(InvalidInput, match="num_tasks=5: class_order=groups makes one task"):
        class_incremental(arrays, 5, seed=0, class_order="groups")


@pytest.mark.slow
def test_a_stream_of_texts_is_learned_with_adapters_on_given_weights(tmp_path, tokenizer):
    model = models.TextEncoder(4, len(WORDS), width=16, depth=1, num_heads=2)
    params = jax.jit(model.init)(jax.random.key(3), jnp.ones((1, 6), jnp.int32))["params"]
    tensors = pretrained.export_params(params, "bert")
    pretrained.write_tensors(tensors, tmp_path / "model.safetensors")  # beside the tokenizer
    config = Config(
        dataset=colours(tmp_path / "t.npz"), scenario="class_incremental", num_tasks=2,
        class_order="given", model="text_encoder", width=16, depth=1, num_heads=2, max_tokens=6,
        vocabulary=len(WORDS), pretrained=str(tmp_path / "model.safetensors"), adapter="lora",
        lora_rank=2, epochs=10, batch_size=8, learning_rate=1e-2, head_learning_rate=1e-1,
    )  # fmt: skip
    learner = Learner(config, seed=0, options=QUIET)
    results = learner.run()
    # The colour decides the class, and the test texts are the training texts.
    assert results["task_aware"]["accuracy_matrix"][1] == [1.0, 1.0]
    assert learner.programs.training.later.train._cache_size() == 1
    frozen = learner.params["word_embed"]["embedding"]
    assert jnp.array_equal(frozen, params["word_embed"]["embedding"])


@pytest.mark.skipif(not SHARED.exists(), reason="needs the prepared CIFAR-100")
def test_a_data_set_without_texts_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="cifar100: has the features .*image.*; a text model"):
        texts.load("cifar100", str(SHARED), tokenizer, 8)
