"""The study of rules and classifiers: its ledger by hand, and its driver on a tiny stream."""

import dataclasses
import json

import pytest

from experiments.studies import ledger
from pm_jax.continual import Config
from pm_jax.continual.storage.provenance import configuration_hash
from pm_jax.types import InvalidInput


def line(rule, rate=0.001, seed=0, stream="cars", drift=None, seconds=10.0, **by_classifier):
    """A line whose accuracies on test data are given in percent; on validation data 10 less."""
    return {
        "stream": stream, "rule": rule, "learning_rate": rate, "seed": seed, "drift": drift,
        "configuration": "c", "seconds": seconds, "device": "cpu",
        "scores": {
            name: {
                split: dict.fromkeys(ledger.FIGURES, (accuracy - less) / 100)
                for split, less in (("test", 0), ("validation", 10))
            }
            for name, accuracy in by_classifier.items()
        },
    }  # fmt: skip


def test_a_rate_is_chosen_by_the_best_classifier_on_the_seeds_that_all_rates_have():
    lines = [
        line("a", 0.1, 0, trained=20, ridge=60),
        line("a", 0.1, 1, trained=99, ridge=99),
        line("a", 0.2, 0, trained=70, ridge=10),
        line("b", 0.3, 0, trained=99, ridge=99),
    ]
    assert ledger.chosen_rate(lines, "a") == 0.2
    # Without the seed that the rates have in common, the rate with most seeds stays.
    assert ledger.chosen_rate([*lines[:2], line("a", 0.2, 2, trained=99)], "a") == 0.1


def test_test_data_choose_nothing():
    lines = [line("a", 0.1, trained=50), line("a", 0.2, trained=40)]
    lines[1]["scores"]["trained"]["validation"]["final_average_accuracy"] = 0.9
    assert ledger.chosen_rate(lines, "a") == 0.2
    assert ledger.leading([line("b", 0.2, trained=80), *lines], 0.2, 1) == ["a"]


def test_the_leading_rules_are_those_that_train_at_the_base_rate():
    lines = [line("frozen", trained=90), line("a", trained=40), line("b", trained=60)]
    lines += [line("c", trained=50), line("a", 0.5, trained=99)]
    assert ledger.leading(lines, 0.001, 2) == ["b", "c"]


def rows_of(table):
    """The cells of a table in Markdown, without the line below its heading."""
    heading, below, *rows = table.splitlines()
    assert set(below) == {"|", "-"}
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (heading, *rows)]


def test_the_table_has_a_column_a_classifier_and_each_rule_at_its_rate():
    lines = [
        line("frozen", seconds=1.0, trained=20, ridge=40, drift=0.0),
        line("merging", 0.001, 0, trained=30, ridge=50, drift=0.5, seconds=11),
        line("merging", 0.001, 1, trained=40, ridge=54, drift=0.7, seconds=13),
        line("merging", 0.1, 0, trained=10, ridge=20),
        line("merging", stream="other", trained=99),
    ]
    lines[2]["device"] = "H100"
    assert rows_of(ledger.table(lines, "cars")) == [
        [*("rule (cars, test)", "rate", "trained", "ridge", "learning, s", "drift"),
         *("n (seeds)", "device")],
        ["merging", "0.001", "35.0 +- 7.1", "52.0 +- 2.8", "12", "0.60", "2 (0,1)", "H100 and cpu"],
        ["frozen", "0.001", "20.0", "40.0", "1", "0.00", "1 (0)", "cpu"],
    ]  # fmt: skip
    of_validation = rows_of(ledger.table(lines, "cars", "validation"))
    assert of_validation[1][:4] == ["merging", "0.001", "25.0 +- 7.1", "42.0 +- 2.8"]


def test_lines_that_are_entered_by_hand_have_what_is_known_and_a_note_below_the_table():
    mine = line("merging", trained=30, seconds=None) | {"note": "Measured once."}
    mine["scores"]["trained"]["validation"] = dict.fromkeys(ledger.FIGURES)
    table, note = ledger.table([mine], "cars").split("\n\n")
    assert rows_of(table)[1] == ["merging", "0.001", "30.0", "-", "-", "1 (0)", "cpu"]
    assert note == "Measured once."


def test_the_rule_of_thumb_sets_the_frozen_model_and_the_drift_beside_the_gain():
    lines = [
        line("frozen", trained=20, ridge=40), line("sequential", trained=30, ridge=20, drift=0.8),
        line("merging", trained=30, ridge=50), line("first_session", trained=99),
        line("frozen", stream="texts", trained=90), line("merging", stream="texts", trained=85),
        line("merging", stream="without the frozen model", trained=85),
    ]  # fmt: skip
    assert rows_of(ledger.rule_of_thumb(lines))[1:] == [
        ["cars", "40.0", "0.80", "merging, ridge", "+10.0"],
        ["texts", "90.0", "-", "merging, trained", "-5.0"],
    ]


def test_lines_are_kept_and_found_again_and_other_settings_are_refused(tmp_path):
    path, config = tmp_path / "folder" / "ledger.jsonl", Config(learning_rate=0.1)
    assert ledger.read(path) == []
    mine = line("a", 0.1, trained=50) | {"configuration": configuration_hash(config)[:12]}
    for each in (mine, line("b", trained=60)):
        ledger.append(path, each)
    lines = ledger.read(path)
    assert lines[0] == mine and len(lines) == 2
    assert ledger.find(lines, "cars", "a", config, 0) == mine
    assert ledger.find(lines, "cars", "a", config, 1) is None
    with pytest.raises(InvalidInput, match="^stream=cars: the ledger has a with seed 0 and other"):
        ledger.find(lines, "cars", "a", dataclasses.replace(config, epochs=9), 0)
    path.write_text(path.read_text() + json.dumps({"stream": "cars"}) + "\n")
    with pytest.raises(InvalidInput, match="ledger.jsonl: line 3 is damaged; take it out"):
        ledger.read(path)


def test_a_last_line_that_is_cut_short_is_set_aside_and_its_run_is_entered_again(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    whole, cut = line("a", trained=50), line("b", trained=60)
    for each in (whole, cut):
        ledger.append(path, each)
    path.write_bytes(path.read_bytes()[:-40])
    tail = path.read_text().splitlines()[1]
    assert ledger.read(path) == [whole]
    aside = tmp_path / "ledger.jsonl.cut"
    said = f"{path}: line 2 was cut short and is now in {aside}; its run is entered again\n"
    assert capsys.readouterr().out == said and aside.read_text() == tail + "\n"
    ledger.append(path, cut)
    assert ledger.read(path) == [whole, cut] and not capsys.readouterr().out
    # Without the last line's end alone nothing is lost.
    path.write_text(path.read_text()[:-1])
    assert ledger.read(path) == [whole, cut]
    ledger.append(path, line("c", trained=70))
    assert [each["rule"] for each in ledger.read(path)] == ["a", "b", "c"]


def test_a_cut_line_elsewhere_and_a_file_that_is_no_ledger_stay_as_they_are(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for content in ('{"rule": "a\n{}\n', "my notes"):
        path.write_text(content)
        with pytest.raises(InvalidInput, match="ledger.jsonl: line 1 is damaged"):
            ledger.read(path)
        assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_files_count_by_their_contents_wherever_they_lie(tmp_path):
    def identity(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        config = Config(dataset="cifar100", scenario="class_incremental", model="vit",
                        patch_size=4, pretrained=str(path))  # fmt: skip
        assert ledger.changed_settings(config)["pretrained"].endswith(path.suffix)
        assert str(tmp_path) not in json.dumps(ledger.changed_settings(config))
        return ledger.identity(config)

    first = identity("a/model.safetensors", b"1")
    assert first == identity("b/weights.safetensors", b"1")
    assert first != identity("c/model.safetensors", b"2")
    # Lines of earlier versions have the hash with paths.
    config = Config(learning_rate=0.1)
    assert ledger.identity(config) == configuration_hash(config)[:12]
