"""Class names, templates and CLIP's tokenizer."""

import numpy as np
import pytest

from pm_jax.classifiers import text_columns
from pm_jax.data import clip_tokens, prompts
from pm_jax.types import InvalidInput
from tests import clip_files

START, END = len(clip_files.VOCABULARY) - 2, len(clip_files.VOCABULARY) - 1


def ids_of(*tokens):
    return [START, *(clip_files.VOCABULARY.index(token) for token in tokens), END]


@pytest.fixture
def tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra text")
    clip_files.write_tokenizer(tmp_path)
    return tmp_path


def test_texts_are_joined_by_the_merges_in_order(tokenizer):
    encode = clip_tokens.encoder(tokenizer)
    rows = encode(["A photo  of the\tCAT's 12!"])
    wanted = ("a</w>", "phot", "o</w>", "of</w>", "the</w>", "cat</w>", "'s</w>", "1</w>", "2</w>")
    assert rows.tolist() == [ids_of(*wanted, "!</w>")]
    rows = encode(["cat", "of a cat"])
    assert rows.tolist() == [[*ids_of("cat</w>"), 0, 0], ids_of("of</w>", "a</w>", "cat</w>")]


def test_the_tokenizer_is_found_by_each_of_its_names(tokenizer):
    import tokenizers

    wanted = clip_tokens.encoder(tokenizer)(["the cat"])
    assert np.array_equal(clip_tokens.encoder(tokenizer / "vocab.json")(["the cat"]), wanted)
    made = clip_tokens._read(tokenizer)
    made.enable_truncation(3)
    made.save(str(tokenizer / "tokenizer.json"))
    assert tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).truncation
    # Nothing is cut, whatever the file says.
    assert np.array_equal(clip_tokens.encoder(tokenizer / "tokenizer.json")(["the cat"]), wanted)


def test_tokenizers_of_other_models_are_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text")
    words = {"[PAD]": 0, "[UNK]": 1, "cat": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidInput, match="does not end a text by"):
        clip_tokens.encoder(tmp_path)(["cat"])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InvalidInput, match="is neither tokenizer.json nor vocab.json"):
        clip_tokens.encoder(tmp_path)
    clip_files.write_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(InvalidInput, match="cannot be read"):
        clip_tokens.encoder(tmp_path)


def test_class_names_cover_the_labels(tmp_path):
    path = str(clip_files.write_names(tmp_path))
    assert prompts.read_class_names(path, 4) == clip_files.NAMES
    assert prompts.read_class_names(path, 3, 1) == clip_files.NAMES[:3]
    for classes, left_out in ((5, 0), (3, 0), (3, 2)):
        with pytest.raises(InvalidInput, match=f"has 4 names, and the data have {classes} classes"):
            prompts.read_class_names(path, classes, left_out)
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(InvalidInput, match="line 2 is empty"):
        prompts.read_class_names(path, 3)


@pytest.mark.parametrize("names, message", [
    (None, "dataset=mine has none"),
    (("n01443537", "n01484850"), "calls its classes n01443537, n01484850"),
    (("3", "7"), "calls its classes 3, 7"),
    (("crane", "dog", "crane"), "two classes of dataset=mine are called crane"),
])  # fmt: skip
def test_names_that_tell_no_classes_apart_are_refused(names, message):
    with pytest.raises(InvalidInput, match=message):
        prompts.check_class_names("mine", names)
    assert prompts.check_class_names("mine", ("7 up", "n01")) == ("7 up", "n01")


def test_templates_are_phrases_or_a_file(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}.\nthe {}\n")
    assert prompts.read_templates(str(tmp_path / "templates.txt")) == ("a {}.", "the {}")
    for wrong in ("a {} on a {}.", "a {}|a photo", "a {}|"):
        with pytest.raises(InvalidInput, match="needs {} once"):
            prompts.read_templates(wrong)
    with pytest.raises(InvalidInput, match="templates=a photo: cannot be read"):
        prompts.read_templates("a photo")


def test_columns_are_the_mean_directions_of_their_phrases():
    """Two templates of vectors that are 90 degrees apart, and of different lengths."""
    vectors = {"a cat": (3.0, 0.0), "my cat": (0.0, 5.0), "a {dog}": (0.0, -2.0),
               "my {dog}": (0.0, -7.0)}  # fmt: skip

    def embed(phrases):
        return np.asarray([vectors[phrase] for phrase in phrases])

    kernel, bias = text_columns(embed, ("cat", "{dog}"), ("a {}", "my {}"), 10.0)
    np.testing.assert_allclose(kernel, [[50**0.5, 0.0], [50**0.5, -10.0]], rtol=1e-6, atol=1e-6)
    assert bias.tolist() == [0.0, 0.0]
    for names, templates in ((("cat",), ()), ((), ("a {}",))):
        with pytest.raises(InvalidInput, match="needs one or more of each"):
            text_columns(embed, names, templates)
    with pytest.raises(InvalidInput, match=r"embed: gives \(2,\) for 2 phrases"):
        text_columns(lambda phrases: np.ones(len(phrases)), ("cat",), ("a {}", "my {}"))
