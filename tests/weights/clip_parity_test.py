"""CLIP's logits, zero-shot columns and token ids beside transformers', open_clip's and PEFT's."""

import json

import jax
import numpy as np
import pytest

from pm_jax import classifiers, models, trees
from pm_jax.data import clip_tokens
from pm_jax.models.clip import PIXEL_DEVIATION, PIXEL_MEAN
from pm_jax.weights import clip, peft_adapter, pretrained
from tests import clip_files

IMAGES = np.random.default_rng(0).uniform(-1, 1, size=(3, 8, 8, 3)).astype(np.float32)
TEMPLATES = ("a photo of the {}.", "the {}!", "cat's {}")
TEXTS = [
    *("the cat", "A PHOTO  of\tthe cat's 12 cars!", "don't, it's we've I'll they're I'm he'd"),
    *("e.g. (red-ish) cat??", "it''s 'so", "a_b 3.14", " spaces ", "the\u00a0cat"),
]


def ours(weights):
    """Logits of our towers for images and phrases, from a folder as others write it."""
    sizes, parts = clip.sizes(str(weights)), clip.parted("", pretrained.read_tensors(weights))
    text = models.ClipTextTower(**sizes.text)
    shapes = jax.eval_shape(text.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    of_text = {"params": pretrained.load_params(parts.text, shapes)}
    encode = clip_tokens.encoder(weights.parent)
    columns = classifiers.text_columns(
        lambda phrases: text.apply(of_text, encode(phrases)),
        clip_files.NAMES, TEMPLATES, parts.scale,
    )  # fmt: skip
    image = models.ClipImageTower(len(clip_files.NAMES), **sizes.image)
    params = jax.jit(image.init)(jax.random.key(0), IMAGES)["params"]
    params = pretrained.load_params(parts.image, params)
    head = dict(zip(("head/kernel", "head/bias"), columns, strict=True))
    return image, trees.replace(params, head), encode, columns[0]


def randomized(module):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "logit_scale":
                parameter.fill_(3.0)
            else:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def pixels():
    import torch

    return torch.tensor(
        (((IMAGES + 1) / 2 - PIXEL_MEAN) / PIXEL_DEVIATION).transpose(0, 3, 1, 2)
    ).float()


def transformers_model(activation):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    content = clip_files.config()
    for part in ("vision_config", "text_config"):
        content[part] |= {"hidden_act": activation}
    return randomized(transformers.CLIPModel(transformers.CLIPConfig(**content)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_logits_are_those_of_transformers(activation, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    theirs = transformers_model(activation)
    theirs.save_pretrained(tmp_path)
    clip_files.write_tokenizer(tmp_path)
    tower, params, encode, _ = ours(tmp_path / "model.safetensors")
    assert tower.activation == activation
    phrases = ["the cat", "a car"]
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(encode(phrases)), pixel_values=pixels())
        per_class = []
        for name in clip_files.NAMES:
            texts = [template.format(name.replace("_", " ")) for template in TEMPLATES]
            vectors = theirs.get_text_features(torch.tensor(encode(texts))).pooler_output
            mean = (vectors / vectors.norm(dim=-1, keepdim=True)).mean(0)
            per_class.append(mean / mean.norm())
        image = found.image_embeds @ torch.stack(per_class).T * theirs.logit_scale.exp()
    np.testing.assert_allclose(
        tower.apply({"params": params}, IMAGES), image.numpy(), rtol=1e-4, atol=1e-4
    )
    # Without templates: `logits_per_image` itself.
    unscaled = found.logits_per_image.numpy() / np.exp(3.0)
    kernel = found.text_embeds.numpy().T
    bare = trees.replace(params, {"head/kernel": np.pad(kernel, ((0, 0), (0, 2)))})
    logits = tower.apply({"params": bare}, IMAGES)[:, :2]
    np.testing.assert_allclose(logits, unscaled, rtol=1e-4, atol=1e-5)
    # The way back.
    moved = jax.tree.map(lambda x: x * 1.1, params)
    tensors = pretrained.read_tensors(tmp_path / "model.safetensors")
    tensors |= pretrained.export_params(clip.without_columns(moved), "clip")
    pretrained.write_tensors(tensors, tmp_path / "model.safetensors", overwrite=True)
    again = type(theirs).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs_again = again(input_ids=torch.tensor(encode(phrases)), pixel_values=pixels())
    bare = trees.replace(moved, {"head/kernel": np.eye(clip_files.EMBEDDING, 4, dtype=np.float32),
                                 "head/bias": np.zeros(4, np.float32)})  # fmt: skip
    np.testing.assert_allclose(
        tower.apply({"params": bare}, IMAGES), theirs_again.image_embeds[:, :4].numpy(),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("quick", [True, False])
def test_logits_are_those_of_open_clip(quick, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    open_clip = pytest.importorskip("open_clip", reason="needs the extra parity")
    content = clip_files.open_clip_config(quick_gelu=quick)
    theirs = randomized(open_clip.CLIP(**content["model_cfg"]))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    clip_files.write_tokenizer(tmp_path)
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    pretrained.write_tensors(tensors, tmp_path / "model.safetensors")
    tower, params, encode, kernel = ours(tmp_path / "model.safetensors")

    def tokenize(texts):
        ids = encode(texts)
        return torch.tensor(np.pad(ids, ((0, 0), (0, clip_files.POSITIONS - ids.shape[1]))))

    names = [name.replace("_", " ") for name in clip_files.NAMES]
    with torch.no_grad():
        columns = open_clip.build_zero_shot_classifier(theirs, tokenize, names, list(TEMPLATES))
        columns = columns * theirs.logit_scale.exp()
        wanted = theirs.encode_image(pixels(), normalize=True) @ columns
    np.testing.assert_allclose(kernel, columns.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        tower.apply({"params": params}, IMAGES), wanted.numpy(), rtol=1e-4, atol=1e-4
    )


def check_tokens(theirs, folder, texts):
    ids = clip_tokens.encoder(folder)(texts)
    for text, row in zip(texts, ids, strict=True):
        wanted = theirs(text)
        assert row[: len(wanted)].tolist() == wanted and not row[len(wanted) :].any(), text


def test_tokens_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    clip_files.write_tokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    check_tokens(lambda text: theirs(text)["input_ids"], tmp_path, TEXTS)
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    check_tokens(lambda text: theirs(text)["input_ids"], tmp_path / "saved", TEXTS)


def test_tokens_are_those_of_open_clip_with_the_whole_vocabulary(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="needs the extra parity")
    theirs = open_clip.SimpleTokenizer()
    # open_clip has other names for the two special tokens.
    renamed = {"<start_of_text>": clip_tokens.START, "<end_of_text>": clip_tokens.END}
    ids = {renamed.get(token, token): number for token, number in theirs.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    merges = [" ".join(pair) for pair in theirs.bpe_ranks]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    assert ids[clip_tokens.END] == 49407
    more = ["AM General Hummer SUV 2000", "aquarium fish", "café, naïve", "日本語", "100% – ok"]
    check_tokens(lambda text: [49406, *theirs.encode(text), 49407], tmp_path, [*TEXTS, *more])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_turns_the_image_tower_into_the_merged_one(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    theirs = transformers_model("quick_gelu")
    theirs.save_pretrained(tmp_path)
    clip_files.write_tokenizer(tmp_path)
    tower, start, _, _ = ours(tmp_path / "model.safetensors")
    rng = np.random.default_rng(1)
    paths = tuple(f"blocks_0/attn/{name}/kernel" for name in ("key", "value"))
    moved = {
        path: leaf + (rng.normal(size=(8, 2)) @ rng.normal(size=(2, 8))).astype(np.float32)
        for path, leaf in trees.select(start, paths).items()
    }
    merged = trees.replace(start, moved)
    towers = (clip.without_columns(params) for params in (start, merged))
    adapter = peft_adapter.peft_adapter(*towers, paths, "clip", 2)
    peft_adapter.write_adapter(adapter, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = loaded.get_image_features(pixels()).pooler_output
        found = found / found.norm(dim=-1, keepdim=True)
    identity = {"head/kernel": np.eye(clip_files.EMBEDDING, 4, dtype=np.float32)}
    vectors = [
        tower.apply({"params": trees.replace(params, identity)}, IMAGES)
        for params in (merged, start)
    ]
    np.testing.assert_allclose(vectors[0], found[:, :4].numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
