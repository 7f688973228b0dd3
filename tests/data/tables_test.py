import csv
import json

import numpy as np
import pytest

from pm_jax.data import archives, tables

WORDS = ("red", "green", "blue")
ROWS = [
    {"text": f"turn it {WORDS[i % 3]}, {i}", "label": WORDS[i % 3], "split": split, "place": place}
    for split, count in (("train", 12), ("dev", 6), ("test", 6))
    for i, place in ((i, "ab"[i % 2]) for i in range(count))
]


def write(path, rows, text="text", label="label"):
    rows = [{text: row["text"], label: row["label"], **row} for row in rows]
    for row in rows:
        [row.pop(key) for key in ("text", "label") if key not in (text, label)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        return path
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_rows_come_back_by_their_splits(tmp_path, name):
    path = write(tmp_path / name, ROWS, "sentence", "intent")
    [found] = tables.load(path, validation_split="dev")
    assert found.class_names == ("blue", "green", "red") and found.name == "mine"
    wanted = {split: [row for row in ROWS if row["split"] == split] for split in ("train", "dev")}
    assert found.train_inputs.tolist() == [row["text"] for row in wanted["train"]]
    assert found.validation[0].tolist() == [row["text"] for row in wanted["dev"]]
    names = [found.class_names[label] for label in found.train_labels]
    assert names == [row["label"] for row in wanted["train"]]
    assert found.notes == ("mine: columns that are not read: place",)
    a, b = tables.load(path, domain_field="place", by_domain=True)
    assert (a.name, b.name) == ("mine/a", "mine/b") and len(a.train_labels) == 6
    assert a.notes == ("mine: not read: dev",)
    assert b.train_inputs.tolist() == [row["text"] for row in wanted["train"]][1::2]


def test_one_file_is_divided_and_a_folder_has_one_for_each_split(tmp_path):
    rows = [{"text": str(i), "label": i % 3} for i in range(30)]
    [found] = tables.load(write(tmp_path / "mine.csv", rows))
    assert np.bincount(found.train_labels).tolist() == [8] * 3 and found.class_names is None
    assert sorted(map(int, [*found.train_inputs, *found.test_inputs])) == [*range(30)]
    assert all(int(x) % 3 == y for x, y in zip(*found.parts()[0], strict=True))
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "train.csv", rows[:20])
    write(tmp_path / "parts" / "test.jsonl", rows[20:])
    [found] = tables.load(tmp_path / "parts")
    assert found.test_inputs.tolist() == [str(i) for i in range(20, 30)]


def test_rows_without_label_are_left_out_and_other_labels_keep_their_names(tmp_path):
    rows = [{"text": str(i), "label": (7, 9, -1, 11)[i % 4]} for i in range(40)]
    [found] = tables.load(write(tmp_path / "mine.jsonl", rows))
    assert found.class_names == ("7", "9", "11")
    assert all(
        rows[int(x)]["label"] == (7, 9, 11)[y] for x, y in zip(*found.parts()[0], strict=True)
    )
    assert "mine: 10 of 40 examples of train have no label" in "\n".join(found.notes)
    rows = [{"text": str(i), "label": (None, "yes", "no", "")[i % 4]} for i in range(40)]
    [found] = tables.load(write(tmp_path / "other.jsonl", rows))
    assert found.class_names == ("no", "yes")
    assert "other: 20 of 40 examples of train have no label" in "\n".join(found.notes)


def test_archives_have_names_of_classes_domains_and_splits_of_any_name(tmp_path):
    x = np.arange(24 * 16, dtype=np.uint8).reshape(24, 4, 4)
    y, site = np.arange(24) % 3 + 4, np.arange(24) // 2 % 2
    fields = {f"{part}_{split}": value for split in ("train", "dev", "test")
              for part, value in (("x", x), ("y", y), ("site", site))}  # fmt: skip
    names = np.asarray([f"n{i}" for i in range(7)])
    path = tmp_path / "mine.npz"
    np.savez(path, **fields, class_names=names, extra=x)
    [found] = archives.load_images(path, test_split="dev")
    assert found.class_names == ("n4", "n5", "n6")
    assert np.array_equal(found.train_labels, y - 4) and found.train_inputs.shape == (24, 4, 4, 1)
    unread, numbered = found.notes
    assert unread == (
        "mine: keys that are not read: extra, site_dev, site_test, site_train, x_test, y_test"
    )
    assert numbered.startswith("mine: the labels 4, 5, 6 are classes 0 to 2")
    zero, one = archives.load_images(path, domain_field="site", by_domain=True)
    assert np.array_equal(one.test_inputs[..., 0], x[site == 1]) and one.name == "mine/1"
    assert np.array_equal(zero.train_labels, y[site == 0] - 4)
    [divided] = archives.load_images(path, test_split="train", validation_split="dev")
    assert [len(labels) for _, labels in divided.parts()] == [19, 5, 24]
