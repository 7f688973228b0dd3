"""PEFT's own adapters, merged here and loaded by PEFT; needs the extra `parity`."""

import numpy as np
import pytest

from tests.binaries import call

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")
peft = pytest.importorskip("peft", reason="needs the extra parity")

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 20}  # fmt: skip
IDS = {"input_ids": torch.tensor([[3, 9, 4, 17], [5, 6, 1, 2]])}


def made(kind):
    """A model of random weights, what it reads, and the options of two adapters of it."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=2)
        targets = (["c_attn", "mlp.c_proj"], ["attn.c_proj", "c_attn"])
        more = {"fan_in_fan_out": True}
        return transformers.GPT2LMHeadModel(config), IDS, targets, more
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=20, **SIZES)
        targets = (["query", "word_embeddings"], ["query", "output.dense"])
        more = {"rank_pattern": {r"1\.attention\.self\.query": 5}}
        return transformers.BertForSequenceClassification(config), IDS, targets, more
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    targets = (["q_proj", "projection"], ["v_proj", "fc1"])
    more = {"modules_to_save": ["classifier"]}
    return transformers.ViTForImageClassification(config), pixels, targets, more


def adapters(kind, folder):
    """Two adapters with random factors, as PEFT saves them, beside their base."""
    for number, rank in enumerate((2, 3)):
        model, _, targets, more = made(kind)
        if number == 0:
            model.save_pretrained(folder / "base")
        torch.manual_seed(number + 1)
        options = peft.LoraConfig(
            r=rank, lora_alpha=3 * rank, use_rslora=number == 1 and "rank_pattern" not in more,
            target_modules=targets[number], init_lora_weights=False, **more,
        )  # fmt: skip
        adapted = peft.get_peft_model(model, options)
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter)
        adapted.save_pretrained(folder / str(number))
    return [str(folder / str(number)) for number in range(2)]


def loaded(kind, folder, path):
    base = type(made(kind)[0]).from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, path).eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_peft_and_transformers_load_the_mean_of_two_adapters(kind, tmp_path):
    paths, (model, inputs, *_) = adapters(kind, tmp_path), made(kind)
    # The mean of the two models that PEFT folds the adapters into.
    weights = [loaded(kind, tmp_path, path).merge_and_unload().state_dict() for path in paths]
    mean = {name: sum(each[name] for each in weights) / 2 for name in weights[0]}
    wanted = type(model).from_pretrained(tmp_path / "base")
    before = logits(wanted.eval(), inputs)
    wanted.load_state_dict(mean)
    wanted = logits(wanted, inputs)
    call("merge", f"--models={','.join(paths)}", f"--output={tmp_path / 'merged'}")
    got = logits(loaded(kind, tmp_path, tmp_path / "merged"), inputs)
    size = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * size)
    assert np.abs(wanted - before).max() > 0.1 * size
    # And folded into the base, as transformers loads it.
    call("merge", f"--models={','.join(paths)}", f"--base={tmp_path / 'base'}",
         f"--output={tmp_path / 'model'}")  # fmt: skip
    folded = type(model).from_pretrained(tmp_path / "model").eval()
    np.testing.assert_allclose(logits(folded, inputs), wanted, rtol=1e-4, atol=1e-4 * size)
