"""The commands of experiments/howto/image_folder.md, on a small folder of images."""

import json

import numpy as np
import pytest
import safetensors
import tokenizers

from tests import bad_files, howto_pages
from tests.binaries import call


@pytest.mark.slow
def test_ones_own_folder_of_images_is_a_stream(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad_files.photos(tmp_path)
    bad_files.photos_by_domain(tmp_path / "other").rename(tmp_path / "places")
    bad_files.photo(tmp_path / "photos" / "train" / "cat" / "large.jpg", (70, 50))
    (tmp_path / "photos" / "train" / "cat" / "notes.txt").write_text("mine")
    look, learn, domains, texts = howto_pages.commands(howto_pages.IMAGES.read_text())
    call(*look)
    said = capsys.readouterr().out
    assert "data: photos: 1 files are no images: train/cat/notes.txt" in said
    call(*learn, "--noreport")
    results = json.loads((tmp_path / "runs/photos/seed_0/results.json").read_text())
    assert results["manifest"]["class_names"] == list(bad_files.KINDS)
    assert len(results["class_accuracy"]) == 4
    # Two test images of each class.
    assert np.mean(results["class_accuracy"]) == np.mean(results["accuracy_matrix"][-1])
    with safetensors.safe_open(tmp_path / "runs/photos/photos.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["class_names"]) == list(bad_files.KINDS)
    call("report", "--workdir=runs/photos")
    page = (tmp_path / "runs/photos/report.html").read_text()
    assert "Final accuracy of each class" in page and ">emu<" in page.replace(" ", "")
    capsys.readouterr()
    call(*domains)
    said = capsys.readouterr().out
    assert "its folders are domain/split/class; the domains are inside, outside" in said
    assert "tasks: 2, training examples [12, 12]" in said
    lines = [f"{word} here,{word}" for word in ("one", "two", "three", "four") for _ in range(10)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *lines]))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "one": 1, "?": 2}, "?"))
    made.save(str(tmp_path / "tokenizer.json"))
    call(*texts)
    assert "tasks: 2, training examples" in capsys.readouterr().out
