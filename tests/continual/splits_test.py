"""One training, and the figures of both splits; work directories of earlier versions."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pm_jax import metrics
from pm_jax.continual import Config, Learner
from pm_jax.continual.report.results import Shown, read_results, table, view
from pm_jax.continual.run import run_seeds
from pm_jax.continual.storage.provenance import configuration_hash
from pm_jax.continual.storage.workdir import check_claim
from pm_jax.continual.training.logits import logits_of
from pm_jax.types import InvalidInput
from tests.small_runs import BY_CLASS, QUIET, comparable

NAMES = ("accuracy_matrix", "task_aware", *metrics.summarize([[1.0]]))


def figures(content):
    return comparable({name: content[name] for name in NAMES})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory of a run that shows its test figures."""
    workdir = tmp_path_factory.mktemp("test")
    run_seeds(BY_CLASS, [0], workdir, QUIET)
    return workdir


@pytest.mark.slow
def test_figures_of_one_run_are_those_of_a_run_for_each_split(finished):
    content = read_results(finished / "seed_0/results.json")
    model, learners = BY_CLASS.network(10), {}
    for split in ("test", "validation"):
        config = dataclasses.replace(BY_CLASS, evaluate_on=split)
        learners[split] = learner = Learner(config, 0, options=QUIET)
        results = json.loads(json.dumps(learner.run()).replace("NaN", "null"))
        assert results["evaluate_on"] == split and results["classifiers"] == ["trained"]
        assert figures(results) == figures(results["scores"]["trained"][split])
        assert figures(results) == figures(view(content, split=split))
        # The last row by hand, from the merged model and the examples of the split.
        stream = learner.stream
        for task, rows in enumerate(getattr(stream, split).rows()):
            inputs = jnp.asarray(stream.inputs[rows])
            logits = np.array(logits_of(model, learner.params, inputs, jnp.ones(10)))
            masks = {"accuracy": np.ones(10, bool), "task_aware": stream.class_masks[task]}
            for name, mask in masks.items():
                part = results["task_aware"] if name == "task_aware" else results
                right = np.where(mask, logits, -np.inf).argmax(axis=1)
                right = np.mean(right == stream.labels[rows])
                np.testing.assert_allclose(part["accuracy_matrix"][-1][task], right, rtol=1e-6)
    test, validation = (content["scores"]["trained"][split] for split in ("test", "validation"))
    assert figures(test) != figures(validation)
    assert learners["test"].programs.training.scores.resident._cache_size() == 1


def test_a_work_directory_is_shown_with_either_split_and_trained_once(finished, monkeypatch):
    content = read_results(finished / "seed_0/results.json")
    monkeypatch.setattr(Learner, "run", None)
    for split in ("validation", "test"):
        config = dataclasses.replace(BY_CLASS, evaluate_on=split)
        summary = run_seeds(config, [0], finished, QUIET)
        wanted = content["scores"]["trained"][split]["final_average_accuracy"]
        assert summary["final_average_accuracy"]["mean"] == wanted
        assert summary["evaluate_on"] == split
        heading, row = table({"a rule": summary}).splitlines()
        assert heading.startswith(f"rule ({split} split) ") and f" {100 * wanted:.1f} " in row
    lines = (finished / "seed_0/metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["event"] == "evaluate"][-1]
    final = {s: x["final_average_accuracy"] for s, x in content["scores"]["trained"].items()}
    assert last["split"] == "test" and last["accuracy"] == pytest.approx(final["test"])
    assert last["validation_accuracy_trained"] == pytest.approx(final["validation"])


def test_rows_that_show_different_things_say_so():
    row = {name: {"mean": 0.5, "standard_deviation": None} for name in NAMES[2:]}
    rows = {"a": row | {"evaluate_on": "test"}, "b": row | {"evaluate_on": "validation"}, "c": row}
    heading, *lines = table(rows).splitlines()
    assert heading.startswith("rule  ")
    assert [line.split("  ")[0] for line in lines] == [
        *("a (test split)", "b (validation split)", "c (split not known)"),
    ]


def test_a_view_has_the_figures_of_its_classifier_and_split():
    def part(value):
        return {"accuracy_matrix": [[value]], "final_average_accuracy": value, "task_aware": {}}

    scores = {
        "trained": {"test": part(0.1), "validation": part(0.2)},
        "ridge": {"test": part(0.3), "validation": part(0.4)},
    }
    content = {"seed": 4, "merges": [], **part(0.1), "scores": scores, "evaluate_on": "test"}
    content["classifiers"] = ["trained", "ridge"]
    found = view(content, "ridge", "validation")
    assert found["final_average_accuracy"] == 0.4 and found["accuracy_matrix"] == [[0.4]]
    assert found["classifiers"] == ["ridge", "trained"] and found["merges"] == []
    assert Shown.of(found) == ("ridge", "validation") and found["scores"] == scores
    assert view(found, "trained", "test") == content == view(content)
    with pytest.raises(InvalidInput, match="^classifiers=aligned: seed 4 has .* trained, ridge "):
        view(content, "aligned")
    earlier = {"seed": 4, **part(0.1), "config": {"classifier": "x", "evaluate_on": "validation"}}
    assert Shown.of(view(earlier, "x", "validation")) == ("x", "validation")
    with pytest.raises(InvalidInput, match="^evaluate_on=test: seed 4 .* validation data only"):
        view(earlier, split="test")


def test_a_work_directory_of_an_earlier_version_is_still_its_own(finished, tmp_path):
    """It measured one split, named it among the settings, and kept no figures of the other."""
    config = json.loads((finished / "config.json").read_text())
    content = json.loads((finished / "seed_0/results.json").read_text())
    for name in ("scores", "evaluate_on", "classifiers"):
        del content[name]
    for field in dataclasses.fields(Config):
        if field.metadata["later"]:
            del config[field.name]
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "seed_0/results.json").write_text(json.dumps(content))
    check_claim(tmp_path, BY_CLASS)
    summary = run_seeds(BY_CLASS, [0], tmp_path, QUIET)
    assert summary["final_average_accuracy"]["mean"] == content["final_average_accuracy"]
    assert table({"a": summary}).startswith("rule (test split) ")
    with pytest.raises(InvalidInput, match="^evaluate_on=validation: seed 0 has .* test data only"):
        run_seeds(dataclasses.replace(BY_CLASS, evaluate_on="validation"), [0, 1], tmp_path, QUIET)
    assert not (tmp_path / "seed_1").exists()


def test_hashes_of_earlier_versions_are_those_of_this_one():
    assert configuration_hash(Config()).startswith("a65bb54b6d3c")
    assert configuration_hash(Config(evaluate_on="validation")) == configuration_hash(Config())
